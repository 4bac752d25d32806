"""The curvature matrices: which output-space vectors v_k make sum_k (J^T v_k)(J^T v_k)^T.

Symbols: N examples, z (N, ...) outputs, J = dz/dtheta, H = d^2 L/dz^2, L = c sum_n l_n the loss with its reduction
factor c (1/N, 1, ...). Every matrix is on the scale of the objective: the l2 term is added by the approximations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.objective import Evaluation

OutputVector = Float[Tensor, "N ..."]


@dataclass(frozen=True, kw_only=True, eq=False)
class Products:
    """The exact matrix on one evaluation, as two functions that share everything random.

    Attributes:
        product: v (D,) -> C v.
        quadratic_form: V (D, K) -> V^T C V (K, K), from the products J V alone where that is possible.
        output_product: x -> M x where C = J^T M J; None for a matrix that is more than that.
    """

    product: Callable[[Float[Tensor, " D"]], Float[Tensor, " D"]]
    quadratic_form: Callable[[Float[Tensor, "D K"]], Float[Tensor, "K K"]]
    output_product: Callable[[OutputVector], OutputVector] | None = None


class CurvatureMatrix(ABC):
    """A matrix C = J^T M J (plus second-order terms for the Hessian), M block diagonal over the examples.

    Attributes:
        has_vectors: whether :meth:`vectors` is defined, so that layerwise approximations can be made.
        draws: whether it depends on random draws.
        dense_vectors: whether every vector is, in general, not zero at all outputs whose targets count.
    """

    has_vectors: ClassVar[bool] = True
    draws: ClassVar[bool] = False
    dense_vectors: ClassVar[bool] = False

    @abstractmethod
    def vectors(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> Iterator[OutputVector]:
        """Yield vectors v_k of the outputs' shape with sum_k v_k[n] v_k[n]^T = M[n] for every example n.

        Args:
            evaluation: the objective on a batch.
            generator: where random draws come from; None is PyTorch's global generator.

        Raises:
            TypeError: the matrix has no such vectors.
        """

    @abstractmethod
    def output_product(
        self, evaluation: Evaluation, generator: torch.Generator | None = None
    ) -> Callable[[OutputVector], OutputVector]:
        """Return the function x -> M x, with everything that does not depend on x computed once."""

    def products(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> Products:
        """Return the exact products and quadratic forms, without the l2 term; random draws are made once for both."""
        output_product = self.output_product(evaluation, generator)
        return Products(
            product=lambda v: evaluation.product(output_product, v),
            quadratic_form=lambda V: _output_space_form(evaluation, output_product, V),
            output_product=output_product,
        )


@dataclass(frozen=True)
class GGN(CurvatureMatrix):
    """Generalised Gauss-Newton matrix J^T H J (Schraudolph 2002), with the exact Hessian of the loss.

    Equal to the Fisher matrix of the model's predictive distribution for losses in natural parameters: squared error,
    cross-entropy on logits, Poisson with a log input.
    """

    def vectors(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> Iterator[OutputVector]:
        """Yield the columns of the exact square root of H, as many as one example has outputs (or fewer)."""
        return evaluation.objective.loss.hessian_sqrt(evaluation.outputs, evaluation.targets)

    def output_product(
        self, evaluation: Evaluation, generator: torch.Generator | None = None
    ) -> Callable[[OutputVector], OutputVector]:
        """Return x -> H x."""
        return evaluation.objective.loss.linearize(evaluation.outputs, evaluation.targets)


@dataclass(frozen=True)
class Fisher(CurvatureMatrix):
    """Fisher matrix c sum_n E[grad l_n grad l_n^T], labels drawn from the model's own distribution.

    A Monte-Carlo estimate, unbiased with any number of draws.

    Args:
        samples: draws an example, at least 1.
    """

    samples: int = 1
    draws: ClassVar[bool] = True
    dense_vectors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:
            raise ValueError(f"Fisher needs samples >= 1, got {self.samples!r}.")

    def vectors(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> Iterator[OutputVector]:
        """Yield the loss gradients at drawn labels, times sqrt(c / samples)."""
        loss = evaluation.objective.loss
        for _ in range(self.samples):
            draw = loss.sample_gradient(evaluation.outputs, evaluation.targets, generator)
            yield draw if self.samples == 1 else draw / self.samples**0.5

    def output_product(
        self, evaluation: Evaluation, generator: torch.Generator | None = None
    ) -> Callable[[OutputVector], OutputVector]:
        """Return x -> sum_k v_k <v_k, x>, the same draws for every x."""
        return _outer_product(self.vectors(evaluation, generator))


@dataclass(frozen=True)
class EmpiricalFisher(CurvatureMatrix):
    """Empirical Fisher c sum_n grad l_n grad l_n^T at the training labels; not a Fisher matrix (Kunstner et al. 2019).

    l_n is the loss of one example as the module computes it, its weights included, and c the module's reduction. So a
    weight w in the loss counts w^2 here and w in the GGN: multiplying a loss by a constant *inside* changes the scale
    of the one relative to the other.
    """

    dense_vectors: ClassVar[bool] = True

    def vectors(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> Iterator[OutputVector]:
        """Yield one vector: sqrt(c) dl_n/dz_n for every example n."""
        yield evaluation.objective.loss.empirical_gradient(evaluation.outputs, evaluation.targets)

    def output_product(
        self, evaluation: Evaluation, generator: torch.Generator | None = None
    ) -> Callable[[OutputVector], OutputVector]:
        """Return x -> v <v, x>, example by example."""
        return _outer_product(self.vectors(evaluation, generator))


@dataclass(frozen=True)
class Hessian(CurvatureMatrix):
    """Hessian of the objective, GGN plus sum_i (dL/dz_i) d^2 z_i/dtheta^2: products only, may be indefinite."""

    has_vectors: ClassVar[bool] = False

    def vectors(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> Iterator[OutputVector]:
        """Refuse: an indefinite matrix has no real square root."""
        raise TypeError(
            "Hessian() gives products only, no vectors v_k with sum v_k v_k^T: it may be indefinite. Use it with "
            "Exact, Dense, BlockDiagonal, Diagonal, HutchinsonDiagonal or LowRank, or choose GGN(), Fisher() or "
            "EmpiricalFisher()."
        )

    def output_product(
        self, evaluation: Evaluation, generator: torch.Generator | None = None
    ) -> Callable[[OutputVector], OutputVector]:
        """Return x -> H x, the part of the Hessian that passes through output space."""
        return evaluation.objective.loss.linearize(evaluation.outputs, evaluation.targets)

    def products(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> Products:
        """Return the products; quadratic forms need them too, as the second-order term passes by output space."""
        output_product = self.output_product(evaluation)

        def product(v: Tensor) -> Tensor:
            jv, second_order = evaluation.jvp_and_second_order(v)
            return evaluation.vjp(output_product(jv)) + second_order

        return Products(
            product=product, quadratic_form=lambda V: V.T @ torch.stack([product(v) for v in V.T.contiguous()], dim=1)
        )


def _outer_product(vectors: Iterator[OutputVector]) -> Callable[[OutputVector], OutputVector]:
    stacked = torch.stack(list(vectors))  # (K, N, ...)
    flat = stacked.flatten(2) if stacked.ndim > 2 else stacked.unsqueeze(2)

    def product(x: OutputVector) -> OutputVector:
        inner = torch.einsum("kno,no->kn", flat, x.reshape(x.shape[0], -1))
        return torch.einsum("kno,kn->no", flat, inner).view_as(x)

    return product


def _output_space_form(
    evaluation: Evaluation, output_product: Callable[[OutputVector], OutputVector], V: Float[Tensor, "D K"]
) -> Float[Tensor, "K K"]:
    moved = [evaluation.jvp(v) for v in V.T.contiguous()]
    left = torch.stack([x.flatten() for x in moved])
    right = torch.stack([output_product(x).flatten() for x in moved], dim=1)
    return left @ right
