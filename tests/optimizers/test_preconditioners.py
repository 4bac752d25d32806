"""Preconditioners of Hessian-free steps: what they are, when they are made anew, and what a rejected step restores."""

import copy
from dataclasses import replace

import pytest
import torch
from optimizer_cases import assert_same, resume, small_network
from preconditioned_cases import STRATEGIES
from torch import nn

from curvlib import GGN, EmpiricalFisher, Objective
from curvlib.approximations import KFAC, Dense, Diagonal, Exact
from curvlib.operators import Dense as DenseOperator
from curvlib.operators import Diagonal as DiagonalOperator
from curvlib.optimizers import (
    BacktrackingLineSearch,
    FixedLength,
    ModelDescent,
    PreconditionedGradient,
    Preconditioner,
    SecondOrderOptimizer,
    TruncatedNewton,
    hessian_free,
)
from curvlib.solvers import (
    CG,
    MINRES,
    ConstantDamping,
    DampedNewton,
    Dogleg,
    LevenbergMarquardt,
    ResidualTest,
    SolveError,
    Steihaug,
    TrustRegion,
    TwoDimensionalSubspace,
    damped_inverse,
)
from curvlib.spectra import DampedPower, NoStructureError

TIGHT = CG(max_iterations=500, stop=ResidualTest(relative=1e-12), check_every=1)


def newton(objective, preconditioner, *, damping=0.1, **options):
    control = ConstantDamping(damping) if isinstance(damping, float) else damping
    direction = TruncatedNewton(**{"cg": TIGHT, "warm_start": 0.0, "preconditioner": preconditioner, **options})
    return SecondOrderOptimizer(objective, direction=direction, step_rule=FixedLength(), damping=control)


def step_of(optimizer, batch, **options):
    before = optimizer.objective.parameter_vector()
    return optimizer.step(batch, **options), optimizer.objective.parameter_vector() - before


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_solution_is_that_without_a_preconditioner(name):
    results = []
    for preconditioner in (None, STRATEGIES[name]):
        objective, batch = small_network()
        optimizer = newton(objective, preconditioner)
        results.append([step_of(optimizer, batch) for _ in range(3)])
    for (plain, step), (fast, other) in zip(*results, strict=True):
        torch.testing.assert_close(other, step, rtol=1e-6, atol=1e-9)
        assert plain.iterations != fast.iterations  # it does take part


def test_the_exact_inverse_solves_in_one_iteration():
    objective, batch = small_network()
    assert newton(objective, Preconditioner(curvature=Dense(GGN()))).step(batch).iterations <= 2
    assert newton(objective, Dense(GGN())).step(batch).iterations <= 2
    assert newton(objective, None).step(batch).iterations > 10


def test_martens_preconditioner_is_the_power_of_the_mean_of_squared_gradients():
    objective, (x, y) = small_network()
    squares = [objective.at((x[n : n + 1], y[n : n + 1])).gradient() for n in range(len(x))]
    # without the l2 term of each single example's objective, which the diagonal has once, as eta
    theta = objective.parameter_vector()
    mean = torch.stack([(g - objective.l2 * theta).square() for g in squares]).mean(0)
    optimizer = newton(objective, Preconditioner.martens())
    made = []
    solver = optimizer._direction._preconditioner._solver
    optimizer._direction._preconditioner._solver = lambda C, damping: made.append(solver(C, damping)) or made[-1]
    optimizer.step((x, y))
    torch.testing.assert_close(made[0].diagonal(), (mean + objective.l2 + 0.1) ** -0.75, rtol=1e-9, atol=0)


def test_the_power_is_a_solver():
    torch.manual_seed(0)
    M = torch.randn(5, 5, dtype=torch.float64)
    C = DenseOperator(M @ M.T)
    root = DampedPower(0.5)(C, 0.3).to_dense()
    torch.testing.assert_close(root @ root, torch.linalg.inv(M @ M.T + 0.3 * torch.eye(5, dtype=torch.float64)))
    torch.testing.assert_close(DampedPower(1)(C, 0.3).to_dense(), damped_inverse(C, 0.3).to_dense())
    with pytest.raises(SolveError, match="singular"):
        DampedPower(0.5)(DenseOperator(torch.zeros(2, 2)), 0.0)
    with pytest.raises((TypeError, ValueError), match="power"):
        DampedPower(float("nan"))


