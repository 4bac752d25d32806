"""Nonlinear regression problems of the NIST Statistical Reference Datasets, as PyTorch models.

Symbols: b (D,) parameters, x (N,) or (N, 2) predictors, y (N,) responses.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent.parent / "tests" / "data" / "nist"
Formula = Callable[[Tensor, Tensor], Tensor]


def _rational(top: int) -> Formula:
    """Return (b_0 + ... + b_top x^top) / (1 + b_{top + 1} x + ...)."""

    def formula(b: Tensor, x: Tensor) -> Tensor:
        numerator = sum(b[k] * x**k for k in range(top + 1))
        return numerator / (1 + sum(b[top + k] * x**k for k in range(1, len(b) - top)))

    return formula


def _exponentials(b: Tensor, x: Tensor) -> Tensor:
    return b[0] * torch.exp(-b[1] * x) + b[2] * torch.exp(-b[3] * x) + b[4] * torch.exp(-b[5] * x)


def _peaks(b: Tensor, x: Tensor) -> Tensor:
    first, second = ((x - b[k + 1]) ** 2 / b[k + 2] ** 2 for k in (2, 5))
    return b[0] * torch.exp(-b[1] * x) + b[2] * torch.exp(-first) + b[5] * torch.exp(-second)


def _cycles(b: Tensor, x: Tensor) -> Tensor:
    def cycle(period: Tensor | float, cosine: Tensor, sine: Tensor) -> Tensor:
        angle = 2 * math.pi * x / period
        return cosine * torch.cos(angle) + sine * torch.sin(angle)

    return b[0] + cycle(12.0, b[1], b[2]) + cycle(b[3], b[4], b[5]) + cycle(b[6], b[7], b[8])


def _decay(b: Tensor, x: Tensor) -> Tensor:
    return torch.exp(-b[0] * x) / (b[1] + b[2] * x)


def _saturation(b: Tensor, x: Tensor) -> Tensor:
    return b[0] * (1 - torch.exp(-b[1] * x))


_FORMULAS: dict[str, Formula] = {
    "Bennett5": lambda b, x: b[0] * (b[1] + x) ** (-1 / b[2]),
    "BoxBOD": _saturation,
    "Chwirut1": _decay,
    "Chwirut2": _decay,
    "DanWood": lambda b, x: b[0] * x ** b[1],
    "ENSO": _cycles,
    "Eckerle4": lambda b, x: b[0] / b[1] * torch.exp(-0.5 * ((x - b[2]) / b[1]) ** 2),
    "Gauss1": _peaks,
    "Gauss2": _peaks,
    "Gauss3": _peaks,
    "Hahn1": _rational(3),
    "Kirby2": _rational(2),
    "Lanczos1": _exponentials,
    "Lanczos2": _exponentials,
    "Lanczos3": _exponentials,
    "MGH09": lambda b, x: b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3]),
    "MGH10": lambda b, x: b[0] * torch.exp(b[1] / (x + b[2])),
    "MGH17": lambda b, x: b[0] + b[1] * torch.exp(-x * b[3]) + b[2] * torch.exp(-x * b[4]),
    "Misra1a": _saturation,
    "Misra1b": lambda b, x: b[0] * (1 - (1 + b[1] * x / 2) ** -2),
    "Misra1c": lambda b, x: b[0] * (1 - (1 + 2 * b[1] * x) ** -0.5),
    "Misra1d": lambda b, x: b[0] * b[1] * x / (1 + b[1] * x),
    "Nelson": lambda b, x: b[0] - b[1] * x[:, 0] * torch.exp(-b[2] * x[:, 1]),
    "Rat42": lambda b, x: b[0] / (1 + torch.exp(b[1] - b[2] * x)),
    "Rat43": lambda b, x: b[0] / (1 + torch.exp(b[1] - b[2] * x)) ** (1 / b[3]),
    "Roszman1": lambda b, x: b[0] - b[1] * x - torch.atan(b[2] / (x - b[3])) / math.pi,
    "Thurber": _rational(3),
}
_ON_LOGARITHMS = {"Nelson"}


@dataclass(frozen=True, kw_only=True, eq=False)
class NISTProblem:
    """A problem with its certified solution.

    Attributes:
        name: of the data set.
        level: of difficulty, Lower, Average or Higher.
        formula: (b, x) -> the (N,) predictions.
        starts: the two starting values.
        certified: the certified b (D,).
        deviations: certified standard deviations of b (D,).
        residual_sum: certified |r|^2.
        x: predictors, float64.
        y: responses (N,), float64.
    """

    name: str
    level: str
    formula: Formula
    starts: tuple[Tensor, Tensor]
    certified: Tensor
    deviations: Tensor
    residual_sum: float
    x: Tensor
    y: Tensor

    def residuals(self, b: Tensor) -> Tensor:
        """Return r (N,) at b."""
        return self.formula(b, self.x) - self.y

    def model(self, start: int) -> Regression:
        """Return the model at its first or second starting value (1 or 2)."""
        return Regression(self.formula, self.starts[start - 1])

    def digits(self, b: Tensor) -> float:
        """Return the least log relative error of b, -log10(|b - c| / |c|): how many digits of all are right."""
        error = ((b - self.certified).abs() / self.certified.abs()).max()
        # Certified values have 11 digits.
        return float((-error.log10()).clamp(0.0, 11.0).nan_to_num(0.0))


class Regression(nn.Module):
    """y = f(b, x) with the parameters b."""

    def __init__(self, formula: Formula, start: Tensor) -> None:
        super().__init__()
        self.formula, self.b = formula, nn.Parameter(start.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return the (N,) predictions."""
        return self.formula(self.b, x)


def load(name: str) -> NISTProblem:
    """Return the problem of a file."""
    lines = (FOLDER / f"{name}.dat").read_text().splitlines()
    text = "\n".join(lines)
    table = torch.tensor(
        [[float(number) for number in line.split("=")[1].split()] for line in lines if re.match(r"\s*b\d\s*=", line)],
        dtype=torch.float64,
    )
    begin = next(i for i, line in enumerate(lines) if re.match(r"Data:\s+y\s", line))
    rows = [[float(number) for number in line.split()] for line in lines[begin + 1 :] if line.strip()]
    data = torch.tensor(rows, dtype=torch.float64)
    y = data[:, 0].log() if name in _ON_LOGARITHMS else data[:, 0]
    start_1, start_2, certified, deviations = table.T
    return NISTProblem(
        name=name,
        level=_after(r"(\w+) Level of Difficulty", text),
        formula=_FORMULAS[name],
        starts=(start_1, start_2),
        certified=certified,
        deviations=deviations,
        residual_sum=float(_after(r"Residual Sum of Squares:\s+(\S+)", text)),
        x=data[:, 1] if data.shape[1] == 2 else data[:, 1:],
        y=y,
    )


def _after(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the file has no line with {pattern!r}.")
    return found[1]


NAMES = tuple(sorted(_FORMULAS))
