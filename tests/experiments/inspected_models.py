"""Models for ``curvlib inspect --model``, small enough for dense matrices."""

import torch
from torch import nn

import curvlib

SIZES = {"0": 20, "2": 15, "4": 8}


def tiny():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    return model, nn.CrossEntropyLoss(), (torch.randn(9, 4).double(), torch.arange(9) % 2)


class Scale(nn.Module):
    """A layer without a rule."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.rand(4))

    def forward(self, x):
        return x * self.factor


def unsupported():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), Scale(), nn.Linear(4, 2)), nn.MSELoss(), (torch.randn(5, 3), torch.ones(5, 2))


def evaluation(make=tiny, l2=0.0):
    model, loss, batch = make()
    return curvlib.Objective(model, loss, l2=l2).at(batch)
