"""Deliberately broken approximations are caught by their suite, which names the identity that broke."""

from dataclasses import dataclass, field

import pytest
import torch
from twins import broken

from curvlib import GGN, Fisher, Hessian
from curvlib.approximations import KFAC, BlockDiagonal, Dense, Diagonal, Exact, layer_key
from curvlib.approximations.assignment import add_to
from curvlib.approximations.description import Description
from curvlib.operators import Dense as DenseOperator
from curvlib.operators import Diagonal as DiagonalOperator
from curvlib.operators import Kronecker, MatrixFree, Shifted
from curvlib.testing import (
    EVERYWHERE,
    NOWHERE,
    ON_BLOCKS,
    ON_DIAGONAL,
    ON_TRACE,
    ONE_EXAMPLE,
    UntestedWarning,
    check_approximation,
)


@dataclass(frozen=True)
class Half(Diagonal):
    def operator(self, objective, statistics):
        return 0.5 * super().operator(objective, statistics)


@dataclass(frozen=True)
class Negative(BlockDiagonal):
    def operator_of_loss(self, objective, statistics):
        return -super().operator_of_loss(objective, statistics)


@dataclass(frozen=True)
class Swapped(KFAC):
    """Each block as A (x) G in the order of the rows of W: the transposed convention."""

    def block(self, layer, statistics):
        C = super().block(layer, statistics)
        return Kronecker(C.factors[::-1])


@dataclass(frozen=True)
class TwiceTheTerm(Dense):
    def operator(self, objective, statistics):
        return Shifted(super().operator(objective, statistics), objective.l2)


@dataclass(frozen=True)
class ForgetsTheReduction(Diagonal):
    """Its statistics are means over examples whatever the loss does."""

    def accumulate(self, factors, means, sums):
        key = layer_key(factors.layer, "diagonal")
        sums[key] = sums.get(key, 0) + factors.squared_gradients() / factors.maps[0].examples


@dataclass(frozen=True)
class CountsBatches(Diagonal):
    """Batches count alike, whatever their size: means in place of sums."""

    def statistics(self, evaluation, generator=None):
        result = super().statistics(evaluation, generator)
        weight = evaluation.objective.loss.batch_weight(evaluation.outputs, evaluation.targets)
        return result if evaluation.objective.loss.additive else result.times(1.0, 3.0 / weight)


@dataclass(frozen=True)
class Cached(Dense):
    """Keeps the first estimate of a model for good."""

    kept: dict = field(default_factory=dict, compare=False, repr=False)

    def statistics(self, evaluation, generator=None):
        evaluation.check_fresh()
        key = (id(evaluation.objective.model), str(evaluation.targets))
        if key not in self.kept:
            # the model is kept as well, so that no other one gets its id
            self.kept[key] = super().statistics(evaluation, generator), evaluation.objective.model
        return self.kept[key][0]


@dataclass(frozen=True)
class BiasedSample(Dense):
    """Divides by one draw more than there are."""

    def statistics(self, evaluation, generator=None):
        samples = self.matrix.samples
        return super().statistics(evaluation, generator).times(1.0, samples / (samples + 1))


@dataclass(frozen=True)
class IgnoresTheGenerator(Exact):
    def estimate(self, evaluation, generator=None):
        return super().estimate(evaluation)


@dataclass(frozen=True)
class WritesGradients(Diagonal):
    def statistics(self, evaluation, generator=None):
        for parameter in evaluation.objective.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return super().statistics(evaluation, generator)


@dataclass(frozen=True)
class LeavesHooks(Diagonal):
    def statistics(self, evaluation, generator=None):
        evaluation.objective.model.register_forward_hook(lambda *_: None)
        return super().statistics(evaluation, generator)


@dataclass(frozen=True)
class LeavesItsMode(Diagonal):
    def statistics(self, evaluation, generator=None):
        evaluation.objective.model.eval()
        return super().statistics(evaluation, generator)


@dataclass(frozen=True)
class LeavesNotes(Diagonal):
    def statistics(self, evaluation, generator=None):
        evaluation.objective.model.estimated = True
        return super().statistics(evaluation, generator)


@dataclass(frozen=True)
class TooLarge(KFAC):
    def operator_of_loss(self, objective, statistics):
        return 1.05 * super().operator_of_loss(objective, statistics)


@dataclass(frozen=True)
class LaterLayersTwice(KFAC):
    """Counts a later layer for each of the layers before it."""

    def block(self, layer, statistics):
        C = super().block(layer, statistics)
        return C if layer.name == "0" else 2.0 * C


@dataclass(frozen=True)
class LastVector(Diagonal):
    """Keeps the statistic of the last output-space vector alone."""

    def accumulate(self, factors, means, sums):
        sums[layer_key(factors.layer, "diagonal")] = factors.squared_gradients()


