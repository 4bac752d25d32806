"""The tables at the end of a comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from curvlib.experiments.comparison import Comparison
from curvlib.experiments.records import Record, Status

_BEST = "bold green"
# Significant digits of the smallest number of a column, and digits beside the first that a number may have in all.
_DIGITS = 4
_WIDEST_NUMBER = 8
# Longer names of methods, those with a curvature of their own, are wrapped.
_WIDEST_METHOD = 22
_ROOM_ENOUGH = 1000


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One row of the table.

    Args:
        label: of the method.
        last: its last record.
        best_loss: lowest loss that it recorded, None if it never had one.
        seconds_to_common_loss: when it first reached the loss that every method reached, None if it diverged.
    """

    label: str
    last: Record
    best_loss: float | None
    seconds_to_common_loss: float | None


def common_loss(comparison: Comparison, records: Sequence[Record]) -> float | None:
    """Return the lowest loss that all methods reached which did not diverge, None if there are none."""
    best = [_best_loss(runs) for runs in _by_method(comparison, records).values() if _healthy(runs)]
    reached = [loss for loss in best if loss is not None]
    return max(reached) if reached else None


def summarise(comparison: Comparison, records: Sequence[Record]) -> list[Summary]:
    """Return a summary of every method that has records, in the order of the comparison."""
    labels = {method.name: method.label for method in comparison.methods}
    target = common_loss(comparison, records)
    return [
        Summary(
            label=labels[name],
            last=own[-1],
            best_loss=_best_loss(own),
            seconds_to_common_loss=_seconds_to(own, target) if _healthy(own) else None,
        )
        for name, own in _by_method(comparison, records).items()
    ]


def results_tables(comparison: Comparison, records: Sequence[Record], *, width: int) -> list[Table]:
    """Return the table of a comparison, also of an interrupted one, in as many parts as its columns need.

    Args:
        comparison: what was compared.
        records: of all methods.
        width: characters that a table may take; no number is cut short, so a very long one takes more.

    Returns:
        Tables with one row a method. The best entry of a column has a star.
    """
    summaries = summarise(comparison, records)
    # A single method has nobody to be compared with.
    target = common_loss(comparison, records) if len(summaries) > 1 else None
    columns = [_column_cells(column, summaries) for column in _columns(comparison, summaries, target)]
    methods = [_method_cell(summary) for summary in summaries]
    parts: list[list[_Cells]] = [[]]
    for column in columns:
        if parts[-1] and _width(_table(methods, [*parts[-1], column])) > width:
            parts.append([])
        parts[-1].append(column)
    tables = [_table(methods, part) for part in parts]
    tables[0].title = f"{comparison.problem.name}: {comparison.budget} a method, seed {comparison.seed}"
    return tables


@dataclass(frozen=True, kw_only=True)
class _Cells:
    title: str
    texts: Sequence[Text]


def _table(methods: Sequence[Text], columns: Sequence[_Cells]) -> Table:
    table = Table()
    longest = max(len("method"), *(len(method) for method in methods))
    table.add_column("method", width=min(longest, _WIDEST_METHOD), overflow="fold")
    for column in columns:
        table.add_column(column.title, justify="right", no_wrap=True, vertical="top")
    for row, method in enumerate(methods):
        table.add_row(method, *(column.texts[row] for column in columns))
    return table


def _width(table: Table) -> int:
    """Return the characters that a table takes where there is room enough."""
    return Console(width=_ROOM_ENOUGH).measure(table).maximum


def legend(comparison: Comparison) -> str:
    """Return what the columns of the tables are."""
    problem, metric = comparison.problem, comparison.problem.task.metric
    source = problem.source
    if source.sizes is None:
        count = f"at most {problem.evaluated_examples} training and test {source.examples}"
    else:
        train, test = (min(problem.evaluated_examples, size) for size in source.sizes)
        count = f"{train} training and {test} test {source.examples}"
    baseline = "" if source.baseline is None else f" (without it {source.baseline})"
    return (
        f"loss: the objective with its l2 term{baseline}; "
        f"{_short_name(metric.higher_is_better)}: {metric.description}; on {count}; "
        "gradients: work, in gradients of one batch; solver iterations: such as conjugate gradients, one exact product "
        "each; seconds: of training alone; "
        "seconds to: until the lowest loss that every method reached; *: best of several methods."
    )


