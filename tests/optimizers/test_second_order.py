"""SecondOrderOptimizer: composition, acceptance, resuming, and what each option changes."""

import copy
import io

import pytest
import torch
from optimizer_cases import assert_same, classification, linear_regression
from torch import nn

import curvlib
from curvlib import GGN, EmpiricalFisher, Fisher, Objective, UnsupportedLayerError
from curvlib.approximations import KFAC, BlockDiagonal, Dense, Diagonal, Exact, Identity
from curvlib.operators import Identity as IdentityOperator
from curvlib.optimizers import (
    BacktrackingLineSearch,
    FixedLength,
    ModelRescaling,
    NonFiniteLossError,
    PreconditionedGradient,
    SecondOrderOptimizer,
    TruncatedNewton,
    hessian_free,
    kfac,
)
from curvlib.solvers import (
    CG,
    ConstantDamping,
    LevenbergMarquardt,
    SolveError,
    UndampedRatio,
    damped_inverse,
)

PRESETS = [kfac, hessian_free]


def compose(objective, **parts):
    defaults = {
        "direction": PreconditionedGradient(curvature=Dense(GGN()), fraction=1.0),
        "step_rule": FixedLength(),
        "damping": ConstantDamping(1e-2),
    }
    return SecondOrderOptimizer(objective, **{**defaults, **parts})


def snapshot(objective):
    return objective.parameter_vector()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_train(preset, device):
    objective, batch = classification(device)
    optimizer = preset(objective)
    first = optimizer.step(batch)
    for _ in range(25):
        last = optimizer.step(batch)
    assert last.loss < 0.25 * first.loss
    assert all(parameter.device.type == device.type for parameter in objective.parameters)


@pytest.mark.parametrize(
    "curvature",
    [
        KFAC(Fisher()),
        KFAC(GGN()),
        Diagonal(EmpiricalFisher()),
        BlockDiagonal(GGN()),
        Dense(GGN()),
        Exact(GGN()),
        Identity(),
    ],
    ids=str,
)
@pytest.mark.parametrize("preset", PRESETS)
def test_any_curvature_can_be_swapped_in(preset, curvature):
    objective, batch = classification()
    optimizer = preset(objective, curvature=curvature)
    losses = [optimizer.step(batch).loss for _ in range(6)]
    assert losses[-1] < losses[0]


def test_one_damped_newton_step_solves_a_quadratic():
    objective, batch = linear_regression()
    optimizer = compose(objective, damping=ConstantDamping(0.0), step_rule=BacktrackingLineSearch())
    result = optimizer.step(batch)
    assert abs(result.ratio - 1) < 1e-9
    assert objective.at(batch).gradient().norm() < 1e-12


@pytest.mark.parametrize("rule", [ModelRescaling(fraction=1.0), FixedLength(), BacktrackingLineSearch()])
def test_the_undamped_ratio_is_one_on_quadratics_and_the_damping_falls(rule):
    objective, batch = linear_regression()
    control = LevenbergMarquardt(initial=1.0, decrease=0.5, increase=2.0, interval=1)
    optimizer = compose(objective, step_rule=rule, damping=control, ratio=UndampedRatio())
    dampings = []
    for _ in range(5):
        result = optimizer.step(batch)
        assert abs(result.ratio - 1) < 1e-6
        dampings.append(result.damping)
    assert dampings == [1.0, 0.5, 0.25, 0.125, 0.0625]


def test_rescaling_finds_the_exact_learning_rate_of_steepest_descent():
    objective, batch = linear_regression()
    evaluation = objective.at(batch)
    g, C = evaluation.gradient(), Dense(GGN()).estimate(evaluation).to_dense()
    direction = PreconditionedGradient(curvature=Identity(), fraction=1.0)
    optimizer = compose(
        objective, direction=direction, step_rule=ModelRescaling(fraction=1.0), damping=ConstantDamping(0.0)
    )
    result = optimizer.step(batch)
    expected = (g @ g) / (g @ C @ g) * (1 + 0.1)  # the proposal is -g / (1 + l2)
    assert result.learning_rate == pytest.approx(float(expected), rel=1e-9)


