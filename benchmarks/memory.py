"""Peak memory of one subject, each in a process of its own.

What is reported is the memory on top of the model and the batch: graphs, captured values, temporaries and results, at
their highest. On a CPU that is the rise of the resident set's high-water mark, which counts the workspaces of the
linear algebra library and the allocator's losses as well; the subject has run on a tiny network before, so that code
which is loaded at first use is not counted. On a GPU it is PyTorch's own count of allocated bytes.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.subjects import Benchmark, Subject

# Freed blocks of this size and above go back to the system at once: the high-water mark then follows live tensors.
_MALLOC_THRESHOLD = 65536
_CALLS = 2
_MIB = 2**20
_ROOT = Path(__file__).resolve().parents[1]


class MemoryProcessError(RuntimeError):
    """The process that measures memory has failed."""


def measure_in_process(
    benchmark: Benchmark, subject: Subject, *, device: str, threads: int, tiny: bool
) -> float | None:
    """Return a subject's peak memory in MiB, from a new process; None where the system does not tell.

    Raises:
        MemoryProcessError: that process has failed; its own message is part of this one's.
    """
    command = [sys.executable, "-m", "benchmarks", "--only", benchmark.name, "--memory-of", subject.name]
    command += ["--device", device, "--threads", str(threads), *(["--tiny"] if tiny else [])]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(_MALLOC_THRESHOLD), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise MemoryProcessError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])["peak_mib"]


def peak_mib(benchmark: Benchmark, subject: Subject, device: torch.device) -> float | None:
    """Return a subject's peak memory in MiB in this process, which must have done nothing else before."""
    call = subject.prepare(benchmark.problem.tiny().workload(device))
    call()
    del call
    workload = benchmark.problem.workload(device)
    gc.collect()
    before = _restart(device)
    if before is None:
        return None
    call = subject.prepare(workload)
    for _ in range(_CALLS):
        call()
    return (_highest(device) - before) / _MIB


def _restart(device: torch.device) -> int | None:
    """Set the high-water mark to the memory in use now, and return that; None where the system has no such mark."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        # Linux: 5 resets VmHWM. (ru_maxrss cannot be reset, and importing PyTorch alone may have driven it higher.)
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def _highest(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/self/status has no {field}.")