@dataclass(frozen=True)
class TraceOverSize(Diagonal):
    """A multiple of the identity: of the size of the mean of the diagonal, times the number of outputs."""

    def block(self, layer, statistics):
        diagonal = super().block(layer, statistics).diagonal()
        return DiagonalOperator(diagonal.mean().expand(layer.size) * (1 + (layer.size > 6)))


@dataclass(frozen=True)
class WithoutBias(KFAC):
    """Forgets the homogeneous coordinate of the inputs."""

    def block(self, layer, statistics):
        C = super().block(layer, statistics).to_dense()
        part = layer.maps[0]
        weight = torch.arange(layer.size) % part.columns < part.columns - part.bias
        return DenseOperator(torch.where(weight.unsqueeze(1) & weight, C, 0.0))


@dataclass(frozen=True)
class MeanTwice(Diagonal):
    """Divides by the number of examples although the loss has done so."""

    def statistics(self, evaluation, generator=None):
        return super().statistics(evaluation, generator).times(1.0, 1.0 / evaluation.examples)


@dataclass(frozen=True)
class AddsUp(Dense):
    """Adds up the statistics of all calls."""

    kept: dict = field(default_factory=dict, compare=False, repr=False)

    def statistics(self, evaluation, generator=None):
        new, key = super().statistics(evaluation, generator), id(evaluation)
        self.kept[key] = (evaluation, self.kept[key][1] + new if key in self.kept else new)
        return self.kept[key][1]


@dataclass(frozen=True)
class IndependentPositions(Diagonal):
    """sum_t g_t^2 a_t^2 in place of (sum_t g_t a_t)^2."""

    def accumulate(self, factors, means, sums):
        (part,) = factors.maps
        squares = torch.einsum("ntgo,ntgi->goi", part.g.square(), part.a.square()).flatten()
        add_to(sums, layer_key(factors.layer, "diagonal"), squares)


@dataclass(frozen=True)
class FixedDraws(Dense):
    def statistics(self, evaluation, generator=None):
        return super().statistics(evaluation, torch.Generator().manual_seed(3))


@dataclass(frozen=True)
class FixedGlobalDraws(Dense):
    """Ignores torch.manual_seed where no generator is given."""

    def statistics(self, evaluation, generator=None):
        return super().statistics(evaluation, generator or torch.Generator().manual_seed(3))


@dataclass(frozen=True)
class OneMore(Exact):
    """A row and a column too many."""

    def estimate(self, evaluation, generator=None):
        return DenseOperator(torch.block_diag(super().estimate(evaluation, generator).to_dense(), torch.ones(1, 1)))


@dataclass(frozen=True)
class NotFinite(Exact):
    def estimate(self, evaluation, generator=None):
        C = super().estimate(evaluation, generator)
        return MatrixFree(lambda V: (C @ V) / torch.zeros(()), C.size, C.dtype)


@dataclass(frozen=True)
class LastBatch(Exact):
    def estimate_over(self, objective, loader, generator=None, *, progress=True):
        return self.estimate(objective.at(list(loader)[-1]), generator)


@dataclass(frozen=True)
class TurnedOverBatches(Exact):
    def estimate_over(self, objective, loader, generator=None, *, progress=True):
        C = super().estimate_over(objective, loader, generator, progress=progress).to_dense()
        return MatrixFree(lambda V: C @ V + V.cumsum(0) - V, len(C), C.dtype)


@dataclass(frozen=True)
class NotBySteps(Dense):
    """Statistics and operator of a running average are not those of an estimate."""

    def operator(self, objective, statistics):
        return 1.1 * super().operator(objective, statistics)

    def estimate(self, evaluation, generator=None):
        return Dense(self.matrix).estimate(evaluation, generator)

    def estimate_over(self, objective, loader, generator=None, *, progress=True):
        return Dense(self.matrix).estimate_over(objective, loader, generator, progress=progress)


@dataclass(frozen=True)
class DescribesTheFirst(Dense):
    def describe(self, objective, plan=None):
        rows = super().describe(objective, plan).rows
        return Description(repr(self), rows[:1])


@dataclass(frozen=True)
class Rounded(Exact):
    """Of float32 models, half of the digits."""

    def estimate(self, evaluation, generator=None):
        C = super().estimate(evaluation, generator).to_dense()
        return DenseOperator(C.bfloat16().float() if C.dtype == torch.float32 else C)


@dataclass(frozen=True)
class NamesNothing(Exact):
    def __post_init__(self):
        if self.matrix == Hessian():
            raise ValueError("unknown")


@dataclass(frozen=True)
class UsesGlobalDraws(Exact):
    def estimate(self, evaluation, generator=None):
        torch.rand(1)
        return super().estimate(evaluation, generator)


@dataclass(frozen=True)
class AlwaysDouble(Exact):
    def estimate(self, evaluation, generator=None):
        return DenseOperator(super().estimate(evaluation, generator).to_dense().double())


