"""A damping that differs by layer, in the optimizer."""

import io

import pytest
import torch
from optimizer_cases import linear_regression, small_network

from curvlib import GGN, Fisher
from curvlib.approximations import KFAC, BlockDiagonal, Dense, Exact
from curvlib.optimizers import (
    FixedLength,
    LayerDamping,
    ModelRescaling,
    PreconditionedGradient,
    SecondOrderOptimizer,
    kfac,
)
from curvlib.solvers import ConstantDamping, FactoredTikhonov, damped_inverse


def optimizer_of(objective, curvature, solver, damping=0.5, rule=None):
    return SecondOrderOptimizer(
        objective,
        direction=PreconditionedGradient(curvature=curvature, solver=solver, fraction=1.0),
        step_rule=rule or FixedLength(),
        damping=ConstantDamping(damping),
    )


@pytest.mark.parametrize("curvature", [KFAC(GGN()), BlockDiagonal(GGN()), Dense(GGN()), Exact(GGN())], ids=str)
def test_each_layer_is_solved_with_its_own_damping(curvature):
    objective, batch = small_network()
    evaluation, theta = objective.at(batch), objective.parameter_vector()
    C, g = curvature.estimate(evaluation).to_dense(), evaluation.gradient()
    f = torch.ones_like(theta)
    f[16:] = 8.0  # the second layer
    expected = -torch.linalg.solve(C + 0.5 * torch.diag(f), g)
    result = optimizer_of(objective, curvature, LayerDamping({"2": 8.0})).step(batch)
    torch.testing.assert_close(objective.parameter_vector() - theta, expected, rtol=1e-6, atol=1e-9)
    d = expected
    predicted = g @ d + 0.5 * d @ (C + 0.5 * torch.diag(f)) @ d
    assert result.predicted == pytest.approx(float(predicted), rel=1e-6)


def test_blocks_keep_the_structure_of_the_solver():
    moves = []
    for solver in (FactoredTikhonov(), LayerDamping({"*": 1.0}, solver=FactoredTikhonov())):
        objective, batch = small_network()
        theta = objective.parameter_vector()
        optimizer_of(objective, KFAC(GGN()), solver).step(batch)
        moves.append(objective.parameter_vector() - theta)
    assert torch.equal(*moves)


def test_the_first_pattern_that_fits_a_parameter_or_its_module_counts():
    objective, _ = small_network()
    solver = LayerDamping({"0.bias": 2.0, "0": 3.0, "?.weight": 4.0}, otherwise=0.5).bind(objective)
    assert solver.factors.tolist() == [3.0] * 12 + [2.0] * 4 + [4.0] * 8 + [0.5] * 2
    with pytest.raises(ValueError, match=r"'encoder\.\*' fits no parameter. Known: 0.weight, 0.bias"):
        LayerDamping({"encoder.*": 2.0}).bind(objective)
    with pytest.raises(ValueError, match="fits no parameter"):
        kfac(objective, solver=LayerDamping({"head": 2.0}))


def test_the_exact_model_has_the_same_damping():
    """On a quadratic, rescaling the exact damped step by the exact damped model changes nothing."""
    objective, batch = linear_regression()
    rule = ModelRescaling(fraction=1.0)
    result = optimizer_of(objective, Dense(GGN()), LayerDamping({"bias": 20.0}), rule=rule).step(batch)
    assert result.learning_rate == pytest.approx(1.0, rel=1e-9)


def test_a_resumed_run_continues_bit_for_bit_and_other_factors_are_refused():
    objective, batch = small_network(torch.float32)

    def make(objective, factor=5.0):
        solver = LayerDamping({"2": factor}, solver=FactoredTikhonov())
        return kfac(objective, curvature=KFAC(Fisher()), solver=solver)

    optimizer = make(objective)
    for _ in range(4):
        optimizer.step(batch)
    file = io.BytesIO()
    torch.save({"model": objective.model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    results = [optimizer.step(batch) for _ in range(4)]
    resumed, _ = small_network(torch.float32)
    state = torch.load(file, weights_only=True)
    resumed.model.load_state_dict(state["model"])
    second = make(resumed)
    second.load_state_dict(state["optimizer"])
    assert [second.step(batch) for _ in range(4)] == results
    assert torch.equal(objective.parameter_vector(), resumed.parameter_vector())
    with pytest.raises(ValueError, match="direction"):
        make(resumed, 6.0).load_state_dict(state["optimizer"])


def test_it_runs_on_the_device(device):
    objective, batch = small_network(torch.float32, device)
    optimizer = kfac(objective, solver=LayerDamping({"2": 3.0}, solver=damped_inverse))
    first = optimizer.step(batch).loss
    for _ in range(10):
        optimizer.step(batch)
    assert float(objective.value(batch)) < first


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "mapping", lambda: LayerDamping([("2", 1.0)])),
        (TypeError, "mapping", lambda: LayerDamping({2: 1.0})),
        (ValueError, r"LayerDamping\['2'\]", lambda: LayerDamping({"2": -1.0})),
        (TypeError, "number", lambda: LayerDamping({"2": "x"})),
        (ValueError, "otherwise", lambda: LayerDamping({"2": 1.0}, otherwise=float("inf"))),
        (TypeError, "solver", lambda: LayerDamping({"2": 1.0}, solver="cg")),
    ],
    ids=["pairs", "number as a name", "negative", "text", "infinite", "solver"],
)
def test_wrong_arguments_are_refused(error, message, call):
    with pytest.raises(error, match=message):
        call()
