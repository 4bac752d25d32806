"""Where an approximation is exact: which part of which matrix it equals, and for which networks.

Symbols: D parameters, M (D, D) the curvature of the loss, eta the l2 weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib import GGN, CurvatureMatrix, EmpiricalFisher, Fisher, Hessian
from curvlib.objective import Evaluation
from curvlib.testing.oracles import Network

Matrix = Float[Tensor, "D D"]


def whole(M: Matrix, evaluation: Evaluation) -> Matrix:
    """Return M."""
    return M


def itself(M: Matrix) -> Matrix:
    """Return M."""
    return M


def layer_blocks(M: Matrix, evaluation: Evaluation) -> Matrix:
    """Return M with zeros between different layers."""
    mask = torch.zeros_like(M, dtype=torch.bool)
    for layer in evaluation.layers:
        mask[layer.coordinates.unsqueeze(1), layer.coordinates] = True
    return torch.where(mask, M, 0.0)


def diagonal_entries(M: Matrix, evaluation: Evaluation) -> Matrix:
    """Return the diagonal of M alone."""
    return torch.diag(M.diagonal())


def matrix_of_loss(network: Network, matrix: CurvatureMatrix) -> Matrix:
    """Return a curvature matrix of the loss by brute force; for ``Fisher()`` the GGN, which it is in expectation.

    Raises:
        TypeError: the matrix is none of curvlib's.
    """
    network = network.copy(l2=0.0)
    if isinstance(matrix, (GGN, Fisher)):
        return network.ggn()
    if isinstance(matrix, Hessian):
        return network.hessian()
    if isinstance(matrix, EmpiricalFisher):
        evaluation = network.evaluate()
        return network.empirical_fisher(evaluation.objective.loss.scale(evaluation.outputs, network.targets))
    raise TypeError(
        f"check_approximation knows no brute force for {matrix!r}: give exact_on=ExactOn(matrix=function) with a "
        "function(network) -> (D, D)."
    )


@dataclass(frozen=True, kw_only=True)
class ExactOn:
    """Where an estimate equals a dense matrix; an estimate from random draws, in expectation.

    Attributes:
        part: (M, evaluation) -> the part of M that the estimate keeps, such as :func:`layer_blocks`.
        matrix: network -> M, the curvature of the loss without the l2 term; by default that of the approximation's
            ``matrix``, by brute force.
        compared: (D, D) -> what of both matrices is compared, such as ``torch.trace``.
        examples: the most examples that a network may have for this to hold.
        positions: whether it holds for inputs at several positions.

    Example:
        >>> ExactOn(part=diagonal_entries).examples
        4
    """

    part: Callable[[Matrix, Evaluation], Matrix] = whole
    matrix: Callable[[Network], Matrix] | None = None
    compared: Callable[[Matrix], Tensor] = itself
    examples: int = 4
    positions: bool = True

    @property
    def note(self) -> str:
        """What is compared, where that is not the whole matrix."""
        return "" if self.compared is itself else f", compared by {getattr(self.compared, '__name__', self.compared)}"

    def expected(self, network: Network, approximation: Any) -> Matrix:
        """Return what the estimate has to be, the l2 term included where the approximation has it."""
        M = matrix_of_loss(network, approximation.matrix) if self.matrix is None else self.matrix(network)
        kept = self.part(M.detach(), network.evaluate())
        return kept + network.l2 * torch.eye(len(M), dtype=M.dtype) if approximation.includes_l2 else kept


EVERYWHERE = ExactOn()
ON_BLOCKS = ExactOn(part=layer_blocks)
ON_DIAGONAL = ExactOn(part=diagonal_entries)
ON_TRACE = ExactOn(compared=torch.trace)
ONE_EXAMPLE = ExactOn(part=layer_blocks, examples=1, positions=False)
NOWHERE: tuple[ExactOn, ...] = ()
