"""The picture of a comparison: loss against iterations and against seconds."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from curvlib.experiments.comparison import Comparison
from curvlib.experiments.records import Record, Status

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def figure_png(comparison: Comparison, records: Sequence[Record]) -> bytes:
    """Return a PNG of the training loss of every method, against iterations and against seconds of training.

    Args:
        comparison: what was compared.
        records: of all methods; a method that diverged or failed ends in a cross.

    Returns:
        The bytes of the PNG file.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    by_step, by_seconds = figure.subplots(1, 2, sharey=True)
    handles, lowest = [], math.inf
    for number, method in enumerate(comparison.methods):
        own = [record for record in records if record.method == method.name]
        if not own:
            continue
        status = own[-1].status
        label = method.label if status.is_healthy else f"{method.label} ({status.value})"
        style: dict[str, Any] = {
            "color": _COLOURS[number % len(_COLOURS)],
            "linewidth": 1.8,
            "marker": ".",
            "markersize": 4,
        }
        # The initial parameters, at step 0 and second 0, have no place on logarithmic axes.
        drawn = [record for record in own if record.step > 0 and record.seconds > 0 and record.loss is not None]
        loss = [record.loss for record in drawn if record.loss is not None]
        _draw(by_step, [record.step for record in drawn], loss, label, status, style)
        _draw(by_seconds, [record.seconds for record in drawn], loss, label, status, style)
        handles.append(Line2D([], [], label=label, **style))
        lowest = min([lowest, *loss])
    if handles:
        by_seconds.legend(handles=handles, frameon=False)
    _dress(by_step, by_seconds, comparison)
    # matplotlib cannot scale axes that hold nothing, or nothing above zero.
    if 0 < lowest < math.inf:
        _make_logarithmic(by_step, by_seconds)
    figure.suptitle(f"{comparison.problem.name}: {comparison.budget} a method", fontsize=12)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()


def _draw(
    axes: Axes, x: Sequence[float], loss: Sequence[float], label: str, status: Status, style: Mapping[str, Any]
) -> None:
    if not x:
        return
    axes.plot(x, loss, label=label, **style)
    if not status.is_healthy:
        axes.plot(x[-1:], loss[-1:], linestyle="none", marker="x", markersize=9, color=style["color"])


def _dress(by_step: Axes, by_seconds: Axes, comparison: Comparison) -> None:
    by_step.set_xlabel("iterations")
    by_seconds.set_xlabel("seconds of training")
    by_step.set_ylabel(f"training loss ({comparison.problem.task.loss_name} + l2)")
    for axes in (by_step, by_seconds):
        axes.grid(True, which="major", alpha=0.35)
        axes.grid(True, which="minor", alpha=0.12)
        axes.spines[["top", "right"]].set_visible(False)


def _make_logarithmic(by_step: Axes, by_seconds: Axes) -> None:
    # Most of the loss falls within the first seconds: on a linear axis, every curve would be a vertical wall.
    by_step.set_xscale("log")
    by_seconds.set_xscale("log")
    by_step.set_yscale("log")
    # Losses that fall by less than a factor of ten would otherwise have one labelled tick, or none.
    by_step.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    by_step.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    by_step.yaxis.set_minor_formatter(NullFormatter())
    by_seconds.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
