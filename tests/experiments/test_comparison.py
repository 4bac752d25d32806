"""The comparison runner: fairness, records, picture, divergence."""

import dataclasses
import json
import math

import pytest
import torch
from small_comparisons import LOADED, SMALL, comparison_of, run

from curvlib.experiments import (
    METHODS,
    Epochs,
    ExperimentError,
    Monitor,
    Record,
    ResultsFolder,
    Status,
    StepReport,
    Trainer,
)
from curvlib.experiments.methods import SGD
from curvlib.experiments.report import notes, summarise
from curvlib.experiments.trainers import StepError


def test_all_methods_start_from_the_same_parameters_and_learn(tmp_path):
    outcome = run(comparison_of(*METHODS, steps=12), tmp_path / "out")
    assert not outcome.interrupted
    first = {r.loss for r in outcome.records if r.step == 0}
    assert len(first) == 1
    for name in METHODS:
        own = [r for r in outcome.records if r.method == name]
        assert own[-1].loss < own[0].loss
        assert own[-1].train_metric < own[0].train_metric
        assert own[-1].step == 12
        assert [r.status for r in own] == [Status.RUNNING] * (len(own) - 1) + [Status.FINISHED]
        assert [r.seconds for r in own] == sorted(r.seconds for r in own)
        assert own[-1].gradients >= 12


def test_records_tell_the_loss_of_the_network_in_the_checkpoint(tmp_path):
    comparison = comparison_of("sgd", steps=5)
    outcome = run(comparison, tmp_path / "out")
    model = SMALL.network.build()
    model.load_state_dict(ResultsFolder(tmp_path / "out").load_checkpoint("sgd")["model"])
    order = torch.randperm(1500, generator=torch.Generator().manual_seed(0))[:100]
    with torch.no_grad():
        examples = LOADED.train[order]
        outputs = model(examples.inputs)
        penalty = 0.5 * SMALL.l2 * sum(p.square().sum() for p in model.parameters())
        loss = LOADED.loss(outputs, examples.targets) + penalty
        error = (outputs.sigmoid() - examples.inputs).square().sum(1).mean()
    assert outcome.records[-1].loss == pytest.approx(loss.item(), rel=1e-5)
    assert outcome.records[-1].train_metric == pytest.approx(error.item(), rel=1e-5)


@pytest.mark.parametrize("name", list(METHODS))
def test_l2_reaches_every_method(tmp_path, name):
    strong = dataclasses.replace(SMALL, l2=5.0)
    norms = []
    for problem in (SMALL, strong):
        comparison = comparison_of(name, steps=10, problem=problem)
        path = tmp_path / str(problem.l2)
        run(comparison, path)
        state = ResultsFolder(path).load_checkpoint(name)["model"]
        norms.append(sum(p.square().sum().item() for p in state.values()))
    assert norms[1] < norms[0]


def test_seed_decides_everything(tmp_path):
    def losses(seed, folder):
        return [r.loss for r in run(comparison_of("kfac", "sgd", steps=4, seed=seed), tmp_path / folder).records]

    assert losses(1, "a") == losses(1, "b")
    assert losses(1, "a2") != losses(2, "c")


def test_random_state_of_the_caller_is_left_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    run(comparison_of("sgd", steps=2, threads=1), tmp_path / "out")
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def test_epochs_are_counted_by_examples(tmp_path):
    outcome = run(comparison_of("sgd", budget=Epochs(1.5)), tmp_path / "out")
    assert outcome.records[-1].step == 9
    assert outcome.records[-1].epoch == 1.5


class Reading(Monitor):
    """Reads the file of results at every step, as somebody might."""

    def __init__(self, path):
        self.path, self.lengths = path, []

    def advanced(self, method, fraction):
        lines = (self.path / "results.jsonl").read_text().splitlines(keepends=True)
        assert all(line.endswith("\n") for line in lines)
        assert all(Record.from_json(line).method for line in lines)
        self.lengths.append(len(lines))


def test_results_are_whole_lines_of_json_at_every_moment(tmp_path):
    monitor = Reading(tmp_path / "out")
    run(comparison_of("sgd", "adam"), tmp_path / "out", monitor=monitor)
    assert monitor.lengths[0] == 1
    assert monitor.lengths == sorted(monitor.lengths)


