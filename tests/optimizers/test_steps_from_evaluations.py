"""Steps from an evaluation that is known: the same steps, and nothing is computed twice."""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from optimizer_cases import assert_same, least_squares, rosenbrock, small_network
from torch import nn

from curvlib import GGN, Fisher, Hessian, Objective
from curvlib.approximations import KFAC, LBFGS, Dense
from curvlib.objective import StaleEvaluationError
from curvlib.optimizers import (
    FixedLength,
    ModelDescent,
    SecondOrderOptimizer,
    hessian_free,
    kfac,
    levenberg_marquardt,
    minimize,
    newton_trust_region,
)
from curvlib.optimizers.control import StepControl
from curvlib.solvers import (
    DampedNewton,
    LevenbergMarquardt,
    MoreSorensen,
    SlopeRatio,
    TrustRegion,
)


def region(objective, **options):
    """With statistics that are averaged, drawn, and made of a part of the batch."""
    options = {"curvature": KFAC(Fisher()), "decay": 0.9, "fraction": 0.5, **options}
    return SecondOrderOptimizer(
        objective,
        direction=ModelDescent(descent=MoreSorensen(), **options),
        step_rule=FixedLength(),
        radius=TrustRegion(initial=30.0),
    )


def newton(objective):
    return SecondOrderOptimizer(
        objective,
        direction=ModelDescent(curvature=Dense(Hessian()), descent=DampedNewton()),
        step_rule=FixedLength(),
        damping=LevenbergMarquardt(initial=1e-3, interval=1, increase=4.0, decrease=0.25),
        ratio=SlopeRatio(),
    )


OPTIMIZERS = [kfac, hessian_free, newton_trust_region, levenberg_marquardt, region, newton]


def told(result):
    """All of it but the work, to the last bit, NaN as well."""
    return repr(replace(result, gradient_evaluations=0.0))


@pytest.fixture
def rejecting(monkeypatch):
    """No step is taken."""
    monkeypatch.setattr(StepControl, "accept", lambda control, ratio: False)


@pytest.mark.parametrize("make", OPTIMIZERS, ids=lambda make: make.__name__)
def test_a_step_from_an_evaluation_is_that_on_its_batch_but_for_the_work(make):
    runs = []
    for known in (False, True):
        objective, batch = small_network()
        optimizer, results = make(objective), []
        for _ in range(5):
            evaluation = objective.at(batch) if known else batch
            before = evaluation.work if known else 0.0
            result = optimizer.step(evaluation)
            results.append((told(result), round(result.gradient_evaluations + before, 9)))
        runs.append((results, objective.parameter_vector(), optimizer.state_dict()))
    assert_same(*runs)


def test_the_work_of_a_step_is_without_what_was_known():
    def work(known):
        objective, batch = small_network()
        return region(objective, fraction=1.0).step(known(objective, batch)).gradient_evaluations

    def with_gradient(objective, batch):
        evaluation = objective.at(batch)
        evaluation.gradient()
        return evaluation

    whole = work(lambda objective, batch: batch)
    assert whole - work(lambda objective, batch: objective.at(batch)) == pytest.approx(1 / 3)
    assert whole - work(with_gradient) == pytest.approx(1.0)


def test_another_step_after_a_rejected_one_takes_the_same_statistics(rejecting):
    """With the draws of the first, and in the average as it was before."""
    objective, batch = small_network()
    optimizer = region(objective)
    operators, own = [], optimizer._direction._subproblem
    optimizer._direction._subproblem = lambda operator, at: operators.append(operator.to_dense()) or own(operator, at)
    evaluation = objective.at(batch)
    first = optimizer.step(evaluation)
    assert optimizer._direction._average.updates == 0
    draws = optimizer._generator.get_state()
    second = optimizer.step(evaluation)
    # neither the gradient's backward pass nor those of the statistics, which are of half of the batch
    assert second.gradient_evaluations < first.gradient_evaluations - 2 / 3 - 1 / 3
    assert torch.equal(optimizer._generator.get_state(), draws)
    optimizer.step(batch)
    assert torch.equal(operators[1], operators[0])
    assert not torch.equal(operators[2], operators[0])  # drawn anew


@pytest.mark.parametrize("curvature", [Dense(GGN()), KFAC(GGN()), LBFGS(memory=2)], ids=lambda c: type(c).__name__)
def test_rejected_steps_from_one_evaluation_are_those_from_many(curvature, monkeypatch):
    own = StepControl.accept
    runs = []
    for reuse in (False, True):
        objective, batch = small_network()
        optimizer = region(objective, curvature=curvature, fraction=1.0, decay=0.0 if type(curvature) is LBFGS else 0.5)
        evaluation, results = objective.at(batch), []
        for number in range(12):
            monkeypatch.setattr(StepControl, "accept", own if number % 3 == 2 else lambda control, ratio: False)
            if not (reuse and evaluation.is_fresh):
                evaluation = objective.at(batch)
            results.append(told(optimizer.step(evaluation)))
        runs.append((results, objective.parameter_vector(), optimizer.state_dict()))
        assert optimizer.state_dict()["control"]["radius"]["step"] == 12
        assert sum("accepted=True" in result for result in results) == 4
    assert_same(*runs)


