"""Hessian-free steps with structural damping: the system that is solved, its model, and its state."""

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recurrent import jacobian_of_states, network, sequences
from torch import nn

from curvlib import GGN, Fisher, Objective
from curvlib.approximations import KFAC, BlockDiagonal, Dense, Diagonal, Exact, Identity, StructuralDamping
from curvlib.operators import Dense as DenseOperator
from curvlib.optimizers import (
    BacktrackingLineSearch,
    FixedLength,
    ModelRescaling,
    SecondOrderOptimizer,
    TruncatedNewton,
    hessian_free,
)
from curvlib.solvers import (
    CG,
    ConstantDamping,
    DampedRatio,
    DampingControl,
    LevenbergMarquardt,
    QuadraticModel,
    ResidualTest,
    UndampedRatio,
)

# CG to a residual of 1e-12 in float64 on matrices whose condition number stays below 1e5
SOLVED = {"rtol": 1e-6, "atol": 1e-9}
TIGHT = CG(max_iterations=500, stop=ResidualTest(relative=1e-12), check_every=1)


def problem(name="rnn", examples=6, **options):
    model, inputs = network(name), sequences(examples)
    targets = torch.randn(examples, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return Objective(model, nn.MSELoss(), **options), (inputs, targets)


def optimizer(objective, *, regularizer=StructuralDamping(), weight=0.5, damping=0.1, **parts):  # noqa: B008 - frozen
    direction = TruncatedNewton(cg=TIGHT, warm_start=0.0, regularizer=regularizer, regularizer_weight=weight)
    return SecondOrderOptimizer(
        objective,
        **{
            "direction": direction,
            "step_rule": FixedLength(),
            "damping": damping if isinstance(damping, DampingControl) else ConstantDamping(damping),
            "ratio": DampedRatio(),
            **parts,
        },
    )


def dense_parts(objective, batch):
    """g, C and S as tensors."""
    evaluation = objective.at(batch)
    J = jacobian_of_states(objective.model, batch[0])[1]
    return evaluation.gradient(), Dense(GGN()).estimate(evaluation).to_dense(), J.T @ J / evaluation.examples


@pytest.mark.parametrize("damping", [0.01, 0.3, 10.0])
@pytest.mark.parametrize("name", ["rnn", "two layers"])
def test_the_step_solves_the_structurally_damped_system(name, damping):
    objective, batch = problem(name, l2=0.01)
    g, C, S = dense_parts(objective, batch)
    before = objective.parameter_vector()
    result = optimizer(objective, damping=damping).step(batch)
    eye = torch.eye(len(g), dtype=torch.float64)
    expected = -torch.linalg.solve(C + damping * (eye + 0.5 * S), g)
    step = objective.parameter_vector() - before
    torch.testing.assert_close(step, expected, **SOLVED)
    plain = -torch.linalg.solve(C + damping * eye, g)
    assert (step - plain).norm() > 1e-3 * plain.norm()
    model = g @ step + 0.5 * step @ C @ step
    assert result.predicted == pytest.approx(float(model + 0.5 * damping * step @ (step + 0.5 * S @ step)), rel=1e-6)


def test_the_undamped_ratio_compares_without_it():
    objective, batch = problem()
    g, C, _ = dense_parts(objective, batch)
    before = objective.parameter_vector()
    result = optimizer(objective, ratio=UndampedRatio()).step(batch)
    step = objective.parameter_vector() - before
    assert result.predicted == pytest.approx(float(g @ step + 0.5 * step @ C @ step), rel=1e-6)


def test_more_weight_moves_the_states_less():
    moved = []
    for weight in (1e-6, 1.0, 100.0):
        objective, batch = problem()
        J, before = jacobian_of_states(objective.model, batch[0])[1], objective.parameter_vector()
        optimizer(objective, weight=weight).step(batch)
        moved.append(float((J @ (objective.parameter_vector() - before)).norm()))
    assert moved[0] > 1.2 * moved[1] > 1.2 * moved[2]


@pytest.mark.parametrize(
    "regularizer",
    [Identity(), Dense(GGN()), Exact(GGN()), Exact(Fisher()), StructuralDamping(modules=("head",))],
    ids=["identity", "dense", "exact", "drawn", "other modules"],
)
def test_any_approximation_regularizes(regularizer):
    objective, batch = problem()
    g, C, _ = dense_parts(objective, batch)
    seeded = torch.Generator().manual_seed(0)
    R = regularizer.estimate(objective.at(batch), seeded).to_dense()
    before = objective.parameter_vector()
    optimizer(objective, regularizer=regularizer, damping=0.2, seed=0).step(batch)
    expected = -torch.linalg.solve(C + 0.2 * (torch.eye(len(g)).double() + 0.5 * R), g)
    torch.testing.assert_close(objective.parameter_vector() - before, expected, **SOLVED)


@pytest.mark.parametrize(
    "curvature", [KFAC(GGN()), Diagonal(Fisher()), BlockDiagonal(GGN())], ids=["kfac", "diagonal", "blocks"]
)
def test_layerwise_curvatures_take_it_as_well(curvature):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    objective, batch = Objective(model, nn.MSELoss()), problem()[1]
    structural = StructuralDamping(modules=(nn.Tanh,))
    training = hessian_free(objective, curvature=curvature, structural_damping=structural, structural_weight=1.0)
    losses = [training.step(batch).loss for _ in range(4)]
    assert losses[-1] < losses[0]


def test_rescaling_uses_the_same_damping():
    objective, batch = problem()
    g, C, S = dense_parts(objective, batch)
    before = objective.parameter_vector()
    result = optimizer(objective, step_rule=ModelRescaling(fraction=1.0)).step(batch)
    step = objective.parameter_vector() - before
    # the proposal minimises the very model that it is rescaled by
    assert result.learning_rate == pytest.approx(1.0, rel=1e-6)
    model = g @ step + 0.5 * step @ (C @ step + 0.1 * (step + 0.5 * S @ step))
    assert result.predicted == pytest.approx(float(model), rel=1e-6)


def test_a_preconditioner_leaves_the_solution():
    steps = []
    for preconditioner in (None, Dense(GGN())):
        objective, batch = problem()
        before = objective.parameter_vector()
        direction = TruncatedNewton(
            cg=TIGHT, regularizer=StructuralDamping(), regularizer_weight=0.5, preconditioner=preconditioner
        )
        optimizer(objective, direction=direction).step(batch)
        steps.append(objective.parameter_vector() - before)
    torch.testing.assert_close(*steps, **SOLVED)


def test_the_preset_passes_its_weight_on_and_trains():
    losses = {}
    for weight in (None, 1 / 30, 3.0):
        objective, batch = problem("gru")
        structural = {} if weight is None else {"structural_damping": StructuralDamping(), "structural_weight": weight}
        training = hessian_free(objective, damping=0.1, **structural)
        losses[weight] = [training.step(batch).loss for _ in range(5)]
        assert losses[weight][-1] < 0.9 * losses[weight][0]
    assert len({path[-1] for path in losses.values()}) == 3


def test_the_default_weight_is_that_of_the_paper():
    assert TruncatedNewton().regularizer_weight == pytest.approx(1 / 30)
    objective, batch = problem()
    other, _ = problem()
    hessian_free(objective, damping=0.1, structural_damping=StructuralDamping()).step(batch)
    hessian_free(other, damping=0.1, structural_damping=StructuralDamping(), structural_weight=1 / 30).step(batch)
    assert torch.equal(objective.parameter_vector(), other.parameter_vector())


def test_products_of_a_part_of_the_batch():
    objective, batch = problem()
    training = hessian_free(objective, structural_damping=StructuralDamping(), curvature_fraction=0.5)
    whole = hessian_free(problem()[0], structural_damping=StructuralDamping())
    first, last = training.step(batch), whole.step(batch)
    assert first.gradient_evaluations / first.iterations < 0.8 * last.gradient_evaluations / last.iterations
    assert training.step(batch).loss < first.loss


def test_with_structural_damping_an_iteration_costs_what_it_costs_without():
    costs = {}
    for structural in (None, StructuralDamping()):
        objective, batch = problem()
        direction = TruncatedNewton(regularizer=structural, cg=CG(max_iterations=30, stop=ResidualTest(relative=1e-15)))
        result = optimizer(objective, direction=direction, damping=1e-3).step(batch)
        costs[structural] = result.gradient_evaluations
    # a forward pass and two backward passes to make and linearise the observed pass, and one for the model's form
    assert costs[StructuralDamping()] - costs[None] < 3


def test_a_rejected_step_leaves_everything_but_the_damping():
    objective, batch = problem()
    control = LevenbergMarquardt(initial=0.3, interval=1)
    direction = TruncatedNewton(cg=TIGHT, regularizer=StructuralDamping(), regularizer_weight=0.5)
    training = optimizer(objective, direction=direction, damping=control, step_rule=FixedLength(learning_rate=40.0))
    before = objective.parameter_vector()
    result = training.step(batch)
    assert not result.accepted
    assert torch.equal(objective.parameter_vector(), before)
    assert training.damping > 0.3
    assert training.state_dict()["direction"]["last"] is None
    # the next step starts from the same parameters with more damping on S, too
    g, C, S = dense_parts(objective, batch)
    training.step_rule = FixedLength()
    damping = training.damping
    assert training.step(batch).accepted
    expected = -torch.linalg.solve(C + damping * (torch.eye(len(g)).double() + 0.5 * S), g)
    torch.testing.assert_close(objective.parameter_vector() - before, expected, **SOLVED)


def test_a_resumed_run_continues_bit_for_bit():
    def make(objective):
        return hessian_free(objective, structural_damping=StructuralDamping(), curvature_fraction=0.5)

    objective, batch = problem("lstm")
    training = make(objective)
    for _ in range(3):
        training.step(batch)
    file = io.BytesIO()
    torch.save({"model": objective.model.state_dict(), "optimizer": training.state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    other, _ = problem("lstm")
    other.model.load_state_dict(saved["model"])
    resumed = make(other)
    resumed.load_state_dict(copy.deepcopy(saved["optimizer"]))
    for _ in range(3):
        assert training.step(batch) == resumed.step(batch)
    assert torch.equal(objective.parameter_vector(), other.parameter_vector())
    without = hessian_free(other, curvature_fraction=0.5)
    with pytest.raises(ValueError, match="another direction"):
        without.load_state_dict(saved["optimizer"])


def test_it_runs_on_every_device(device):
    model = network("rnn cells").float().to(device)
    moved = sequences(6).float().to(device), torch.ones(6, 2, device=device)
    training = hessian_free(Objective(model, nn.MSELoss()), structural_damping=StructuralDamping())
    losses = [training.step(moved).loss for _ in range(4)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"regularizer": 0.1}, TypeError, "regularizer"),
    ({"regularizer": StructuralDamping(), "regularizer_weight": 0.0}, ValueError, "regularizer_weight > 0"),
    ({"regularizer": StructuralDamping(), "regularizer_weight": float("nan")}, ValueError, "regularizer_weight > 0"),
], ids=["no approximation", "zero", "nan"])  # fmt: skip
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        TruncatedNewton(**options)