def test_momentum_makes_two_steps_at_least_as_good():
    results = {}
    for momentum in (True, False):
        objective, batch = linear_regression()
        direction = PreconditionedGradient(curvature=Identity(), fraction=1.0)
        rule = ModelRescaling(fraction=1.0, momentum=momentum)
        optimizer = compose(objective, direction=direction, step_rule=rule, damping=ConstantDamping(0.0))
        steps = [optimizer.step(batch) for _ in range(6)]
        results[momentum] = float(objective.value(batch))
        assert (steps[-1].momentum != 0) == momentum
    assert results[True] < results[False]


def test_fixed_length_scales_the_step():
    moves = []
    for rate in (1.0, 0.25):
        objective, batch = linear_regression()
        before = snapshot(objective)
        compose(objective, step_rule=FixedLength(learning_rate=rate)).step(batch)
        moves.append(snapshot(objective) - before)
    torch.testing.assert_close(moves[1], 0.25 * moves[0])


def test_fixed_momentum_adds_the_last_step():
    objective, batch = linear_regression()
    optimizer = compose(objective, step_rule=FixedLength(learning_rate=0.1, momentum=0.5))
    start = snapshot(objective)
    optimizer.step(batch)
    middle = snapshot(objective)
    evaluation = objective.at(batch)
    inverse = damped_inverse(Dense(GGN()).estimate(evaluation), 1e-2)
    expected = middle - 0.1 * (inverse @ evaluation.gradient()) + 0.5 * (middle - start)
    optimizer.step(batch)
    torch.testing.assert_close(snapshot(objective), expected, rtol=1e-6, atol=1e-8)


class Overshoot:
    """A solver that proposes steps far too long."""

    def __call__(self, operator, damping):
        return 1e3 * IdentityOperator(operator.size, dtype=operator.dtype)


def test_a_rejected_step_restores_the_parameters_bit_for_bit_and_raises_the_damping():
    objective, batch = classification()
    direction = PreconditionedGradient(curvature=KFAC(GGN()), solver=Overshoot())
    control = LevenbergMarquardt(initial=1.0, increase=4.0, interval=100)
    optimizer = compose(objective, direction=direction, damping=control)
    before = {key: value.clone() for key, value in objective.model.state_dict().items()}
    result = optimizer.step(batch)
    assert not result.accepted
    assert result.actual > 0
    assert all(torch.equal(value, before[key]) for key, value in objective.model.state_dict().items())
    assert optimizer.damping == 4.0


class Uphill:
    """A solver whose proposals raise h."""

    def __call__(self, operator, damping):
        return -1.0 * damped_inverse(operator, damping)


def test_a_line_search_that_finds_nothing_leaves_the_parameters():
    objective, batch = linear_regression()
    direction = PreconditionedGradient(curvature=Dense(GGN()), solver=Uphill(), fraction=1.0)
    optimizer = compose(objective, direction=direction, step_rule=BacktrackingLineSearch())
    before = snapshot(objective)
    result = optimizer.step(batch)
    assert (result.accepted, result.learning_rate, result.actual) == (False, 0.0, 0.0)
    assert torch.equal(before, snapshot(objective))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("bad", ["input", "parameter"])
def test_a_nan_loss_raises_and_nothing_is_lost(preset, bad):
    objective, (x, y) = classification()
    optimizer = preset(objective)
    optimizer.step((x, y))
    if bad == "input":
        poisoned = x.clone()
        poisoned[0, 0] = float("nan")
    else:
        poisoned = x
        with torch.no_grad():
            objective.model[0].bias[0] = float("inf")
    before, state = objective.parameter_vector(), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(NonFiniteLossError, match="the parameters and the optimizer are unchanged"):
        optimizer.step((poisoned, y))
    torch.testing.assert_close(objective.parameter_vector(), before, equal_nan=True, rtol=0, atol=0)
    assert_same(state, optimizer.state_dict())


