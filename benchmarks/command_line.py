"""The command line of the benchmarks."""

from __future__ import annotations

import gc
import json
import os
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter, process_time

import click
import torch

from benchmarks.convolutional_statistics import CONVOLUTIONAL_STATISTICS
from benchmarks.ggn_products import GGN_PRODUCTS
from benchmarks.kfac_statistics import KFAC_STATISTICS
from benchmarks.measurement import Result, Settings, run
from benchmarks.memory import peak_mib
from benchmarks.recurrent_statistics import RECURRENT_STATISTICS
from benchmarks.report import markdown, write
from benchmarks.steps import STEPS
from benchmarks.subjects import Benchmark

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (*GGN_PRODUCTS, KFAC_STATISTICS, *CONVOLUTIONAL_STATISTICS, RECURRENT_STATISTICS, STEPS)
}


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--only", multiple=True, type=click.Choice(tuple(BENCHMARKS)), help="Repeatable; all by default.")
@click.option("--repeats", type=click.IntRange(min=1), default=15, help="Pairs of measurements for each ratio.")
@click.option(
    "--threads", type=click.IntRange(min=1), default=lambda: os.cpu_count() or 1, help="CPU threads.  [default: all]"
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where to compute.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False, writable=True),
    default=Path("results/benchmarks"),
    help="Folder of results.json and results.md.",
)
@click.option("--memory/--no-memory", default=True, help="Measure peak memory, in a process for each subject.")
@click.option(
    "--processor-time",
    is_flag=True,
    help="Compare processor time, not elapsed time: with --threads 1, for a CPU that others are using as well.",
)
@click.option("--tiny", is_flag=True, help="A few units and examples only, to try the code out: no sensible figures.")
@click.option("--memory-of", metavar="SUBJECT", hidden=True, help="Print the peak memory of one subject.")
def main(
    *,
    only: tuple[str, ...],
    repeats: int,
    threads: int,
    device: str,
    output: Path,
    memory: bool,
    processor_time: bool,
    tiny: bool,
    memory_of: str | None,
) -> None:
    """Measure curvlib and its peers side by side, in gradients of the same network, and their peak memory."""
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: PyTorch sees no GPU here; use --device cpu.")
    if processor_time and (threads > 1 or device != "cpu"):
        raise click.UsageError("--processor-time adds up over threads and leaves a GPU out: give --threads 1 as well.")
    torch.set_num_threads(threads)
    # The collector runs before every measurement; it need not look through all imported modules each time.
    gc.freeze()
    # Peers use parts of PyTorch that it has deprecated, and BackPACK's hooks see inputs without gradients.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    chosen = [_at_scale(BENCHMARKS[name], tiny) for name in only or BENCHMARKS]
    if memory_of is not None:
        click.echo(json.dumps({"peak_mib": peak_mib(chosen[0], chosen[0].subject(memory_of), torch.device(device))}))
        return
    settings = Settings(
        repeats=repeats,
        device=device,
        threads=threads,
        tiny=tiny,
        memory=memory,
        clock=process_time if processor_time else perf_counter,
    )
    try:
        output.mkdir(parents=True, exist_ok=True)
        write(output, settings, [])
    except OSError as error:
        raise click.UsageError(f"--output {output}: {error.strerror}; name a folder that can be written.") from error
    results: list[Result] = []
    for benchmark in chosen:
        results.append(run(benchmark, settings, partial(_announce, benchmark)))
        write(output, settings, results)
    click.echo(markdown(settings, results))
    click.echo(f"Written to {output}.")


def _announce(benchmark: Benchmark, what: str) -> None:
    click.echo(f"{benchmark.name}: {what}", err=True)


def _at_scale(benchmark: Benchmark, tiny: bool) -> Benchmark:
    return replace(benchmark, problem=benchmark.problem.tiny()) if tiny else benchmark
