"""What a statistic of the output-space vectors keeps, whatever it leaves out.

Symbols: v_k (N, ...) the vectors of a matrix with sum_k v_k v_k^T the loss's Hessian, C the estimate, K their number.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from curvlib import CurvatureMatrix
from curvlib.objective import Evaluation
from curvlib.testing.estimates import Estimates
from curvlib.testing.numbers import draw
from curvlib.testing.oracles import Network

# float32 through a few layers, an eigenbasis and sums with cancellation: some thousand roundings of 6e-8.
_SINGLE = 1e-3


@dataclass(frozen=True)
class Turned(CurvatureMatrix):
    """The same matrix by other vectors, v'_j = sum_k Q_jk v_k for an orthogonal Q, one more than there were."""

    matrix: CurvatureMatrix

    @property
    def has_vectors(self) -> bool:  # type: ignore[override]
        """As the matrix."""
        return self.matrix.has_vectors

    @property
    def draws(self) -> bool:  # type: ignore[override]
        """As the matrix."""
        return self.matrix.draws

    def __getattr__(self, name: str) -> Any:
        """As the matrix, such as the number of draws."""
        if name == "matrix":  # before it is set, as in copies
            raise AttributeError(name)
        return getattr(self.matrix, name)

    def vectors(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> Iterator[Tensor]:
        """Yield the v'_j."""
        stacked = torch.stack(list(self.matrix.vectors(evaluation, generator)))
        Q = draw(0, stacked.device, dtype=stacked.dtype).orthogonal(len(stacked) + 1)
        return iter(torch.einsum("jk,k...->j...", Q[:, :-1], stacked))

    def output_product(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> Any:
        """Return the product of the matrix."""
        return self.matrix.output_product(evaluation, generator)


def of_the_sum_alone(one: Estimates) -> None:
    """Orthogonal combinations of the vectors have the same sum of squares, and so the same estimate."""
    approximation: Any = one.approximation
    matrix: Any = getattr(approximation, "matrix", None)
    if not (
        isinstance(matrix, CurvatureMatrix) and matrix.has_vectors and hasattr(approximation, "__dataclass_fields__")
    ):
        return
    try:
        turned: Any = replace(approximation, matrix=Turned(matrix))
        turned.estimate(one.network.evaluate(), torch.Generator().manual_seed(0))
    except (TypeError, ValueError, NotImplementedError):
        return  # it takes matrices that it knows alone, and says so
    identity = "C depends on the vectors v_k by sum_k v_k v_k^T alone: orthogonal combinations of them give the same C"
    other = Estimates(turned, one.subject, one.network)
    one.equal(identity, other.C, one.C)


def twice_the_batch(one: Estimates, degree: float | None) -> None:
    """Each example twice, in another order: the same mean, and twice the sum."""
    network = one.network
    double = Network(copy.deepcopy(network.model), network.loss, _twice(network.inputs), None, network.l2)
    double.targets = (
        tuple(map(_twice, network.targets)) if isinstance(network.targets, tuple) else _twice(network.targets)
    )
    loss, evaluation = one.objective.loss, double.evaluate()
    factor = 2.0 * float(
        loss.scale(evaluation.outputs, double.targets) / loss.scale(one.evaluation.outputs, network.targets)
    )
    if factor != 1.0 and degree is None:
        return
    shift = network.l2 if one.approximation.includes_l2 else 0.0
    own = shift * torch.eye(len(one.C), dtype=one.C.dtype)
    expected = factor ** (degree or 0.0) * (one.C - own) + own
    identity = "each example twice, in another order, gives the same C of a mean, and 2^degree C of a sum, the l2 apart"
    one.subject.equal(identity, one.dense(double), expected, scale=max(factor, 1.0) * one.size, tolerance=1e-9)


def _twice(x: Any) -> Any:
    return torch.cat([x, x.flip(0)]) if isinstance(x, Tensor) else x


def draws_are_of_the_generator(one: Estimates) -> None:
    """Random estimates differ from draw to draw, and without a generator come from PyTorch's global numbers."""
    approximation: Any = one.approximation
    one.subject.same("the same generator gives the same estimate", one.dense, one.C)
    if getattr(getattr(approximation, "matrix", None), "draws", False):
        identity = f"with {approximation.matrix!r} another generator gives other draws"
        one.subject.holds(identity, one.random, f"the seeds 0 and 1 both gave {one.C}")
    state = torch.get_rng_state()
    one.dense()
    one.subject.same("with a generator, global random numbers are not used", torch.get_rng_state(), state)
    if not one.random:
        return

    def at_seed(seed: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return approximation.estimate(one.evaluation).to_dense()

    first = one.subject.value("estimate(evaluation) without a generator", lambda: at_seed(0))
    one.subject.same("without a generator, torch.manual_seed decides", lambda: at_seed(0), first)
    identity = "without a generator, another torch.manual_seed gives other draws"
    one.subject.holds(identity, not torch.equal(at_seed(1), first), f"both gave {first}")


def single_precision(one: Estimates) -> None:
    """In float32 the estimate is a float32 operator near that in float64."""
    network = one.network

    def single(x: Any) -> Any:
        return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x

    targets = network.targets
    targets = tuple(map(single, targets)) if isinstance(targets, tuple) else single(targets)
    model = copy.deepcopy(network.model).float()
    small = Network(model, network.loss, single(network.inputs), targets, network.l2)
    C = one.dense(small)
    one.subject.holds("C of a float32 model has the type float32", C.dtype == torch.float32, f"got {C.dtype}")
    if not one.random:  # draws are other numbers in another type
        identity = "C in float32 = C in float64 up to rounding"
        one.subject.equal(identity, C.double(), one.C, scale=one.size, tolerance=_SINGLE)
