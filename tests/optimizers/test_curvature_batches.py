"""A batch of its own for the curvature: what is made of it, and what is not."""

import pytest
import torch
from optimizer_cases import assert_same, small_network
from torch import nn

from curvlib import GGN, Objective
from curvlib.approximations import KFAC, Dense, Diagonal, Exact
from curvlib.operators import MatrixFree
from curvlib.optimizers import (
    Direction,
    FixedLength,
    ModelDescent,
    PreconditionedGradient,
    Preconditioner,
    SecondOrderOptimizer,
    TruncatedNewton,
    hessian_free,
    kfac,
)
from curvlib.solvers import (
    CG,
    ConstantDamping,
    DampedNewton,
    DampedRatio,
    LevenbergMarquardt,
    ResidualTest,
    StochasticOperatorError,
)

TIGHT = CG(max_iterations=500, stop=ResidualTest(relative=1e-12), check_every=1)
DIRECTIONS = {
    "truncated newton": TruncatedNewton(cg=TIGHT, fraction=0.5),
    "averaged": PreconditionedGradient(curvature=Dense(GGN()), fraction=0.5),
    "anew": PreconditionedGradient(curvature=Exact(GGN()), solver=TIGHT),
    "descent": ModelDescent(curvature=Dense(GGN()), descent=DampedNewton(), fraction=0.5),
}


def other_batch(examples=15):
    generator = torch.Generator().manual_seed(5)
    x = 2 * torch.randn(examples, 3, dtype=torch.float64, generator=generator)
    return x, torch.randint(2, (examples,), generator=generator)


def compose(objective, direction, control=None):
    control = control or ConstantDamping(0.1)
    return SecondOrderOptimizer(
        objective, direction=direction, step_rule=FixedLength(), damping=control, ratio=DampedRatio()
    )


@pytest.mark.parametrize("name", DIRECTIONS)
def test_the_gradient_is_of_one_batch_and_the_curvature_of_the_other(name):
    objective, batch = small_network()
    g = objective.at(batch).gradient()
    C = Dense(GGN()).estimate(objective.at(other_batch())).to_dense()
    before = objective.parameter_vector()
    result = compose(objective, DIRECTIONS[name], LevenbergMarquardt(initial=0.1, interval=1)).step(
        batch, curvature_batch=other_batch()
    )
    step = objective.parameter_vector() - before
    expected = -torch.linalg.solve(C + 0.1 * torch.eye(len(g), dtype=g.dtype), g)
    torch.testing.assert_close(step, expected, rtol=1e-8, atol=1e-10)
    # the model that the step is judged by: g of the batch, C of the other one; h of the batch
    predicted = float(g @ step + 0.5 * step @ C @ step + 0.05 * step @ step)
    assert result.predicted == pytest.approx(predicted, rel=1e-8)
    assert result.actual == pytest.approx(float(objective.value(batch)) - result.loss, rel=1e-9)
    assert result.ratio == pytest.approx(result.actual / predicted, rel=1e-7)


def test_the_next_step_is_without_it():
    steps = []
    for first in (None, other_batch()):
        objective, batch = small_network()
        optimizer = compose(objective, TruncatedNewton(cg=TIGHT, warm_start=0.0))
        theta = objective.parameter_vector()
        optimizer.step(batch, curvature_batch=first)
        objective.layout.write(objective.parameters, theta)
        optimizer.step(batch)
        steps.append(objective.parameter_vector() - theta)
    assert torch.equal(*steps)


def test_the_preconditioner_is_of_the_same_examples_as_the_products():
    seen = []

    class Watching(Diagonal):
        def statistics(self, evaluation, generator=None):
            seen.append(evaluation.targets)
            return super().statistics(evaluation, generator)

    objective, batch = small_network()
    watching = Watching(GGN())
    own = other_batch()
    direction = TruncatedNewton(curvature=watching, preconditioner=Preconditioner(curvature=watching, fraction=0.5))
    compose(objective, direction).step(batch, curvature_batch=own)
    assert [targets is own[1] for targets in seen] == [True, True]


