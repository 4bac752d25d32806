"""A deliberately broken twin of each kind is caught by its suite, which names the identity that broke."""

import re
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from curvlib import GGN, AutogradLoss, Fisher
from curvlib.approximations import KFAC, BlockDiagonal, Dense, Diagonal, Exact, layer_key
from curvlib.extensions import LayerRule, register
from curvlib.operators import Dense as DenseOperator
from curvlib.operators import Kronecker, LinearOperator, LowRank, MatrixFree, Shifted
from curvlib.output_losses import OutputLoss
from curvlib.solvers import CG, damped_inverse
from curvlib.testing import (
    EVERYWHERE,
    ON_BLOCKS,
    ON_DIAGONAL,
    ONE_EXAMPLE,
    IdentityError,
    LossCase,
    check_approximation,
    check_layer,
    check_loss,
    check_operator,
    check_solver,
    draws,
)


def broken(identity):
    """The error names this identity, and where inputs are drawn it shows the smallest."""
    return pytest.raises(IdentityError, match=re.escape(identity))


@dataclass(frozen=True, eq=False, repr=False)
class Matrix(LinearOperator):
    """A matrix whose methods are as they should be."""

    matrix: torch.Tensor
    size = property(lambda self: len(self.matrix))
    dtype = property(lambda self: self.matrix.dtype)
    device = property(lambda self: self.matrix.device)

    def matmat(self, V):
        return self.matrix @ V


class WrongSign(Matrix):
    def quadratic_form(self, V):
        return -super().quadratic_form(V)


class WrongScale(Matrix):
    def trace(self):
        return super().trace() / self.size


class Transposed(Matrix):
    """Right for symmetric parts alone: a matrix that is applied along another dimension by its transpose."""

    def apply_along(self, X, dim):
        return super().apply_along(X.flip(dim), dim)


class Stale(Matrix):
    """Keeps the first product for all blocks of the same shape."""

    def matmat(self, V):
        cache = self.__dict__.setdefault("cache", {})
        return cache.setdefault(tuple(V.shape), self.matrix @ V)


class Rounds(Matrix):
    def matmat(self, V):
        return (self.matrix.float() @ V.float()).to(V.dtype)


class TakesAll(Matrix):
    def _check_vector(self, x):
        pass


class WritesToItsArgument(Matrix):
    def matmat(self, V):
        return V.copy_(self.matrix @ V)


class OwnProduct(Matrix):
    """A product that is taken before curvlib's own switches the low precision off."""

    def __matmul__(self, x):
        self._check_vector(x)
        return (self.matrix.float() @ x.float()).to(x.dtype) if torch.is_autocast_enabled("cpu") else self.matrix @ x


class Unfrozen(Matrix):
    """Another product each time."""

    def matmat(self, V):
        self.__dict__["calls"] = self.__dict__.get("calls", 0) + 1
        return self.matrix @ V * (1 + 1e-14 * self.__dict__["calls"])


