"""The recurrent layers and cells of curvlib.testing under their short names."""

from curvlib.testing.recurrent import recurrent_cells, recurrent_layers

__all__ = ["recurrent_cells", "recurrent_layers"]
