"""Newton steps with curvatures that may be indefinite: more damping where it is needed, or a refusal."""

import copy
from itertools import pairwise
from math import isnan

import pytest
import torch
from optimizer_cases import assert_same, least_squares, rosenbrock, small_network
from torch import nn

from curvlib import GGN, Hessian, Objective
from curvlib.approximations import KFAC, BlockDiagonal, Dense, Exact, HutchinsonDiagonal
from curvlib.operators import Dense as DenseOperator
from curvlib.optimizers import (
    BacktrackingLineSearch,
    CurvatureScaling,
    FixedLength,
    FixedScaling,
    LayerDamping,
    ModelDescent,
    ModelRescaling,
    NormConstraint,
    PreconditionedGradient,
    SecondOrderOptimizer,
    StrongWolfe,
    gauss_newton,
    levenberg_marquardt,
    minimize,
)
from curvlib.output_losses import AutogradLoss
from curvlib.solvers import (
    CG,
    MINRES,
    BlockwiseDamping,
    ConstantDamping,
    CustomDamping,
    DampedNewton,
    DampingControl,
    DampingState,
    Descent,
    DeterminismCheck,
    ExponentialDamping,
    LevenbergMarquardt,
    LinearDamping,
    NotPositiveDefiniteError,
    SlopeRatio,
    SolveError,
    TrustRegion,
    damped_inverse,
)

SOLVERS = {"direct": damped_inverse, "cg": CG()}


class Saddle(nn.Module):
    """(x, y) -> x^2 - y^2 / 2 + y^4 / 4: a saddle point at 0, minima at (0, -1) and (0, 1)."""

    def __init__(self, start):
        super().__init__()
        self.x = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self, _):
        x, y = self.x
        return (x**2 - y**2 / 2 + y**4 / 4).reshape(1, 1)


def saddle(start):
    batch = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    return Objective(Saddle(start), AutogradLoss(lambda z, y: z.sum())), batch


def newton(objective, control, solver=damped_inverse, curvature=None, **parts):
    return SecondOrderOptimizer(
        objective,
        direction=ModelDescent(curvature=curvature or Dense(Hessian()), descent=DampedNewton(solver=solver)),
        damping=control,
        **{"step_rule": FixedLength(), **parts},
    )


class Falling(DampingControl):
    """A control of one's own, which follows the ratio and knows no other damping."""

    def start(self, *, gradient_curvature=None):
        return DampingState(damping=1.0)

    def update(self, state, ratio, *, mean_curvature=None):
        return DampingState(damping=0.5 * state.damping, step=state.step + 1)


@pytest.mark.parametrize(
    "control",
    [
        ConstantDamping(1e6),
        ExponentialDamping(initial=1.0, final=0.5, steps=3),
        LinearDamping(initial=1.0, final=0.5, steps=3),
        CustomDamping(lambda k: 1.0 + k),
        LevenbergMarquardt(increase=1.0),
        Falling(),
    ],
    ids=lambda control: type(control).__name__,
)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("curvature", [Dense(Hessian()), Exact(Hessian()), HutchinsonDiagonal(GGN())], ids=str)
def test_a_control_that_does_not_raise_the_damping_is_refused(curvature, solver, control):
    objective, _ = small_network()
    for rule in (FixedLength(), BacktrackingLineSearch()):
        with pytest.raises(ValueError, match=r"may be indefinite, and .* does not raise the damping"):
            newton(objective, control, solver, curvature, step_rule=rule)
    newton(objective, control, solver, Dense(GGN()))
    newton(objective, LevenbergMarquardt(), solver, curvature)


def test_presets_with_the_hessian_are_refused_unless_the_damping_rises():
    objective, _ = small_network()
    scaling = FixedScaling(torch.ones(objective.layout.size, dtype=torch.float64))
    with pytest.raises(ValueError, match="does not raise the damping"):
        gauss_newton(objective, curvature=Dense(Hessian()), scaling=scaling)
    with pytest.raises(ValueError, match=r"LevenbergMarquardt\(\), which raises the damping"):
        PreconditionedGradient(curvature=Dense(Hessian()))
    levenberg_marquardt(objective, curvature=Dense(Hessian()), scaling=scaling, control=LevenbergMarquardt())
    with pytest.raises(ValueError, match="CurvatureScaling takes roots"):
        levenberg_marquardt(objective, curvature=Dense(Hessian()), control=LevenbergMarquardt())
    assert CurvatureScaling().needs_definite


