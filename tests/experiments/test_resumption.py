"""Interruption and resumption: nothing is lost, and the rest is what it would have been."""

import dataclasses
import signal
import threading

import pytest
import torch
from small_comparisons import SMALL, Interrupt, Signal, comparison_of, run, timeless
from torch import nn

from curvlib.experiments import (
    METHODS,
    Epochs,
    EvaluationSchedule,
    ExperimentError,
    ResultsFolder,
    Seconds,
    Status,
    Steps,
    reopen_folder,
)
from curvlib.experiments.methods import SGD
from curvlib.experiments.report import summarise


@pytest.fixture(autouse=True)
def _quick_pictures(monkeypatch):
    monkeypatch.setattr("curvlib.experiments.runner.figure_png", lambda *_: b"a picture")


@pytest.fixture(autouse=True)
def _interrupts_as_in_a_terminal():
    # Workers of a parallel test run may ignore interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("checkpoint_seconds", [0.0, 1e9], ids=["from a checkpoint", "from the start"])
def test_resumed_run_has_the_records_of_an_uninterrupted_one(tmp_path, name, checkpoint_seconds):
    comparison = comparison_of(name, steps=14)
    expected = run(comparison, tmp_path / "whole").records
    for interruption in (Interrupt(steps=3), Interrupt(steps=4), Interrupt(records=2)):
        outcome = run(comparison, tmp_path / "cut", monitor=interruption, checkpoint_seconds=checkpoint_seconds)
        assert outcome.interrupted
        assert outcome.records[-1].status is Status.RUNNING
    resumed = run(comparison, tmp_path / "cut").records
    assert timeless(resumed) == timeless(expected)
    final = [ResultsFolder(tmp_path / part).load_checkpoint(name)["model"] for part in ("whole", "cut")]
    assert all(torch.equal(final[0][key], final[1][key]) for key in final[0])


class NoisyTanh(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x.tanh(), 0.2, self.training)


def test_randomness_of_the_network_is_resumed_too(tmp_path):
    noisy = dataclasses.replace(SMALL, network=dataclasses.replace(SMALL.network, activation=NoisyTanh))
    comparison = comparison_of("sgd", steps=14, problem=noisy)
    expected = run(comparison, tmp_path / "whole").records
    run(comparison, tmp_path / "cut", monitor=Interrupt(steps=9), checkpoint_seconds=0.0)
    assert timeless(run(comparison, tmp_path / "cut").records) == timeless(expected)


def test_finished_methods_are_not_trained_again(tmp_path):
    comparison = comparison_of("sgd", "adam", steps=6)
    whole = run(comparison, tmp_path / "whole").records
    per_method = sum(record.method == "sgd" for record in whole)
    first = run(comparison, tmp_path / "cut", monitor=Interrupt(records=per_method + 2))
    resumed = run(comparison, tmp_path / "cut")
    assert resumed.records[:per_method] == first.records[:per_method]
    assert timeless(resumed.records) == timeless(whole)
    again = run(comparison, tmp_path / "cut")
    assert again.records == resumed.records


def test_resuming_counts_the_seconds_of_before(tmp_path):
    comparison = comparison_of("sgd", budget=Seconds(0.3))
    cut = run(comparison, tmp_path / "out", monitor=Interrupt(records=4), checkpoint_seconds=0.0)
    resumed = run(comparison, tmp_path / "out").records
    assert resumed[:3] == cut.records[:3]
    assert [r.seconds for r in resumed] == sorted(r.seconds for r in resumed)
    assert 0.3 <= resumed[-1].seconds < 0.6


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 3}, "seed was 0, is now 3"),
        ({"budget": Steps(9)}, "budget was 20 steps, is now 9 steps"),
        ({"problem": dataclasses.replace(SMALL, l2=0.5)}, "problem.l2 was 1e-05, is now 0.5"),
        ({"threads": 1}, "threads was None, is now 1"),
        ({"methods": (SGD(lr=0.5),)}, "sgd.lr was 0.01, is now 0.5"),
        ({"methods": (METHODS.get("adam")(),)}, "method was sgd, is now adam"),
        ({"schedule": EvaluationSchedule(count=3)}, "evaluations was 6, is now 3"),
    ],
)
def test_resuming_with_other_settings_is_refused_by_name(tmp_path, change, named):
    comparison = comparison_of("sgd")
    run(comparison, tmp_path / "out", monitor=Interrupt(steps=3))
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    with pytest.raises(ExperimentError, match="started with other settings") as caught:
        run(dataclasses.replace(comparison, **change), tmp_path / "out")
    assert named in str(caught.value)
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == before


def steps_of(path, name):
    return ResultsFolder(path).load_checkpoint(name)["step"]


@pytest.mark.parametrize("name", list(METHODS))
def test_a_signal_saves_the_step_that_it_comes_in(tmp_path, name):
    comparison = comparison_of(name, steps=14)
    expected = run(comparison, tmp_path / "whole").records
    done = 0
    for steps, number in ((1, signal.SIGINT), (4, signal.SIGTERM), (2, signal.SIGINT)):
        monitor = Signal(steps=steps, number=number)
        outcome = run(comparison, tmp_path / "cut", monitor=monitor)
        done += steps
        assert outcome.interrupted
        assert monitor.announced == 1
        assert steps_of(tmp_path / "cut", name) == done
        assert timeless(outcome.records) == timeless([r for r in expected if r.step <= done])
        assert (tmp_path / "cut" / "comparison.png").exists()
    resumed = run(comparison, tmp_path / "cut")
    assert not resumed.interrupted
    assert timeless(resumed.records) == timeless(expected)
    final = [ResultsFolder(tmp_path / part).load_checkpoint(name)["model"] for part in ("whole", "cut")]
    assert all(torch.equal(final[0][key], final[1][key]) for key in final[0])


