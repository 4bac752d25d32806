"""Comparisons on a network that is small enough for tests, and ways of interrupting them."""

import dataclasses
import math
import signal

from torch import nn

from curvlib.experiments import (
    PROBLEMS,
    Comparison,
    EvaluationSchedule,
    FullyConnected,
    Monitor,
    Record,
    ResultsFolder,
    Status,
    Steps,
    compare,
    configure,
    prepare_folder,
    reopen_folder,
)

SMALL = dataclasses.replace(
    PROBLEMS.get("digits-autoencoder"),
    network=FullyConnected(widths=(64, 12, 4, 12, 64), activation=nn.Tanh),
    evaluated_examples=100,
    settings={"hessian-free": {"batch_size": 200}, "lbfgs": {"iterations": 2}},
)
LOADED = SMALL.load()


def comparison_of(*names, steps=20, **changes):
    methods = tuple(configure(name, SMALL, {}) for name in names)
    values = {"problem": SMALL, "methods": methods, "budget": Steps(steps), "schedule": EvaluationSchedule(count=6)}
    return Comparison(**{**values, **changes})


def run(comparison, path, **options):
    folder = ResultsFolder(path)
    if folder.has_results:
        reopen_folder(comparison, folder)
    else:
        prepare_folder(comparison, folder)
    return compare(comparison, LOADED, folder, **options)


def timeless(records):
    return [dataclasses.replace(record, seconds=0.0) for record in records]


class Interrupt(Monitor):
    """Ends the comparison at the given call of one of the notifications."""

    def __init__(self, *, steps=math.inf, records=math.inf):
        self.steps, self.records = steps, records

    def advanced(self, method, fraction):
        self.steps -= 1
        if self.steps == 0:
            self.interrupt()

    def recorded(self, method, record):
        self.records -= 1
        if self.records == 0:
            self.interrupt()

    def interrupt(self):
        raise KeyboardInterrupt


class Signal(Interrupt):
    """Sends this process a signal, once or several times."""

    def __init__(self, *, number=signal.SIGINT, times=1, **when):
        super().__init__(**when)
        self.number, self.times, self.announced = number, times, 0

    def interrupt(self):
        for _ in range(self.times):
            signal.raise_signal(self.number)

    def stopping(self):
        self.announced += 1


def record(method, seconds, loss, status=Status.RUNNING):
    return Record(
        method=method, step=int(seconds), epoch=seconds / 2, seconds=seconds, gradients=2 * seconds, loss=loss,
        train_metric=loss, test_metric=loss, status=status,
    )  # fmt: skip
