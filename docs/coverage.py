"""Which approximation is exact, approximate or refused, for which curvature matrix and layer: by trying all of them.

``python docs/coverage.py`` writes ``docs/coverage.md``.
Every cell compares the estimate with the dense matrix from exact products, on eight examples in float64.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import curvlib
from curvlib import GGN, EmpiricalFisher, Fisher, Hessian, Objective, approximations

TARGET = Path(__file__).with_name("coverage.md")
# Rounding of float64 sums and of products of roots.
_EXACT = 1e-8
_REFUSALS = (TypeError, ValueError, NotImplementedError, curvlib.UnsupportedLayerError, curvlib.LinearizationError)

MATRICES = {"GGN": GGN(), "Fisher(samples=1)": Fisher(), "EmpiricalFisher": EmpiricalFisher(), "Hessian": Hessian()}


@dataclass(frozen=True, kw_only=True)
class Row:
    """An approximation.

    Attributes:
        name: as users write it.
        make: from a curvature matrix.
        memory: numbers that the operator holds, as a formula.
        time: of an estimate beside the backward passes, as a formula.
        own_draws: whether it draws labels otherwise than the dense matrix beside it: the two cannot be compared.
    """

    name: str
    make: Callable[[object], approximations.Approximation]
    memory: str
    time: str
    own_draws: bool = False


def _sharing(strategy: approximations.WeightSharing) -> Callable[[object], approximations.Approximation]:
    return lambda matrix: approximations.KFAC(matrix, weight_sharing=strategy)


# d_i inputs (with the bias), d_o outputs and P = d_i d_o parameters of a layer, D of all, R = N T rows, V vectors v_k
ROWS = (
    Row(name="Exact", make=approximations.Exact, memory="a graph", time="one pass a product"),
    Row(name="Dense", make=approximations.Dense, memory="D^2", time="D products"),
    Row(name="BlockDiagonal", make=approximations.BlockDiagonal, memory="sum P^2", time="V N P^2"),
    Row(
        name="BlockDiagonal(partition=ByParameter())",
        make=lambda matrix: approximations.BlockDiagonal(matrix, partition=approximations.ByParameter()),
        memory="sum over tensors of size^2",
        time="V N P^2",
    ),
    Row(
        name="BlockDiagonal(partition=ByOutputUnit())",
        make=lambda matrix: approximations.BlockDiagonal(matrix, partition=approximations.ByOutputUnit()),
        memory="sum d_o d_i^2",
        time="V N d_o d_i^2",
    ),
    Row(name="KFAC", make=approximations.KFAC, memory="sum d_i^2 + d_o^2", time="R d_i^2 + V R d_o^2"),
    Row(
        name="KFAC(weight_sharing=Reduce())",
        make=_sharing(approximations.Reduce()),
        memory="the same",
        time="N d_i^2 + V N d_o^2",
    ),
    Row(
        name="KFAC(weight_sharing=LinearGaussian())",
        make=_sharing(approximations.LinearGaussian()),
        memory="sum 2 d_i^2 + 2 d_o^2",
        time="twice KFAC's",
    ),
    Row(
        name="KFAC(weight_sharing=LinearGaussian(GeneralTransition()))",
        make=_sharing(approximations.LinearGaussian(approximations.GeneralTransition())),
        memory="the same",
        time="the same",
    ),
    Row(name="EKFAC", make=approximations.EKFAC, memory="KFAC's and D", time="twice KFAC's, and V R P (T > 1)"),
    Row(
        name="TridiagonalKFAC",
        make=approximations.TridiagonalKFAC,
        memory="KFAC's and its products of neighbours",
        time="twice KFAC's",
    ),
    Row(name="KFRA", make=approximations.KFRA, memory="KFAC's", time="R d_i^2 + C N d_o^2"),
    Row(name="Diagonal", make=approximations.Diagonal, memory="D", time="V N P (T = 1), V R P (T > 1)"),
    Row(
        name="HutchinsonDiagonal",
        make=approximations.HutchinsonDiagonal,
        memory="D",
        time="a product for each probe",
        own_draws=True,
    ),
    Row(name="RootDiagonal", make=approximations.RootDiagonal, memory="D", time="Diagonal's"),
    Row(name="LowRank", make=approximations.LowRank, memory="D N V", time="V N D", own_draws=True),
    Row(
        name="LowRank(method=Nystrom(rank=5))",
        make=lambda matrix: approximations.LowRank(matrix, method=approximations.Nystrom(rank=5)),
        memory="D r",
        time="r products, D r^2",
        own_draws=True,
    ),
    Row(name="Identity", make=lambda matrix: approximations.Identity(), memory="0", time="0"),
)


class Steps(nn.Module):
    """The outputs of a recurrent layer at every step."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, T H)."""
        return self.layer(x)[0].flatten(1)


class Attending(nn.Module):
    """Self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(2, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, T E)."""
        return self.layer(x, x, x)[0].flatten(1)


def _flat(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules, nn.Flatten())