@pytest.mark.parametrize(
    ("twin", "identity"),
    [
        (WrongSign, "C.quadratic_form(v) = v^T C v"),
        (WrongScale, "C.trace() = sum of the diagonal"),
        (Transposed, "C.apply_along(X, 1) = C on dimension 1 of X"),
        (Stale, "C = C^T"),
        (Rounds, "C @ v = the matrix times v"),
        (TakesAll, "C @ x refuses x of"),
        (WritesToItsArgument, "C @ V leaves V as it is"),
        (OwnProduct, "C @ V inside autocast = C @ V"),
        (Unfrozen, "repeated products are the same"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_broken_operators(twin, identity):
    def make(d):
        M = d.symmetric(d.integer(2, 4))
        return twin(M), M

    with broken(identity) as caught:
        check_operator(draws().map(make), examples=10)
    assert twin.__name__ in caught.value.subject
    assert twin.__name__ in caught.value.example


def test_an_operator_that_is_not_symmetric():
    with broken("C = C^T"):
        check_operator(Matrix(torch.tensor([[1.0, 2.0], [0.0, 1.0]])))


def test_an_operator_that_is_another_matrix():
    with broken("C @ v = the matrix times v"):
        check_operator(DenseOperator(torch.eye(2)), dense=2.0 * torch.eye(2))


def test_an_operator_that_claims_to_be_semidefinite():
    check_operator(DenseOperator(-torch.eye(2)))
    with broken("no eigenvalue is negative"):
        check_operator(DenseOperator(-torch.eye(2)), semidefinite=True)


@dataclass(frozen=True, eq=False, repr=False)
class OfLowRank(LinearOperator):
    """u u^T with a rule of its own for the inverse."""

    u: torch.Tensor
    size = property(lambda self: len(self.u))
    dtype = property(lambda self: self.u.dtype)

    def matmat(self, V):
        return self.u.outer(self.u @ V)


class WithoutComplement(OfLowRank):
    pass


@damped_inverse.register(WithoutComplement)
def _(operator, damping):
    u = operator.u
    weight = 1 / (u @ u * (u @ u + damping))
    return LowRank(u.unsqueeze(1), weight.reshape(1), torch.zeros_like(u))


def test_an_inverse_without_the_orthogonal_complement():
    check_operator(draws().map(lambda d: OfLowRank(d.normal(3))), semidefinite=True, examples=3)
    with broken("damped_inverse(C, lambda) @ (C + lambda I) v = v"):
        check_operator(draws().map(lambda d: WithoutComplement(d.normal(3))), examples=3)


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
        key = (id(evaluation.objective.model), evaluation.examples, float(evaluation.outputs.numel()))
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


@pytest.mark.parametrize(
    ("twin", "claim", "identity"),
    [
        (Half(GGN()), ON_DIAGONAL, "C with l2 + 0.7 = C + 0.7 I"),
        (Negative(GGN()), ON_BLOCKS, "no eigenvalue is negative"),
        (Swapped(GGN()), ONE_EXAMPLE, "C = the dense matrix that it is exact for"),
        (TwiceTheTerm(GGN()), EVERYWHERE, "C with l2 + 0.7 = C + 0.7 I"),
        (CountsBatches(GGN()), ON_DIAGONAL, "C follows the reduction"),
        (ForgetsTheReduction(GGN()), ON_DIAGONAL, "estimate_over(batches) = estimate of all of them at once"),
        (Cached(GGN()), EVERYWHERE, "after the parameters have moved, the estimate is that at the new ones"),
        (BiasedSample(Fisher(samples=2)), EVERYWHERE, "the mean over random draws = the dense matrix"),
        (IgnoresTheGenerator(Fisher()), EVERYWHERE, "the same generator gives the same estimate"),
        (WritesGradients(GGN()), ON_DIAGONAL, "an estimate leaves the gradient of"),
        (LeavesHooks(GGN()), ON_DIAGONAL, "an estimate leaves the hooks of the model as it was"),
        (Diagonal(GGN()), EVERYWHERE, "C = the dense matrix that it is exact for"),
        (KFAC(GGN()), ON_BLOCKS, "C = the dense matrix that it is exact for"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Diagonal | Exact | Dense | KFAC) else None,
)
def test_broken_approximations(twin, claim, identity):
    with broken(identity) as caught:
        check_approximation(twin, exact_on=claim, examples=15, draws=100)
    assert type(twin).__name__ in caught.value.subject


class Row(nn.Module):
    """A linear layer with another layout of the weight, as a third party has it."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(d_in, d_out)), nn.Parameter(torch.randn(d_out))

    def forward(self, x):
        return x @ self.weight + self.bias


class RowRule(LayerRule):
    def inputs(self, module, x):
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def output_gradients(self, module, g):
        return g.reshape(g.shape[0], -1, g.shape[-1])

    def weight_matrix(self, module, weight):
        return weight.T


def variant(name, **methods):
    """A module class of its own with a rule that is the right one but for some methods."""
    kind = type(name, (Row,), {})
    register(kind, type(f"{name}Rule", (RowRule,), methods)())
    return kind


REBUILT = "sum_t g_t a_t^T = J_n^T v of every example n"


def first_alone(self, module, x):
    return RowRule.inputs(self, module, x[:1]).expand(len(x), -1, -1)


def mean_of_positions(self, module, x):
    return x.mean(1, keepdim=True).expand_as(x)


LAYERS = (
    variant("RowOfHalfInputs", inputs=lambda self, module, x: 0.5 * x),
    variant("RowOfSign", output_gradients=lambda self, module, g: -g),
    variant("RowOfFlatWeight", weight_matrix=lambda self, module, w: w.reshape(w.shape[1], -1)),
    variant("RowOfMeanPositions", inputs=mean_of_positions),
    variant("RowOfOneExample", inputs=first_alone),
)


def test_the_right_rule_passes():
    check_layer(variant("RightRow", output_gradients=RowRule.output_gradients)(3, 2), torch.randn(4, 3))


@pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.__name__)
def test_broken_layer_rules(kind):
    with broken(REBUILT) as caught:
        check_layer(kind(3, 2), torch.randn(4, 2, 3))
    assert kind.__name__ in caught.value.subject


def test_a_rule_with_a_stale_cache():
    kept = {}

    def inputs(self, module, x):
        return kept.setdefault(x.shape, RowRule.inputs(self, module, x))

    with broken(f"{REBUILT}, called twice"):
        check_layer(variant("RowOfTheFirstCall", inputs=inputs)(3, 2), torch.randn(4, 3))


def test_a_module_without_a_rule():
    with broken("every parameter belongs to a layer"):
        check_layer(nn.PReLU(2), torch.randn(3, 2))


def without_damping(C, damping):
    return damped_inverse(C, 1e-9)


def half_the_damping(C, damping):
    return damped_inverse(C, 0.5 * damping)


def of_the_range_alone(C, damping):
    """Inverts on the range of C, and gives zero on the orthogonal complement."""
    e, Q = torch.linalg.eigh(C.to_dense())
    inverse = torch.where(e > 1e-9 * e.max(), 1 / (e + damping), 0.0)
    return DenseOperator((Q * inverse) @ Q.T)


def wrong_sign(C, damping):
    return -damped_inverse(C, damping)


CACHE = {}


def stale(C, damping):
    """Keeps the inverse of an operator for all dampings."""
    key = (id(C), C)
    if key not in CACHE:
        CACHE.clear()
        CACHE[key] = damped_inverse(C, damping)
    return CACHE[key]


def silent(C, damping):
    """Never says that it cannot solve: a pseudo-inverse of what is finite."""
    M = C.to_dense().nan_to_num() + damping * torch.eye(C.size, dtype=C.dtype)
    if not 0 < damping < float("inf"):
        raise ValueError(f"damping must be positive and finite, got {damping}.")
    return DenseOperator(torch.linalg.pinv(M))


def of_any_sign(C, damping):
    if not 0 < damping < float("inf"):
        raise ValueError(f"damping must be positive and finite, got {damping}.")
    M = C.to_dense()
    if not M.isfinite().all():
        raise ValueError("the operator has entries that are not finite")
    return DenseOperator(torch.linalg.inv(M + damping * torch.eye(C.size, dtype=C.dtype)))


def first_column_alone(C, damping):
    X = damped_inverse(C, damping)
    return MatrixFree(lambda V: (X @ V[:, :1]).expand_as(V).clone(), C.size, C.dtype)


def unchecked(C, damping):
    return damped_inverse(C, abs(damping))


INVERTS = "X @ b = (C + lambda I)^-1 b"


@pytest.mark.parametrize(
    ("twin", "identity"),
    [
        (without_damping, "(C + lambda I)^-1 b"),
        (half_the_damping, INVERTS),
        (of_the_range_alone, INVERTS),
        (wrong_sign, INVERTS),
        (stale, "a new damping counts"),
        (first_column_alone, "X @ B = (C + lambda I)^-1 B, column by column"),
        (silent, "that are not finite is refused"),
        (of_any_sign, "C + lambda I with a negative eigenvalue is refused"),
        (unchecked, "the damping -1.0 is refused by name"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_broken_solvers(twin, identity):
    with broken(identity) as caught:
        check_solver(twin)
    assert twin.__name__ in caught.value.subject


def test_a_solver_that_takes_any_sign_may_say_so():
    check_solver(of_any_sign, refuses_indefinite=False, examples=5)


@pytest.mark.filterwarnings("ignore::curvlib.solvers.ConvergenceWarning")
def test_a_solver_that_stops_early():
    with broken(INVERTS):
        check_solver(CG(max_iterations=1))


class Squares(OutputLoss):
    """Half the squared error: what the broken ones differ from."""

    def value(self, outputs, targets):
        return 0.5 * (outputs - targets).square().sum() * self.scale(outputs, targets)

    def sample_gradient(self, outputs, targets, generator=None):
        draw = torch.randn(outputs.shape, dtype=outputs.dtype, generator=generator)
        return draw * self.scale(outputs, targets).sqrt()


class GradientOfSum(Squares):
    def gradient(self, outputs, targets):
        return (outputs - targets).detach()


class WrongProduct(Squares):
    def linearize(self, outputs, targets):
        return lambda V: 2.0 * V * self.scale(outputs, targets)


class WrongRoot(Squares):
    def hessian_sqrt(self, outputs, targets):
        yield from (0.5**0.5 * v for v in super().hessian_sqrt(outputs, targets))


class BiasedDraws(Squares):
    """The reduction's factor in place of its root."""

    def sample_gradient(self, outputs, targets, generator=None):
        draw = torch.randn(outputs.shape, dtype=outputs.dtype, generator=generator)
        return draw * self.scale(outputs, targets)


class AtTrainingLabels(Squares):
    def sample_gradient(self, outputs, targets, generator=None):
        return (outputs - targets) * self.scale(outputs, targets).sqrt()


class GlobalDraws(Squares):
    def sample_gradient(self, outputs, targets, generator=None):
        return torch.randn_like(outputs) * self.scale(outputs, targets).sqrt()


class MeanOverElements(Squares):
    def value(self, outputs, targets):
        error = 0.5 * (outputs - targets).square()
        return error.sum() if self.additive else error.mean()


class ExamplesMeet(Squares):
    def value(self, outputs, targets):
        return super().value(outputs, targets) + outputs.sum().square() * self.scale(outputs, targets)


class Transposes(Squares):
    def linearize(self, outputs, targets):
        return lambda V: V.flip(1) * self.scale(outputs, targets)


@pytest.mark.parametrize(
    ("twin", "identity"),
    [
        (GradientOfSum, "gradient = dL/dz"),
        (WrongProduct, "linearize(z, y)(V) = H V"),
        (Transposes, "linearize(z, y)(V) = H V"),
        (WrongRoot, "sum_k v_k v_k^T = H_n"),
        (BiasedDraws, "E[v_n v_n^T] = H_n for drawn gradients v (mean)"),
        (AtTrainingLabels, "drawn gradients have mean zero"),
        (GlobalDraws, "the same generator gives the same draw"),
        (MeanOverElements, "sum = batch_weight x mean"),
        (ExamplesMeet, "examples do not meet"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_broken_losses(twin, identity):
    with broken(identity) as caught:
        check_loss(LossCase(twin.__name__, lambda z, r: twin(reduction=r), torch.randn_like), draws=1000)
    assert twin.__name__ in caught.value.subject


def test_the_right_loss_passes():
    check_loss(LossCase("squares", lambda z, r: Squares(reduction=r), torch.randn_like), draws=500, examples=5)


def test_a_loss_that_claims_to_have_a_likelihood():
    def quartic(z, reduction):
        def function(z, y):
            return (z - y).pow(4).sum() / (len(z) if reduction == "mean" else 1)

        return AutogradLoss(function, reduction=reduction)

    with broken("sample_gradient(z, y, generator)"):
        check_loss(LossCase("quartic", quartic, torch.randn_like))


def test_the_smallest_input_is_small():
    with broken("C.trace() = sum of the diagonal") as caught:
        check_operator(draws().map(lambda d: WrongScale(d.symmetric(d.integer(2, 9)))), examples=20)
    smallest = re.search(r"matrix=tensor\(\[(.*?)\]\]", caught.value.example, re.DOTALL)[1]
    assert smallest.count("[") == 2
    assert "expected tensor" in str(caught.value)
    assert "got " in str(caught.value)


def test_random_numbers_are_as_before():
    layer, state = nn.Linear(2, 1), torch.get_rng_state()
    check_operator(draws().map(lambda d: Matrix(d.symmetric(2))), examples=2)
    check_layer(layer, torch.ones(3, 2))
    check_solver(damped_inverse, examples=1)
    check_approximation(Diagonal(GGN()), examples=1)
    assert torch.equal(torch.get_rng_state(), state)