@pytest.mark.parametrize(
    "make",
    [
        kfac,
        hessian_free,
        lambda objective: kfac(objective, solver=damped_inverse),
        lambda objective: kfac(objective, solver=CG(max_iterations=400)),
        lambda objective: kfac(objective, curvature=Exact(Fisher()), solver=CG(max_iterations=200)),
        lambda objective: hessian_free(objective, preconditioner=KFAC(Fisher())),
    ],
    ids=["kfac", "hessian_free", "kfac, exact damping", "kfac by CG", "exact by CG", "preconditioned hessian_free"],
)
def test_a_resumed_run_continues_bit_for_bit(make):
    objective, batch = classification()
    optimizer = make(objective)
    for _ in range(4):
        optimizer.step(batch)
    file = io.BytesIO()
    torch.save({"model": objective.model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    for _ in range(4):
        optimizer.step(batch)

    resumed, _ = classification()
    state = torch.load(file, weights_only=True)
    resumed.model.load_state_dict(state["model"])
    second = make(resumed)
    second.load_state_dict(state["optimizer"])
    for _ in range(4):
        second.step(batch)
    assert torch.equal(snapshot(objective), snapshot(resumed))
    assert optimizer.damping == second.damping


def test_the_seed_changes_the_draws():
    ends = []
    for seed in (0, 0, 1):
        objective, batch = classification()
        optimizer = kfac(objective, seed=seed)
        for _ in range(3):
            optimizer.step(batch)
        ends.append(snapshot(objective))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


class CountingSolver:
    def __init__(self):
        self.dampings = []

    def __call__(self, operator, damping):
        self.dampings.append(damping)
        return damped_inverse(operator, damping)


def test_inverse_every_and_a_moved_damping_decide_when_inverses_are_made():
    objective, batch = classification()
    solver = CountingSolver()
    direction = PreconditionedGradient(curvature=KFAC(GGN()), solver=solver, inverse_every=10)
    optimizer = compose(objective, direction=direction, damping=ConstantDamping(1.0))
    for _ in range(21):
        optimizer.step(batch)
    assert len(solver.dampings) == 3 + 2  # steps 0, 1, 2, 10, 20

    solver.dampings.clear()
    control = LevenbergMarquardt(initial=8.0, decrease=0.5, interval=1, low=-1e9, high=-1e8, reject_below=-1e9)
    direction = PreconditionedGradient(curvature=KFAC(GGN()), solver=solver, inverse_every=1000)
    optimizer = compose(objective, direction=direction, damping=control)
    for _ in range(7):
        optimizer.step(batch)
    assert solver.dampings == [8.0, 4.0, 2.0, 0.5, 0.125]  # afterwards only once it has moved by more than two


def test_statistics_every_decides_when_statistics_are_made():
    objective, batch = classification()
    direction = PreconditionedGradient(curvature=KFAC(GGN()), statistics_every=3)
    optimizer = compose(objective, direction=direction)
    for _ in range(7):
        optimizer.step(batch)
    assert optimizer.state_dict()["direction"]["average"]["updates"] == 3


def test_fractions_of_the_batch_lower_the_work():
    work = []
    for fraction in (1 / 8, 1.0):
        objective, batch = classification()
        optimizer = kfac(objective, statistics_fraction=fraction, model_fraction=fraction, damping=ConstantDamping(1.0))
        work.append(optimizer.step(batch).gradient_evaluations)
    assert work[0] < 1.6 < work[1]


class FailsLater:
    """A solver that works once and then fails."""

    def __init__(self):
        self.calls = 0

    def __call__(self, operator, damping):
        self.calls += 1
        if self.calls > 1:
            raise SolveError("no inverse today")
        return damped_inverse(operator, damping)


def test_failing_inverses_keep_the_last_good_one_within_a_budget():
    objective, batch = classification()
    direction = PreconditionedGradient(curvature=KFAC(GGN()), solver=FailsLater(), inverse_every=1)
    optimizer = compose(objective, direction=direction)
    optimizer.step(batch)
    for number in range(1, 6):
        with pytest.warns(RuntimeWarning, match=rf"kept the last inverse \({number} failures"):
            optimizer.step(batch)
    with pytest.raises(SolveError, match="no inverse today"):
        optimizer.step(batch)


def test_parts_of_a_batch_are_refused_for_sums():
    objective, _ = classification()
    total = Objective(objective.model, nn.CrossEntropyLoss(reduction="sum"))
    with pytest.raises(ValueError, match="reduction='sum'"):
        kfac(total)
    with pytest.raises(ValueError, match="reduction='sum'"):
        compose(total, step_rule=ModelRescaling(fraction=0.5))
    with pytest.raises(ValueError, match="reduction='sum'"):
        hessian_free(total, curvature_fraction=0.5)


def test_sums_train_with_whole_batches():
    objective, batch = classification()
    total = Objective(objective.model, nn.CrossEntropyLoss(reduction="sum"))
    optimizer = kfac(total, statistics_fraction=1.0, model_fraction=1.0, damping=30.0)
    losses = [optimizer.step(batch).loss for _ in range(10)]
    assert losses[-1] < 0.5 * losses[0]


def test_an_unsupported_layer_is_named_when_the_optimizer_is_made():
    model = nn.Sequential(nn.Bilinear(2, 2, 2))
    with pytest.raises(UnsupportedLayerError, match="Bilinear"):
        kfac(Objective(model, nn.MSELoss()))
    kfac(Objective(model, nn.MSELoss()), curvature=KFAC(Fisher(), on_unsupported="exclude"))


@pytest.mark.parametrize(
    "call",
    [
        lambda objective: kfac(objective, damping=-1.0),
        lambda objective: hessian_free(objective, damping=float("nan")),
        lambda objective: kfac(objective, statistics_fraction=0.0),
        lambda objective: kfac(objective, model_fraction=1.5),
        lambda objective: PreconditionedGradient(curvature=Identity(), inverse_every=0),
        lambda objective: PreconditionedGradient(curvature=Identity(), statistics_every=1.5),
        lambda objective: TruncatedNewton(warm_start=2.0),
        lambda objective: FixedLength(learning_rate=0.0),
        lambda objective: FixedLength(momentum=1.0),
        lambda objective: BacktrackingLineSearch(shrink=1.0),
    ],
)
def test_bad_options_are_refused(call):
    with pytest.raises(ValueError, match=r"got|needs"):
        call(classification()[0])


def test_it_is_a_torch_optimizer():
    objective, batch = classification()
    optimizer = kfac(objective)
    assert isinstance(optimizer, torch.optim.Optimizer)
    nn.functional.cross_entropy(objective.model(batch[0]), batch[1]).backward()
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in objective.parameters)
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == objective.layout.size


def test_inputs_as_tuples_and_mappings_are_split_into_parts():
    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x, scale, shift):
            return self.layer(x) * scale + shift

    x, y = torch.randn(40, 3), torch.randn(40, 2)
    for inputs in (
        (x, torch.ones(40, 1), torch.zeros(2)),
        {"x": x, "scale": torch.ones(40, 1), "shift": torch.zeros(2)},
    ):
        objective = Objective(TwoInputs(), nn.MSELoss())
        optimizer = kfac(objective)
        losses = [optimizer.step((inputs, y)).loss for _ in range(5)]
        assert losses[-1] < losses[0]


def test_the_package_exposes_the_presets():
    assert curvlib.optimizers.kfac is kfac
    assert curvlib.optimizers.hessian_free is hessian_free
