"""L-BFGS in optimizers and sums: its directions, rejected steps, resumed runs, and what it refuses."""

import copy
from dataclasses import replace

import pytest
import torch
from cases import mlp
from lbfgs_oracles import by_updates, latest_delta, two_loops
from optimizer_cases import assert_same
from scipy.optimize import LbfgsInvHessProduct, minimize
from torch import nn

from curvlib import GGN, Objective
from curvlib.approximations import (
    EKFAC,
    LBFGS,
    Dense,
    Diagonal,
    Exact,
    Identity,
    MovingAverage,
)
from curvlib.optimizers import (
    FixedLength,
    ModelDescent,
    PreconditionedGradient,
    SecondOrderOptimizer,
    StrongWolfe,
    hessian_free,
    kfac,
)
from curvlib.solvers import ConstantDamping, MoreSorensen, TrustRegion


def regression(l2=0.0, examples=30):
    """A deterministic strictly convex quadratic of ten parameters."""
    torch.manual_seed(0)
    model, x, y = mlp([4, 2]), torch.randn(examples, 4).double(), torch.randn(examples, 2).double()
    return Objective(model, nn.MSELoss(), l2=l2), (x * torch.logspace(-1, 1, 4), y)


def composed(objective, curvature, *, step_rule=None, **direction):
    return SecondOrderOptimizer(
        objective,
        direction=PreconditionedGradient(curvature=curvature, fraction=1.0, **direction),
        step_rule=step_rule or StrongWolfe(),
        damping=ConstantDamping(0.0),
    )


class Watch:
    """Parameters and gradients of the whole objective before each step, by hand."""

    def __init__(self, objective, batch):
        self.objective, self.batch, self.points, self.gradients = objective, batch, [], []

    def look(self):
        self.points.append(self.objective.parameter_vector())
        self.gradients.append(self.objective.at(self.batch).gradient())

    def pairs(self):
        return [
            (self.points[i + 1] - self.points[i], self.gradients[i + 1] - self.gradients[i])
            for i in range(len(self.points) - 1)
        ]


@pytest.mark.parametrize("memory", [3, 20])
def test_in_an_optimizer_every_direction_is_that_of_l_bfgs(memory):
    """By the two loops and, with delta = 1, by scipy, from pairs that are made outside of the optimizer."""
    for initial in (None, 1.0):
        objective, batch = regression()
        optimizer = composed(objective, LBFGS(memory=memory, initial=initial))
        watch = Watch(objective, batch)
        for step in range(8):
            watch.look()
            result = optimizer.step(batch)
            moved, g = objective.parameter_vector() - watch.points[-1], watch.gradients[-1]
            pairs = watch.pairs()[-memory:]
            if initial is None:
                expected = -two_loops(pairs, latest_delta(pairs) if pairs else 1.0, g)
            elif pairs:
                S, Y = (torch.stack(vectors).numpy() for vectors in zip(*pairs, strict=True))
                expected = -torch.from_numpy(LbfgsInvHessProduct(S, Y).matvec(g.numpy()))
            else:
                expected = -g
            scale = float(expected.norm()) * result.learning_rate
            assert result.accepted, step
            # pairs are differences of gradients: rounding grows with the condition 1e4 of the problem
            assert float((moved - result.learning_rate * expected).norm()) < 1e-7 * scale


def test_with_an_l2_term_that_part_of_the_curvature_is_exact():
    objective, batch = regression(l2=0.1)
    optimizer, watch = composed(objective, LBFGS(memory=5)), Watch(objective, batch)
    for _ in range(6):
        watch.look()
        result = optimizer.step(batch)
        moved = objective.parameter_vector() - watch.points[-1]
    pairs = [(s, y - 0.1 * s) for s, y in watch.pairs()]
    B = by_updates(pairs, latest_delta(pairs)) + 0.1 * torch.eye(10, dtype=torch.float64)
    expected = -result.learning_rate * torch.linalg.solve(B, watch.gradients[-1])
    assert float((moved - expected).norm()) < 1e-7 * float(expected.norm())