@dataclass(frozen=True, kw_only=True)
class _Column:
    title: str
    value: Callable[[Summary], float | None]
    decimals: int | None = None
    best: Callable[[Sequence[float]], float] | None = None


def _columns(comparison: Comparison, summaries: Sequence[Summary], target: float | None) -> list[_Column]:
    higher_is_better = comparison.problem.task.metric.higher_is_better
    best_metric = max if higher_is_better else min
    short = _short_name(higher_is_better)
    loss = _Column(title="loss", value=lambda s: s.last.loss, best=min)
    columns = [
        loss,
        _Column(title=f"train\n{short}", value=lambda s: s.last.train_metric, best=best_metric),
        _Column(title=f"test\n{short}", value=lambda s: s.last.test_metric, best=best_metric),
    ]
    if target is not None:
        title = f"seconds to\n{_format_of(loss, summaries)(target)}"
        columns += [_Column(title=title, value=lambda s: s.seconds_to_common_loss, decimals=1, best=min)]
    solver = _Column(title="solver\niterations", value=lambda s: s.last.solver_iterations, decimals=0)
    return [
        *columns,
        _Column(title="seconds", value=lambda s: s.last.seconds, decimals=1),
        _Column(title="steps", value=lambda s: s.last.step, decimals=0),
        _Column(title="epochs", value=lambda s: s.last.epoch, decimals=1),
        _Column(title="gradients", value=lambda s: s.last.gradients, decimals=0),
        *([solver] if any(s.last.solver_iterations is not None for s in summaries) else []),
    ]


def _format_of(column: _Column, summaries: Sequence[Summary]) -> Callable[[float], str]:
    """Return how to write the numbers of a column: all with as many decimals as its smallest one needs."""
    if column.decimals is not None:
        return f"{{:.{column.decimals}f}}".format
    values = [abs(value) for s in summaries if (value := column.value(s))]
    if not values:
        return "{:g}".format
    before, after = (math.floor(math.log10(extreme)) for extreme in (max(values), min(values)))
    decimals = max(0, _DIGITS - 1 - after)
    # Numbers of very different sizes would be wider than a column.
    return f"{{:.{_DIGITS - 1}e}}".format if max(before, 0) + decimals > _WIDEST_NUMBER else f"{{:.{decimals}f}}".format


def _short_name(higher_is_better: bool) -> str:
    return "accuracy" if higher_is_better else "error"


def _column_cells(column: _Column, summaries: Sequence[Summary]) -> _Cells:
    format_number = _format_of(column, summaries)
    rivals = [value for s in summaries if s.last.status.is_healthy and (value := column.value(s)) is not None]
    best = column.best(rivals) if column.best is not None and len(rivals) > 1 else None
    texts = []
    for summary in summaries:
        value = column.value(summary)
        if value is None:
            texts.append(Text("-", style="dim"))
        elif best is not None and value == best:
            # In front, where it leaves the decimals under each other.
            texts.append(Text("*" + format_number(value), style=_BEST))
        else:
            texts.append(Text(format_number(value)))
    return _Cells(title=column.title, texts=texts)


def _method_cell(summary: Summary) -> Text:
    status = summary.last.status
    notes = {
        Status.DIVERGED: (" diverged", "bold red"),
        Status.FAILED: (" failed", "bold red"),
        Status.RUNNING: (" unfinished", "yellow"),
    }
    text = Text(summary.label)
    return text.append(*notes[status]) if status in notes else text


def notes(comparison: Comparison, records: Sequence[Record]) -> list[str]:
    """Return one line for every method that did not reach the end of its budget, with the reason."""
    last = [own[-1] for own in _by_method(comparison, records).values()]
    return [f"{record.method} {record.status.value}: {record.note}" for record in last if record.note is not None]


def _by_method(comparison: Comparison, records: Sequence[Record]) -> dict[str, list[Record]]:
    grouped = {method.name: [r for r in records if r.method == method.name] for method in comparison.methods}
    return {name: own for name, own in grouped.items() if own}


def _healthy(records: Sequence[Record]) -> bool:
    return records[-1].status.is_healthy


def _best_loss(records: Sequence[Record]) -> float | None:
    return min((record.loss for record in records if record.loss is not None), default=None)


def _seconds_to(records: Sequence[Record], target: float | None) -> float | None:
    reached = (r.seconds for r in records if r.loss is not None and target is not None and r.loss <= target)
    return next(reached, None)
