"""Layer knowledge: how modules act as affine maps at positions, and the driver that records it in one forward pass."""

from curvlib.extensions.attention import MultiheadAttentionRule
from curvlib.extensions.capture import Tape
from curvlib.extensions.convolution import ConvolutionRule, TransposedConvolutionRule
from curvlib.extensions.embedding import EmbeddingBagRule, EmbeddingRule
from curvlib.extensions.factors import DenseFactors, LayerFactors, MapFactors
from curvlib.extensions.layers import AffineMap, Layer, LayerPlan, UnsupportedLayerError, plan_layers
from curvlib.extensions.linear import LinearRule
from curvlib.extensions.lookups import LookupFactors
from curvlib.extensions.normalization import (
    BatchNormRule,
    GroupNormRule,
    InstanceNormRule,
    LayerNormRule,
    RMSNormRule,
    ScaleAndShiftRule,
)
from curvlib.extensions.recurrent import RecurrentCellRule, RecurrentRule
from curvlib.extensions.rule import LayerRule, Part, PositionFactors, find_rule, register
from curvlib.extensions.uses import (
    AffineUse,
    DenseUse,
    InputMoments,
    LookupUse,
    PositionUse,
    Use,
    gram,
    grouped_gram,
    lag_product,
    moments_of_rows,
    rows_of,
)

__all__ = [
    "AffineMap",
    "AffineUse",
    "BatchNormRule",
    "ConvolutionRule",
    "DenseFactors",
    "DenseUse",
    "EmbeddingBagRule",
    "EmbeddingRule",
    "GroupNormRule",
    "InputMoments",
    "InstanceNormRule",
    "Layer",
    "LayerFactors",
    "LayerNormRule",
    "LayerPlan",
    "LayerRule",
    "LinearRule",
    "LookupFactors",
    "LookupUse",
    "MapFactors",
    "MultiheadAttentionRule",
    "Part",
    "PositionFactors",
    "PositionUse",
    "RMSNormRule",
    "RecurrentCellRule",
    "RecurrentRule",
    "ScaleAndShiftRule",
    "Tape",
    "TransposedConvolutionRule",
    "UnsupportedLayerError",
    "Use",
    "find_rule",
    "gram",
    "grouped_gram",
    "lag_product",
    "moments_of_rows",
    "plan_layers",
    "register",
    "rows_of",
]