@pytest.mark.parametrize(
    ("twin", "claim", "identity"),
    [
        (Half(GGN()), ON_DIAGONAL, "C with l2 + 0.7 = C + 0.7 I"),
        (Negative(GGN()), ON_BLOCKS, "no eigenvalue is negative"),
        (Swapped(GGN()), ONE_EXAMPLE, "C = the dense matrix that it is exact for"),
        (TwiceTheTerm(GGN()), EVERYWHERE, "C with l2 + 0.7 = C + 0.7 I"),
        (CountsBatches(GGN()), ON_DIAGONAL, "C follows the reduction"),
        (ForgetsTheReduction(GGN()), ON_DIAGONAL, "and 2^degree C of a sum, the l2 apart"),
        (Cached(GGN()), EVERYWHERE, "after the parameters have moved, the estimate is that at the new ones"),
        (BiasedSample(Fisher(samples=2)), EVERYWHERE, "the mean over random draws = the dense matrix"),
        (IgnoresTheGenerator(Fisher()), EVERYWHERE, "the same generator gives the same estimate"),
        (WritesGradients(GGN()), ON_DIAGONAL, "an estimate leaves the gradient of"),
        (LeavesHooks(GGN()), ON_DIAGONAL, "an estimate leaves the hooks of the model as it was"),
        (LeavesItsMode(GGN()), ON_DIAGONAL, "an estimate leaves the mode of"),
        (LeavesNotes(GGN()), ON_DIAGONAL, "an estimate leaves the attributes of the model as it was"),
        (TooLarge(GGN()), NOWHERE, "a multiple c I of the identity, C = c^degree I"),
        (LaterLayersTwice(GGN()), NOWHERE, "a multiple c I of the identity, the diagonal of C is c^degree"),
        (WithoutBias(GGN()), NOWHERE, "a multiple c I of the identity, C = c^degree I"),
        (LastVector(GGN()), NOWHERE, "C depends on the vectors v_k by sum_k v_k v_k^T alone"),
        (TraceOverSize(GGN()), ON_TRACE, "C = the dense matrix that it is exact for, compared by trace"),
        (WithoutBias(GGN()), ONE_EXAMPLE, "C = the dense matrix that it is exact for"),
        (MeanTwice(GGN()), NOWHERE, "each example twice, in another order, gives the same C of a mean"),
        (AddsUp(GGN()), NOWHERE, "the same generator gives the same estimate"),
        (FixedDraws(Fisher()), NOWHERE, "with Fisher(samples=1) another generator gives other draws"),
        (FixedGlobalDraws(Fisher()), NOWHERE, "without a generator, another torch.manual_seed gives other draws"),
        (IndependentPositions(GGN()), ON_DIAGONAL, "C = the dense matrix that it is exact for"),
        (OneMore(GGN()), NOWHERE, "C is (D, D)"),
        (NotFinite(GGN()), NOWHERE, "C is finite"),
        (LastBatch(GGN()), NOWHERE, "estimate_over(batches) = estimate of all of them at once"),
        (TurnedOverBatches(GGN()), NOWHERE, "estimate_over(batches) = its transpose"),
        (NotBySteps(GGN()), NOWHERE, "MovingAverage of equal batches = estimate"),
        (DescribesTheFirst(GGN()), NOWHERE, "describe names every parameter once"),
        (Rounded(GGN()), NOWHERE, "C in float32 = C in float64 up to rounding"),
        (NamesNothing(GGN()), NOWHERE, "Hessian() gives a symmetric estimate or is refused by name"),
        (UsesGlobalDraws(GGN()), NOWHERE, "with a generator, global random numbers are not used"),
        (AlwaysDouble(GGN()), NOWHERE, "C of a float32 model has the type float32"),
        (Diagonal(GGN()), EVERYWHERE, "C = the dense matrix that it is exact for"),
        (KFAC(GGN()), ON_BLOCKS, "C = the dense matrix that it is exact for"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Diagonal | Exact | Dense | KFAC) else None,
)
def test_broken_approximations(twin, claim, identity):
    with broken(identity) as caught:
        check_approximation(twin, exact_on=claim, examples=8, draws=100)
    assert type(twin).__name__ in caught.value.subject


def test_the_outcome_tells_what_was_not_tested():
    with pytest.warns(UntestedWarning, match="exact_on=ON_BLOCKS"):
        outcome = check_approximation(Diagonal(GGN()), degree=None, examples=1)
    assert [line.split(":")[0] for line in outcome.untested] == ["exactness", "scale"]
    assert str(outcome).count("NOT TESTED") == 2
    outcome = check_approximation(Diagonal(Fisher()), exact_on=ON_DIAGONAL, examples=1, draws=20)
    assert [line.split(":")[0] for line in outcome.untested] == ["batches"]
    assert "C = C^T" in outcome.kept
    outcome = check_approximation(KFAC(GGN()), exact_on=ONE_EXAMPLE, examples=1)
    assert [line.split(":")[0] for line in outcome.untested] == ["several examples", "positions"]
