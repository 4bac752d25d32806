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
        vanishing: (C, M, evaluation) -> what is zero, where that says more than a comparison with one part, such as
            C C - C M for eigenpairs of M; C and M without the l2 term. It takes the place of part and compared.
        examples: the most examples that a network may have for this to hold.
        positions: whether it holds for inputs at several positions.

    Example:
        >>> ExactOn(part=diagonal_entries).examples
        4
    """

    part: Callable[[Matrix, Evaluation], Matrix] = whole
    matrix: Callable[[Network], Matrix] | None = None
    compared: Callable[[Matrix], Tensor] = itself
    vanishing: Callable[[Matrix, Matrix, Evaluation], Tensor] | None = None
    examples: int = 4
    positions: bool = True

    @property
    def note(self) -> str:
        """What is compared, where that is not the whole matrix."""
        if self.vanishing is not None:
            return f": {getattr(self.vanishing, '__name__', self.vanishing)} vanishes"
        return "" if self.compared is itself else f", compared by {getattr(self.compared, '__name__', self.compared)}"

    def sides(self, network: Network, approximation: Any) -> Callable[[Matrix], tuple[Tensor, Tensor]]:
        """Return the function of an estimate C that gives what is compared of it, and what that has to be."""
        M = (matrix_of_loss(network, approximation.matrix) if self.matrix is None else self.matrix(network)).detach()
        l2 = (network.l2 if approximation.includes_l2 else 0.0) * torch.eye(len(M), dtype=M.dtype)
        evaluation, vanishing = network.evaluate(), self.vanishing
        if vanishing is not None:
            return lambda C: (left := vanishing(C - l2, M, evaluation), torch.zeros_like(left))
        expected = self.compared(self.part(M, evaluation) + l2)
        return lambda C: (self.compared(C), expected)


EVERYWHERE = ExactOn()
ON_BLOCKS = ExactOn(part=layer_blocks)
ON_DIAGONAL = ExactOn(part=diagonal_entries)
ON_TRACE = ExactOn(compared=torch.trace)
ONE_EXAMPLE = ExactOn(part=layer_blocks, examples=1, positions=False)
NOWHERE: tuple[ExactOn, ...] = ()
