"""The command ``python -m benchmarks.recurrent_errors``: how far approximations of recurrent weights are from exact.

A recurrent network is trained, and at some steps the block of every weight is compared with the exact block of the
Gauss-Newton matrix: |approximation - exact| / |exact| in the Frobenius norm.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from torch import Tensor, nn

from curvlib import GGN, Evaluation, Objective
from curvlib.approximations import (
    KFAC,
    Approximation,
    BlockDiagonal,
    Diagonal,
    GeneralTransition,
    Independent,
    LinearGaussian,
    Reduce,
)
from curvlib.experiments import PROBLEMS, ExperimentError, configure
from curvlib.experiments.problems import LoadedProblem, Problem

APPROXIMATIONS: Mapping[str, Approximation] = {
    "Independent": KFAC(GGN(), weight_sharing=Independent()),
    "option 1": KFAC(GGN(), weight_sharing=LinearGaussian()),
    "option 2": KFAC(GGN(), weight_sharing=LinearGaussian(GeneralTransition())),
    "Reduce": KFAC(GGN(), weight_sharing=Reduce()),
    "Diagonal": Diagonal(GGN()),
}


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Relative errors of one weight's block.

    Attributes:
        step: of the training.
        loss: on the batch then.
        layer: name of the affine map.
        by_approximation: relative Frobenius errors.
    """

    step: int
    loss: float
    layer: str
    by_approximation: Mapping[str, float]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--data", type=click.Path(path_type=Path), envvar="CURVLIB_DATA", help="Folder or file of the data.")
@click.option("--problem", default="rowwise-digits-rnn", help="A problem with a recurrent network.")
@click.option("--units", type=click.IntRange(min=1), default=32, help="Of the recurrent layer: blocks are dense.")
@click.option("--steps", multiple=True, type=click.IntRange(min=0), default=(0, 50, 500), help="Repeatable.")
@click.option("--examples", type=click.IntRange(min=1), default=500, help="N of the matrices.")
@click.option("--seed", type=int, default=0, help="Of the training.")
@click.option(
    "--threads", type=click.IntRange(min=1), default=lambda: os.cpu_count() or 1, help="CPU threads.  [default: all]"
)
def main(
    *, data: Path | None, problem: str, units: int, steps: tuple[int, ...], examples: int, seed: int, threads: int
) -> None:
    """Print a table of the errors of every weight's block before, during and after training with Adam."""
    torch.set_num_threads(threads)
    try:
        chosen = PROBLEMS.get(problem).with_options({"units": str(units)})
        loaded = chosen.load(data)
    except ExperimentError as error:
        raise click.UsageError(str(error)) from error
    click.echo(markdown(list(errors(chosen, loaded, sorted(set(steps)), examples, seed))))


def errors(problem: Problem, loaded: LoadedProblem, steps: Sequence[int], examples: int, seed: int) -> Iterator[Errors]:
    """Train with the problem's settings of Adam and yield the errors at these steps."""
    torch.manual_seed(seed)
    network = problem.network if loaded.symbols is None else problem.network.for_symbols(loaded.symbols)
    model, loss = network.build(), loaded.loss
    method = configure("adam", problem, {})
    trainer = method.start(model, loss, problem.l2, seed)
    batch = loaded.train[torch.arange(min(examples, len(loaded.train)))].batch
    done = 0
    for goal in steps:
        while done < goal:
            trainer.step(loaded.train[torch.randint(len(loaded.train), (method.batch_size,))].batch)
            done += 1
        yield from _of_blocks(model, loss, batch, done)


def _of_blocks(model: nn.Module, loss: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Iterator[Errors]:
    # in float64, as small eigenvalues of the moments are inverted
    wide, (inputs, targets) = copy.deepcopy(model).double(), batch
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    evaluation = Objective(wide, loss).at((inputs, targets))
    found = {name: _blocks(approximation, evaluation) for name, approximation in APPROXIMATIONS.items()}
    exact = _blocks(BlockDiagonal(GGN()), evaluation)
    for layer, block in exact.items():
        by_approximation = {name: float((b[layer] - block).norm() / block.norm()) for name, b in found.items()}
        yield Errors(step=step, loss=float(evaluation.value), layer=layer, by_approximation=by_approximation)


def _blocks(approximation: Approximation, evaluation: Evaluation) -> dict[str, Tensor]:
    """Return the dense blocks of the recurrent modules' weights by name."""
    C = approximation.estimate(evaluation)
    layers = [layer for layer in evaluation.layers if isinstance(layer.members[0], (nn.RNNBase, nn.RNNCellBase))]
    found = {}
    for layer in layers:
        places = layer.coordinates
        columns = torch.zeros(C.size, len(places), dtype=C.dtype, device=C.device)
        columns[places, torch.arange(len(places))] = 1.0
        found[layer.name] = (C @ columns)[places]
    return found


def markdown(results: Sequence[Errors]) -> str:
    """Return the table."""
    names = list(APPROXIMATIONS)
    head = [f"| step | loss | weight | {' | '.join(names)} |", f"|---:|---:|---|{'---:|' * len(names)}"]
    rows = [
        f"| {line.step} | {line.loss:.3g} | {line.layer} | "
        f"{' | '.join(f'{line.by_approximation[name]:.3f}' for name in names)} |"
        for line in results
    ]
    return "\n".join([*head, *rows])


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.recurrent_errors")
