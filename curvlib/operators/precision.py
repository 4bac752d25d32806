"""Curvature is computed in the type of its tensors, also where the caller has switched autocast on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch


def full_precision(device: torch.device) -> AbstractContextManager:
    """Return a context without autocast on the device.

    Under autocast, matrix products would be made in half precision: statistics and solves need float32 at least. The
    check costs less than a microsecond where autocast is off.
    """
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def in_full_precision(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return the method of an object with a ``device``, made without autocast."""

    @wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        with full_precision(self.device):
            return method(self, *args, **kwargs)

    return guarded