def counted(preconditioner, steps, **changes):
    """How often statistics and inverses were made in some steps."""
    inverses = []

    class Counting:
        def __call__(self, C, damping):
            inverses.append(damping)
            return damped_inverse(C, damping)

    objective, batch = small_network()
    counting = Preconditioner(curvature=preconditioner, solver=Counting(), **changes)
    optimizer = newton(objective, counting)
    for _ in range(steps):
        optimizer.step(batch)
    return optimizer._direction._preconditioner._average.updates, len(inverses)


def test_statistics_and_inverses_come_as_often_as_asked():
    assert counted(KFAC(GGN()), 9) == (9, 9)
    assert counted(KFAC(GGN()), 9, statistics_every=4) == (3, 9)
    # the first three, then steps number 3 and 6
    assert counted(KFAC(GGN()), 9, inverse_every=3) == (9, 5)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_rejected_step_restores_the_preconditioner(name):
    objective, batch = small_network()
    optimizer = newton(objective, STRATEGIES[name], damping=LevenbergMarquardt(initial=0.1, interval=1))
    for _ in range(2):
        optimizer.step(batch)
    before = copy.deepcopy(optimizer._direction.state_dict()["preconditioner"])
    optimizer.step_rule = NeverTaken()
    assert not optimizer.step(batch).accepted
    after = optimizer._direction.state_dict()["preconditioner"]
    if name == "anew":
        assert before == after == {}
        return
    assert (before.pop("rejected"), after.pop("rejected")) == (False, True)
    assert_same(after, before)
    optimizer.step_rule = FixedLength()
    optimizer.step(batch)
    assert optimizer._direction.state_dict()["preconditioner"]["average"]["updates"] == 3


class NeverTaken(BacktrackingLineSearch):
    def choose(self, situation, proposal, previous):
        choice = super().choose(situation, proposal, previous)
        return type(choice)(step=0 * choice.step, prediction=choice.prediction, learning_rate=0.0)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(name):
    def start():
        objective, batch = small_network()
        return hessian_free(objective, preconditioner=STRATEGIES[name], curvature_fraction=0.5), batch

    optimizer, batch = start()
    for _ in range(3):
        optimizer.step(batch)
    other, _ = start()
    resume(optimizer, other)
    for _ in range(3):
        assert optimizer.step(batch) == other.step(batch)
    assert torch.equal(optimizer.objective.parameter_vector(), other.objective.parameter_vector())


def test_a_run_goes_on_from_a_checkpoint_after_a_rejected_step():
    strategy = Preconditioner(curvature=KFAC(GGN()), decay=0.9, inverse_every=100)

    def start():
        objective, batch = small_network()
        return newton(objective, strategy, damping=LevenbergMarquardt(initial=0.1, interval=1, increase=1.5)), batch

    optimizer, batch = start()
    for _ in range(4):
        optimizer.step(batch)
    optimizer.step_rule, rule = NeverTaken(), optimizer.step_rule
    assert not optimizer.step(batch).accepted
    optimizer.step_rule = rule
    other, _ = start()
    other.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        other.objective.layout.write(other.objective.parameters, optimizer.objective.parameter_vector())
    made = []
    for each in (optimizer, other):
        state = each._direction._preconditioner
        solver = state._solver
        state._solver = lambda C, damping, solver=solver: made.append(damping) or solver(C, damping)
    assert optimizer.step(batch) == other.step(batch)
    # both make the inverse anew, which nothing but the rejected step asks for
    assert len(made) == 2
    assert torch.equal(optimizer.objective.parameter_vector(), other.objective.parameter_vector())


def test_a_state_of_another_preconditioner_is_refused():
    objective, batch = small_network()
    optimizer = hessian_free(objective, preconditioner=STRATEGIES["kfac"])
    optimizer.step(batch)
    for other in (None, STRATEGIES["ekfac"], KFAC(GGN())):
        with pytest.raises(ValueError, match="direction"):
            hessian_free(small_network()[0], preconditioner=other).load_state_dict(optimizer.state_dict())


def test_equal_fractions_are_the_same_examples():
    objective, batch = small_network()
    drawn = []
    curvature = Watching(drawn, GGN())
    optimizer = newton(objective, Preconditioner(curvature=curvature, fraction=0.5), fraction=0.5, curvature=curvature)
    optimizer.step(batch)
    assert len(drawn) == 2
    assert drawn[0] is drawn[1]
    optimizer = newton(objective, Preconditioner(curvature=curvature, fraction=0.25), fraction=0.5, curvature=curvature)
    optimizer.step(batch)
    assert [len(evaluation.targets) for evaluation in drawn[2:]] == [20, 10]


