"""Curvature is computed in the type of its tensors, also where the caller has switched autocast on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def full_precision(device: torch.device) -> AbstractContextManager:
    """Return a context without autocast on the device.

    Under autocast, matrix products would be made in half precision: statistics and solves need float32 at least. The
    check costs less than a microsecond where autocast is off.
    """
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
