"""Tables of the problems and the methods that there are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from rich.table import Table

from curvlib.approximations import Approximation
from curvlib.experiments.curvatures import INSPECTED_APPROXIMATIONS, INSPECTED_MATRICES
from curvlib.experiments.inspection_choice import NOT_APPLICABLE, approximation_of
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
            shown = AUTOMATIC if value is None else value if isinstance(value, str) else f"{value:g}"
            table.add_row(f"{name}.{entry.name}", shown, f"{entry.explanation} ({entry.expectation})")
        table.add_section()
    return table


def approximations_table() -> Table:
    """Return the approximations that can be looked at, and the matrices for which each is defined; fits 80 columns."""
    table = Table(title="Approximations, and the matrices for which they are defined")
    table.add_column("name", no_wrap=True)
    table.add_column("in curvlib.approximations", overflow="fold")
    for name in INSPECTED_MATRICES:
        table.add_column(name.replace("-", "\n"), justify="center")
    for name in INSPECTED_APPROXIMATIONS:
        of = {matrix: _defined(name, matrix) for matrix in INSPECTED_MATRICES}
        some = next((approximation for approximation in of.values() if approximation is not None), None)
        made = "-" if some is None else _constructor(some)
        table.add_row(name, made, *("-" if approximation is None else "yes" for approximation in of.values()))
    return table


def _defined(name: str, matrix: str) -> Approximation | None:
    try:
        return approximation_of(name, matrix)
    except NOT_APPLICABLE:
        return None


def _constructor(approximation: Any) -> str:
    """Return how it is made, without its matrix and what has its default value."""
    given = []
    for entry in dataclasses.fields(approximation) if dataclasses.is_dataclass(approximation) else ():
        made = entry.default_factory
        default = entry.default if made is dataclasses.MISSING else made()
        value = getattr(approximation, entry.name)
        if entry.name != "matrix" and value != default:
            shown = _constructor(value) if isinstance(value, Approximation) else repr(value)
            given.append(f"{entry.name}={shown}")
    return f"{type(approximation).__name__}({', '.join(given)})"