class Breaking(Trainer):
    """Ends in the way that it is told."""

    def __init__(self, after):
        self.after, self.count = after, 0

    def step(self, batch):
        self.count += 1
        if self.count <= 3:
            return StepReport(loss=1.0)
        if isinstance(self.after, Exception):
            raise self.after
        return StepReport(loss=torch.tensor(self.after))

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def breaking(error):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class BreakingMethod(SGD):
        name = "breaking"

        def start(self, model, loss, l2, seed):
            return Breaking(error)

    return BreakingMethod()


@pytest.mark.parametrize(
    ("error", "status", "note"),
    [
        (math.nan, Status.DIVERGED, "the loss is not finite"),
        (math.inf, Status.DIVERGED, "the loss is not finite"),
        (FloatingPointError("the objective is nan"), Status.DIVERGED, "the objective is nan"),
        (StepError("not positive definite"), Status.FAILED, "not positive definite"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), Status.FAILED, "can't allocate memory"),
    ],
)
def test_a_method_that_breaks_is_reported_and_stops_no_other(tmp_path, error, status, note):
    comparison = comparison_of("adam", steps=30)
    comparison = dataclasses.replace(comparison, methods=(breaking(error), *comparison.methods))
    outcome = run(comparison, tmp_path / "out")
    broken = [r for r in outcome.records if r.method == "breaking"]
    assert broken[-1].status is status
    assert note in broken[-1].note
    assert broken[-1].step <= 10
    assert outcome.records[-1].method == "adam"
    assert outcome.records[-1].status is Status.FINISHED
    assert notes(comparison, outcome.records) == [f"breaking {status.value}: {broken[-1].note}"]
    assert [s.seconds_to_common_loss is None for s in summarise(comparison, outcome.records)] == [True, False]
    assert run(comparison, tmp_path / "out").records == outcome.records


def test_an_error_in_the_code_of_a_method_is_not_hidden(tmp_path):
    comparison = dataclasses.replace(comparison_of("sgd"), methods=(breaking(RuntimeError("a mistake")),))
    with pytest.raises(RuntimeError, match="a mistake"):
        run(comparison, tmp_path / "out")


def test_a_learning_rate_that_is_far_too_large_diverges(tmp_path):
    outcome = run(comparison_of("sgd", methods=(SGD(lr=1e12),), steps=60), tmp_path / "out")
    assert outcome.records[-1].status is Status.DIVERGED
    assert outcome.records[-1].step <= 20
    last = json.loads((tmp_path / "out" / "results.jsonl").read_text().splitlines()[-1])
    assert last["loss"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ()}, "one or more different methods"),
        ({"methods": (SGD(), SGD())}, "one or more different methods"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"threads": 0}, "threads must be at least 1"),
    ],
)
def test_a_comparison_checks_its_settings(change, message):
    with pytest.raises(ExperimentError, match=message):
        comparison_of("sgd", **change)


class Pictures(Monitor):
    """Notes whether there is a picture when a method starts, and how long it is."""

    def __init__(self, path):
        self.path, self.sizes = path, {}

    def started(self, method):
        self.sizes[method.name] = self.path.stat().st_size if self.path.exists() else 0


def test_the_picture_is_drawn_whenever_a_method_ends(tmp_path):
    monitor = Pictures(tmp_path / "comparison.png")
    run(comparison_of("sgd", "adam", "kfac", steps=3), tmp_path, monitor=monitor)
    sizes = [*monitor.sizes.values(), (tmp_path / "comparison.png").stat().st_size]
    assert sizes[0] == 0
    assert len(set(sizes)) == 4


def test_the_picture_is_drawn_when_an_error_ends_the_training(tmp_path):
    comparison = dataclasses.replace(comparison_of("sgd"), methods=(breaking(RuntimeError("a mistake")),))
    with pytest.raises(RuntimeError, match="a mistake"):
        run(comparison, tmp_path)
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_fails_does_not_hide_the_error_before(tmp_path, monkeypatch):
    monkeypatch.setattr("curvlib.experiments.runner.figure_png", lambda *_: 1 / 0)
    comparison = dataclasses.replace(comparison_of("sgd"), methods=(breaking(RuntimeError("a mistake")),))
    with pytest.raises(RuntimeError, match="a mistake"):
        run(comparison, tmp_path)
