"""The command ``curvlib``: compare methods on a problem, look at a curvature, list problems and methods."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from curvlib import UnsupportedLayerError, __version__
from curvlib.experiments.budgets import Budget, Epochs, Seconds, Steps
from curvlib.experiments.comparison import Comparison, Outcome
from curvlib.experiments.curvatures import APPROXIMATIONS, MATRICES, CurvatureChoice
from curvlib.experiments.errors import ExperimentError
from curvlib.experiments.inspection_command import inspect_curvature
from curvlib.experiments.interruption import EXIT_INTERRUPTED
from curvlib.experiments.listing import methods_table, problems_table
from curvlib.experiments.methods import METHODS, Method, configure
from curvlib.experiments.preparation import prepare_folder, reopen_folder, replace_folder
from curvlib.experiments.problems import PROBLEM, PROBLEMS, LoadedProblem, Problem
from curvlib.experiments.progress import ProgressBars
from curvlib.experiments.report import legend, notes, results_tables
from curvlib.experiments.results_folder import ResultsFolder
from curvlib.experiments.runner import compare
from curvlib.experiments.terminal import console_of_command, device_named
from curvlib.experiments.workload import check_methods

_DEFAULT_METHODS = ("kfac", "hessian-free", "sgd", "adam", "lbfgs")
_BUDGETS: Mapping[str, Callable[[Any], Budget]] = {"seconds": Seconds, "steps": Steps, "epochs": Epochs}


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ExperimentError as error:
            raise click.UsageError(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="curvlib")
def main() -> None:
    """Second-order methods for PyTorch, compared with first-order ones on real problems."""


@main.command("problems")
def list_problems() -> None:
    """List the problems and their options, which --set problem.OPTION=VALUE changes."""
    console_of_command().print(problems_table())


@main.command("methods")
@click.option("--problem", default="digits-autoencoder", help="Show the settings for this problem.")
def list_methods(problem: str) -> None:
    """List the methods and their options, which --set METHOD.OPTION=VALUE changes."""
    console_of_command().print(methods_table(PROBLEMS.get(problem)))


@main.command("compare")
@click.option("--problem", default="digits-autoencoder", help=f"One of {', '.join(PROBLEMS)}.")
@click.option("--method", multiple=True, default=_DEFAULT_METHODS, help=f"Repeatable; one of {', '.join(METHODS)}.")
@click.option("--seconds", type=float, help="Budget of each method: seconds of training.")
@click.option("--steps", type=int, help="Budget of each method: parameter updates.")
@click.option("--epochs", type=float, help="Budget of each method: passes over the training data.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Examples a step, for all methods.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, help="Of all randomness.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    envvar="CURVLIB_DATA",
    show_envvar=True,
    help="Folder of data files, or the text file.",
)
@click.option("--output", type=click.Path(path_type=Path), help="Folder of results.  [default: results/PROBLEM]")
@click.option("--resume", is_flag=True, help="Go on in the output folder; the budget may be larger.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier comparison in the output folder.")
@click.option("--device", default="auto", type=click.Choice(["cpu", "cuda", "auto"]), help="Where to train.")
@click.option("--curvature", help=f"Approximation for the second-order methods: {', '.join(APPROXIMATIONS)}.")
@click.option("--matrix", help=f"Curvature matrix for the second-order methods: {', '.join(MATRICES)}.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: PyTorch's own choice]")
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="METHOD.OPTION=VALUE",
    help="Repeatable; problem.OPTION=VALUE sets one of the problem.",
)
@click.pass_context
def compare_methods(
    context: click.Context,
    *,
    problem: str,
    data: Path | None,
    output: Path | None,
    resume: bool,
    overwrite: bool,
    **request: Any,
) -> None:
    """Train one problem with several methods from the same initial parameters, and compare them.

    Writes results.jsonl, comparison.png and checkpoints to the output folder, as it goes.
    """
    comparison = _comparison(PROBLEMS.get(problem), request)
    if resume and overwrite:
        raise ExperimentError("--resume and --overwrite exclude each other: give one of them.")
    # The environment variable stands for all problems; an option was meant for this one.
    given = context.get_parameter_source("data") is ParameterSource.COMMANDLINE
    if given and not comparison.problem.source.reads_files:
        click.echo(f"Warning: --data {data} is not used: {problem} needs no data files.", err=True)
    loaded = comparison.problem.load(data)
    comparison = dataclasses.replace(comparison, data=loaded.fingerprint)
    check_methods(comparison, loaded)  # before anything is written
    folder = ResultsFolder(output if output is not None else Path("results") / problem)
    prepare = reopen_folder if resume else replace_folder if overwrite else prepare_folder
    prepare(comparison, folder)
    outcome = _run(comparison, loaded, folder)
    if outcome.interrupted:
        click.echo(f"\nInterrupted; what there is has been kept. Go on with:\n  {_resume_command(context)}")
        context.exit(EXIT_INTERRUPTED)


def _run(comparison: Comparison, loaded: LoadedProblem, folder: ResultsFolder) -> Outcome:
    console = console_of_command()
    try:
        with ProgressBars(comparison, console) as bars:
            outcome = compare(comparison, loaded, folder, monitor=bars)
    except UnsupportedLayerError as error:
        raise click.ClickException(
            f"{error}\nOn the command line: leave the method out by naming the others with --method, or use "
            "--curvature exact. What was written is kept."
        ) from error
    except OSError as error:
        raise click.ClickException(f"Cannot write to {folder.path}: {error}. What was written is kept.") from error
    console.print()
    if not outcome.records:
        console.print("Nothing has been recorded yet.")
        return outcome
    for table in results_tables(comparison, outcome.records, width=console.width):
        console.print(table)
    console.print(legend(comparison), style="dim", highlight=False)
    for note in notes(comparison, outcome.records):
        console.print(note, markup=False, highlight=False)
    console.print(f"records: {folder.results}\nfigure:  {folder.figure}", highlight=False, soft_wrap=True)
    return outcome


def _comparison(problem: Problem, request: Mapping[str, Any]) -> Comparison:
    prefix = f"{PROBLEM}."
    own = [_assignment(text) for text in request["assignments"] if text.startswith(prefix)]
    problem = problem.with_options({key: value for _, key, value in own})
    request = {**request, "assignments": [text for text in request["assignments"] if not text.startswith(prefix)]}
    return Comparison(
        problem=problem,
        methods=_methods(problem, request),
        budget=_budget(request),
        seed=request["seed"],
        device=device_named(request["device"]),
        threads=request["threads"],
    )


def _budget(request: Mapping[str, Any]) -> Budget:
    given = [name for name in _BUDGETS if request[name] is not None]
    if len(given) != 1:
        got = " and ".join(f"--{name}" for name in given) or "none"
        raise ExperimentError(f"Give exactly one budget, --seconds, --steps or --epochs; got {got}.")
    return _BUDGETS[given[0]](request[given[0]])


def _methods(problem: Problem, request: Mapping[str, Any]) -> tuple[Method, ...]:
    names: tuple[str, ...] = request["method"]
    assigned = _assignments(request["assignments"], names)
    if request["batch_size"] is not None:
        assigned = {name: {"batch_size": str(request["batch_size"]), **assigned[name]} for name in names}
    methods = tuple(configure(name, problem, assigned[name]) for name in names)
    choice = CurvatureChoice(approximation=request["curvature"], matrix=request["matrix"])
    if choice == CurvatureChoice():
        return methods
    if not any(method.takes_curvature for method in methods):
        raise ExperimentError(
            f"--curvature and --matrix change second-order methods alone, and none is among {', '.join(names)}."
        )
    return tuple(method.with_curvature(choice) if method.takes_curvature else method for method in methods)


def _assignments(texts: Sequence[str], names: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Return option name to text of every method of the comparison."""
    assigned: dict[str, dict[str, str]] = {METHODS.get(name).name: {} for name in names}
    for text in texts:
        name, key, value = _assignment(text)
        METHODS.get(name)
        if name not in assigned:
            raise ExperimentError(f"--set {text}: {name} is not compared; compared are {', '.join(names)}.")
        assigned[name][key] = value
    return assigned


def _assignment(text: str) -> tuple[str, str, str]:
    """Return (owner, option, value) of an assignment."""
    target, equals, value = text.partition("=")
    name, dot, key = target.partition(".")
    if not (equals and dot and key and value):
        raise ExperimentError(
            "--set needs METHOD.OPTION=VALUE, such as sgd.lr=0.05, or problem.OPTION=VALUE, such as "
            f"problem.length=100, got {text!r}."
        )
    return name, key, value


def _resume_command(context: click.Context) -> str:
    """Return the command line that was given, with --resume."""
    words = [context.command_path]
    for parameter in context.command.params:
        name = parameter.name or ""
        value = context.params.get(name)
        given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if given and not (isinstance(parameter, click.Option) and parameter.is_flag):
            values = value if isinstance(value, tuple) else (value,)
            words += [word for item in values for word in (parameter.opts[0], shlex.quote(str(item)))]
    return " ".join([*words, "--resume"])


main.add_command(inspect_curvature)
