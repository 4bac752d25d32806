"""Pictures of an inspection: matrices side by side, and all pictures with their captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from curvlib.experiments.inspection import Inspected
from curvlib.experiments.inspection_matrix import MOST_PIXELS, entries_per_pixel
from curvlib.experiments.inspection_png import DPI, png_of
from curvlib.experiments.inspection_selection import Selection
from curvlib.experiments.inspection_spectra import KERNEL, densities, spectra, what_density

_BORDER = "#ff9f1c"
# White is the absolute value that this part of the exact matrix's pixels stays below, black is 0, as in the paper.
_WHITE = 0.985
# Grey levels, the borders' colour besides: few, so that files are small.
_GREYS = 40


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A PNG file.

    Args:
        file: its name.
        title: what it shows.
        caption: how to read it.
        png: the bytes.
    """

    file: str
    title: str
    caption: str
    png: bytes


def pictures_of(inspected: Inspected) -> Iterator[Picture]:
    """Yield the heat maps of every approximation that applies, then the spectra."""
    exact, matrix = inspected.exact, inspected.inspection.matrix
    if exact is not None:
        yield Picture(
            file="spectra.png",
            title="eigenvalues on these layers",
            caption="The eigenvalues of the exact matrix and of each approximation, in decreasing order. Dots are the "
            "absolute values of negative ones. Below d eps max |eigenvalue|, eps of the model's dtype, they are "
            "rounding errors, of which the negative ones are not drawn; the shaded area is that of the exact "
            "matrix.",
            png=spectra(inspected, exact),
        )
    if inspected.density is not None:
        yield Picture(
            file="density.png",
            title=f"spectrum of the {what_density(inspected)}",
            caption="Estimates from products with random vectors (stochastic Lanczos quadrature). Left: the density of "
            f"the eigenvalues, smoothed by a kernel of {KERNEL:.0%} of the exact matrix's largest; right: how many "
            "have an absolute value above t.",
            png=densities(inspected, inspected.density),
        )
    for row, looked in inspected.drawn:
        assert exact is not None  # what is drawn is held against it
        assert looked.difference is not None  # the exact matrix alone has none
        panels = (
            (f"exact {matrix}", exact.picture),
            (row.name, looked.picture),
            (f"difference (error {row.error:.3g})", looked.difference),
        )
        caption = _caption(inspected.selection, panels[0][1])
        yield Picture(
            file=f"matrix-{row.name}.png",
            title=f"exact {matrix}, {row.name} and their difference",
            caption=caption,
            png=heat_maps(panels, inspected.selection),
        )
        if exact.inverse_picture is None or looked.inverse_picture is None:
            continue
        assert looked.inverse_difference is not None  # both inverses exist
        panels = (
            (f"inverse of exact {matrix}", exact.inverse_picture),
            (f"inverse of {row.name}", looked.inverse_picture),
            (f"difference (error {row.inverse_error:.3g})", looked.inverse_difference),
        )
        yield Picture(
            file=f"inverse-{row.name}.png",
            title=f"damped inverses of exact {matrix} and {row.name}, and their difference",
            caption=f"(C + damping I)^-1 with damping {inspected.damping:.3g}. "
            + _caption(inspected.selection, panels[0][1]),
            png=heat_maps(panels, inspected.selection),
        )


def _caption(selection: Selection, first: Tensor) -> str:
    side = entries_per_pixel(selection.size)
    mean = f", averaged over the {side} x {side} entries of a pixel" if side > 1 else ""
    borders = " Dashed lines are borders of layers." if len(selection.regions) > 1 else ""
    return (
        f"Absolute values{mean}: black is 0, white {_white(first):.3g} or more, which "
        f"{1 - _WHITE:.1%} of the exact one's pixels are.{borders} Inside a layer the entries of (W b) follow one "
        "another column by column."
    )


def _white(first: Tensor) -> float:
    return float(torch.quantile(first.flatten(), _WHITE)) or float(first.max()) or 1.0


def heat_maps(panels: Sequence[tuple[str, Tensor]], selection: Selection) -> bytes:
    """Return a PNG of pictures side by side, on the colour scale of the first one: black is small, white is large.

    Args:
        panels: titles and absolute values (p, p), the exact matrix first.
        selection: whose borders are drawn.
    """
    first = panels[0][1]
    scale = Normalize(0.0, _white(first), clip=True)
    # Whole pixels for every entry, and axes that begin at whole pixels: nothing is resampled.
    zoom = max(1, MOST_PIXELS // len(first))
    side, gap, right, top, bottom = zoom * len(first), 14, 86, 34, 10
    # Beside the names of the layers there is the label of the axis.
    left = max(62, 36 + 7 * max(len(_short(region.name)) for region in selection.regions))
    width, height = left + len(panels) * side + (len(panels) - 1) * gap + right, top + side + bottom
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
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
    return png_of(figure, _palette_of_heat_maps())


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


def _palette_of_heat_maps() -> Image.Image:
    greys = [(level, level, level) for level in np.linspace(0, 255, _GREYS).round().astype(int).tolist()]
    border = [round(255 * part) for part in to_rgb(_BORDER)]
    palette = Image.new("P", (1, 1))
    palette.putpalette([part for colour in (*greys, border) for part in colour])
    return palette
