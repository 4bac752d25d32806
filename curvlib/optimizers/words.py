"""Configurations in words, the same in every process: by these a checkpoint of another configuration is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from curvlib.objective import Objective


def in_words(value: object) -> str:
    """Return a text that says what distinguishes a configuration from others.

    Dataclasses, loss modules and containers are their entries; a tensor is its shape, its type and a digest of all its
    numbers, which its repr abbreviates; a function, and an object whose repr is its address, is its name.
    """
    if isinstance(value, Tensor):
        return f"tensor(shape={list(value.shape)}, dtype={value.dtype}, sha256={_digest(value)})"
    if isinstance(value, type):
        return value.__qualname__
    if isinstance(value, nn.Module):
        return _named(value, _entries_of_module(value))
    if is_dataclass(value):
        # what a class leaves out of its repr is no part of the configuration
        return _named(value, {entry.name: getattr(value, entry.name) for entry in fields(value) if entry.repr})
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{in_words(key)}: {in_words(entry)}' for key, entry in value.items())}}}"
    if type(value) in (tuple, list):
        return f"({', '.join(map(in_words, value))})"  # type: ignore[call-overload]
    text = repr(value)
    return text if " at 0x" not in text else str(getattr(value, "__qualname__", type(value).__qualname__))


def objective_in_words(objective: Objective) -> dict[str, Any]:
    """Return names and shapes of the parameters, and what the objective is: loss, l2 weight and type of numbers."""
    layout = objective.layout
    return {
        "model": {name: list(shape) for name, shape in zip(layout.names, layout.shapes, strict=True)},
        "objective": [in_words(objective.loss), objective.l2, str(layout.dtype)],
    }


def refuse_another(expected: Mapping[str, Any], came: Mapping[str, Any]) -> None:
    """Refuse a state that was made with something else.

    Raises:
        ValueError: names what differs, with both.
    """
    for what, own in expected.items():
        if came.get(what) != own:
            raise ValueError(f"the state was made with another {what}: expected {own}, got {came.get(what)}.")


def _named(value: object, entries: Mapping[str, object]) -> str:
    return f"{type(value).__name__}({', '.join(f'{name}={in_words(entry)}' for name, entry in entries.items())})"


def _entries_of_module(module: nn.Module) -> dict[str, object]:
    """Return options, buffers and submodules; parameters are left out, as training may have changed them."""
    own = {name: entry for name, entry in vars(module).items() if not name.startswith("_") and name != "training"}
    return {**own, **dict(module.named_buffers(recurse=False)), **dict(module.named_children())}


def _digest(value: Tensor) -> str:
    numbers = value.detach().cpu().contiguous().flatten().view(torch.uint8)
    return sha256(numbers.numpy().tobytes()).hexdigest()[:16]
