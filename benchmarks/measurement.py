"""Runs one benchmark: every subject against the gradient, every target against its reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.memory import measure_in_process
from benchmarks.subjects import PLAIN_GRADIENT, Benchmark, Subject, Target
from benchmarks.timing import Clock, Ratio, interleaved


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to measure.

    Attributes:
        repeats: pairs of measurements for each ratio.
        device: "cpu" or "cuda".
        threads: CPU threads.
        tiny: networks and batches of a few units, to try the code out.
        memory: whether to measure peak memory as well.
        clock: gives the seconds that are compared.
    """

    repeats: int
    device: str
    threads: int
    tiny: bool
    memory: bool
    clock: Clock


@dataclass(frozen=True, kw_only=True)
class Row:
    """One subject's result.

    Attributes:
        subject: its name.
        ratio: its time over one gradient's; None for the gradient itself.
        peak_mib: peak memory on top of model and batch, or None where it was not measured.
        note: a few words.
    """

    subject: str
    ratio: Ratio | None
    peak_mib: float | None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a target was met.

    Attributes:
        target: the target.
        ratio: the ratio that it is about.
    """

    target: Target
    ratio: Ratio

    @property
    def met(self) -> bool:
        """Whether the median is within the target."""
        return self.ratio.median <= self.target.at_most


@dataclass(frozen=True, kw_only=True)
class Result:
    """One benchmark's results.

    Attributes:
        benchmark: what was run.
        rows: a row for the gradient and one for each subject.
        verdicts: one for each target.
    """

    benchmark: Benchmark
    rows: tuple[Row, ...]
    verdicts: tuple[Verdict, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the results as JSON values."""
        return {
            "name": self.benchmark.name,
            "title": self.benchmark.title,
            "problem": str(self.benchmark.problem),
            "rows": [asdict(row) for row in self.rows],
            "targets": [
                {**asdict(verdict.target), "ratio": asdict(verdict.ratio), "met": verdict.met}
                for verdict in self.verdicts
            ],
        }


def run(benchmark: Benchmark, settings: Settings, announce: Callable[[str], None]) -> Result:
    """Measure all subjects and targets of a benchmark.

    Args:
        benchmark: what to run, at the sizes that the settings ask for.
        settings: how to measure.
        announce: called with a few words on what is being measured now.
    """
    rows = [_row(benchmark, subject, settings, announce) for subject in (PLAIN_GRADIENT, *benchmark.subjects)]
    ratios = {row.subject: row.ratio for row in rows}
    verdicts = []
    for target in benchmark.targets:
        ratio = ratios[target.subject]
        if target.reference != PLAIN_GRADIENT.name or ratio is None:
            announce(f"{target.subject} against {target.reference}")
            ratio = _ratio(benchmark, benchmark.subject(target.subject), target.reference, settings)[0]
        verdicts.append(Verdict(target=target, ratio=ratio))
    return Result(benchmark=benchmark, rows=tuple(rows), verdicts=tuple(verdicts))


def _row(benchmark: Benchmark, subject: Subject, settings: Settings, announce: Callable[[str], None]) -> Row:
    announce(subject.name)
    ratio, note = None, ""
    if subject is not PLAIN_GRADIENT:
        ratio, note = _ratio(benchmark, subject, PLAIN_GRADIENT.name, settings)
    peak = None
    if settings.memory:
        peak = measure_in_process(
            benchmark, subject, device=settings.device, threads=settings.threads, tiny=settings.tiny
        )
    return Row(subject=subject.name, ratio=ratio, peak_mib=peak, note=note)


def _ratio(benchmark: Benchmark, subject: Subject, reference: str, settings: Settings) -> tuple[Ratio, str]:
    """Return the ratio of two subjects, each with a model of its own, and the subject's note."""
    device = torch.device(settings.device)
    first = benchmark.subject(reference).prepare(benchmark.problem.workload(device))
    second = subject.prepare(benchmark.problem.workload(device))
    note = subject.note(second())
    repeats = min(settings.repeats, subject.most_repeats or settings.repeats)
    ratio = interleaved(first, second, units=subject.units, repeats=repeats, device=device, clock=settings.clock)
    return ratio, note
