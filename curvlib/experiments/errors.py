"""The error that every part of the experiments raises for input that a user can put right."""

from __future__ import annotations


class ExperimentError(ValueError):
    """Something that was asked for cannot be done; the message names it, what was expected, and the remedy."""
