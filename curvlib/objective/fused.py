"""Steps of fused optimizers, which change parameters without moving their version counters.

An :class:`~curvlib.objective.Evaluation` and autograd itself notice changes by these counters alone. After a step of an
optimizer with ``fused=True`` the counters of the parameters that objectives use are therefore moved here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook

_watched: WeakValueDictionary[int, nn.Parameter] = WeakValueDictionary()


def watch(parameters: Iterable[nn.Parameter]) -> None:
    """Notice the steps of fused optimizers on these parameters from now on, as long as they live."""
    _watched.update({id(parameter): parameter for parameter in parameters})


def _mark(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        if group.get("fused"):
            for parameter in group["params"]:
                if id(parameter) in _watched and parameter.grad is not None:
                    increment_version(parameter)


register_optimizer_step_post_hook(_mark)
