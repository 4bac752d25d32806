"""Layer knowledge: how modules act as affine maps at positions, and the driver that records it in one forward pass."""

from curvlib.extensions.capture import Tape
from curvlib.extensions.factors import LayerFactors
from curvlib.extensions.layers import Layer, LayerPlan, UnsupportedLayerError, plan_layers
from curvlib.extensions.linear import LinearRule
from curvlib.extensions.rule import AffineUse, LayerRule, PositionFactors, find_rule, register

__all__ = [
    "AffineUse",
    "Layer",
    "LayerFactors",
    "LayerPlan",
    "LayerRule",
    "LinearRule",
    "PositionFactors",
    "Tape",
    "UnsupportedLayerError",
    "find_rule",
    "plan_layers",
    "register",
]