def test_a_signal_at_a_record_keeps_the_record(tmp_path):
    comparison = comparison_of("sgd", "adam", steps=14)
    expected = run(comparison, tmp_path / "whole").records
    for records in (1, 2, 3, 2, 2):
        assert run(comparison, tmp_path / "cut", monitor=Signal(records=records)).interrupted
    assert timeless(run(comparison, tmp_path / "cut").records) == timeless(expected)


def test_a_signal_before_the_first_step_of_a_method(tmp_path):
    comparison = comparison_of("kfac", steps=6)
    cut = run(comparison, tmp_path / "cut", monitor=Signal(records=1))
    assert [r.step for r in cut.records] == [0]
    expected = run(comparison, tmp_path / "whole").records
    assert timeless(run(comparison, tmp_path / "cut").records) == timeless(expected)


def test_a_second_signal_interrupts_at_once_and_loses_no_record(tmp_path):
    comparison = comparison_of("sgd", steps=40)
    expected = run(comparison, tmp_path / "whole").records
    cut = run(comparison, tmp_path / "cut", monitor=Signal(records=4, times=2))
    assert cut.interrupted
    assert ResultsFolder(tmp_path / "cut").load_checkpoint("sgd") is None
    assert timeless(cut.records) == timeless(expected[:4])
    # While they are made again, none of them goes before its successor has come.
    for steps in range(1, cut.records[-1].step + 1):
        again = run(comparison, tmp_path / "cut", monitor=Interrupt(steps=steps))
        assert timeless(again.records) == timeless(cut.records)
    assert timeless(run(comparison, tmp_path / "cut").records) == timeless(expected)


def test_records_that_are_made_again_are_the_new_ones(tmp_path):
    comparison = comparison_of("sgd", steps=40)
    cut = run(comparison, tmp_path / "cut", monitor=Interrupt(records=4))
    again = run(comparison, tmp_path / "cut", monitor=Signal(records=2))
    assert [new == old for new, old in zip(again.records, cut.records, strict=True)] == [True, False, False, True]


def test_signal_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run(comparison_of("sgd", steps=3), tmp_path, monitor=Signal(steps=2))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_signals_that_the_process_ignores_stay_ignored(tmp_path):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert not run(comparison_of("sgd", steps=3), tmp_path, monitor=Signal(steps=2)).interrupted


def test_other_threads_can_compare(tmp_path):
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(run(comparison_of("sgd", steps=3), tmp_path)))
    thread.start()
    thread.join()
    assert outcomes[0].records[-1].status is Status.FINISHED


@pytest.mark.parametrize("interrupted", [True, False])
def test_a_larger_budget_extends_a_comparison(tmp_path, interrupted):
    short, long = comparison_of("sgd", "kfac", steps=9), comparison_of("sgd", "kfac", steps=20)
    before = run(short, tmp_path / "out", monitor=Signal(steps=12) if interrupted else None).records
    assert before[-1].status is (Status.RUNNING if interrupted else Status.FINISHED)
    cut = run(long, tmp_path / "out", monitor=Signal(steps=3))
    assert cut.interrupted
    assert [s.last.status for s in summarise(long, cut.records)] == [Status.RUNNING] * 2
    records = run(long, tmp_path / "out").records
    assert [(s.last.step, s.last.status) for s in summarise(long, records)] == [(20, Status.FINISHED)] * 2
    assert [r.status for r in records].count(Status.FINISHED) == 2
    kept = {(r.method, r.step): r.loss for r in records}
    assert all(kept[r.method, r.step] == r.loss for r in before)
    assert [r.method for r in records] == sorted((r.method for r in records), reverse=True)
    whole = run(long, tmp_path / "whole").records
    last = {r.method: dataclasses.replace(r, seconds=0.0) for r in whole}
    assert {r.method: dataclasses.replace(r, seconds=0.0) for r in records} == last
    assert run(long, tmp_path / "out").records == records


def test_an_extension_that_is_killed_at_its_start_goes_on(tmp_path):
    run(comparison_of("sgd", steps=5), tmp_path)
    long = comparison_of("sgd", steps=8)
    reopen_folder(long, ResultsFolder(tmp_path))  # and then nothing
    assert run(long, tmp_path).records[-1].step == 8


@pytest.mark.parametrize(
    ("before", "after"), [(Epochs(0.5), Epochs(1)), (Seconds(0.05), Seconds(1.5)), (Seconds(1 / 30), Seconds(1.5))]
)
def test_budgets_of_every_kind_can_grow_and_cannot_shrink(tmp_path, before, after):
    run(comparison_of("sgd", budget=before), tmp_path)
    first = len((tmp_path / "results.jsonl").read_text().splitlines())
    assert len(run(comparison_of("sgd", budget=after), tmp_path).records) > first
    for other in (before, Steps(10**6)):
        with pytest.raises(ExperimentError, match=f"budget was {after}, is now {other}"):
            run(comparison_of("sgd", budget=other), tmp_path)


def test_a_method_that_diverged_is_not_extended(tmp_path):
    short = comparison_of("sgd", methods=(SGD(lr=1e12),), steps=30)
    before = run(short, tmp_path).records
    assert before[-1].status is Status.DIVERGED
    assert run(dataclasses.replace(short, budget=Steps(60)), tmp_path).records == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", list(METHODS))
def test_methods_train_on_a_gpu_and_are_resumed_there(tmp_path, name):
    comparison = comparison_of(name, steps=12, device=torch.device("cuda"))
    run(comparison, tmp_path / "out", monitor=Interrupt(steps=5), checkpoint_seconds=0.0)
    records = run(comparison, tmp_path / "out").records
    assert records[-1].status is Status.FINISHED
    assert records[-1].loss < records[0].loss
