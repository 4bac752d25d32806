"""Runs a comparison: one method after the other, every record kept at once, ready to be interrupted."""

from __future__ import annotations

import contextlib
import dataclasses

import torch

from curvlib.experiments.budgets import Progress
from curvlib.experiments.comparison import Comparison, Monitor, Outcome
from curvlib.experiments.figure import figure_png
from curvlib.experiments.interruption import Interruption
from curvlib.experiments.methods import Method
from curvlib.experiments.problems import LoadedProblem
from curvlib.experiments.records import Record, Status
from curvlib.experiments.results_folder import ResultsFolder
from curvlib.experiments.run import Run
from curvlib.experiments.workload import Workload, warm_up, workload_of


def compare(
    comparison: Comparison,
    loaded: LoadedProblem,
    folder: ResultsFolder,
    *,
    monitor: Monitor | None = None,
    checkpoint_seconds: float = 10.0,
) -> Outcome:
    """Train with every method and record how it goes.

    What the folder holds already is gone on with: finished methods are left alone, and an unfinished one continues
    from its last checkpoint with exactly the records that it would have had (for a budget of steps or epochs on the
    CPU). The picture is drawn whenever a method ends, and at the end, whatever ends the comparison.

    The first SIGINT (Ctrl-C) or SIGTERM ends the comparison after the current step, with a checkpoint of it. The
    second one ends it at once; the method then goes on from its checkpoint before, and no record is lost.

    Args:
        comparison: what to do.
        loaded: the problem's data.
        folder: prepared by :func:`prepare_folder`, :func:`replace_folder` or :func:`reopen_folder`.
        monitor: is told of the progress.
        checkpoint_seconds: seconds of training between two checkpoints of a method, at least.

    Returns:
        The records, also of an interrupted comparison.
    """
    monitor = monitor if monitor is not None else Monitor()
    threads = torch.get_num_threads()
    cuda = [comparison.device] if comparison.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), Interruption(monitor.stopping) as interruption:
        runner = _Runner(comparison, folder, monitor, interruption, checkpoint_seconds)
        try:
            torch.set_num_threads(comparison.threads or threads)
            complete = runner.train_all(loaded)
        except KeyboardInterrupt:
            complete = False
        except BaseException:
            # What ended the training is what the user must hear of, not a picture that failed after it.
            with contextlib.suppress(Exception):
                runner.draw()
            raise
        finally:
            torch.set_num_threads(threads)
        with contextlib.suppress(KeyboardInterrupt):
            runner.draw()
    order = {method.name: number for number, method in enumerate(comparison.methods)}
    records = sorted((r for r in folder.records() if r.method in order), key=lambda record: order[record.method])
    return Outcome(records=tuple(records), interrupted=not complete)


class _Runner:
    """The work of :func:`compare`, with its arguments."""

    def __init__(
        self,
        comparison: Comparison,
        folder: ResultsFolder,
        monitor: Monitor,
        interruption: Interruption,
        checkpoint_seconds: float,
    ) -> None:
        self._comparison, self._folder, self._monitor = comparison, folder, monitor
        self._stop, self._checkpoint_seconds = interruption.requested, checkpoint_seconds
        self._drawn: list[Record] = []

    def train_all(self, loaded: LoadedProblem) -> bool:
        """Train with every method; return whether all came to an end."""
        self._reopen_finished()
        workload = workload_of(self._comparison, loaded)
        warm_up(workload)
        return all(self._train(workload, method) for method in self._comparison.methods)

    def draw(self) -> None:
        """Draw the picture, unless it shows everything already."""
        records = self._folder.records()
        if records and records != self._drawn:
            self._folder.write_figure(figure_png(self._comparison, records))
            self._drawn = records

    def _reopen_finished(self) -> None:
        """Call methods unfinished that finished a smaller budget."""
        records = self._folder.records()
        reopened = [
            dataclasses.replace(r, status=Status.RUNNING)
            if r.status is Status.FINISHED and not self._is_at_its_end(r)
            else r
            for r in records
        ]
        if reopened != records:
            self._folder.replace_records(reopened)

    def _is_at_its_end(self, record: Record) -> bool:
        progress = Progress(step=record.step, epoch=record.epoch, seconds=record.seconds)
        return not record.status.is_healthy or self._comparison.budget.fraction(progress) >= 1.0

    def _train(self, workload: Workload, method: Method) -> bool:
        """Train with one method; return whether it came to its end."""
        if self._stop():
            return False
        self._monitor.started(method)
        mine = [record for record in self._folder.records() if record.method == method.name]
        if mine and mine[-1].status is not Status.RUNNING:
            self._monitor.recorded(method, mine[-1])
            return True
        run = Run(workload, method)
        state = self._folder.load_checkpoint(method.name)
        if state is not None:
            run.load_state_dict(state)
        complete = self._go_on(run, method)
        if complete:
            self.draw()
        return complete

    def _go_on(self, run: Run, method: Method) -> bool:
        records = _RecordsOfRun(self._folder, method.name, run.step)
        record = records.last if records.last is not None else self._evaluate(run, method, records)
        saved_at = record.seconds
        while record.status is Status.RUNNING:
            if not run.train_to_next_evaluation(lambda fraction: self._monitor.advanced(method, fraction), self._stop):
                self._folder.save_checkpoint(method.name, run.state_dict())
                return False
            record = self._evaluate(run, method, records)
            if record.status is not Status.RUNNING or record.seconds - saved_at >= self._checkpoint_seconds:
                self._folder.save_checkpoint(method.name, run.state_dict())
                saved_at = record.seconds
        return True

    def _evaluate(self, run: Run, method: Method, records: _RecordsOfRun) -> Record:
        record = run.evaluate()
        records.add(record)
        self._monitor.recorded(method, record)
        return record


class _RecordsOfRun:
    """Records of one method, some of which may be later than the checkpoint that its run goes on from.

    Those are made again. Each gives way only when a new one has come as far: an interruption at any moment leaves at
    least as many as there were.

    Args:
        folder: that keeps them.
        method: its name.
        step: where the run stands.
    """

    def __init__(self, folder: ResultsFolder, method: str, step: int) -> None:
        self._folder, self._method = folder, method
        mine = [record for record in folder.records() if record.method == method]
        self._later = [record for record in mine if record.step > step]
        earlier = [record for record in mine if record.step <= step]
        self.last: Record | None = earlier[-1] if earlier else None

    def add(self, record: Record) -> None:
        """Keep a new record."""
        if self._later:
            # The first one that is made again, and others before it, are superseded; all are where the run has ended.
            running = record.status is Status.RUNNING
            later = [other for other in self._later if running and other.step > record.step]
            kept = [other for other in self._folder.records() if other not in self._later]
            self._folder.replace_records([*kept, record, *later])
            self._later = later
        else:
            self._folder.append(record)
        self.last = record
