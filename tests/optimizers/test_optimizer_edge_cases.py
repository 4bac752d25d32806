"""What optimizers once did silently: each case is right now, or refused by name."""

import copy
from collections import namedtuple

import pytest
import torch
from cases import classifier
from torch import nn

from curvlib import (
    GGN,
    Fisher,
    Objective,
)
from curvlib.approximations import KFAC, Dense, Diagonal, Exact, Identity, MovingAverage
from curvlib.optimizers import (
    BacktrackingLineSearch,
    FixedLength,
    ModelRescaling,
    PreconditionedGradient,
    SecondOrderOptimizer,
    hessian_free,
    kfac,
)
from curvlib.solvers import (
    CG,
    ConstantDamping,
    LevenbergMarquardt,
    damped_inverse,
)


def test_an_error_in_the_damping_control_comes_before_the_parameters_are_written():
    class Failing(LevenbergMarquardt):
        def update(self, state, ratio, **options):
            raise ValueError("a mistake")

    objective, batch = classifier()
    optimizer = hessian_free(objective, damping=Failing(initial=1.0, interval=1))
    before = objective.parameter_vector()
    with pytest.raises(ValueError, match="a mistake"):
        optimizer.step(batch)
    assert torch.equal(before, objective.parameter_vector())


def test_a_step_that_the_line_search_made_good_is_taken_although_the_whole_one_was_bad():
    class Overshoot:
        def __call__(self, operator, damping):
            return 300.0 * damped_inverse(operator, damping)

    objective, batch = classifier()
    optimizer = SecondOrderOptimizer(
        objective,
        direction=PreconditionedGradient(curvature=Dense(GGN()), solver=Overshoot(), fraction=1.0),
        step_rule=BacktrackingLineSearch(),
        damping=LevenbergMarquardt(initial=1.0, increase=2.0, interval=1),
    )
    result = optimizer.step(batch)
    assert result.learning_rate < 1
    assert result.ratio < 0  # of the whole step
    assert result.actual < 0  # of the step that was taken
    assert result.accepted
    assert float(objective.value(batch)) == pytest.approx(result.loss + result.actual, rel=1e-5)
    assert optimizer.damping == 2.0


@pytest.mark.parametrize(
    ("curvature", "least"),
    [(KFAC(Fisher(1)), 1.9), (KFAC(Fisher(20)), 3.0), (Exact(GGN()), 5.0), (Dense(GGN()), 20.0)],
    ids=str,
)
def test_work_counts_what_was_done(curvature, least):
    objective, batch = classifier()
    optimizer = kfac(objective, curvature=curvature)
    optimizer.step(batch)  # checks that are made once
    assert optimizer.step(batch).gradient_evaluations >= least


@pytest.mark.parametrize("preset", [kfac, hessian_free])
def test_a_zero_gradient_is_no_error(preset):
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = preset(Objective(model, nn.MSELoss()))
    result = optimizer.step((torch.randn(8, 3), torch.zeros(8, 2)))
    assert (result.accepted, result.loss, result.actual) == (False, 0.0, 0.0)


def test_parts_of_a_batch_without_targets_fall_back_to_the_whole():
    objective, (x, y) = classifier()
    y = torch.full_like(y, -100)
    y[0] = 1
    optimizer = kfac(objective)
    losses = [optimizer.step((x, y)).loss for _ in range(10)]
    assert losses[-1] < losses[0]
    parts = [(x[:20], y[:20]), (x[20:], y[20:])]  # the second has no target
    for approximation in (KFAC(GGN()), Diagonal(GGN()), Exact(GGN())):
        C = approximation.estimate_over(objective, parts, progress=False)
        whole = approximation.estimate(objective.at((x, y)))
        torch.testing.assert_close(C.diagonal(), whole.diagonal())


def test_state_of_another_model_or_composition_is_refused_and_nothing_changes():
    objective, batch = classifier()
    optimizer = kfac(objective)
    optimizer.step(batch)
    state = optimizer.state_dict()
    small = Objective(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), nn.CrossEntropyLoss())
    for other, what in (
        (kfac(small), "model"),
        (hessian_free(objective), "direction"),
        (kfac(objective, model_fraction=1.0), "step rule"),
        (kfac(objective, damping=ConstantDamping(7.0)), "damping control"),
        (kfac(objective, curvature=Diagonal(Fisher())), "direction"),
        (kfac(objective, solver=damped_inverse), "solver=damped_inverse"),
        (kfac(objective, statistics_fraction=1.0), "fraction=1.0"),
        (kfac(Objective(objective.model, nn.CrossEntropyLoss(), l2=0.5)), "objective"),
    ):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match=what):
            other.load_state_dict(state)
        assert str(other.state_dict()) == str(before)
    with pytest.raises(ValueError, match="no state of a SecondOrderOptimizer"):
        optimizer.load_state_dict({})