LAYERS: Mapping[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "Linear chain": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)),
        lambda: torch.randn(8, 3),
    ),
    "Linear on steps": (lambda: _flat(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)), lambda: torch.randn(8, 3, 2)),
    "Conv2d": (lambda: _flat(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Conv2d(2, 1, 2)), lambda: torch.randn(8, 1, 3, 3)),
    "LayerNorm": (lambda: _flat(nn.Linear(3, 3), nn.LayerNorm(3), nn.Tanh()), lambda: torch.randn(8, 3)),
    "Embedding": (
        lambda: nn.Sequential(nn.Embedding(4, 2), nn.Flatten(), nn.Linear(4, 2)),
        lambda: torch.randint(4, (8, 2)),
    ),
    "RNN": (lambda: Steps(nn.RNN(2, 2, batch_first=True)), lambda: torch.randn(8, 3, 2)),
    "LSTM": (lambda: Steps(nn.LSTM(2, 2, batch_first=True)), lambda: torch.randn(8, 3, 2)),
    "MultiheadAttention": (Attending, lambda: torch.randn(8, 2, 2)),
    "no rule (PReLU)": (lambda: nn.Sequential(nn.Linear(3, 2), nn.PReLU()), lambda: torch.randn(8, 3)),
}


def cell(row: Row, matrix: object, layer: str) -> str:
    """Return what the approximation is of this matrix for this layer."""
    torch.manual_seed(0)
    make, data = LAYERS[layer]
    model, x = make().double(), data()
    x = x.double() if x.is_floating_point() else x
    objective = Objective(model, nn.MSELoss())
    evaluation = objective.at((x, torch.randn(model(x).shape, dtype=torch.float64)))
    draws = [torch.Generator().manual_seed(1) for _ in range(2)]
    try:
        estimate = row.make(matrix).estimate(evaluation, draws[0])
    except _REFUSALS:
        return "refused"
    C = estimate.to_dense()
    if row.own_draws and matrix.draws:
        return "other draws"
    exact = approximations.Dense(matrix).estimate(evaluation, draws[1]).to_dense()
    if _error(C, exact) < _EXACT:
        return "exact"
    if torch.equal(C, torch.eye(len(C)).double()):
        return "-"
    if _error(C.diagonal(), exact.diagonal()) < _EXACT and not bool((C - torch.diag(C.diagonal())).any()):
        return "exact diagonal"
    places = [layer.coordinates for layer in evaluation.layers]
    if all(_error(C[p][:, p], exact[p][:, p]) < _EXACT for p in places):
        return "exact blocks"
    inside = C != 0
    if _error(C, torch.where(inside, exact, 0.0)) < _EXACT:
        return "exact blocks"
    return f"{max(_error(C, exact), 0.01):.2f}"


def _error(C: Tensor, exact: Tensor) -> float:
    return float((C - exact).norm() / exact.norm())


def tables() -> str:
    """Return one table a matrix, without figures that depend on the machine."""
    parts = []
    for name, matrix in MATRICES.items():
        head = [f"| {name} | {' | '.join(LAYERS)} |", f"|---|{'---|' * len(LAYERS)}"]
        rows = [f"| `{row.name}` | {' | '.join(cell(row, matrix, layer) for layer in LAYERS)} |" for row in ROWS]
        parts.append("\n".join([*head, *rows]))
    return "\n\n".join(parts)


def measured() -> str:
    """Return memory and time of each approximation of the GGN's Fisher estimate on one network."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    batch = torch.randn(500, 64), torch.randint(10, (500,))
    objective = Objective(model, nn.CrossEntropyLoss())
    unit = _seconds(lambda: objective.at(batch).gradient())
    rows = []
    for row in ROWS:
        evaluation = objective.at(batch)
        operator = row.make(Fisher()).estimate(evaluation)
        seconds = _seconds(lambda row=row, e=evaluation: row.make(Fisher()).estimate(e))
        rows.append(f"| `{row.name}` | {row.memory} | {_numbers(operator):,} | {row.time} | {seconds / unit:.1f} |")
    size = objective.layout.size
    head = [
        f"| approximation | numbers | measured, D = {size:,} | operations | gradients |",
        "|---|---|---:|---|---:|",
    ]
    return "\n".join([*head, *rows])


def _numbers(operator: object) -> int:
    """Return how many numbers the tensors of an operator's state hold."""
    try:
        return _count(operator.state_dict())  # type: ignore[attr-defined]
    except RuntimeError:
        return 0


def _count(value: object) -> int:
    if isinstance(value, Tensor):
        return value.numel() if value.is_floating_point() else 0
    if isinstance(value, Mapping):
        return sum(map(_count, value.values()))
    return sum(map(_count, value)) if isinstance(value, (tuple, list)) else 0


def _seconds(function: Callable[[], object]) -> float:
    function()
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        function()
        best = min(best, time.process_time() - start)
    return best


TEXT = """# What is exact, what is approximate, what is refused

Made by `python docs/coverage.py`: every cell is tried on eight examples in float64, squared error, with the dense
matrix from exact products beside it. "exact" is the whole matrix; "exact blocks" and "exact diagonal" are exact where
the approximation keeps entries; a number is the relative error in the Frobenius norm, of the whole matrix, 0.01 at
least; "refused" is an error that says why. One draw of labels for `Fisher`, the same
for both sides ("other draws" where an approximation draws in another order). Errors of approximations depend on
network and data: on these small ones they say that a cell is not exact, not how good it is.

{tables}

## Memory and time

d_i inputs (with the one of the bias), d_o outputs and P = d_i d_o parameters of a layer, D of all layers, N examples,
R = N T rows of all positions, V output-space vectors (1 for `Fisher(samples=1)`, the outputs of one example for
`GGN`), r a rank. Measured with `Fisher(samples=1)` on a 64-32-10 network and 500 examples, processor time of one
estimate in gradients; `Exact` holds a graph.

{measured}
"""


if __name__ == "__main__":
    torch.set_num_threads(1)
    TARGET.write_text(TEXT.format(tables=tables(), measured=measured()))