class Watching(Diagonal):
    """Notes the evaluations that it is estimated on."""

    def __init__(self, seen, matrix):
        super().__init__(matrix)
        object.__setattr__(self, "seen", seen)

    def statistics(self, evaluation, generator=None):
        self.seen.append(evaluation)
        return super().statistics(evaluation, generator)


def test_what_cannot_be_a_preconditioner_is_refused():
    objective, batch = small_network()
    for wrong in ("kfac", damped_inverse, DampedPower(0.75)):
        with pytest.raises(TypeError, match="preconditioner"):
            hessian_free(objective, preconditioner=wrong)
    with pytest.raises(TypeError, match="Preconditioner needs curvature"):
        Preconditioner(curvature=GGN())
    with pytest.raises(ValueError, match="inverse_every"):
        Preconditioner(curvature=KFAC(GGN()), inverse_every=0)
    additive = Objective(objective.model, nn.CrossEntropyLoss(reduction="sum"))
    with pytest.raises(ValueError, match="Preconditioner cannot take curvature from a part"):
        hessian_free(additive, preconditioner=Preconditioner(curvature=KFAC(GGN()), fraction=0.5))
    powers = Preconditioner(curvature=Exact(EmpiricalFisher()), solver=DampedPower(0.75))
    with pytest.raises(NoStructureError):
        newton(objective, powers).step(batch)


def test_the_solver_of_a_truncated_newton_step_has_to_be_conjugate_gradients():
    for cg in (3, None, MINRES()):
        with pytest.raises(TypeError, match="TruncatedNewton needs cg to be conjugate gradients"):
            TruncatedNewton(cg=cg)


def test_a_preconditioner_of_conjugate_gradients_serves_all_steps():
    objective, batch = small_network()
    exact = damped_inverse(Dense(GGN()).estimate(objective.at(batch)), 0.1)
    optimizer = newton(objective, None, cg=replace(TIGHT, preconditioner=exact))
    assert optimizer.step(batch).iterations <= 2
    assert optimizer.step(batch).iterations > 2  # C is another, P is not
    assert float(objective.value(batch)) < float(small_network()[0].value(batch))


def test_a_second_preconditioner_is_refused():
    cg = CG(preconditioner=DiagonalOperator(torch.ones(3, dtype=torch.float64)))
    for other in (KFAC(GGN()), Preconditioner.martens()):
        with pytest.raises(ValueError, match="two preconditioners"):
            TruncatedNewton(cg=cg, preconditioner=other)


FIXED = {
    "truncated newton": lambda P: TruncatedNewton(cg=CG(preconditioner=P)),
    "gradient": lambda P: PreconditionedGradient(curvature=Exact(GGN()), solver=CG(preconditioner=P), fraction=1.0),
    "preconditioner": lambda P: TruncatedNewton(
        preconditioner=Preconditioner(curvature=KFAC(GGN()), solver=CG(preconditioner=P))
    ),
    "damped newton": lambda P: ModelDescent(
        curvature=Exact(GGN()), descent=DampedNewton(solver=MINRES(preconditioner=P))
    ),
    "dogleg": lambda P: ModelDescent(curvature=Exact(GGN()), descent=Dogleg(solver=CG(preconditioner=P))),
    "steihaug": lambda P: ModelDescent(curvature=Exact(GGN()), descent=Steihaug(preconditioner=P)),
    "plane": lambda P: ModelDescent(
        curvature=Exact(GGN()), descent=TwoDimensionalSubspace(steihaug=Steihaug(preconditioner=P))
    ),
}


@pytest.mark.parametrize("name", FIXED)
def test_a_preconditioner_of_another_size_is_refused_when_the_optimizer_is_made(name):
    objective, batch = small_network()
    size = objective.layout.size
    control = {"damping": ConstantDamping(0.1)}
    if name in ("dogleg", "steihaug", "plane"):
        control["radius"] = TrustRegion()
    with pytest.raises(ValueError, match=rf"on the D = {size} parameters, got Diagonal\(size=3"):
        SecondOrderOptimizer(
            objective,
            direction=FIXED[name](DiagonalOperator(torch.ones(3, dtype=torch.float64))),
            step_rule=FixedLength(),
            **control,
        )
    fitting = DiagonalOperator(torch.full((size,), 2.0, dtype=torch.float64))
    direction = FIXED[name](fitting)
    optimizer = SecondOrderOptimizer(objective, direction=direction, step_rule=FixedLength(), **control)
    assert optimizer.step(batch).accepted