def test_a_loaded_state_an_error_and_a_curvature_batch_forget_the_statistics(rejecting, monkeypatch):
    objective, batch = small_network()
    optimizer = region(objective)
    evaluation = objective.at(batch)
    empty, draws = copy.deepcopy(optimizer.state_dict()), optimizer._generator.get_state()
    optimizer.step(evaluation)
    optimizer.load_state_dict(empty)
    optimizer.step(evaluation)
    assert not torch.equal(optimizer._generator.get_state(), draws)  # drawn again
    draws = optimizer._generator.get_state()
    with monkeypatch.context() as patch:
        patch.setattr(optimizer._direction, "rejected", lambda snapshot: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            optimizer.step(evaluation)
    assert torch.equal(optimizer._generator.get_state(), draws)
    optimizer.step(evaluation)
    assert not torch.equal(optimizer._generator.get_state(), draws)
    draws = optimizer._generator.get_state()
    optimizer.step(evaluation, curvature_batch=batch)
    assert not torch.equal(optimizer._generator.get_state(), draws)


def test_evaluations_that_do_not_answer_for_the_step_are_refused():
    objective, batch = small_network()
    optimizer = kfac(objective)
    evaluation = objective.at(batch)
    with pytest.raises(ValueError, match="the optimizer's own objective"):
        optimizer.step(Objective(objective.model, objective.loss).at(batch))
    assert optimizer.step(evaluation).accepted
    assert not evaluation.is_fresh
    with pytest.raises(StaleEvaluationError):
        optimizer.step(evaluation)
    evaluation = objective.at(batch)
    assert evaluation.is_fresh
    objective.model.eval()
    assert not evaluation.is_fresh
    objective.model.train()
    assert evaluation.is_fresh
    assert evaluation.batch == batch
    batch[0].add_(1.0)
    assert not evaluation.is_fresh


def test_the_optimizer_keeps_no_evaluation(rejecting):
    objective, batch = small_network()
    optimizer = region(objective)
    gc.disable()
    try:
        evaluation = objective.at(batch)
        assert not optimizer.step(evaluation).accepted
        alive = weakref.ref(evaluation)
        del evaluation
        assert alive() is None
        assert not optimizer._direction._taken
    finally:
        gc.enable()


def counting(monkeypatch):
    """How often the objective is evaluated and statistics are made."""
    counts = {"at": 0, "statistics": 0}

    def counted(owner, name, key):
        own = getattr(owner, name)

        def call(*args, **kwargs):
            counts[key] += 1
            return own(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    counted(Objective, "at", "at")
    counted(Dense, "statistics", "statistics")
    return counts


@pytest.mark.parametrize("make", [levenberg_marquardt, newton], ids=lambda make: make.__name__)
def test_minimize_evaluates_once_at_each_point(make, monkeypatch):
    start = [0.0, 1.0] if make is newton else [-1.2, 1.0]
    objective, batch = least_squares(rosenbrock, start)
    optimizer = make(objective)
    steps = [optimizer.step(batch) for _ in range(12)]
    moved = sum(step.accepted for step in steps)
    assert moved < 12
    other, batch = least_squares(rosenbrock, start)
    counts = counting(monkeypatch)
    results = []
    done = minimize(make(other), batch, max_steps=12, stop_when=results.append)
    assert (done.steps, done.accepted) == (12, moved)
    assert [told(step) for step in results] == [told(step) for step in steps]
    assert torch.equal(other.parameter_vector(), objective.parameter_vector())
    # one at the end, with statistics where the last step was tried from there; the first radius takes the first ones
    assert counts == {"at": moved + 1, "statistics": moved + (not results[-1].accepted)}
    before = sum(step.gradient_evaluations for step in steps)
    assert done.gradient_evaluations < before - 1


def test_minimize_looks_again_where_the_caller_has_moved_parameters_or_mode(rejecting):
    objective, batch = small_network()
    objective.model.append(nn.Dropout(0.5))
    objective = Objective(objective.model, objective.loss)
    values = []

    def move(result):
        values.append(result.loss)
        if len(values) == 1:
            objective.model.eval()
        elif len(values) == 3:
            objective.layout.write(objective.parameters, 0.5 * objective.parameter_vector())
        return len(values) == 4

    start = objective.parameter_vector()
    done = minimize(newton_trust_region(objective), batch, stop_when=move)
    assert values[3] == done.value == float(objective.value(batch))
    objective.layout.write(objective.parameters, start)
    assert values[0] != values[1] == values[2] == float(objective.value(batch)) != values[3]
