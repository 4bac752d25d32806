r"""Limited-memory BFGS as a curvature: low rank plus a multiple of the identity, from pairs of steps.

Symbols: D parameters, m pairs, s (D,) a step, y (D,) the change of the gradient along it, S, Y (D, m) their columns
from the oldest to the latest, delta the curvature that the pairs say nothing about.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.approximations.base import Approximation, with_l2
from curvlib.approximations.description import Description
from curvlib.approximations.exact import whole_matrix
from curvlib.extensions import LayerPlan
from curvlib.objective import Batch, Evaluation, Objective
from curvlib.operators import LinearOperator, LowRank
from curvlib.operators.state import check_entries

Vector = Float[Tensor, " D"]


class PairRule(ABC):
    """What is done with a pair whose s^T y is not positive, which would make B indefinite."""

    @abstractmethod
    def admit(self, s: Vector, y: Vector, product: Callable[[Vector], Vector]) -> Vector | None:
        """Return the y to use, or None to leave the pair out.

        Args:
            s: the step (D,), float64.
            y: the change of the gradient (D,), float64.
            product: v -> B v with the pairs so far.
        """


@dataclass(frozen=True, kw_only=True)
class SkipPairs(PairRule):
    """Pairs with s^T y <= threshold |s| |y| are left out.

    Args:
        threshold: at least 0, below 1.
    """

    threshold: float = 1e-8

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise ValueError(f"SkipPairs needs 0 <= threshold < 1, got {self.threshold!r}.")

    def admit(self, s: Vector, y: Vector, product: Callable[[Vector], Vector]) -> Vector | None:
        """Return y itself, or None."""
        return y if bool(s @ y > self.threshold * s.norm() * y.norm()) else None


@dataclass(frozen=True, kw_only=True)
class PowellDamping(PairRule):
    """y is moved towards B s until s^T y >= fraction s^T B s; only a step of length zero is left out.

    y' = t y + (1 - t) B s, t = (1 - fraction) s^T B s / (s^T B s - s^T y) where s^T y is smaller, 1 otherwise.

    Source: Powell 1978; Nocedal & Wright 2006, procedure 18.2.

    Args:
        fraction: in (0, 1).
    """

    fraction: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ValueError(f"PowellDamping needs 0 < fraction < 1, got {self.fraction!r}.")

    def admit(self, s: Vector, y: Vector, product: Callable[[Vector], Vector]) -> Vector | None:
        """Return y, damped if need be."""
        if not bool(s.any()):
            return None
        Bs = product(s)
        have, want = s @ y, s @ Bs
        if bool(have >= self.fraction * want):
            return y
        t = (1 - self.fraction) * want / (want - have)
        return t * y + (1 - t) * Bs


@dataclass(frozen=True, kw_only=True)
class LBFGS(Approximation):
    r"""B = delta I - W M^-1 W^T with W = (delta S, Y) and M = [[delta S^T S, L], [L^T, -diag(s_i^T y_i)]].

    L is the part of S^T Y strictly below its diagonal.
    The curvature that the BFGS updates with the last pairs make of delta I; its inverse by structure is the two-loop
    recursion's. It needs no curvature matrix: the pairs are steps and changes of a gradient on the same data. Without
    pairs it is delta I, so that an estimate of one evaluation alone is that, plus the l2 term.

    As the curvature of ``PreconditionedGradient`` or ``ModelDescent`` it learns a pair from every step that is taken,
    on the batch of the step, at the price of one more gradient; rejected steps leave no trace. As everywhere, C is the
    curvature of the loss plus eta I: the pairs have the gradient of the loss, and the curvature eta of the l2 term is
    not learned but known. In a loop of one's own :meth:`start` gives the history that takes pairs, and
    :attr:`LBFGSHistory.approximation` is this with them. Whole batches are what it is for: curvature along a step is
    that of its batch, and in small ones mostly noise.

    Source: Byrd, Nocedal & Schnabel 1994, theorem 2.3 (eq. 2.17); two loops: Nocedal & Wright 2006, algorithm 7.4.

    Args:
        memory: m, the pairs that are kept, at least 1; the oldest goes first.
        pairs: ``SkipPairs()`` or ``PowellDamping()``.
        initial: delta > 0; None takes y^T y / s^T y of the latest pair (Nocedal & Wright, eq. 7.20), 1 before any.
        history: the pairs (s, y), admitted by their rule, the oldest first.

    Example:
        >>> history = LBFGS(memory=5).start()
        >>> history.update(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 0.0]))
        True
        >>> (history.operator() @ torch.tensor([1.0, 0.0])).round(decimals=5)
        tensor([3., 0.])
    """

    memory: int = 10
    pairs: PairRule = field(default_factory=SkipPairs)
    initial: float | None = None
    history: tuple[tuple[Vector, Vector], ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.memory, bool) or not isinstance(self.memory, int) or self.memory < 1:
            raise ValueError(f"LBFGS needs memory >= 1, got {self.memory!r}.")
        if not isinstance(self.pairs, PairRule):
            raise TypeError(f"LBFGS needs pairs to be SkipPairs() or PowellDamping(), got {self.pairs!r}.")
        if self.initial is not None and not (isfinite(self.initial) and self.initial > 0):
            raise ValueError(f"LBFGS needs a finite initial > 0 or None, got {self.initial!r}.")

    @property
    def follows_steps(self) -> bool:
        """True: see :class:`StepPairs`."""
        return True

    def start(self) -> LBFGSHistory:
        """Return a history that begins with the pairs known here."""
        return LBFGSHistory(self)

    def estimate(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> LinearOperator:
        """Return B + eta I, B of the pairs known here; the batch does not matter.

        Raises:
            ValueError: the pairs are those of another number of parameters.
        """
        evaluation.check_fresh()
        return with_l2(self.start().operator(evaluation.objective), evaluation.objective)

    def estimate_over(
        self,
        objective: Objective,
        loader: Iterable[Batch],
        generator: torch.Generator | None = None,
        *,
        progress: bool = True,
    ) -> LinearOperator:
        """Return B + eta I, B of the pairs known here, whatever the data; the loader is not run through."""
        return with_l2(self.start().operator(objective), objective)

    def describe(self, objective: Objective, plan: LayerPlan | None = None) -> Description:
        """All parameters are in one block."""
        return whole_matrix(self, objective, f"L-BFGS: delta I and the last {self.memory} pairs of steps")


class LBFGSHistory:
    """The pairs of :class:`LBFGS` so far; lives outside of the operators, which are frozen values.

    Attributes:
        config: memory, rule for the pairs, delta.
        updates: pairs taken in.
        skipped: pairs left out, because of their curvature or because they were not finite.
    """

    def __init__(self, config: LBFGS) -> None:
        self.config = config
        self.updates = 0
        self.skipped = 0
        self._pairs: list[tuple[Vector, Vector]] = list(config.history)[-config.memory :]

    @property
    def approximation(self) -> LBFGS:
        """The approximation with the pairs so far, for sums with others; later pairs do not change it.

        It adds the l2 term of the objective, so that the pairs' gradients should be those of the loss alone.
        """
        return replace(self.config, history=tuple(self._pairs))

    def update(self, step: Vector, gradient_change: Vector) -> bool:
        """Take in a pair; return whether it was used.

        Args:
            step: s (D,), new parameters minus old.
            gradient_change: y (D,), gradient at the new minus gradient at the old parameters, on the same data.

        Raises:
            ValueError: the shapes do not fit each other or the earlier pairs.
        """
        size = len(self._pairs[0][0]) if self._pairs else step.numel()
        if step.shape != (size,) or gradient_change.shape != (size,):
            raise ValueError(
                f"step and gradient_change must have shape ({size},), got {tuple(step.shape)} and "
                f"{tuple(gradient_change.shape)}."
            )
        s, y = step.detach().double(), gradient_change.detach().double()
        admitted = None
        if bool(s.isfinite().all() and y.isfinite().all()):
            admitted = self.config.pairs.admit(s, y, lambda v: self._product(v, step))
        if admitted is None:
            self.skipped += 1
            return False
        # copies: the caller may write its parameters in place afterwards
        pair = (step.detach().clone(), admitted.to(step.dtype, copy=True))
        self._pairs = [*self._pairs, pair][-self.config.memory :]
        self.updates += 1
        return True

    def operator(self, objective: Objective | None = None) -> LinearOperator:
        """Return B, the curvature of what the pairs' gradients are of.

        Args:
            objective: gives the size while there is no pair.

        Raises:
            RuntimeError: there is no pair yet, and no objective.
            ValueError: the pairs are those of another number of parameters.
        """
        if self._pairs:
            size = len(self._pairs[0][0])
            if objective is not None and objective.layout.size != size:
                raise ValueError(f"the pairs have {size} entries and the objective {objective.layout.size} parameters.")
            return self._compact()
        if objective is None:
            raise RuntimeError("LBFGS has no pair yet: call update first, or give the objective for delta I.")
        layout = objective.layout
        return self._scaled_identity(torch.zeros(layout.size, dtype=layout.dtype, device=layout.device))

    def state_dict(self) -> dict[str, Any]:
        """Return the pairs and counts."""
        return {
            "config": repr(self.config),
            "updates": self.updates,
            "skipped": self.skipped,
            "steps": [s for s, _ in self._pairs],
            "gradient_changes": [y for _, y in self._pairs],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            ValueError: the state is that of another configuration, or incomplete; nothing is changed.
        """
        check_entries("LBFGS", state, self.state_dict())
        if state["config"] != repr(self.config):
            raise ValueError(f"the state is that of {state['config']}, not of {self.config!r}.")
        steps, changes = state["steps"], state["gradient_changes"]
        if len(steps) != len(changes):
            raise ValueError(
                f"the state of LBFGS is incomplete: it has {len(steps)} steps and {len(changes)} gradient changes."
            )
        self.updates, self.skipped = state["updates"], state["skipped"]
        self._pairs = list(zip(steps, changes, strict=True))

    def _product(self, v: Vector, like: Vector) -> Vector:
        """B v in float64; before any pair delta I."""
        C = self._compact(v.dtype) if self._pairs else self._scaled_identity(like.double())
        return C @ v

    def _scaled_identity(self, like: Vector) -> LowRank:
        return LowRank(
            like.new_zeros(len(like), 0), like.new_zeros(0), torch.full_like(like, self.config.initial or 1.0)
        )

    def _compact(self, dtype: torch.dtype | None = None) -> LowRank:
        """Return B in float64 numbers, for vectors of the pairs' type."""
        S, Y = (torch.stack(vectors, dim=1).double() for vectors in zip(*self._pairs, strict=True))
        SY = S.T @ Y
        delta = (
            (Y[:, -1] @ Y[:, -1]) / SY[-1, -1] if self.config.initial is None else SY.new_tensor(self.config.initial)
        )
        L, d = SY.tril(-1), SY.diagonal()
        M = torch.cat([torch.cat([delta * (S.T @ S), L], 1), torch.cat([L.T, -torch.diag(d)], 1)])
        # An orthonormal basis first: columns of W may be nearly parallel, and M is then nearly singular.
        Q, R = torch.linalg.qr(torch.cat([delta * S, Y], 1))
        core = -R @ torch.linalg.solve(M, R.T)
        w, P = torch.linalg.eigh(0.5 * (core + core.T))
        return LowRank(Q @ P, w, delta.expand(len(S)).clone(), dtype or self._pairs[0][0].dtype)
