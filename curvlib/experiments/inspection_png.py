"""Figures as small PNG files."""

from __future__ import annotations

import io

from matplotlib.figure import Figure
from PIL import Image

DPI = 100
# Colours of a figure: few, so that files are small, and no curve in the colour of another one.
_COLOURS = 256


def png_of(figure: Figure, palette: Image.Image | None = None) -> bytes:
    """Return the figure in few colours, those of the palette where one is given."""
    raw, small = io.BytesIO(), io.BytesIO()
    figure.savefig(raw, format="png", dpi=DPI)
    raw.seek(0)
    with Image.open(raw) as image:
        few = image.convert("RGB").quantize(
            _COLOURS, Image.Quantize.MAXCOVERAGE, palette=palette, dither=Image.Dither.NONE
        )
        few.save(small, format="png", optimize=True)
    return small.getvalue()