def test_statistics_of_another_approximation_are_refused():
    with pytest.raises(ValueError, match="MovingAverage of KFAC"):
        MovingAverage(Diagonal(GGN())).load_state_dict(MovingAverage(KFAC(GGN())).state_dict())


def test_parameter_groups_and_copies_are_refused():
    optimizer = kfac(classifier()[0])
    with pytest.raises(TypeError, match="instead of adding a parameter group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(TypeError, match=r"state_dict\(\)"):
        copy.deepcopy(optimizer)


def test_named_tuples_are_split_into_parts():
    Inputs = namedtuple("Inputs", ["x", "scale"])

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x, scale):
            return self.layer(x) * scale

    x, y = torch.randn(40, 5), torch.randint(3, (40,))
    optimizer = kfac(Objective(Model(), nn.CrossEntropyLoss()))
    assert optimizer.step((Inputs(x, torch.ones(40, 1)), y)).accepted


def test_statistics_that_come_rarely_decay_by_the_steps_between():
    objective, _ = classifier()
    directions = [
        PreconditionedGradient(curvature=KFAC(GGN()), decay=0.5, statistics_every=every, fraction=1.0)
        for every in (1, 3)
    ]
    assert [direction.start(objective)._state._average.decay for direction in directions] == [0.5, 0.125]


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (ValueError, lambda o: Objective(o.model, nn.MSELoss(), l2=True)),
        (TypeError, lambda o: KFAC(GGN(), weight_sharing="reduce")),
        (TypeError, lambda o: ModelRescaling(matrix="ggn")),
        (TypeError, lambda o: kfac(o, solver="cg")),
        (TypeError, lambda o: kfac(o, curvature="kfac")),
        (TypeError, lambda o: kfac(o, curvature=GGN())),
        (TypeError, lambda o: kfac(o.model)),
        (TypeError, lambda o: kfac(o, statistics_fraction="a")),
        (TypeError, lambda o: hessian_free(o, preconditioner="kfac")),
        (TypeError, lambda o: CG(store=3)),
        (TypeError, lambda o: CG(on_limit="warn")),
        (TypeError, lambda o: CG(preconditioner="x")),
        (TypeError, lambda o: LevenbergMarquardt(floor=0.1)),
        (ValueError, lambda o: hessian_free(o, damping=0.0)),
        (ValueError, lambda o: Objective(nn.LazyLinear(3), nn.MSELoss())),
    ],
)
def test_wrong_types_and_values_are_refused_where_they_are_given(error, call):
    with pytest.raises(error, match=r"got|must|needs|not initialised|would stay 0"):
        call(classifier()[0])


def test_fixed_length_still_follows_the_acceptance_of_the_control():
    objective, batch = classifier()
    optimizer = SecondOrderOptimizer(
        objective,
        direction=PreconditionedGradient(curvature=Dense(GGN()), fraction=1.0),
        step_rule=FixedLength(learning_rate=500.0),
        damping=LevenbergMarquardt(initial=1.0, interval=1),
    )
    assert not optimizer.step(batch).accepted


def test_a_state_with_a_foreign_generator_changes_nothing():
    objective, batch = classifier()
    optimizer = kfac(objective)
    optimizer.step(batch)
    state = optimizer.state_dict()
    for _ in range(3):
        optimizer.step(batch)
    before = optimizer.damping
    with pytest.raises(ValueError, match="random generator"):
        optimizer.load_state_dict({**state, "generator": torch.zeros(3, dtype=torch.uint8)})
    assert optimizer.damping == before


def test_a_step_that_is_not_finite_is_never_written():
    objective, batch = classifier()
    optimizer = SecondOrderOptimizer(
        objective,
        direction=PreconditionedGradient(curvature=Identity(), fraction=1.0),
        step_rule=FixedLength(learning_rate=1e39),
        damping=ConstantDamping(1e-3),
    )
    before = objective.parameter_vector()
    with pytest.raises(FloatingPointError, match="proposed step is not finite"):
        optimizer.step(batch)
    assert torch.equal(before, objective.parameter_vector())


def test_losses_with_a_value_for_each_example_of_the_whole_batch_name_the_fraction():
    objective = Objective(nn.Linear(3, 2), nn.BCEWithLogitsLoss(weight=torch.ones(16, 1)))
    batch = torch.randn(16, 3), torch.rand(16, 2)
    with pytest.raises(ValueError, match="the fraction 1"):
        kfac(objective).step(batch)
    assert kfac(objective, statistics_fraction=1.0, model_fraction=1.0).step(batch).loss > 0