@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 1000), st.floats(0, 3))
def test_the_quadratic_model_with_a_regularizer_is_that_of_the_summed_matrix(D, K, seed, damping):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    factors, g, V = normal(2, D, D), normal(D), normal(D, min(K, D))
    C, R = (DenseOperator(X @ X.T) for X in factors)
    value = torch.zeros((), dtype=torch.float64)
    model = QuadraticModel(value=value, gradient=g, curvature=C, damping=damping, regularizer=R)
    system = C.matrix + damping * (torch.eye(D).double() + R.matrix)
    whole = QuadraticModel(value=value, gradient=g, curvature=DenseOperator(system))
    step = V[:, 0]
    torch.testing.assert_close(model.change(step), whole.change(step))
    assert model.predict(step).damped == pytest.approx(whole.predict(step).damped)
    undamped = QuadraticModel(value=value, gradient=g, curvature=C).predict(step).undamped
    assert model.predict(step).undamped == pytest.approx(undamped)
    best, expected = model.minimise_over(V), whole.minimise_over(V)
    # the minimum is flat, where the coefficients may be less exact than its value
    assert best.predicted_change == pytest.approx(expected.predicted_change, rel=1e-6, abs=1e-9)
    assert best.prediction.damped == pytest.approx(model.predict(best.step).damped, rel=1e-6, abs=1e-9)
    assert best.prediction.undamped == pytest.approx(model.predict(best.step).undamped, rel=1e-6, abs=1e-9)


def test_a_regularizer_that_does_not_fit_is_refused():
    C, R = DenseOperator(torch.eye(3)), DenseOperator(torch.eye(2))
    with pytest.raises(ValueError, match=r"regularizer=\.\.\.\) must fit"):
        QuadraticModel(value=torch.zeros(()), gradient=torch.ones(3), curvature=C, regularizer=R)


def test_the_line_search_backtracks_over_the_same_model():
    objective, batch = problem()
    result = optimizer(objective, step_rule=BacktrackingLineSearch(), ratio=UndampedRatio()).step(batch)
    assert result.accepted
    assert result.actual < 0
