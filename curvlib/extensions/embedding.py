"""The layer rules of embeddings: affine maps of one-hot vectors that are never made.

Symbols: N examples, T positions, S indices at each, V rows of the table, d their length. The table is (V, d); as the
matrix of an affine map it is its transpose (d, V), and the input of position t is sum_s c_ts e(i_ts).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from curvlib.extensions.rule import LayerRule, Part, register
from curvlib.extensions.uses import LookupUse, Use


class EmbeddingRule(LayerRule):
    """``nn.Embedding``, with or without ``padding_idx``; the rows that are looked up are positions."""

    sparse: ClassVar[bool] = True
    ordered: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__(("weight",))

    def parts(self, module: nn.Module) -> tuple[Part, ...]:
        """Return the map of the table."""
        return (Part(bias=None),)

    def refusal(self, module: Any) -> str:
        """Refuse options that change the table or its gradient behind the back of the curvature."""
        return _refused_options(module)

    def weight_matrix(self, module: nn.Module, weight: Int[Tensor, "V d"]) -> Int[Tensor, "d V"]:
        """Return the table transposed."""
        return weight.T

    def uses(self, module: Any, x: Int[Tensor, "N *T"], g: Float[Tensor, "N *T d"]) -> tuple[Use, ...]:
        """Return the lookups; those of the padding index have the coefficient 0, as it is not trained."""
        indices = x.reshape(x.shape[0], -1, 1)
        gradient = g.reshape(x.shape[0], -1, g.shape[-1])
        coefficients = torch.ones_like(indices, dtype=g.dtype)
        if module.padding_idx is not None:
            coefficients = coefficients.masked_fill(indices == module.padding_idx, 0.0)
        return (LookupUse(indices, coefficients, gradient),)


class EmbeddingBagRule(EmbeddingRule):
    """``nn.EmbeddingBag`` with mode "sum" or "mean", padding index, offsets and weights of each sample.

    PyTorch cannot differentiate its backward pass, so that a model with one has statistics, but no exact products.
    """

    def refusal(self, module: Any) -> str:
        """Refuse the mode "max", which takes another row for each feature."""
        if module.mode == "max":
            return "EmbeddingBag with mode='max' is no affine map of its indices"
        return _refused_options(module)

    def call_input(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return indices, offsets and weights of the samples."""
        names = ("input", "offsets", "per_sample_weights")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return tuple(given.get(name) for name in names)

    def uses(self, module: Any, x: Any, g: Float[Tensor, "N d"]) -> tuple[Use, ...]:
        """Return one position for each bag."""
        indices, offsets, weights = x if isinstance(x, tuple) else (x, None, None)
        coefficients = torch.ones_like(indices, dtype=g.dtype) if weights is None else weights.detach()
        if module.padding_idx is not None:
            coefficients = coefficients.masked_fill(indices == module.padding_idx, 0.0)
        if indices.ndim == 1:
            indices, coefficients = _bags(indices, coefficients, offsets, module.include_last_offset)
        if module.mode == "mean":
            coefficients = coefficients / coefficients.sum(1, keepdim=True).clamp(min=1.0)
        return (LookupUse(indices.unsqueeze(1), coefficients.unsqueeze(1), g.unsqueeze(1)),)


def _refused_options(module: Any) -> str:
    kind = type(module).__name__
    if module.max_norm is not None:
        return f"{kind} with max_norm changes its own rows in the forward pass"
    if module.scale_grad_by_freq:
        return f"{kind} with scale_grad_by_freq has another gradient than its function"
    return ""


def _bags(
    indices: Int[Tensor, " total"], coefficients: Float[Tensor, " total"], offsets: Int[Tensor, " N"], last: bool
) -> tuple[Int[Tensor, "N S"], Float[Tensor, "N S"]]:
    """Return bags of different lengths as rows of the longest one's, filled up with coefficients of 0."""
    starts = offsets[:-1] if last else offsets
    ends = offsets[1:] if last else torch.cat([offsets[1:], offsets.new_tensor([len(indices)])])
    longest = max(1, int((ends - starts).max()))
    places = starts.unsqueeze(1) + torch.arange(longest, device=indices.device)
    inside = places < ends.unsqueeze(1)
    places = places.clamp(max=max(0, len(indices) - 1))
    return indices[places], coefficients[places] * inside


register(nn.Embedding, EmbeddingRule())
register(nn.EmbeddingBag, EmbeddingBagRule())
