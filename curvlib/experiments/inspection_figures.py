"""Pictures of an inspection: matrices side by side, and their spectra."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from PIL import Image
from torch import Tensor

from curvlib.experiments.inspection import Inspected
from curvlib.experiments.inspection_matrix import MOST_PIXELS
from curvlib.experiments.inspection_selection import Selection
from curvlib.spectra import SpectralMeasure

# Okabe and Ito's colours, which colour-blind readers can tell apart, in several styles of line.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLES = ("-", "--", "-.", ":")
_BORDER = "#ff9f1c"
# White is the absolute value that this part of the exact matrix's pixels stays below, black is 0, as in the paper.
_WHITE = 0.985
_DPI = 100
# Grey levels of a heat map, the borders' colour besides, and colours of lines: few, so that files are small.
_GREYS, _COLOURS_OF_LINES = 40, 64
# Eigenvalues below this part of the largest are rounding errors.
_SMALLEST = 1e-10
# Width of the kernel that smooths a spectral density, relative to the largest eigenvalue.
_KERNEL = 0.01


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A PNG file.

    Args:
        file: its name.
        title: what it shows.
        png: the bytes.
    """

    file: str
    title: str
    png: bytes


def pictures_of(inspected: Inspected) -> Iterator[Picture]:
    """Yield the heat maps of every approximation that applies, then the spectra."""
    selection, matrix = inspected.selection, inspected.inspection.matrix
    for row, looked in inspected.drawn:
        assert looked.difference is not None  # the exact matrix alone has none
        panels = (
            (f"exact {matrix}", inspected.exact.picture),
            (row.name, looked.picture),
            ("difference", looked.difference),
        )
        yield Picture(
            file=f"matrix-{row.name}.png",
            title=f"exact {matrix}, {row.name} and their difference",
            png=heat_maps(panels, selection),
        )
        if inspected.exact.inverse_picture is None or looked.inverse_picture is None:
            continue
        assert looked.inverse_difference is not None  # both inverses exist
        panels = (
            (f"inverse of exact {matrix}", inspected.exact.inverse_picture),
            (f"inverse of {row.name}", looked.inverse_picture),
            ("difference", looked.inverse_difference),
        )
        yield Picture(
            file=f"inverse-{row.name}.png",
            title=f"damped inverses of exact {matrix} and {row.name}, and their difference",
            png=heat_maps(panels, selection),
        )
    yield Picture(file="spectra.png", title="eigenvalues on these layers", png=_spectra(inspected))
    if inspected.density is not None:
        yield Picture(file="density.png", title="spectrum of the whole matrix", png=_densities(inspected))


