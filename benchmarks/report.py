"""The report: results.json with every number, results.md with the tables."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.measurement import Result, Row, Settings, Verdict

# Figures of a few MiB are losses of the allocator.
_ROUNDING_MIB = 5.0
_PEERS = ("backpack-for-pytorch", "curvlinops-for-pytorch")


def machine(device: str, threads: int) -> dict[str, Any]:
    """Return versions and hardware."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": threads,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }


def environment(settings: Settings) -> dict[str, Any]:
    """Return versions, hardware and clock."""
    return {
        **{name: version(name) for name in _PEERS},
        **machine(settings.device, settings.threads),
        "clock": settings.clock.__name__,
    }


def write(folder: Path, settings: Settings, results: Sequence[Result]) -> None:
    """Write both files; called after every benchmark, so that an interrupted run keeps what it has."""
    facts = environment(settings)
    values = {
        "environment": facts,
        "settings": {"repeats": settings.repeats, "tiny": settings.tiny},
        "benchmarks": [result.to_json() for result in results],
    }
    (folder / "results.json").write_text(json.dumps(values, indent=2) + "\n")
    (folder / "results.md").write_text(markdown(settings, results))


def markdown(settings: Settings, results: Sequence[Result]) -> str:
    """Return the tables."""
    facts = ", ".join(f"{name} {value}" for name, value in environment(settings).items())
    return "\n\n".join([facts + ".", *(_section(result) for result in results)]) + "\n"


def _section(result: Result) -> str:
    head = [
        "| subject | gradients | lowest to highest | milliseconds | peak MiB (of the gradient's) | note |",
        "|---|---:|---:|---:|---:|---|",
    ]
    gradient = next((row.ratio.reference_seconds for row in result.rows if row.ratio is not None), None)
    gradient_peak = next((row.peak_mib for row in result.rows if row.ratio is None), None)
    parts = [
        f"### {result.benchmark.title}",
        f"{result.benchmark.problem}; `--only {result.benchmark.name}`.",
        "\n".join([*head, *(_row(row, gradient, gradient_peak) for row in result.rows)]),
    ]
    if result.verdicts:
        parts.append(
            "\n".join(
                [
                    "| target | at most | measured | lowest to highest | met |",
                    "|---|---:|---:|---:|---|",
                    *(_verdict(verdict) for verdict in result.verdicts),
                ]
            )
        )
    return "\n\n".join(parts)


def _row(row: Row, gradient: float | None, gradient_peak: float | None) -> str:
    peak = _peak(row.peak_mib, gradient_peak)
    if row.ratio is None:
        milliseconds = "-" if gradient is None else f"{1e3 * gradient:.3g}"
        return f"| {row.subject} | 1 | | {milliseconds} | {peak} | {row.note} |"
    ratio = row.ratio
    spread = f"{ratio.lowest:.2f} to {ratio.highest:.2f}"
    return f"| {row.subject} | {ratio.median:.2f} | {spread} | {1e3 * ratio.seconds:.3g} | {peak} | {row.note} |"


def _peak(mib: float | None, gradient: float | None) -> str:
    """Return MiB, and how many times the gradient's where that is more than rounding."""
    if mib is None:
        return "-"
    return f"{mib:.0f}" if gradient is None or gradient < _ROUNDING_MIB else f"{mib:.0f} ({mib / gradient:.2f})"


def _verdict(verdict: Verdict) -> str:
    target, ratio = verdict.target, verdict.ratio
    spread = f"{ratio.lowest:.2f} to {ratio.highest:.2f}"
    return (
        f"| {target.subject} / {target.reference} | {target.at_most:g} | {ratio.median:.2f} | {spread} | "
        f"{'yes' if verdict.met else 'no'} |"
    )


def _processor() -> str:
    """Return the processor's name; platform.processor() knows the architecture alone on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
