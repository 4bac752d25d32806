"""Tables of the problems and the methods that there are."""

from __future__ import annotations

from rich.table import Table

from curvlib.experiments.methods import METHODS, configure
from curvlib.experiments.options import AUTOMATIC, options_of
from curvlib.experiments.problems import PROBLEMS, Problem


def problems_table() -> Table:
    """Return all problems with their sizes; it fits 80 columns."""
    table = Table(title="Problems", show_lines=True)
    table.add_column("problem", no_wrap=True)
    table.add_column("what", overflow="fold")
    for name, problem in PROBLEMS.items():
        train, test = problem.images.sizes
        lines = (
            problem.description,
            f"images: {train:,} for training, {test:,} for tests ({problem.images.origin})",
            f"network: {problem.network}",
            f"parameters: {problem.network.parameters:,}",
            f"loss: {problem.task.loss_name}; reported: {problem.task.metric.name}",
        )
        table.add_row(name, "\n".join(lines))
    return table


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
