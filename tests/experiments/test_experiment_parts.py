"""Budgets, schedule, data order, options, networks and tasks."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from curvlib import GGN, EmpiricalFisher, Fisher
from curvlib.approximations import EKFAC, KFAC, Diagonal, Exact, Identity
from curvlib.experiments import (
    METHODS,
    PROBLEMS,
    CurvatureChoice,
    Epochs,
    EvaluationSchedule,
    ExperimentError,
    FullyConnected,
    Problem,
    Seconds,
    Steps,
    configure,
    register_problem,
)
from curvlib.experiments.budgets import Progress
from curvlib.experiments.example_order import ExampleOrder
from curvlib.experiments.images import Images
from curvlib.experiments.networks import glorot, kaiming, sparse
from curvlib.experiments.options import options_of
from curvlib.experiments.tasks import Accuracy, Classification, Reconstruction, SquaredErrorPerImage
from curvlib.optimizers import Preconditioner
from curvlib.solvers import TighteningTest

DIGITS = PROBLEMS.get("digits-autoencoder")
CPU = torch.device("cpu")


def test_each_budget_counts_its_own_quantity():
    progress = Progress(step=3, epoch=0.5, seconds=20.0)
    assert Steps(6).fraction(progress) == 0.5
    assert Epochs(2).fraction(progress) == 0.25
    assert Seconds(10).fraction(progress) == 2.0


@pytest.mark.parametrize("budget", [Steps, Epochs, Seconds])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_a_budget_that_never_ends_or_begins_is_refused(budget, value):
    with pytest.raises(ExperimentError, match="must be a finite number above 0"):
        budget(value)


@given(count=st.integers(1, 60), steps=st.integers(1, 400))
def test_schedule_evaluates_at_the_end_and_never_more_often_than_asked(count, steps):
    schedule = EvaluationSchedule(count=count)
    due = [step for step in range(1, steps + 1) if schedule.is_due((step - 1) / steps, step / steps)]
    assert due[-1] == steps
    assert len(due) <= count
    if steps >= count**2:
        assert len(due) == count
    # Often at first: the gaps never become much shorter.
    gaps = [b - a for a, b in itertools.pairwise(due)]
    assert all(late >= early - 1 for early, late in itertools.pairwise(gaps))


def test_schedule_needs_an_evaluation():
    with pytest.raises(ExperimentError, match="must be at least 1, got 0"):
        EvaluationSchedule(count=0)


@settings(max_examples=60)
@given(size=st.integers(1, 40), cuts=st.lists(st.integers(1, 90), min_size=1, max_size=6), seed=st.integers(0, 9))
def test_batches_of_any_size_are_cuts_of_one_stream_of_permutations(size, cuts, seed):
    order, position, parts = ExampleOrder(size, seed, CPU), 0, []
    for length in cuts:
        parts.append(order.batch(position, length))
        assert len(parts[-1]) == length
        position += length
    stream = torch.cat(parts)
    assert torch.equal(stream, ExampleOrder(size, seed, CPU).batch(0, position))
    for epoch in stream.split(size):
        if len(epoch) == size:
            assert torch.equal(epoch.sort().values, torch.arange(size))
    # A fresh order at a later position, as after a resumption.
    assert torch.equal(ExampleOrder(size, seed, CPU).batch(position, 5), order.batch(position, 5))


def test_order_changes_with_the_seed_and_the_epoch():
    first = ExampleOrder(50, 0, CPU).batch(0, 100)
    assert not torch.equal(first[:50], first[50:])
    assert not torch.equal(first, ExampleOrder(50, 1, CPU).batch(0, 100))


@pytest.mark.parametrize("name", list(METHODS))
def test_every_option_can_be_set_and_is_checked(name):
    for entry in options_of(METHODS.get(name)):
        changed = {int: 7, float: 0.123, str: str(entry.bounds).split(", ")[-1]}[entry.kind]
        assert getattr(configure(name, DIGITS, {entry.name: str(changed)}), entry.name) == changed
        for wrong in ("fast", "nan", "-1", "1.5" if entry.kind is int else "inf", ""):
            with pytest.raises(ExperimentError, match=rf"{name}\.{entry.name} must be {entry.expectation}"):
                configure(name, DIGITS, {entry.name: wrong})


@pytest.mark.parametrize(("wrong", "value"), [("batch_size", True), ("batch_size", 2.0), ("lr", "0.1"), ("lr", None)])
def test_python_callers_are_checked_too(wrong, value):
    with pytest.raises(ExperimentError, match=rf"sgd\.{wrong} must be"):
        METHODS.get("sgd")(**{wrong: value})


def test_unknown_options_list_the_known_ones():
    with pytest.raises(ExperimentError, match=r"Unknown option sgd\.speed\. Known options of sgd: batch_size, lr"):
        configure("sgd", DIGITS, {"speed": "1"})
    with pytest.raises(ExperimentError, match=r"Unknown method 'agd'; did you mean 'sgd'\? Known: kfac, hessian-free"):
        configure("agd", DIGITS, {})


def test_settings_of_the_problem_come_before_defaults_and_after_overrides():
    problem = dataclasses.replace(DIGITS, settings={"sgd": {"lr": 0.5}})
    assert configure("sgd", problem, {}).lr == 0.5
    assert configure("sgd", problem, {"lr": "0.25"}).lr == 0.25
    assert configure("adam", problem, {}).lr == METHODS.get("adam")().lr


def test_curvature_choice_keeps_what_was_not_asked_for():
    hessian_free = configure("hessian-free", DIGITS, {})
    assert hessian_free.label == "hessian-free"
    assert hessian_free.with_curvature(CurvatureChoice(matrix="empirical-fisher")).curvature.approximation == Exact(
        EmpiricalFisher()
    )
    changed = hessian_free.with_curvature(CurvatureChoice(approximation="diagonal"))
    assert changed.curvature.approximation == Diagonal(GGN())
    assert changed.label == "hessian-free (diagonal ggn)"
    assert changed.settings() != hessian_free.settings()
    identity = hessian_free.with_curvature(CurvatureChoice(approximation="identity"))
    assert identity.curvature.approximation == Identity()


def test_curvature_choice_refuses_what_makes_no_sense():
    with pytest.raises(ExperimentError, match="Known: kfac, kfac-reduce"):
        CurvatureChoice(approximation="kfca")
    with pytest.raises(ExperimentError, match="Known: ggn, fisher, empirical-fisher"):
        CurvatureChoice(matrix="hessian")
    with pytest.raises(ExperimentError, match="leave out --matrix ggn"):
        CurvatureChoice(approximation="identity", matrix="ggn")
    with pytest.raises(ExperimentError, match="sgd has no curvature matrix"):
        configure("sgd", DIGITS, {}).with_curvature(CurvatureChoice(matrix="ggn"))


def test_a_registered_problem_keeps_its_name():
    with pytest.raises(ExperimentError, match="registered already"):
        register_problem(DIGITS)


@pytest.mark.parametrize(("field", "value"), [("l2", -1.0), ("evaluated_examples", 0)])
def test_a_problem_checks_its_numbers(field, value):
    with pytest.raises(ExperimentError, match=field):
        dataclasses.replace(DIGITS, **{field: value})


def test_network_has_linear_layers_where_asked_and_no_activation_at_the_end():
    network = FullyConnected(widths=(4, 3, 2, 3, 4), activation=nn.Tanh, linear_layers=(2,))
    kinds = [type(module) for module in network.build()]
    assert kinds == [nn.Linear, nn.Tanh, nn.Linear, nn.Linear, nn.Tanh, nn.Linear]
    assert str(network) == "4-3-2-3-4"
    for wrong in ((4,), (4, 0)):
        with pytest.raises(ExperimentError, match="widths needs at least two positive"):
            FullyConnected(widths=wrong, activation=nn.Tanh)


def test_initialisations_have_their_moments():
    layer = nn.Linear(400, 300)
    for initialise, variance in ((glorot, 2 / 700), (kaiming, 2 / 400), (sparse, 15 / 400)):
        initialise(layer)
        assert layer.weight.var().item() == pytest.approx(variance, rel=0.05)
        assert torch.count_nonzero(layer.bias) == 0
    assert torch.equal((layer.weight != 0).sum(dim=1), torch.full((300,), 15))
    sparse(small := nn.Linear(6, 5))
    assert torch.count_nonzero(small.weight) == 30


def test_reconstruction_loss_is_a_sum_over_pixels_and_a_mean_over_images():
    generator = torch.Generator().manual_seed(0)
    pixels, logits = torch.rand(7, 20, generator=generator), torch.randn(7, 20, generator=generator)
    images = Images(pixels=pixels)
    p = logits.sigmoid()
    expected = -(pixels * p.log() + (1 - pixels) * (1 - p).log()).sum(1).mean()
    torch.testing.assert_close(Reconstruction().loss(images)(logits, Reconstruction().targets(images)), expected)
    torch.testing.assert_close(SquaredErrorPerImage()(logits, pixels), ((p - pixels) ** 2).sum(1).mean())


def test_classification_reports_the_share_that_is_right():
    outputs, labels = torch.eye(4), torch.tensor([0, 1, 2, 0])
    assert Accuracy()(outputs, labels) == 0.75
    images = Images(pixels=torch.zeros(4, 1), labels=labels)
    expected = -outputs.log_softmax(1)[torch.arange(4), labels].mean()
    torch.testing.assert_close(Classification().loss(images)(outputs, Classification().targets(images)), expected)


def test_identity_of_a_problem_holds_no_addresses():
    for _, problem in PROBLEMS.items():
        assert isinstance(problem, Problem)
        assert "0x" not in "".join(problem.identity().values())


def test_options_that_may_be_left_to_the_method():
    digits = PROBLEMS.get("digits-classifier")
    assert configure("kfac", digits, {}).damping is None
    assert configure("kfac", digits, {"damping": "auto"}).damping is None
    assert configure("kfac", digits, {"damping": "2.5"}).damping == 2.5
    with pytest.raises(ExperimentError, match=r"kfac\.damping must be a finite number above 0 or auto, got 'much'"):
        configure("kfac", digits, {"damping": "much"})
    with pytest.raises(ExperimentError, match=r"adam\.lr must be a finite number above 0, got 'auto'"):
        configure("adam", digits, {"lr": "auto"})


def test_the_trust_region_takes_preconditioners_by_name():
    model = nn.Sequential(nn.Linear(64, 3), nn.Sigmoid(), nn.Linear(3, 64))
    for words, preconditioner, euclidean in (
        ({}, None, True),
        ({"preconditioner": "ekfac"}, EKFAC(Fisher(samples=10)), False),
    ):
        method = configure("newton-trust-region", DIGITS, words)
        config = method.start(model, nn.BCEWithLogitsLoss(), 0.0, 0)._optimizer._direction._config
        assert config.preconditioner == preconditioner
        assert config.descent.euclidean_radius == euclidean
    with pytest.raises(ExperimentError, match=r"newton-trust-region\.preconditioner must be one of none, diagonal"):
        configure("newton-trust-region", DIGITS, {"preconditioner": "kfca"})


def test_hessian_free_takes_preconditioners_and_rules_by_name():
    model = nn.Sequential(nn.Linear(64, 3), nn.Sigmoid(), nn.Linear(3, 64))
    made = {}
    choices = ({"preconditioner": "kfac"}, {"preconditioner": "diagonal"}, {"rules": "shorter"}, {"rules": "martens"})
    for words in ({}, *choices):
        method = configure("hessian-free", DIGITS, words)
        direction = method.start(model, nn.BCEWithLogitsLoss(), 0.0, 0)._optimizer._direction
        made[tuple(words.values())] = direction._config
    assert made[()].preconditioner is None
    assert made[("kfac",)].preconditioner == KFAC(Fisher(samples=10))
    assert made[("diagonal",)].preconditioner == Preconditioner.martens()
    assert str(made[()].cg.stop) == "progress below 5e-02 an iteration"
    assert made[("shorter",)].cg.stop == TighteningTest(epsilon=0.1, min_window=1)
    assert str(made[("martens",)].cg.stop) == "progress below 5e-04 an iteration"
    for words in ({"preconditioner": "kfca"}, {"rules": "auto"}, {"preconditioner": ""}):
        with pytest.raises(
            ExperimentError, match=r"hessian-free\.\w+ must be one of (none, diagonal|short, shorter, martens)"
        ):
            configure("hessian-free", DIGITS, words)
