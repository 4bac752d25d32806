"""The picture of a comparison: how the loss falls, and what the damping, the reduction ratio and the solver do."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, Locator, LogLocator, MaxNLocator, NullFormatter

from curvlib.experiments.comparison import Comparison
from curvlib.experiments.records import Record

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


@dataclass(frozen=True)
class _Curve:
    """The records of one method and how it is drawn."""

    records: Sequence[Record]
    style: dict[str, Any]
    label: str


@dataclass(frozen=True)
class _Panel:
    """One quantity of the records against another.

    Args:
        x_label, y_label: of the axes.
        x: of a record.
        y: of a record and the one before; None where the method has none.
        logarithmic: whether y is drawn so.
        limits: of y, with a line at 1 between them; None for those of the data.
        counts: whether x and y count something, which has whole numbers at its ticks.
    """

    x_label: str
    y_label: str
    x: Callable[[Record], float]
    y: Callable[[Record, Record | None], float | None]
    logarithmic: bool = True
    limits: tuple[float, float] | None = None
    counts: tuple[bool, bool] = (False, False)

    def points(self, curve: _Curve) -> tuple[list[float], list[float]]:
        """Return what can be drawn; step 0 and numbers that are not positive have no place on logarithmic axes."""
        earlier = [None, *curve.records]
        pairs = [(self.x(record), self.y(record, last)) for last, record in zip(earlier, curve.records, strict=False)]
        drawn = [(x, y) for x, y in pairs if x > 0 and y is not None and (y > 0 or not self.logarithmic)]
        low, high = self.limits or (-math.inf, math.inf)
        return [x for x, _ in drawn], [min(max(y, low), high) for _, y in drawn]


def figure_png(comparison: Comparison, records: Sequence[Record]) -> bytes:
    """Return a PNG of how the training of every method went.

    The first row is the training loss against iterations, seconds of training, and work in gradients of all training
    examples, a unit that does not depend on the batch. The second, where a method has one of them, is the damping, the
    radius, the reduction ratio and the iterations of the solver a step.

    Args:
        comparison: what was compared.
        records: of all methods; a method that diverged or failed ends in a cross.

    Returns:
        The bytes of the PNG file.
    """
    curves = _curves(comparison, records)
    losses = _loss_panels(comparison, logarithmic=all(r.loss is None or r.loss > 0 for r in records))
    inner = [panel for panel in _INNER_PANELS if any(panel.points(curve)[0] for curve in curves)]
    rows = [row for row in (losses, inner) if row]
    figure = Figure(figsize=(13, 4.2 * len(rows) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    for row, part in zip(rows, figure.subfigures(len(rows), 1, squeeze=False)[:, 0], strict=True):
        for axes, panel in zip(part.subplots(1, len(row), squeeze=False, sharey=row is losses)[0], row, strict=True):
            _draw(axes, panel, curves)
            if row is losses and panel is not losses[0]:
                axes.set_ylabel("")
    if curves:
        handles = [Line2D([], [], label=curve.label, **curve.style) for curve in curves]
        figure.legend(handles=handles, frameon=False, loc="outside lower center", ncols=min(len(handles), 5))
    figure.suptitle(f"{comparison.problem.name}: {comparison.budget} a method, seed {comparison.seed}", fontsize=12)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()


def _curves(comparison: Comparison, records: Sequence[Record]) -> list[_Curve]:
    curves = []
    for number, method in enumerate(comparison.methods):
        own = [record for record in records if record.method == method.name]
        if own:
            style = {"color": _COLOURS[number % len(_COLOURS)], "linewidth": 1.8, "marker": ".", "markersize": 4}
            status = own[-1].status
            label = method.label if status.is_healthy else f"{method.label} ({status.value})"
            curves.append(_Curve(own, style, label))
    return curves


def _loss_panels(comparison: Comparison, *, logarithmic: bool) -> list[_Panel]:
    """Return the panels of the loss, which is negative for some likelihoods."""
    label = f"training loss ({comparison.problem.task.loss_name} + l2)"
    against: dict[str, Callable[[Record], float]] = {
        "iterations": lambda record: record.step,
        "seconds of training": lambda record: record.seconds,
        "work, in gradients of all training examples": _passes,
    }
    return [
        _Panel(name, label, x, lambda record, _: record.loss, logarithmic, counts=(name == "iterations", False))
        for name, x in against.items()
    ]


def _passes(record: Record) -> float:
    """Return the work in a unit that is the same for all batch sizes."""
    return record.gradients * record.epoch / record.step if record.step else 0.0


def _solver_iterations_a_step(record: Record, last: Record | None) -> float | None:
    """Return the mean over the steps since the last record."""
    if record.solver_iterations is None:
        return None
    steps = record.step - (last.step if last is not None else 0)
    before = 0 if last is None else last.solver_iterations or 0
    return (record.solver_iterations - before) / steps if steps > 0 else None


def _against_iterations(y_label: str, y: Callable[[Record, Record | None], float | None], **options: Any) -> _Panel:
    return _Panel("iterations", y_label, lambda record: record.step, y, **{"counts": (True, False), **options})


_INNER_PANELS = (
    _against_iterations("damping", lambda record, _: record.damping or None),
    _against_iterations("radius", lambda record, _: record.radius),
    _against_iterations(
        "actual / predicted reduction",
        lambda record, _: record.ratio,
        logarithmic=False,
        limits=(-0.5, 2.0),  # beyond them, a ratio says no more than they do
    ),
    _against_iterations("solver iterations a step", _solver_iterations_a_step, counts=(True, True)),
)


def _draw(axes: Axes, panel: _Panel, curves: Sequence[_Curve]) -> None:
    lowest = math.inf
    for curve in curves:
        x, y = panel.points(curve)
        if not x:
            continue
        lowest = min([lowest, *y])
        axes.plot(x, y, label=curve.label, **curve.style)
        if not curve.records[-1].status.is_healthy:
            axes.plot(x[-1:], y[-1:], linestyle="none", marker="x", markersize=9, color=curve.style["color"])
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.grid(True, which="major", alpha=0.35)
    axes.grid(True, which="minor", alpha=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    if panel.limits is not None:
        low, high = panel.limits
        axes.axhline(1.0, color="0.5", linewidth=0.8, zorder=0)
        axes.set_ylim(low - 0.1, high + 0.1)
    # matplotlib cannot scale axes that hold nothing.
    if lowest < math.inf:
        _make_logarithmic(axes, panel)


def _make_logarithmic(axes: Axes, panel: _Panel) -> None:
    # Most of the loss falls within the first seconds: on a linear axis, every curve would be a vertical wall.
    axes.set_xscale("log")
    x_counts, y_counts = panel.counts
    _label(axes.xaxis, _whole_ticks(axes.xaxis) if x_counts else None)
    if not panel.logarithmic:
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # Losses that fall by less than a factor of ten would otherwise have one labelled tick, or none.
    ticks = LogLocator(subs=(1.0, 2.0, 5.0) if high < 1e3 * low else (1.0,))
    _label(axes.yaxis, (_whole_ticks(axes.yaxis) if y_counts else None) or ticks)


def _label(axis: Axis, ticks: Locator | None) -> None:
    if ticks is not None:
        axis.set_major_locator(ticks)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _whole_ticks(axis: Axis) -> Locator | None:
    """Return whole numbers as ticks of a logarithmic axis of counts, None where powers of ten and their parts do."""
    low, high = axis.get_view_interval()
    if low < 0.9 and axis.get_data_interval()[0] >= 1:
        low = 0.9  # around a single number the axis spans powers of ten
        axis.set_view_interval(low, high, ignore=True)
    # A logarithmic locator that finds too few powers of ten takes fractions.
    if high < 1 or high >= 10 * low:
        return None
    if math.floor(high) - math.ceil(low) < 1:
        low, high = math.floor(low) or low, math.floor(high) + 1
        axis.set_view_interval(low, high, ignore=True)
    return MaxNLocator(nbins=9, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
