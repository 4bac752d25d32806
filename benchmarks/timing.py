"""Ratios of running times on machines whose speed changes from second to second.

Symbols: A the reference (usually one gradient), B the subject, measured in turns A B A B ... A. Each B is divided by
the mean of its two neighbours, so that a slow drift of the machine cancels to first order; the median is reported.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from benchmarks.subjects import Call

# One measurement takes this long at least, by repeating short calls: far more than the clock and one wake-up cost.
_SHORTEST_SECONDS = 0.02

Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """The subject's time over the reference's.

    Attributes:
        median: of the pairwise ratios.
        lowest: smallest pairwise ratio.
        highest: largest one.
        seconds: median time of one unit of the subject.
        reference_seconds: median time of one call of the reference.
        repeats: number of ratios.
    """

    median: float
    lowest: float
    highest: float
    seconds: float
    reference_seconds: float
    repeats: int


def interleaved(
    reference: Call, subject: Call, *, units: int, repeats: int, device: torch.device, clock: Clock
) -> Ratio:
    """Time both in turns and return their ratio.

    Args:
        reference: A.
        subject: B.
        units: units of work in one call of B.
        repeats: pairs, at least 1.
        device: waited for after each measurement.
        clock: gives seconds, such as ``time.perf_counter``.
    """
    first, second = _Stopwatch(reference, device, clock), _Stopwatch(subject, device, clock)
    a, b = [first.seconds()], []
    for _ in range(repeats):
        b.append(second.seconds() / units)
        a.append(first.seconds())
    ratios = [value / (0.5 * (before + after)) for value, before, after in zip(b, a, a[1:], strict=False)]
    return Ratio(
        median=median(ratios),
        lowest=min(ratios),
        highest=max(ratios),
        seconds=median(b),
        reference_seconds=median(a),
        repeats=repeats,
    )


class _Stopwatch:
    """Times one function, warmed up, as often in a row as fills the shortest measurement."""

    def __init__(self, call: Call, device: torch.device, clock: Clock) -> None:
        self._call, self._device, self._clock, self._count = call, device, clock, 1
        once = self.seconds()
        if once < _SHORTEST_SECONDS:
            # The first call of a short function is mostly what is loaded and allocated at first use.
            self._count = max(1, round(_SHORTEST_SECONDS / max(self.seconds(), 1e-9)))

    def seconds(self) -> float:
        """Return the time of one call."""
        # Cycles that the other side has left behind are not to be collected at this one's expense.
        gc.collect()
        self._wait()
        start = self._clock()
        for _ in range(self._count):
            self._call()
        self._wait()
        return (self._clock() - start) / self._count

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
