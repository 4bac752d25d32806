"""The networks and losses of curvlib.testing under their short names, and a float32 classifier."""

import torch
from torch import nn

from curvlib import Objective
from curvlib.testing import EVERY_LOSS, LOSSES, LossCase, mlp, networks
from curvlib.testing.losses import PositionsLast, SharedNoise
from curvlib.testing.networks import ACTIVATIONS, POSITIONS

__all__ = [
    "ACTIVATIONS",
    "EVERY_LOSS",
    "LOSSES",
    "POSITIONS",
    "LossCase",
    "PositionsLast",
    "SharedNoise",
    "classifier",
    "mlp",
    "networks",
]


def classifier(seed=0, examples=40):
    """A small float32 classifier as an objective with an l2 term, and a batch for it."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    return Objective(model, nn.CrossEntropyLoss(), l2=1e-3), (torch.randn(examples, 5), torch.randint(3, (examples,)))