@pytest.mark.parametrize(("increase", "factor"), [(1.2, 2.0), (4.0, 4.0)])
def test_an_indefinite_system_is_a_rejected_step_that_raises_the_damping(increase, factor):
    # H = diag(2, 3 y^2 - 1) with the least eigenvalue -0.97 at y = 0.1
    objective, batch = saddle([0.5, 0.1])
    optimizer = newton(objective, LevenbergMarquardt(initial=0.1, increase=increase))
    before, damping = copy.deepcopy(optimizer.state_dict()), 0.1
    while damping < 0.97:
        result = optimizer.step(batch)
        assert (result.damping, result.accepted) == (damping, False)
        assert isnan(result.ratio)
        assert isnan(result.predicted)
        assert (result.actual, result.step_norm, result.learning_rate, result.iterations) == (None, 0.0, 0.0, 0)
        assert "eigenvalue -0.97" in result.failure
        assert result.gradient_norm == 1.0
        assert objective.parameter_vector().tolist() == [0.5, 0.1]
        damping *= factor
        assert optimizer.damping == damping
    after = copy.deepcopy(optimizer.state_dict())
    assert after["control"]["damping"]["rejected"] == after["control"]["damping"]["step"] > 0
    for state in (before, after):
        state.pop("control")
    assert_same(after, before)
    result = optimizer.step(batch)
    assert result.accepted
    assert result.failure is None
    # -(H + lambda I)^-1 g with g = (2 x, y^3 - y)
    expected = [0.5 - 1.0 / (2 + damping), 0.1 + 0.099 / (damping - 0.97)]
    assert objective.parameter_vector().tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("curvature", [Dense(Hessian()), Exact(Hessian())], ids=str)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_minima_are_found_from_where_the_hessian_is_indefinite(solver, curvature):
    control = LevenbergMarquardt(initial=1e-3, increase=4.0, decrease=0.25, interval=1)
    objective, batch = saddle([0.5, 1e-3])
    optimizer = newton(objective, control, solver, curvature, ratio=SlopeRatio())
    assert minimize(optimizer, batch).converged
    torch.testing.assert_close(objective.parameter_vector(), torch.tensor([0.0, 1.0]).double(), rtol=0, atol=1e-6)
    objective, batch = least_squares(rosenbrock, [0.0, 1.0])  # its Hessian has the entry -398 there
    optimizer = newton(objective, control, solver, curvature, ratio=SlopeRatio())
    assert minimize(optimizer, batch).converged
    torch.testing.assert_close(objective.parameter_vector(), torch.ones(2).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("curvature", [BlockDiagonal(Hessian()), 0.5 * Dense(Hessian())], ids=["blocks", "scaled"])
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_indefinite_blocks_and_multiples_raise_the_damping_as_well(solver, curvature):
    objective, batch = small_network()
    optimizer = newton(objective, LevenbergMarquardt(initial=1e-3, interval=1, increase=4.0), solver, curvature)
    results = [optimizer.step(batch) for _ in range(20)]
    assert any(result.failure for result in results) == (solver is damped_inverse)
    assert float(objective.value(batch)) < 0.8 * results[0].loss


def test_no_step_of_conjugate_gradients_is_no_step():
    # The gradient is the first direction, and it has negative curvature: -0.97 y^2 against 2 x^2.
    objective, batch = saddle([1e-3, 0.1])
    optimizer = newton(objective, LevenbergMarquardt(initial=0.1), CG())
    result = optimizer.step(batch)
    assert "no positive curvature" in result.failure
    assert (result.accepted, optimizer.damping) == (False, 0.2)


def test_the_error_comes_where_there_is_no_more_damping():
    objective, batch = saddle([0.5, 0.1])
    optimizer = newton(objective, LevenbergMarquardt(initial=0.1, increase=2.0, ceiling=0.3))
    assert [optimizer.step(batch).failure is not None for _ in range(2)] == [True, True]
    assert optimizer.damping == 0.3
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(NotPositiveDefiniteError, match=r"eigenvalue -0\.97"):
        optimizer.step(batch)
    assert_same(optimizer.state_dict(), before)


def test_what_no_damping_heals_is_an_error_at_once():
    def solver(operator, damping):
        raise SolveError("no structure")

    objective, batch = small_network()
    optimizer = newton(objective, LevenbergMarquardt(), solver, Dense(GGN()))
    with pytest.raises(SolveError, match="no structure"):
        optimizer.step(batch)
    assert optimizer.damping == 1.0


def test_a_radius_beside_newton_steps_is_refused_for_its_own_reason():
    with pytest.raises(ValueError, match="would control nothing"):
        newton(small_network()[0], None, radius=TrustRegion())


class SaddleFree:
    """(|C| + lambda I)^-1, positive definite whatever C is."""

    takes_indefinite = gives_descent = True

    def __call__(self, operator, damping):
        e, Q = torch.linalg.eigh(operator.to_dense())
        return DenseOperator(Q @ torch.diag(1 / (e.abs() + damping)) @ Q.T)


def gradient_step(solver, curvature=None):
    return PreconditionedGradient(curvature=curvature or Dense(Hessian()), solver=solver, fraction=1.0)


@pytest.mark.parametrize("rule", [FixedLength(), BacktrackingLineSearch(), NormConstraint(constraint=0.1)], ids=str)
def test_inverses_of_indefinite_systems_that_go_downhill_need_no_more_damping(rule):
    for direction in (
        gradient_step(SaddleFree()),
        gradient_step(DeterminismCheck(solver=SaddleFree())),
        gradient_step(LayerDamping({}, solver=BlockwiseDamping(factors=torch.ones(2), solver=SaddleFree()))),
        ModelDescent(curvature=Dense(Hessian()), descent=DampedNewton(solver=SaddleFree())),
    ):
        objective, batch = saddle([0.5, 0.1])
        optimizer = SecondOrderOptimizer(objective, direction=direction, step_rule=rule, damping=ConstantDamping(0.1))
        for _ in range(30):
            assert optimizer.step(batch).accepted
        torch.testing.assert_close(objective.parameter_vector(), torch.tensor([0.0, 1.0]).double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "direction",
    [gradient_step(MINRES()), ModelDescent(curvature=Dense(Hessian()), descent=DampedNewton(solver=MINRES()))],
    ids=["gradient", "model"],
)
@pytest.mark.parametrize(
    "rule",
    [FixedLength(), BacktrackingLineSearch(), StrongWolfe(), ModelRescaling(matrix=Hessian(), fraction=1.0)],
    ids=lambda rule: type(rule).__name__,
)
def test_a_solver_of_indefinite_systems_leads_to_a_minimum_where_the_damping_rises(rule, direction):
    # At the start the undamped step leads uphill, to the saddle point.
    objective, batch = saddle([1e-3, 0.5])
    optimizer = SecondOrderOptimizer(
        objective,
        direction=direction,
        step_rule=rule,
        damping=LevenbergMarquardt(initial=0.1, interval=1, increase=2.0, decrease=0.5),
    )
    results = [optimizer.step(batch) for _ in range(30)]
    assert not results[0].accepted
    assert results[1].damping == 0.2
    assert all(after.loss <= before.loss for before, after in pairwise(results))
    torch.testing.assert_close(objective.parameter_vector(), torch.tensor([0.0, 1.0]).double(), rtol=0, atol=1e-6)


class Uphill(Descent):
    """The gradient."""

    has_radius = False

    def solve(self, problem):
        return problem.answer(problem.gradient, on_boundary=False, multiplier=None)


@pytest.mark.parametrize(
    "control", [ConstantDamping(1.0), LevenbergMarquardt(increase=2.0)], ids=["constant", "adaptive"]
)
def test_no_step_under_a_norm_constraint_is_no_agreement_with_the_model(control):
    objective, batch = small_network()
    before = objective.parameter_vector()
    optimizer = SecondOrderOptimizer(
        objective,
        direction=ModelDescent(curvature=Exact(GGN()), descent=Uphill()),
        step_rule=NormConstraint(),
        damping=control,
    )
    result = optimizer.step(batch)
    assert (result.accepted, result.learning_rate) == (False, 0.0)
    assert torch.equal(objective.parameter_vector(), before)
    if isinstance(control, ConstantDamping):
        assert (result.ratio, optimizer.damping) == (None, 1.0)
    else:
        assert isnan(result.ratio)
        assert (result.actual, optimizer.damping) == (0.0, 2.0)


def test_an_indefinite_model_of_the_rescaling_is_refused_where_the_damping_does_not_rise():
    objective, _ = small_network()
    parts = {"direction": gradient_step(damped_inverse, KFAC(GGN())), "step_rule": ModelRescaling(matrix=Hessian())}
    with pytest.raises(ValueError, match=r"the model of ModelRescaling.* may be indefinite"):
        SecondOrderOptimizer(objective, damping=ConstantDamping(1.0), **parts)
    SecondOrderOptimizer(objective, damping=LevenbergMarquardt(), **parts)
    SecondOrderOptimizer(objective, damping=ConstantDamping(1.0), **{**parts, "step_rule": ModelRescaling()})
