"""``curvlib inspect``: the exact curvature of a model beside its approximations."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import curvlib
from curvlib.experiments.curvatures import INSPECTED_APPROXIMATIONS, INSPECTED_MATRICES
from curvlib.experiments.errors import ExperimentError
from curvlib.experiments.inspection import Inspected, Inspection, prepare
from curvlib.experiments.inspection_choice import ON_UNSUPPORTED
from curvlib.experiments.inspection_figures import Picture, pictures_of
from curvlib.experiments.inspection_folder import DOCUMENT, PAGE, InspectionFolder
from curvlib.experiments.inspection_memory import size_text
from curvlib.experiments.inspection_report import document, html_page, legend, remarks, results_table, versions
from curvlib.experiments.inspection_run import inspect_evaluation, product_seconds, products_of
from curvlib.experiments.inspection_subject import Subject, Training, find_function, own_model, trained
from curvlib.experiments.inspection_work import StopInspection
from curvlib.experiments.interruption import EXIT_INTERRUPTED, Interruption
from curvlib.experiments.listing import approximations_table
from curvlib.experiments.methods import METHODS, configure
from curvlib.experiments.problems import PROBLEM, PROBLEMS
from curvlib.experiments.terminal import console_of_command, device_named
from curvlib.spectra import SpectralDensity

# Options that say how a problem is trained, and say nothing about a model of one's own.
_OF_PROBLEMS = ("problem", "method", "steps", "batch_size", "examples", "data", "assignments")
# Paths of this machine have no place in a report that is given away.
_PLACEHOLDERS = {"data": "DATA"}
_UNTOLD = ("output", "overwrite")
_STANDARD_ERROR = 2
_DENSITY = SpectralDensity(steps=40, probes=8)


@click.command("inspect")
@click.option("--problem", default="digits-small-classifier", help=f"One of {', '.join(PROBLEMS)}.")
@click.option("--model", metavar="MODULE:FUNCTION", help="Your own: returns (model, loss, (inputs, targets)).")
@click.option("--method", default="kfac", help=f"To train the problem with: {', '.join(METHODS)}.")
@click.option("--steps", type=click.IntRange(min=0), default=100, help="Parameter updates before the look.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Examples a step.")
@click.option("--examples", type=click.IntRange(min=1), default=1000, help="Examples that the curvature is of.")
@click.option("--matrix", default="ggn", help=f"The exact matrix: {', '.join(INSPECTED_MATRICES)}.")
@click.option("--approximated", help="The matrix that is approximated.  [default: the exact one]")
@click.option(
    "--approximation",
    "approximations",
    multiple=True,
    help=f"One or more, such as kfac,diagonal; repeatable; of {', '.join(INSPECTED_APPROXIMATIONS)}.  [default: all "
    "that are not the matrix itself]",
)
@click.option(
    "--on-unsupported",
    default=ON_UNSUPPORTED[0],
    type=click.Choice(ON_UNSUPPORTED),
    help="What parameters outside every layer get in a layerwise approximation; raise leaves it out, with the reason.",
)
@click.option("--layers", help="Names or patterns, such as 2,4,6 or 'encoder.*'.  [default: all]")
@click.option("--most", type=click.IntRange(min=1), default=2000, help="Coordinates that may be looked at.")
@click.option(
    "--estimate", is_flag=True, help="Errors, steps and spectrum by products alone, for large models: no heat maps."
)
@click.option("--damping", type=float, help="For steps and inverses.  [default: mean absolute eigenvalue]")
@click.option("--inverse", is_flag=True, help="Draw the damped inverses as well.")
@click.option("--density/--no-density", default=True, help="Spectrum of the whole matrix, where layers are left out.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, help="Of all randomness.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    envvar="CURVLIB_DATA",
    show_envvar=True,
    help="Folder of data files, or the text file.",
)
@click.option(
    "--output", type=click.Path(path_type=Path), help="Folder of results.  [default: results/inspect-PROBLEM]"
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier inspection in the output folder.")
@click.option("--device", default="auto", type=click.Choice(["cpu", "cuda", "auto"]), help="Where to compute.")
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="OPTION=VALUE",
    help="Repeatable; an option of the method, or problem.OPTION=VALUE.",
)
@click.option(
    "--list",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=lambda context, _, asked: _list_approximations(context, asked),
    help="List the approximations and the matrices for which they are defined, and exit.",
)
@click.pass_context
def inspect_curvature(
    context: click.Context, *, model: str | None, output: Path | None, overwrite: bool, **request: Any
) -> None:
    """Draw the exact curvature beside its approximations, and say how far they are from it.

    Writes PNG files, report.html (one page with everything inside) and inspection.json to the output folder.
    """
    inspection = _inspection(request)
    device = device_named(request["device"])
    console = console_of_command()
    subject_of = _subject_maker(context, model, device, request, lambda at: _tell_plan(console, at, inspection))
    name = request["problem"] if model is None else model.replace(":", "-")
    folder = InspectionFolder(
        output if output is not None else Path("results") / f"inspect-{name}", overwrite=overwrite
    )
    interruption = Interruption(_announce)
    try:
        with interruption, _bars(console, interruption) as report:
            subject = subject_of(report)
            inspected = inspect_evaluation(subject.evaluation, inspection, report)
            pictures = list(pictures_of(inspected))
    except StopInspection:
        click.echo("Interrupted before any approximation was done: nothing was written.", err=True)
        context.exit(EXIT_INTERRUPTED)
    how = _how(context, subject, inspected, device)
    try:
        folder.write(_files(subject.title, inspected, pictures, how))
    except OSError as error:
        raise click.ClickException(f"Cannot write to {folder.path}: {error}.") from error
    _tell(console, subject, inspected, folder)
    if inspected.interrupted:
        context.exit(EXIT_INTERRUPTED)


def _list_approximations(context: click.Context, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        console_of_command().print(approximations_table())
        context.exit()


def _inspection(request: Mapping[str, Any]) -> Inspection:
    layers: str | None = request["layers"]
    approximations = tuple(_parts(",".join(request["approximations"])))
    return Inspection(
        matrix=request["matrix"],
        approximated=request["approximated"],
        approximations=approximations,
        on_unsupported=request["on_unsupported"],
        layers=() if layers is None else tuple(_parts(layers)),
        most=request["most"],
        estimate=request["estimate"],
        damping=request["damping"],
        inverses=request["inverse"],
        density=_DENSITY if request["density"] else None,
        seed=request["seed"],
    )


def _parts(text: str) -> Iterator[str]:
    return (part.strip() for part in text.split(",") if part.strip())


def _subject_maker(
    context: click.Context,
    model: str | None,
    device: torch.device,
    request: Mapping[str, Any],
    check: Callable[[curvlib.Evaluation], None],
) -> Callable[[Callable[[str, float], None]], Subject]:
    """Return what makes the subject, with everything checked that can be before the work begins."""
    if model is not None:
        given = [key for key in _OF_PROBLEMS if context.get_parameter_source(key) is ParameterSource.COMMANDLINE]
        if given:
            flags = ", ".join(_flag(context, key) for key in given)
            raise ExperimentError(
                f"{flags} is for the built-in problems, and --model {model} was given: its function trains "
                "the model, and returns the batch whose examples the curvature is of."
            )
        function = find_function(model)
        return lambda report: own_model(model, function, request["seed"], device, check)
    # Options of the method go without its name, or with it as in ``curvlib compare``.
    assigned = [_assignment(text) for text in request["assignments"]]
    of_problem = {key.partition(".")[2]: value for key, value in assigned if key.startswith(f"{PROBLEM}.")}
    problem = PROBLEMS.get(request["problem"]).with_options(of_problem)
    own = {
        key.removeprefix(f"{request['method']}."): value for key, value in assigned if not key.startswith(f"{PROBLEM}.")
    }
    if request["batch_size"] is not None:
        own = {"batch_size": str(request["batch_size"]), **own}
    training = Training(
        problem=problem,
        method=configure(request["method"], problem, own),
        steps=request["steps"],
        examples=request["examples"],
        seed=request["seed"],
        device=device,
    )
    # The environment variable stands for all problems; an option was meant for this one.
    if context.get_parameter_source("data") is ParameterSource.COMMANDLINE and not problem.source.reads_files:
        click.echo(f"Warning: --data {request['data']} is not used: {problem.name} needs no data files.", err=True)
    loaded = problem.load(request["data"])
    return lambda report: trained(training, loaded, report, check)


def _assignment(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (equals and key and value):
        raise ExperimentError(f"--set needs OPTION=VALUE, such as lr=0.05, got {text!r}.")
    return key, value


def _how(context: click.Context, subject: Subject, inspected: Inspected, device: torch.device) -> dict[str, str]:
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    matrix = INSPECTED_MATRICES.get(inspected.inspection.matrix)
    return {
        "command": _command(context),
        **subject.facts,
        "curvature": f"{matrix!r} on {subject.evaluation.examples} examples",
        "damping": f"{inspected.damping:.6g}"
        + ("" if inspected.inspection.damping is not None else ", the mean absolute eigenvalue of the exact matrix"),
        "seed": str(inspected.inspection.seed),
        "device": f"{device.type}{threads}",
        **versions(),
    }


def _command(context: click.Context) -> str:
    """Return the command line that was given, without paths of this machine."""
    words = ["curvlib", "inspect"]
    for parameter in context.command.params:
        name = parameter.name or ""
        given = context.get_parameter_source(name) in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
        if not given or name in _UNTOLD:
            continue
        value = _PLACEHOLDERS.get(name, context.params.get(name))
        if isinstance(parameter, click.Option) and parameter.is_flag:
            words.append(parameter.opts[0] if value else (parameter.secondary_opts or [""])[0])
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [word for item in values for word in (parameter.opts[0], shlex.quote(str(item)))]
    return " ".join(words)


def _flag(context: click.Context, name: str) -> str:
    return next(parameter.opts[0] for parameter in context.command.params if parameter.name == name)


def _files(title: str, inspected: Inspected, pictures: Sequence[Picture], how: Mapping[str, str]) -> dict[str, bytes]:
    files = {picture.file: picture.png for picture in pictures}
    files[PAGE] = html_page(title, inspected, pictures, how).encode()
    return {**files, DOCUMENT: json.dumps(document(inspected, how, list(files)), indent=1, allow_nan=False).encode()}


def _tell(console: Console, subject: Subject, inspected: Inspected, folder: InspectionFolder) -> None:
    console.print()
    console.print(subject.title, *subject.facts.values(), sep="\n", markup=False, highlight=False)
    console.print(results_table(inspected))
    console.print(legend(inspected), style="dim", markup=False, highlight=False)
    for line in remarks(inspected):
        console.print(line, markup=False, highlight=False)
    for label, file in (("report:", PAGE), ("numbers:", DOCUMENT)):
        console.print(f"{label:<9}{folder.path / file}", markup=False, highlight=False, soft_wrap=True)


def _tell_plan(console: Console, evaluation: curvlib.Evaluation, inspection: Inspection) -> None:
    """Say how much work is ahead, or refuse it."""
    preparation = prepare(evaluation, inspection)
    selection, count = preparation.selection, sum(choice.reason is None for choice in preparation.choices)
    seconds = product_seconds(evaluation, inspection)
    products = products_of(inspection, preparation, evaluation)
    work = f"up to {products:,} products of {seconds:.2g} s with the exact matrix"
    console.print(
        f"{inspection.matrix} on {selection.size:,} of {selection.total:,} parameters, and {count} approximations: "
        f"{work}, about {size_text(preparation.memory)} of memory.",
        markup=False,
        highlight=False,
    )


def _announce() -> None:
    # Not through the console or sys.stderr: the signal may have come in the middle of their own writing.
    with suppress(OSError):
        os.write(_STANDARD_ERROR, b"\nInterrupted: what is done is written soon; once more stops at once.\n")


@contextmanager
def _bars(console: Console, interruption: Interruption) -> Iterator[Callable[[str, float], None]]:
    """Show a bar for everything that is reported; after an interruption, end the inspection there."""
    tasks: dict[str, TaskID] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def report(what: str, part: float) -> None:
            if interruption.requested():
                raise StopInspection
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=1.0)
            progress.update(tasks[what], completed=part)

        yield report
