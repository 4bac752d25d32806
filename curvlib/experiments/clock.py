"""A clock of training time that waits for the device before it is read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class TrainingClock:
    """Counts the seconds spent inside :meth:`running`.

    Args:
        device: whose queued work belongs to the time.
        seconds: where to go on from.
        timer: what is read, elapsed time or processor time.
    """

    def __init__(
        self, device: torch.device, seconds: float = 0.0, timer: Callable[[], float] = time.perf_counter
    ) -> None:
        self._device, self._seconds, self._timer = device, seconds, timer
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds so far; while running without waiting for the device."""
        return self._seconds + (self._timer() - self._started if self._started is not None else 0.0)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of the block."""
        self._wait()
        self._started = self._timer()
        try:
            yield
        finally:
            self._wait()
            self._seconds, self._started = self.seconds, None

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
