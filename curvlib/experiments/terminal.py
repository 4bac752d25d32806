"""What the commands share: the console, and the device by its name."""

from __future__ import annotations

import torch
from rich.console import Console

from curvlib.experiments.errors import ExperimentError

# Tables that go into a file or a pipe have no terminal width to follow.
_WIDTH_WITHOUT_TERMINAL = 140


def console_of_command() -> Console:
    """Return the console, wide enough for tables where there is no terminal."""
    # names of users, such as "my_models:one:two", hold no codes of emoji
    console = Console(emoji=False)
    return console if console.is_terminal else Console(width=_WIDTH_WITHOUT_TERMINAL, emoji=False)


def device_named(name: str) -> torch.device:
    """Return the device for "cpu", "cuda" or "auto".

    Raises:
        ExperimentError: "cuda" without a GPU.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ExperimentError("--device cuda needs a GPU that PyTorch can use, and there is none: use --device cpu.")
    return torch.device("cuda" if available and name != "cpu" else "cpu")
