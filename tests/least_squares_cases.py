"""Classic problems of nonlinear least squares.

More, Garbow & Hillstrom, "Testing unconstrained optimization software" (1981). Osborne 1, Kowalik & Osborne and Meyer
are the problems MGH17, MGH09 and MGH10 of NIST from their second starting values.
"""

from dataclasses import dataclass
from math import pi
from typing import Any

import torch
from optimizer_cases import powell_singular, rosenbrock

from benchmarks.nist_problems import load


@dataclass(frozen=True)
class Classic:
    """Residuals, a start and |r|^2 at the minimum."""

    residuals: Any
    start: list
    minimum: float


def wood(x):
    return torch.stack(
        [
            10 * (x[1] - x[0] ** 2),
            1 - x[0],
            90**0.5 * (x[3] - x[2] ** 2),
            1 - x[2],
            10**0.5 * (x[1] + x[3] - 2),
            (x[1] - x[3]) / 10**0.5,
        ]
    )


def helical_valley(x):
    angle = torch.atan2(x[1], x[0]) / (2 * pi)
    return torch.stack([10 * (x[2] - 10 * angle), 10 * ((x[0] ** 2 + x[1] ** 2).sqrt() - 1), x[2]])


def box(x):
    t = torch.arange(1, 11).double() / 10
    return torch.exp(-t * x[0]) - torch.exp(-t * x[1]) - x[2] * (torch.exp(-t) - torch.exp(-10 * t))


def brown_almost_linear(x):
    return torch.cat([x[:-1] + x.sum() - (len(x) + 1), x.prod().unsqueeze(0) - 1])


_BARD = [0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39]
# fmt: off
_OSBORNE_2 = [
    1.366, 1.191, 1.112, 1.013, 0.991, 0.885, 0.831, 0.847, 0.786, 0.725, 0.746, 0.679, 0.608,
    0.655, 0.616, 0.606, 0.602, 0.626, 0.651, 0.724, 0.649, 0.649, 0.694, 0.644, 0.624, 0.661,
    0.612, 0.558, 0.533, 0.495, 0.500, 0.423, 0.395, 0.375, 0.372, 0.391, 0.396, 0.405, 0.428,
    0.429, 0.523, 0.562, 0.607, 0.653, 0.672, 0.708, 0.633, 0.668, 0.645, 0.632, 0.591, 0.559,
    0.597, 0.625, 0.739, 0.710, 0.729, 0.720, 0.636, 0.581, 0.428, 0.292, 0.162, 0.098, 0.054,
]
# fmt: on


def bard(x):
    u = torch.arange(1, 16).double()
    v = 16 - u
    return torch.tensor(_BARD).double() - x[0] - u / (v * x[1] + torch.minimum(u, v) * x[2])


def osborne_2(x):
    t = torch.arange(65).double() / 10
    peaks = (x[k] * torch.exp(-((t - x[k + 7]) ** 2) * x[k + 4]) for k in (1, 2, 3))
    return torch.tensor(_OSBORNE_2).double() - x[0] * torch.exp(-t * x[4]) - sum(peaks)


def _of_nist(name):
    problem = load(name)
    return Classic(problem.residuals, problem.starts[1].tolist(), problem.residual_sum)


CLASSICS = {
    "rosenbrock": Classic(rosenbrock, [-1.2, 1.0], 0.0),
    "powell-singular": Classic(powell_singular, [3.0, -1.0, 0.0, 1.0], 0.0),
    "wood": Classic(wood, [-3.0, -1.0, -3.0, -1.0], 0.0),
    "helical-valley": Classic(helical_valley, [-1.0, 0.0, 0.0], 0.0),
    "box-3d": Classic(box, [0.0, 10.0, 20.0], 0.0),
    "brown-almost-linear": Classic(brown_almost_linear, [0.5] * 10, 0.0),
    "bard": Classic(bard, [1.0, 1.0, 1.0], 8.21487e-3),
    "osborne-1": _of_nist("MGH17"),
    "osborne-2": Classic(osborne_2, [1.3, 0.65, 0.65, 0.7, 0.6, 3.0, 5.0, 7.0, 2.0, 4.5, 5.5], 4.01377e-2),
    "kowalik-osborne": _of_nist("MGH09"),
    "meyer": _of_nist("MGH10"),
}