def heat_maps(panels: Sequence[tuple[str, Tensor]], selection: Selection) -> bytes:
    """Return a PNG of pictures side by side, on the colour scale of the first one: black is small, white is large.

    Args:
        panels: titles and absolute values (p, p), the exact matrix first.
        selection: whose borders are drawn.
    """
    first = panels[0][1]
    white = float(torch.quantile(first.flatten(), _WHITE)) or float(first.max())
    scale = Normalize(0.0, white, clip=True)
    # Whole pixels for every entry, and axes that begin at whole pixels: nothing is resampled.
    zoom = max(1, MOST_PIXELS // len(first))
    side, gap, left, right, top, bottom = zoom * len(first), 14, 62, 86, 34, 10
    width, height = left + len(panels) * side + (len(panels) - 1) * gap + right, top + side + bottom
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    for number, (title, pixels) in enumerate(panels):
        place = (left + number * (side + gap)) / width, bottom / height, side / width, side / height
        axes = figure.add_axes(place)
        shown = axes.imshow(
            pixels.numpy(),
            cmap="gray",
            norm=scale,
            interpolation="nearest",
            extent=(0, selection.size, selection.size, 0),
        )
        axes.set_title(title, fontsize=11)
        _mark_layers(axes, selection, named=number == 0)
    bar = figure.add_axes(((width - right + 14) / width, bottom / height, 12 / width, side / height))
    figure.colorbar(shown, cax=bar, label="absolute value (white: this or more)")
    bar.ticklabel_format(axis="y", scilimits=(-2, 3), useMathText=True)
    bar.yaxis.get_offset_text().set_fontsize(8)
    bar.tick_params(labelsize=8)
    return _png(figure, _palette_of_heat_maps())


def _mark_layers(axes: Axes, selection: Selection, *, named: bool) -> None:
    for part in selection.slices[1:]:
        for line in (axes.axhline, axes.axvline):
            line(part.start, color=_BORDER, linewidth=0.7, linestyle=(0, (6, 5)), antialiased=False)
    axes.set_xticks([])
    # Names of layers that are narrower than a line of text would lie on each other.
    wide = [
        (0.5 * (part.start + part.stop), region.name)
        for part, region in zip(selection.slices, selection.regions, strict=True)
        if region.size >= selection.size / 30
    ]
    axes.set_yticks([middle for middle, _ in wide] if named else [])
    if named:
        axes.set_yticklabels([_short(name) for _, name in wide], fontsize=8)
        axes.set_ylabel("layer", fontsize=9)
    axes.tick_params(length=0)


def _short(name: str) -> str:
    return name if len(name) <= 10 else "…" + name[-9:]


def _spectra(inspected: Inspected) -> bytes:
    figure = Figure(figsize=(9, 4.6), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    largest = 0.0
    curves = [("exact", inspected.exact), *((row.name, looked) for row, looked in inspected.drawn)]
    for (name, looked), style in zip(curves, _line_styles(), strict=False):
        values = looked.eigenvalues.numpy()
        largest = max(largest, float(np.abs(values).max()))
        positive = np.maximum(values, 0.0)
        axes.plot(1 + np.arange(len(values)), np.where(positive > 0, positive, np.nan), label=name, **style)
        negative = np.flatnonzero(values < -_SMALLEST * np.abs(values).max())
        if len(negative):
            axes.plot(
                1 + negative, -values[negative], linestyle="none", marker=".", markersize=3, color=style["color"],
                label=f"{name}, negative",
            )  # fmt: skip
    axes.axhline(inspected.damping, color="0.5", linewidth=0.8)
    axes.annotate("damping", (0.995, inspected.damping), xycoords=("axes fraction", "data"), fontsize=8, color="0.4",
                  ha="right", va="bottom")  # fmt: skip
    axes.set_yscale("log")
    smallest = min(float(looked.eigenvalues.abs().min()) for _, looked in curves)
    axes.set_ylim(max(largest * _SMALLEST, 0.3 * min(smallest, inspected.damping)), largest * 3)
    axes.set_xlabel("number of the eigenvalue")
    axes.set_ylabel("eigenvalue")
    _dress(axes)
    axes.set_title(f"{inspected.inspection.matrix} on the selected layers", fontsize=11)
    return _png(figure)


def _densities(inspected: Inspected) -> bytes:
    figure = Figure(figsize=(11, 4.4), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    density, count = figure.subplots(1, 2)
    curves = [("exact", inspected.density), *((row.name, row.density) for row, _ in inspected.drawn)]
    measures = [(name, measure) for name, measure in curves if measure is not None]
    lowest = min(float(measure.nodes.min()) for _, measure in measures)
    largest = max(float(measure.nodes.abs().max()) for _, measure in measures)
    points = torch.linspace(min(lowest, 0.0) - 0.04 * largest, 1.04 * largest, 400, dtype=torch.float64)
    highest = 0.0
    for (name, measure), style in zip(measures, _line_styles(), strict=False):
        # one kernel for all: they can be compared
        heights = measure.density(points, width=largest * _KERNEL).value
        highest = max(highest, float(heights.max()))
        density.plot(points.numpy(), heights.cpu().numpy(), label=name, **style)
        count.plot(*_counted(measure, largest), label=name, **style)
    density.set_yscale("log")
    # Further down are the tails of the kernels that smooth it.
    density.set_ylim(highest * 1e-6, highest * 3)
    density.set_xlabel("eigenvalue")
    density.set_ylabel("density")
    count.set_xscale("log")
    count.set_yscale("log")
    count.set_ylim(bottom=0.7)
    count.set_xlabel("t")
    count.set_ylabel("eigenvalues above t")
    for axes in (density, count):
        _dress(axes)
    figure.suptitle(f"{inspected.inspection.matrix} of all {inspected.selection.total:,} parameters", fontsize=11)
    return _png(figure)


def _counted(measure: SpectralMeasure, largest: float) -> tuple[np.ndarray, np.ndarray]:
    """Return points t and the estimated numbers of eigenvalues above them."""
    points = torch.logspace(-8, 0, 200, dtype=torch.float64, device=measure.nodes.device) * largest
    above = measure.size * (1.0 - measure.cumulative(points).value)
    return points.cpu().numpy(), above.cpu().numpy()


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
    axes.legend(frameon=False, fontsize=8)


def _png(figure: Figure, palette: Image.Image | None = None) -> bytes:
    raw, small = io.BytesIO(), io.BytesIO()
    figure.savefig(raw, format="png", dpi=_DPI)
    raw.seek(0)
    with Image.open(raw) as image:
        few = image.convert("RGB").quantize(_COLOURS_OF_LINES, palette=palette, dither=Image.Dither.NONE)
        few.save(small, format="png", optimize=True)
    return small.getvalue()


def _palette_of_heat_maps() -> Image.Image:
    greys = [(level, level, level) for level in np.linspace(0, 255, _GREYS).round().astype(int).tolist()]
    border = [round(255 * part) for part in to_rgb(_BORDER)]
    palette = Image.new("P", (1, 1))
    palette.putpalette([part for colour in (*greys, border) for part in colour])
    return palette