def test_it_converges_on_a_quadratic_as_scipy_does():
    objective, batch = regression()
    optimizer = composed(objective, LBFGS(memory=20))
    steps = 0
    while steps < 60 and float(objective.at(batch).gradient().norm()) > 1e-6:
        steps += 1
        optimizer.step(batch)
    theta, other = objective.parameter_vector(), regression()[0]

    def value_and_gradient(x):
        other.layout.write(other.parameters, torch.from_numpy(x))
        evaluation = other.at(batch)
        return float(evaluation.value), evaluation.gradient().numpy()

    options = {"maxcor": 20, "gtol": 1e-7, "ftol": 0.0, "maxiter": 200}
    start = other.parameter_vector().numpy()
    reference = minimize(value_and_gradient, start, jac=True, method="L-BFGS-B", options=options)
    assert steps <= 1.5 * reference.nit  # each has a line search of its own
    torch.testing.assert_close(theta, torch.from_numpy(reference.x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("curvature", [LBFGS(memory=3), 0.5 * LBFGS(memory=3) + 0.5 * Diagonal(GGN())], ids=str)
@pytest.mark.parametrize("make", [composed, "in a region"], ids=["gradient", "model descent"])
def test_a_rejected_step_leaves_no_trace(curvature, make):
    objective, batch = regression()
    if make is composed:
        rule = AcceptsNot()
        optimizer = composed(objective, curvature, step_rule=rule)
    else:
        optimizer = SecondOrderOptimizer(
            objective,
            direction=ModelDescent(curvature=curvature, descent=MoreSorensen()),
            step_rule=(rule := AcceptsNot()),
            radius=TrustRegion(initial=0.2),
        )
    for _ in range(3):
        assert optimizer.step(batch).accepted
    before, theta = copy.deepcopy(optimizer.state_dict()["direction"]), objective.parameter_vector()
    rule.on = True
    assert not optimizer.step(batch).accepted
    after = optimizer.state_dict()["direction"]
    for state in (before, after):
        state.pop("rejected", None)
    assert_same(before, after)
    assert torch.equal(objective.parameter_vector(), theta)
    rule.on = False
    assert optimizer.step(batch).accepted


class AcceptsNot(FixedLength):
    """A step of length zero while it is on."""

    on = False

    def __setattr__(self, name, value):
        object.__setattr__(self, name, value)

    def choose(self, situation, proposal, previous):
        choice = super().choose(situation, proposal, previous)
        return replace(choice, learning_rate=0.0, step=0.0 * choice.step) if self.on else choice


def test_a_resumed_run_continues_bit_for_bit():
    for curvature in (LBFGS(memory=3), 0.5 * LBFGS() + 0.5 * EKFAC(GGN())):
        objective, batch = regression()
        first = composed(objective, curvature)
        for _ in range(4):
            first.step(batch)
        state, theta = copy.deepcopy(first.state_dict()), objective.parameter_vector()
        last = first.step(batch)
        other, _ = regression()
        other.layout.write(other.parameters, theta)
        second = composed(other, curvature)
        second.load_state_dict(state)
        assert second.step(batch) == last
        assert torch.equal(objective.parameter_vector(), other.parameter_vector())
        with pytest.raises(ValueError, match="another direction"):
            composed(other, LBFGS(memory=9)).load_state_dict(state)


def test_pairs_are_of_the_batch_of_the_step_and_their_gradient_is_counted():
    objective, (x, y) = regression()
    optimizer = composed(objective, LBFGS(), step_rule=FixedLength(learning_rate=0.01))
    expected = []
    for part in (slice(0, 10), slice(10, 20), slice(20, 30)):
        batch, theta = (x[part], y[part]), objective.parameter_vector()
        before = objective.at(batch).gradient()
        work = optimizer.step(batch).gradient_evaluations
        expected.append((objective.parameter_vector() - theta, objective.at(batch).gradient() - before))
    plain = composed(objective, Identity(), step_rule=FixedLength(learning_rate=0.05))
    assert work == pytest.approx(plain.step(batch).gradient_evaluations + 1)
    state = optimizer.state_dict()["direction"]["average"]
    for kept, (s, y) in zip(zip(state["steps"], state["gradient_changes"], strict=True), expected, strict=True):
        torch.testing.assert_close(kept, (s, y), rtol=1e-9, atol=1e-12)


def test_sums_count_the_l2_term_once():
    objective, batch = regression(l2=0.1)
    history = LBFGS(memory=4).start()
    generator = torch.Generator().manual_seed(1)
    H = Dense(GGN()).estimate(objective.at(batch)).to_dense()
    for s in torch.randn(3, 10, generator=generator, dtype=torch.float64):
        history.update(s, H @ s)
    frozen = history.approximation
    B, eye = history.operator().to_dense(), torch.eye(10, dtype=torch.float64)
    torch.testing.assert_close(frozen.estimate(objective.at(batch)).to_dense(), B + 0.1 * eye)
    total = (0.5 * frozen + 2.0 * Dense(GGN())).estimate(objective.at(batch)).to_dense()
    torch.testing.assert_close(total, 0.5 * B + 2.0 * (H - 0.1 * eye) + 0.1 * eye)
    history.update(H[0], H @ H[0])
    torch.testing.assert_close(frozen.estimate(objective.at(batch)).to_dense(), B + 0.1 * eye)
    assert frozen == LBFGS(memory=4)
    assert not (0.5 * LBFGS() + Diagonal(GGN())).may_be_indefinite
    with pytest.raises(ValueError, match="pairs have 10 entries and the objective 6 parameters"):
        frozen.estimate(Objective(mlp([2, 2]), nn.MSELoss()).at((torch.ones(1, 2).double(), torch.ones(1, 2).double())))


def test_in_a_sum_it_learns_and_the_others_are_averaged():
    objective, batch = regression(l2=0.1)
    optimizer, watch = composed(objective, 0.3 * LBFGS(memory=9) + 2.0 * Diagonal(GGN())), Watch(objective, batch)
    for _ in range(4):
        watch.look()
        result = optimizer.step(batch)
        moved = objective.parameter_vector() - watch.points[-1]
    pairs, eye = [(s, y - 0.1 * s) for s, y in watch.pairs()], torch.eye(10, dtype=torch.float64)
    diagonal = Diagonal(GGN()).estimate(objective.at(batch)).to_dense() - 0.1 * eye  # the same at every step
    C = 0.3 * by_updates(pairs, latest_delta(pairs)) + 2.0 * diagonal + 0.1 * eye
    expected = -result.learning_rate * torch.linalg.solve(C, watch.gradients[-1])
    assert float((moved - expected).norm()) < 1e-7 * float(expected.norm())


def test_where_it_makes_no_sense_it_is_refused():
    objective, _ = regression()
    with pytest.raises(ValueError, match=r"TruncatedNewton estimates curvature anew .* PreconditionedGradient"):
        hessian_free(objective, curvature=LBFGS())
    with pytest.raises(ValueError, match="TruncatedNewton estimates preconditioner anew"):
        hessian_free(objective, preconditioner=0.5 * LBFGS() + 0.5 * Diagonal(GGN()))
    with pytest.raises(TypeError, match=r"Exact\(matrix=GGN\(\)\) is estimated anew at each step"):
        kfac(objective, curvature=0.5 * LBFGS() + 0.5 * Exact(GGN()))
    with pytest.raises(TypeError, match="statistics that average"):
        MovingAverage(LBFGS())
    table = objective.describe(LBFGS(memory=7))
    assert {row.block for row in table.rows} == {"L-BFGS: delta I and the last 7 pairs of steps"}
    # parts of the batch do not matter to it, so that a loss that is a sum may keep the default
    total = Objective(mlp([4, 2]), nn.MSELoss(reduction="sum"))
    PreconditionedGradient(curvature=LBFGS(), fraction=0.5).start(total)
