"""Small problems for optimizers, and comparisons of their states."""

import io

import torch
from torch import nn

from curvlib import Objective


class Residuals(nn.Module):
    """Parameters whose residuals are the outputs: one example with dummy inputs."""

    def __init__(self, function, start):
        super().__init__()
        self.function, self.x = function, nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self, inputs):
        return self.function(self.x).unsqueeze(0)


def rosenbrock(x):
    return torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


def chained_rosenbrock(x):
    return torch.cat([10 * (x[1:] - x[:-1] ** 2), 1 - x[:-1]])


def powell_singular(x):
    return torch.stack([x[0] + 10 * x[1], 5**0.5 * (x[2] - x[3]), (x[1] - 2 * x[2]) ** 2, 10**0.5 * (x[0] - x[3]) ** 2])


def least_squares(function, start):
    """h = |r(x)|^2 and its only batch."""
    model = Residuals(function, start)
    zeros = torch.zeros_like(model(None))
    return Objective(model, nn.MSELoss(reduction="sum")), (torch.zeros(1, 1, dtype=torch.float64), zeros.detach())


def linear_regression():
    """h is exactly quadratic."""
    torch.manual_seed(0)
    x = torch.randn(50, 4).double()
    objective = Objective(nn.Linear(4, 2).double(), nn.MSELoss(), l2=0.1)
    return objective, (x, x @ torch.randn(4, 2).double() + 0.1 * torch.randn(50, 2).double())


def classification(device="cpu", dtype=torch.float32, examples=200):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples, 6, generator=generator)
    y = (x[:, :3] * x[:, 3:]).argmax(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3)).to(device, dtype)
    return Objective(model, nn.CrossEntropyLoss(), l2=1e-4), (x.to(device, dtype), y.to(device))


def small_network(dtype=torch.float64, device="cpu", loss=None):
    torch.manual_seed(0)
    x = torch.randn(40, 3)
    y = (x[:, 0] * x[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(device, dtype)
    return Objective(model, loss or nn.CrossEntropyLoss(), l2=1e-3), (x.to(device, dtype), y.to(device))


def assert_same(one, other, where="state"):
    """Equal in every tensor and number, at every depth, bit for bit."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{where}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def resume(optimizer, other):
    """Give another optimizer the state and the parameters of one, by way of a file."""
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), optimizer.objective.parameter_vector()), file)
    file.seek(0)
    state, theta = torch.load(file, weights_only=True)
    other.load_state_dict(state)
    other.objective.layout.write(other.objective.parameters, theta)