def test_work_counts_its_examples():
    work = {}
    for examples in (10, 20, 40):
        objective, batch = small_network()  # 40 examples
        optimizer = compose(objective, TruncatedNewton(cg=CG(max_iterations=4, stop=ResidualTest(relative=1e-15))))
        work[examples] = optimizer.step(batch, curvature_batch=other_batch(examples)).gradient_evaluations
    assert work[40] - work[20] == pytest.approx(2 * (work[20] - work[10]))
    assert work[20] > work[10]


def test_a_step_that_fails_or_is_rejected_changes_nothing():
    objective, batch = small_network()
    optimizer = hessian_free(objective, preconditioner=Preconditioner(curvature=KFAC(GGN()), decay=0.9))
    optimizer.step(batch, curvature_batch=other_batch())
    theta, before = objective.parameter_vector(), optimizer._direction.state_dict()["preconditioner"]
    bad = other_batch()
    bad[0][0] = float("nan")
    with pytest.raises(ArithmeticError):
        optimizer.step(batch, curvature_batch=bad)
    assert torch.equal(objective.parameter_vector(), theta)
    after = optimizer._direction.state_dict()["preconditioner"]
    assert_same(after["average"], before["average"])


def test_what_does_not_go_with_one_is_said_before_anything_happens():
    class Own(Direction):
        def start(self, objective):
            return TruncatedNewton().start(objective)

    objective, batch = small_network()
    theta = objective.parameter_vector()
    with pytest.raises(ValueError, match=r"curvature_batch.*Own.*makes no curvature"):
        compose(objective, Own()).step(batch, curvature_batch=other_batch())
    additive = Objective(objective.model, nn.CrossEntropyLoss(reduction="sum"))
    with pytest.raises(ValueError, match=r"curvature_batch of 15 examples.*batch of 40"):
        compose(additive, TruncatedNewton()).step(batch, curvature_batch=other_batch())
    with pytest.raises((TypeError, ValueError), match="batch"):
        compose(objective, TruncatedNewton()).step(batch, curvature_batch=batch[0])
    assert torch.equal(objective.parameter_vector(), theta)
    compose(additive, TruncatedNewton()).step(batch, curvature_batch=other_batch(40))


def test_presets_take_one():
    for preset in (kfac, hessian_free):
        objective, batch = small_network()
        optimizer = preset(objective)
        losses = [optimizer.step(batch, curvature_batch=other_batch(40)).loss for _ in range(6)]
        assert losses[-1] < losses[0]


class Redrawn(Exact):
    """Another matrix at each product."""

    def estimate(self, evaluation, generator=None):
        C = super().estimate(evaluation, generator)
        return MatrixFree(lambda V: C @ (V * torch.rand_like(V).round()), C.size, C.dtype, C.device)


def test_a_stochastic_matrix_is_refused_before_the_solve():
    objective, batch = small_network()
    theta = objective.parameter_vector()
    checked = compose(objective, TruncatedNewton(curvature=Redrawn(GGN()), check_products=True))
    with pytest.raises(StochasticOperatorError, match="stochastic"):
        checked.step(batch)
    assert torch.equal(objective.parameter_vector(), theta)
    # without the check the solver only sees its symptoms
    compose(objective, TruncatedNewton(curvature=Redrawn(GGN()))).step(batch)


def test_randomness_of_the_model_is_frozen_for_one_solve():
    torch.manual_seed(0)
    x, y = small_network()[1]
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 2)).double()
    optimizer = compose(Objective(model, nn.CrossEntropyLoss()), TruncatedNewton(check_products=True))
    results = [optimizer.step((x, y)) for _ in range(3)]
    assert len({result.loss for result in results}) == 3  # masks are drawn anew for each step
