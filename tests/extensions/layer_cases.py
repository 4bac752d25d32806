"""The layers of curvlib.testing under their short names."""

from curvlib.testing.layers import (
    Attention,
    LayerCase,
    attentions,
    convolutions,
    embedding_bags,
    embeddings,
    norms,
    transposed_convolutions,
)

__all__ = [
    "Attention",
    "LayerCase",
    "attentions",
    "convolutions",
    "embedding_bags",
    "embeddings",
    "norms",
    "transposed_convolutions",
]
