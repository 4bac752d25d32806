"""Figures as small PNG files."""

from __future__ import annotations

import io

from matplotlib.figure import Figure
from PIL import Image

DPI = 100


def png_of(figure: Figure, palette: Image.Image | None = None) -> bytes:
    """Return the figure, in the colours of the palette alone where one is given, for a smaller file."""
    raw, small = io.BytesIO(), io.BytesIO()
    figure.savefig(raw, format="png", dpi=DPI)
    raw.seek(0)
    with Image.open(raw) as image:
        colours = image.convert("RGB")
        if palette is not None:
            colours = colours.quantize(palette=palette, dither=Image.Dither.NONE)
        colours.save(small, format="png", optimize=True)
    return small.getvalue()
