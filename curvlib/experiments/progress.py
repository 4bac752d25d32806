"""Live progress bars of a comparison in the terminal."""

from __future__ import annotations

import contextlib
import os
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from curvlib.experiments.comparison import Comparison, Monitor
from curvlib.experiments.methods import Method
from curvlib.experiments.records import Record, Status

# Training waits for the bar; ten updates a second are all that an eye sees.
_SECONDS_BETWEEN_UPDATES = 0.1
_STANDARD_ERROR = 2


class ProgressBars(Monitor):
    """One bar a method: spent part of the budget, steps, last evaluated loss. A context manager.

    Args:
        comparison: whose methods get the bars.
        console: where to draw; without a terminal, the bars are drawn once at the end.
    """

    def __init__(self, comparison: Comparison, console: Console) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("step {task.fields[step]}"),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {
            method.name: self._bars.add_task(method.label, total=1.0, start=False, step=0, loss="-")
            for method in comparison.methods
        }
        self._updated = 0.0

    def __enter__(self) -> ProgressBars:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def started(self, method: Method) -> None:
        """Start the clock of a bar."""
        self._bars.start_task(self._tasks[method.name])

    def advanced(self, method: Method, fraction: float) -> None:
        """Move a bar."""
        now = time.monotonic()
        if now - self._updated >= _SECONDS_BETWEEN_UPDATES:
            self._bars.update(self._tasks[method.name], completed=min(fraction, 1.0))
            self._updated = now

    def recorded(self, method: Method, record: Record) -> None:
        """Show the loss; stop the clock of a bar at the end."""
        task = self._tasks[method.name]
        loss = f"{record.loss:.4g}" if record.status.is_healthy and record.loss is not None else record.status.value
        self._bars.update(task, step=record.step, loss=loss)
        if record.status is Status.FINISHED:
            self._bars.update(task, completed=1.0)
        if record.status is not Status.RUNNING:
            self._bars.stop_task(task)

    def stopping(self) -> None:
        """Say that the current step is finished first."""
        # Not through the console or sys.stderr: the signal may have come in the middle of their own writing.
        with contextlib.suppress(OSError):
            os.write(_STANDARD_ERROR, b"\nInterrupted: finishing the current step; once more stops at once.\n")
