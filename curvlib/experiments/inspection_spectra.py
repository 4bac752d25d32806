"""Curves of eigenvalues and of their densities."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from curvlib.experiments.inspection import Inspected
from curvlib.experiments.inspection_matrix import Looked
from curvlib.experiments.inspection_png import DPI, png_of
from curvlib.spectra import SpectralMeasure

# Okabe and Ito's colours, which colour-blind readers can tell apart, in several styles of line.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLES = ("-", "--", "-.", ":")
# Width of the kernel that smooths a spectral density, relative to the largest eigenvalue.
KERNEL = 0.01


def what_density(inspected: Inspected) -> str:
    """Return in words of what the density is."""
    selection = inspected.selection
    if inspected.inspection.estimate and not selection.is_whole:
        return f"selected layers, {selection.size:,} parameters"
    return f"whole matrix, {selection.total:,} parameters"


def spectra(inspected: Inspected, exact: Looked) -> bytes:
    """Return a PNG of all eigenvalues on the selected layers, on a logarithmic axis."""
    figure = Figure(figsize=(11, 4.8), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    curves = [("exact", exact), *((row.name, looked) for row, looked in inspected.drawn)]
    signs = False
    for (name, looked), style in zip(curves, _line_styles(), strict=False):
        values = looked.eigenvalues.numpy()
        # a line of one point is not seen
        marker: dict[str, Any] = {"marker": "o", "markersize": 4} if len(values) == 1 else {}
        axes.plot(1 + np.arange(len(values)), np.where(values > 0, values, np.nan), label=name, **style, **marker)
        negative = np.flatnonzero(values < -looked.rounding)
        signs = signs or len(negative) > 0
        axes.plot(1 + negative, -values[negative], linestyle="none", marker=".", markersize=3, color=style["color"])
    if signs:
        axes.plot([], [], linestyle="none", marker=".", color="0.3", label="negative: |eigenvalue|")
    largest = max(float(looked.eigenvalues.abs().max()) for _, looked in curves)
    smallest = min(float(looked.eigenvalues.abs().min()) for _, looked in curves)
    # Not far below the rounding errors, of which there would be more to be seen than of the eigenvalues.
    axes.set_ylim(max(0.03 * exact.rounding, 0.3 * min(smallest, inspected.damping)), largest * 3)
    axes.set_yscale("log")
    axes.axhspan(axes.get_ylim()[0], exact.rounding, color="0.9", zorder=0)
    if axes.get_ylim()[0] < exact.rounding:
        _say(axes, f"rounding errors: below d eps max = {exact.rounding:.1e}", exact.rounding, "top")
    axes.axhline(inspected.damping, color="0.5", linewidth=0.8)
    _say(axes, f"damping {inspected.damping:.3g}", inspected.damping, "bottom")
    axes.set_xlabel("number of the eigenvalue, the largest first")
    axes.set_ylabel("eigenvalue")
    _dress(axes)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    axes.set_title(f"eigenvalues of {inspected.inspection.matrix} on the selected layers", fontsize=11)
    return png_of(figure)


def _say(axes: Axes, text: str, height: float, side: str) -> None:
    axes.annotate(
        text,
        (0.005, height),
        xycoords=("axes fraction", "data"),
        xytext=(0, 1 if side == "bottom" else -2),
        textcoords="offset points",
        fontsize=8,
        color="0.35",
        ha="left",
        va=side,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
    )


def densities(inspected: Inspected, exact: SpectralMeasure) -> bytes:
    """Return a PNG of the estimated spectra: densities, and numbers of eigenvalues above thresholds."""
    figure = Figure(figsize=(12.5, 4.6), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    density, count = figure.subplots(1, 2)
    measures = [("exact", exact), *((row.name, row.density) for row in inspected.rows if row.density is not None)]
    # All are seen where the exact matrix has its eigenvalues: one of other size would leave no room for them.
    low, high = min(float(exact.nodes.min()), 0.0), max(float(exact.nodes.max()), 0.0)
    largest = max(high, -low)
    points = torch.linspace(low - 0.05 * largest, high + 0.1 * largest, 400, dtype=torch.float64)
    highest = 0.0
    for (name, measure), style in zip(measures, _line_styles(), strict=False):
        # one kernel for all: they can be compared
        heights = measure.density(points, width=largest * KERNEL).value
        highest = max(highest, float(heights.max()))
        density.plot(points.numpy(), heights.cpu().numpy(), label=name, **style)
        count.plot(*_counted(measure, largest), **style)
    density.set_yscale("log")
    # Further down are the tails of the kernels that smooth it.
    density.set_ylim(highest * 1e-6, highest * 3)
    density.set_xlabel("eigenvalue")
    density.set_ylabel("density")
    count.set_xscale("log")
    count.set_yscale("log")
    count.set_ylim(bottom=0.7)
    count.set_xlabel("t")
    count.set_ylabel("eigenvalues with |eigenvalue| > t")
    for axes in (density, count):
        _dress(axes)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    figure.suptitle(f"{inspected.inspection.matrix}: {what_density(inspected)}", fontsize=11)
    return png_of(figure)


def _counted(measure: SpectralMeasure, largest: float) -> tuple[np.ndarray, np.ndarray]:
    """Return points t and the estimated numbers of eigenvalues whose absolute values are above them."""
    points = torch.logspace(-7, 0.5, 200, dtype=torch.float64, device=measure.nodes.device) * largest
    within = measure.cumulative(points).value - measure.cumulative(-points).value
    return points.cpu().numpy(), (measure.size * (1.0 - within)).cpu().numpy()


def _line_styles() -> Iterator[dict[str, Any]]:
    yield {"color": "black", "linewidth": 2.2}
    number = 0
    while True:
        colour, style = _COLOURS[number % len(_COLOURS)], _STYLES[(number // len(_COLOURS)) % len(_STYLES)]
        yield {"color": colour, "linestyle": style, "linewidth": 1.4}
        number += 1


def _dress(axes: Axes) -> None:
    axes.grid(True, which="major", alpha=0.3)
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)
