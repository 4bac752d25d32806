"""A clock of training time that waits for the device before it is read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class TrainingClock:
    """Counts the seconds spent inside :meth:`running`.

    Args:
        device: whose queued work belongs to the time.
        seconds: where to go on from.
    """

    def __init__(self, device: torch.device, seconds: float = 0.0) -> None:
        self._device, self._seconds = device, seconds
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds so far; while running without waiting for the device."""
        return self._seconds + (time.perf_counter() - self._started if self._started is not None else 0.0)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of the block."""
        self._wait()
        self._started = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            self._seconds, self._started = self.seconds, None

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
