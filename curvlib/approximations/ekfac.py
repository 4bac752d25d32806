r"""EKFAC: K-FAC's eigenbasis with scales of its own (George et al. 2018).

Symbols: as in :mod:`.eigenbasis`; S the averaged statistics of a running average.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from curvlib.approximations.assignment import Assignment
from curvlib.approximations.eigenbasis import Basis, InEigenbasis, eigenbases, moved_scales
from curvlib.approximations.fallbacks import Fallback, check_fallback
from curvlib.approximations.kfac import KFAC
from curvlib.approximations.layerwise import check_vectors
from curvlib.approximations.moving_average import state_of, statistics_of
from curvlib.approximations.running import RunningAverage, running_average
from curvlib.approximations.statistics import Statistics
from curvlib.approximations.two_sweeps import Standing, TwoSweeps
from curvlib.approximations.weight_sharing import Expand, OneProduct
from curvlib.extensions import LayerPlan
from curvlib.matrices import CurvatureMatrix
from curvlib.objective import Batch, Evaluation, Objective
from curvlib.operators import LinearOperator, full_precision

# So few updates behind, the factors change so much with one more that the basis is made anew each time.
_EARLY_UPDATES = 3


@dataclass(frozen=True)
class EKFAC(TwoSweeps):
    r"""Block of a layer = U diag(s) U^T, U = U_G (x) U_A the eigenvectors of K-FAC's factors, s as it is on the batch.

    .. math:: s = \sum_n \sum_k \Bigl( U_G^T \bigl( \sum_t g_t a_t^T \bigr) U_A \Bigr)^2

    for the vectors v_k of the curvature matrix: the diagonal of U^T C U, so that in Frobenius norm no other matrix with
    these eigenvectors is nearer to the layer's exact block C; K-FAC with the same vectors is one of them. Exact where
    K-FAC is. The square comes after the sum over positions, so that they need not be independent. Damping is exact:
    1 / (s + damping).

    A layer used at one position costs one matrix product of squares for each vector besides K-FAC's factors; with
    several positions per-example gradients are made in chunks of at most 64 MiB in float32, or of one example. An
    estimate makes the factors in a first sweep over the layers and the scales in a second one, for ``Fisher()`` with
    the same draws; over a loader as well, which then must be one that can be iterated twice.

    The input side of embeddings is the identity. Scale and shift of a normalisation layer get their exact diagonal.
    Modules that use one weight in two ways get the sum of two blocks, without the terms between the two uses: nearest
    part by part, not in the sum.

    Over training steps :class:`EigenbasisAverage` keeps the basis and renews the scales at each; ``MovingAverage``
    refuses it, as scales in different bases do not add up. It can be one of the choices of ``PerLayer``.

    Source: George, Laurent, Bouthillier, Ballas & Vincent 2018, sec. 3 and algorithm 1.

    Args:
        matrix: ``Fisher()`` as in the paper, ``GGN()`` or ``EmpiricalFisher()``.
        weight_sharing: of the factors that give the basis: ``Expand()``, ``Independent()`` or ``Reduce()``.
        basis_every: updates of a running average from one eigenbasis to the next.
        on_unsupported: what parameters outside every layer get: "raise", "diagonal", "dense" or "exclude".

    Example:
        >>> import curvlib
        >>> objective = Objective(torch.nn.Linear(3, 2), torch.nn.MSELoss())
        >>> C = EKFAC(curvlib.GGN()).estimate(objective.at((torch.eye(3), torch.zeros(3, 2))))
        >>> C.blocks[0].eigenvalues.shape
        torch.Size([2, 4])
    """

    matrix: CurvatureMatrix
    weight_sharing: OneProduct = field(default_factory=Expand, kw_only=True)
    basis_every: int = field(default=20, kw_only=True)
    on_unsupported: Fallback = field(default="raise", kw_only=True)
    # What a parameter outside every layer gets that PerLayer gives to this approximation by name: what it says itself.
    own_fallback: ClassVar[Fallback | None] = None
    # Why PerLayer could not mix it with others.
    alone: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        check_vectors(self, self.matrix)
        check_fallback(self.on_unsupported)
        if not isinstance(self.weight_sharing, OneProduct):
            raise TypeError(
                "EKFAC needs weight_sharing to be Expand(), Independent(), Reduce() or another OneProduct, whose block "
                f"has one eigenbasis, got {self.weight_sharing!r}."
            )
        if isinstance(self.basis_every, bool) or not isinstance(self.basis_every, int) or self.basis_every < 1:
            raise ValueError(f"EKFAC needs an integer basis_every >= 1, got {self.basis_every!r}.")

    def assign(self, objective: Objective, plan: LayerPlan) -> Assignment:
        """Return that every layer has an eigenbasis of its own."""
        own = InEigenbasis(self.matrix, bases={})
        others = dict.fromkeys(plan.unsupported, (self.on_unsupported, self.matrix))
        return Assignment(dict.fromkeys((layer.name for layer in plan.layers), own), others)

    def estimate(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> LinearOperator:
        """Return the operator of one batch: two backward passes down to the layers' outputs for each vector.

        Raises:
            NonFiniteStatisticsError: the statistics hold NaN or infinity.
        """
        return self.estimate_in_two_sweeps(evaluation, generator)

    def estimate_over(
        self,
        objective: Objective,
        loader: Iterable[Batch],
        generator: torch.Generator | None = None,
        *,
        progress: bool = True,
    ) -> LinearOperator:
        """Return the operator of all batches: one sweep over the loader for the basis, one for the scales.

        ``Fisher()`` draws the same labels in both where the batches come in the same order.

        Raises:
            TypeError: the loader can be iterated once only.
        """
        return self.estimate_over_in_two_sweeps(objective, loader, generator, progress)

    def first_sweep(self, standing: Standing) -> KFAC:
        """Return K-FAC."""
        matrix = standing.get(self.matrix, self.matrix)
        return KFAC(matrix, weight_sharing=self.weight_sharing, on_unsupported=self.on_unsupported)

    def second_sweep(
        self, bases: Mapping[str, Basis], standing: Standing, *, with_factors: bool = False
    ) -> InEigenbasis:
        """Return the scales in given bases; parameters outside every layer belong to the sweep of the factors."""
        return InEigenbasis(
            standing.get(self.matrix, self.matrix),
            bases=bases,
            factors=self.first_sweep(standing) if with_factors else None,
            on_unsupported=self.on_unsupported if with_factors else "exclude",
        )


class EigenbasisAverage(RunningAverage):
    r"""Running averages of EKFAC's scales in an eigenbasis that is made anew every ``basis_every`` updates.

    K-FAC's factors and the scales in the present basis are averaged as in :class:`MovingAverage`, both from one
    backward pass for each vector; only the first update takes two. A new basis comes from the factors averaged so far,
    before the new batch; the averaged scales are taken along as diag(U'^T U diag(s) U^T U'), the nearest in Frobenius
    norm. Among the first updates, while the factors still change much, the third and the fourth have a new basis.

    Departure from George et al. 2018, whose scales start anew with each basis.

    Args:
        approximation: EKFAC of some matrix, or PerLayer with EKFAC among its choices.
        decay: weight of the past, in [0, 1); when statistics come every m steps, give decay^m.

    Attributes:
        updates: batches that the average has taken in.
        skipped: batches whose statistics were not finite; they left the average as it was.

    Example:
        >>> import curvlib
        >>> objective = Objective(torch.nn.Linear(3, 2), torch.nn.MSELoss())
        >>> average = EigenbasisAverage(EKFAC(curvlib.Fisher(), basis_every=10), decay=0.95)
        >>> average.update(objective.at((torch.ones(4, 3), torch.zeros(4, 2))))
        True
        >>> average.operator(objective).shape
        (8, 8)
    """

    cheap_inverse: ClassVar[bool] = True

    def __init__(self, approximation: TwoSweeps, decay: float = 0.95) -> None:
        if not (isinstance(approximation, TwoSweeps) and approximation.basis_every > 0):
            raise TypeError(
                "EigenbasisAverage needs EKFAC(matrix), or PerLayer with EKFAC, got "
                f"{approximation!r}: see MovingAverage."
            )
        super().__init__(decay)
        self.approximation = approximation
        self._statistics: Statistics | None = None  # factors and scales
        self._bases: dict[str, Basis] = {}

    def update(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> bool:
        """Take in one evaluation; return whether its statistics were finite (others are left out, counted)."""
        with full_precision(evaluation.layout.device):
            past, bases, statistics = self._past_in_basis(evaluation, generator)
        if not statistics.is_finite():
            self.skipped += 1
            return False
        self._statistics, self._bases = self._averaged(past, statistics), bases
        return True

    def operator(self, objective: Objective) -> LinearOperator:
        """Return the operator of the averaged scales, the l2 term included.

        Raises:
            RuntimeError: there was no update with finite statistics yet.
        """
        statistics = self._known(self._statistics)
        return self.approximation.second_sweep(self._bases, {}).operator(objective, statistics)

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged tensors, the bases and the counts."""
        return {
            "approximation": repr(self.approximation),
            "updates": self.updates,
            "skipped": self.skipped,
            **state_of(self._statistics, bases={name: list(basis) for name, basis in self._bases.items()}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            ValueError: the state is that of another approximation, or incomplete; nothing is changed.
        """
        self._check_state(state, self.approximation)
        bases = {name: (U_G, U_A) for name, (U_G, U_A) in state["bases"].items()}
        statistics = statistics_of(state)
        self.updates, self.skipped = state["updates"], state["skipped"]
        self._bases, self._statistics = bases, statistics

    def _past_in_basis(
        self, evaluation: Evaluation, generator: torch.Generator | None
    ) -> tuple[Statistics | None, dict[str, Basis], Statistics]:
        """Return the average so far in the basis of this update, that basis, and the batch's statistics in it."""
        approximation, past, bases = self.approximation, self._statistics, self._bases
        if past is None:
            factors, standing = approximation.first_factors(evaluation, generator)
            if not factors.is_finite():
                return None, {}, factors
            bases = eigenbases(approximation.layers_with_bases(evaluation, factors), factors)
            scales = approximation.second_sweep(bases, standing).statistics(evaluation, generator)
            return None, bases, factors.joined(scales)
        # after one update the factors are those that the basis was made of
        if self.updates > 1 and (self.updates <= _EARLY_UPDATES or self.updates % approximation.basis_every == 0):
            bases = eigenbases(approximation.layers_with_bases(evaluation, past), past)
            past = moved_scales(past, self._bases, bases)
        both = approximation.second_sweep(bases, {}, with_factors=True)
        return past, bases, both.statistics(evaluation, generator)


@running_average.register
def _(approximation: EKFAC, decay: float) -> RunningAverage:
    return EigenbasisAverage(approximation, decay)
