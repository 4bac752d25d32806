"""The gradients J_n^T v of all parameters, one row an example.

Symbols: D parameters, N examples, v an output-space vector.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.approximations.by_products import exact_blocks
from curvlib.approximations.diagonal import Diagonal
from curvlib.extensions import LayerFactors, UnsupportedLayerError
from curvlib.matrices import CurvatureMatrix
from curvlib.objective import Evaluation


def example_gradients(evaluation: Evaluation, vector: Float[Tensor, "N ..."]) -> Float[Tensor, "N D"]:
    """Return the rows J_n^T v_n, for any model.

    Layers give theirs by one backward pass down to their outputs. Parameters outside every layer, and all of them in a
    model whose examples meet, need a backward pass an example.
    """
    layout = evaluation.layout
    rows = torch.zeros(evaluation.examples, layout.size, dtype=layout.dtype, device=layout.device)
    names = layout.names
    if layers_hold(evaluation):
        for factors in evaluation.layer_factors(vector):
            rows[:, factors.layer.coordinates] = rows_of(factors).to(rows.dtype)
        names = tuple(evaluation.plan.unsupported)
    if names:
        for n, gradients in enumerate(evaluation.per_example_vjp(names, vector)):
            for name, gradient in zip(names, gradients, strict=True):
                rows[n, layout.slices[name]] = dense_row(gradient)
    return rows


def exact_diagonal(
    evaluation: Evaluation, matrix: CurvatureMatrix, generator: torch.Generator | None
) -> Float[Tensor, " D"]:
    """Return the diagonal of a matrix, without the l2 term, for any model."""
    layout = evaluation.layout
    if not matrix.has_vectors:
        like = torch.empty(layout.size, dtype=layout.dtype, device=layout.device)
        entries = torch.arange(layout.size, device=layout.device).unsqueeze(1)
        return exact_blocks(matrix.products(evaluation, generator).product, entries, like).flatten()
    if layers_hold(evaluation):
        approximation = Diagonal(matrix, on_unsupported="diagonal")
        statistics = approximation.statistics(evaluation, generator)
        return approximation.operator_of_loss(evaluation.objective, statistics).diagonal()
    result = torch.zeros(layout.size, dtype=layout.dtype, device=layout.device)
    for vector in matrix.vectors(evaluation, generator):
        for gradients in evaluation.per_example_vjp(layout.names, vector):
            result += layout.join(gradients).square()
    return result


def layers_hold(evaluation: Evaluation) -> bool:
    """Return whether the layers' factors belong to one example each, so that they make its gradients."""
    try:
        evaluation.check_examples_are_independent()
    except UnsupportedLayerError:
        return False
    return True


def rows_of(factors: LayerFactors) -> Float[Tensor, "N size"]:
    """Return J_n^T v of one layer for all examples at once."""
    chunks = list(factors.per_example_gradients())
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


def stacked_rows(gradients: Iterable[list[Tensor]]) -> list[Float[Tensor, "N d"]]:
    """Return what :meth:`Evaluation.per_example_vjp` yields example by example, parameter by parameter."""
    return [torch.stack(list(map(dense_row, parameter))) for parameter in zip(*gradients, strict=True)]


def dense_row(gradient: Tensor) -> Float[Tensor, " d"]:
    """Return one example's gradient as a vector, in float32 at least."""
    dense = gradient.to_dense() if gradient.is_sparse else gradient
    return dense.to(torch.promote_types(dense.dtype, torch.float32)).flatten()
