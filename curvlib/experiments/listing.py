"""Tables of the problems and the methods that there are."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from curvlib.experiments.methods import METHODS, configure
from curvlib.experiments.options import AUTOMATIC, options_of
from curvlib.experiments.problems import PROBLEM, PROBLEMS, Problem


def problems_table() -> Table:
    """Return all problems with their sizes; it fits 80 columns."""
    table = Table(title="Problems", show_lines=True)
    table.add_column("problem", no_wrap=True)
    table.add_column("what", overflow="fold")
    for name, problem in PROBLEMS.items():
        table.add_row(name, "\n".join(_facts(problem)))
    return table


def _facts(problem: Problem) -> Iterator[str]:
    source, parameters = problem.source, problem.network.parameters
    yield problem.description
    if source.sizes is None:
        yield f"{source.examples}: as many as there are ({source.origin})"
    else:
        train, test = source.sizes
        yield f"{source.examples}: {train:,} for training, {test:,} for tests ({source.origin})"
    yield f"network: {problem.network}"
    yield "parameters: " + ("depend on the symbols of the data" if parameters is None else f"{parameters:,}")
    yield f"loss: {problem.task.loss_name}; reported: {problem.task.metric.name}"
    if source.baseline is not None:
        yield f"loss to get below: {source.baseline}"
    for entry, value in problem.options():
        yield f"--set {PROBLEM}.{entry.name}={value}: {entry.explanation} ({entry.expectation})"


def methods_table(problem: Problem) -> Table:
    """Return all methods with their options and the defaults that they have on a problem; it fits 80 columns."""
    table = Table(title=f"Methods, with their settings on {problem.name}")
    table.add_column("option", no_wrap=True)
    table.add_column("default", justify="right", no_wrap=True)
    table.add_column("meaning", overflow="fold")
    for name, method in METHODS.items():
        configured = configure(name, problem, {})
        table.add_row(f"[bold]{name}[/bold]", "", f"[bold]{method.description}[/bold]")
        for entry in options_of(method):
            value = getattr(configured, entry.name)
            shown = AUTOMATIC if value is None else f"{value:g}"
            table.add_row(f"{name}.{entry.name}", shown, f"{entry.explanation} ({entry.expectation})")
        table.add_section()
    return table
