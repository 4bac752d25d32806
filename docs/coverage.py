"""Which approximation is exact, approximate or refused, for which curvature matrix and layer: by trying all of them.

``python docs/coverage.py`` writes ``docs/coverage.md``.
Every cell compares the estimate with a dense matrix by plain automatic differentiation, on eight examples in float64.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from coverage_rows import ROWS, Row, Sizes
from torch import Tensor, nn

import curvlib
from curvlib import GGN, EmpiricalFisher, Fisher, Hessian, Objective
from curvlib.approximations import ByParameter

TARGET = Path(__file__).with_name("coverage.md")
# Rounding of float64 sums and of products of roots.
_EXACT = 1e-8
_REFUSALS = (TypeError, ValueError, NotImplementedError, curvlib.UnsupportedLayerError, curvlib.LinearizationError)

MATRICES = {"GGN": GGN(), "Fisher(samples=1)": Fisher(), "EmpiricalFisher": EmpiricalFisher(), "Hessian": Hessian()}


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


class Tied(nn.Module):
    """Logits by the weight of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(4, 2), nn.Linear(2, 2), nn.Linear(2, 4, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, T 4)."""
        return self.head(torch.tanh(self.layer(self.embedding(x)))).flatten(1)


class Twice(nn.Module):
    """One layer used twice, with a function between the two."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer of tanh of the layer."""
        return self.layer(torch.tanh(self.layer(x)))


def _flat(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules, nn.Flatten())


def _normalised(norm: nn.Module) -> nn.Module:
    return _flat(nn.Conv2d(1, 2, 2), norm, nn.Tanh()).eval()


def _images() -> Tensor:
    return torch.randn(8, 1, 3, 3)


def _steps() -> Tensor:
    return torch.randn(8, 3, 2)


LAYERS: Mapping[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "Linear chain": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)),
        lambda: torch.randn(8, 3),
    ),
    "Linear on steps": (lambda: _flat(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)), _steps),
    "Linear used twice": (lambda: Twice(nn.Linear(3, 3)), lambda: torch.randn(8, 3)),
    "Conv2d": (lambda: _flat(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Conv2d(2, 1, 2)), _images),
    "Conv2d, groups": (lambda: _flat(nn.Conv2d(2, 4, 2, groups=2), nn.Tanh()), lambda: torch.randn(8, 2, 3, 3)),
    "ConvTranspose2d": (lambda: _flat(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.ConvTranspose2d(2, 1, 2)), _images),
    "LayerNorm": (lambda: _flat(nn.Linear(3, 3), nn.LayerNorm(3), nn.Tanh()), lambda: torch.randn(8, 3)),
    "BatchNorm2d (eval)": (lambda: _normalised(nn.BatchNorm2d(2)), _images),
    "GroupNorm": (lambda: _normalised(nn.GroupNorm(1, 2)), _images),
    "InstanceNorm2d": (lambda: _normalised(nn.InstanceNorm2d(2, affine=True)), _images),
    "Embedding": (
        lambda: nn.Sequential(nn.Embedding(4, 2), nn.Flatten(), nn.Linear(4, 2)),
        lambda: torch.randint(4, (8, 2)),
    ),
    "tied Embedding": (Tied, lambda: torch.randint(4, (8, 2))),
    "EmbeddingBag": (
        lambda: nn.Sequential(nn.EmbeddingBag(4, 2), nn.Tanh(), nn.Linear(2, 2)),
        lambda: torch.randint(4, (8, 2)),
    ),
    "RNN": (lambda: Steps(nn.RNN(2, 2, batch_first=True)), _steps),
    "LSTM": (lambda: Steps(nn.LSTM(2, 2, batch_first=True)), _steps),
    "GRU": (lambda: Steps(nn.GRU(2, 2, batch_first=True)), _steps),
    "MultiheadAttention": (Attending, lambda: torch.randn(8, 2, 2)),
    "no rule (PReLU)": (lambda: nn.Sequential(nn.Linear(3, 2), nn.PReLU()), lambda: torch.randn(8, 3)),
}


@cache
def _evaluation(layer: str) -> curvlib.Evaluation:
    torch.manual_seed(0)
    make, data = LAYERS[layer]
    model, x = make().double(), data()
    x = x.double() if x.is_floating_point() else x
    return Objective(model, nn.MSELoss()).at((x, torch.randn(model(x).shape, dtype=torch.float64)))


@cache
def _dense(matrix: object, layer: str) -> Tensor:
    """Return the matrix of the squared error (1 / (N C)) sum (z - y)^2 by automatic differentiation, row by row."""
    evaluation = _evaluation(layer)
    parameters = evaluation.objective.parameters
    z, y = evaluation.forward_again(), evaluation.targets

    def row(value: Tensor, **options: bool) -> Tensor:
        parts = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, **options)
        filled = [torch.zeros_like(p) if part is None else part for p, part in zip(parameters, parts, strict=True)]
        return torch.cat([part.flatten() for part in filled])

    if isinstance(matrix, Hessian):
        gradient = row((z - y).square().mean(), create_graph=True)
        return torch.stack([row(entry) for entry in gradient])
    J = torch.stack([row(value) for value in z.flatten()]).view(len(z), -1, evaluation.layout.size)
    if isinstance(matrix, GGN):
        return 2 / z.numel() * torch.einsum("noi,noj->ij", J, J)
    if isinstance(matrix, EmpiricalFisher):
        vectors = [2 * (z - y).detach() / z.numel() ** 0.5]
    else:
        vectors = list(matrix.vectors(evaluation, torch.Generator().manual_seed(1)))
    rows = torch.cat([torch.einsum("no,noi->ni", vector.flatten(1), J) for vector in vectors])
    return rows.T @ rows


def _kept(partition: object, layer: str) -> Tensor:
    """Return which entries the blocks of a partition have; a parameter outside every layer is a block of its own."""
    evaluation = _evaluation(layer)
    layout, numbers = evaluation.layout, torch.empty(evaluation.layout.size, dtype=torch.long)
    for number, name in enumerate(layout.names):
        numbers[layout.slices[name]] = -1 - number
    if not isinstance(partition, ByParameter):
        count = 0
        for one in evaluation.layers:
            blocks = one.coordinates.view(partition.blocks_of(one), -1)
            numbers[blocks] = torch.arange(count, count + len(blocks)).unsqueeze(1)
            count += len(blocks)
    return numbers.unsqueeze(1) == numbers


def cell(row: Row, matrix: object, layer: str) -> str:
    """Return what the approximation is of this matrix for this layer."""
    try:
        C = row.make(matrix).estimate(_evaluation(layer), torch.Generator().manual_seed(1)).to_dense()
    except _REFUSALS:
        return "refused"
    if row.own_matrix:
        return "-"
    if row.own_draws and matrix.draws:
        kind = "exact" if cell(row, GGN(), layer) == "exact" else "approximate"
        return f"{kind}, other draws"
    return judged(C, _dense(matrix, layer), _kept(row.partition, layer))


def judged(C: Tensor, exact: Tensor, kept: Tensor) -> str:
    """Return in words how a matrix differs from the exact one, of whose entries it has to keep some."""
    if _error(C, exact) < _EXACT:
        return "exact"
    if _error(C, torch.diag(exact.diagonal())) < _EXACT:
        return "exact diagonal"
    if _error(C, torch.where(kept, exact, 0.0)) < _EXACT:
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


def chain(widths: tuple[int, ...], examples: int) -> tuple[Objective, object, Sizes]:
    """Return a classifier of linear layers and tanh, a batch, and their sizes."""
    torch.manual_seed(0)
    layers = [module for pair in pairwise(widths) for module in (nn.Linear(*pair), nn.Tanh())]
    batch = torch.randn(examples, widths[0]), torch.randint(widths[-1], (examples,))
    objective = Objective(nn.Sequential(*layers[:-1]), nn.CrossEntropyLoss())
    return objective, batch, Sizes.of(widths, examples)


def memory(row: Row, objective: Objective, batch: object) -> int | None:
    """Return the bytes of the numbers that an estimate holds, None where the row is refused."""
    try:
        operator = row.make(Fisher()).estimate(objective.at(batch))
    except _REFUSALS:
        return None
    try:
        return _bytes(operator.state_dict())
    except RuntimeError:  # it holds a graph
        return 0


def _bytes(value: object) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size() if value.is_floating_point() else 0
    if isinstance(value, Mapping):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, (tuple, list)) else 0


MEASURED = ((64, 32, 10), 500)


def measured() -> str:
    """Return memory and time of each approximation of the Fisher estimate on one network."""
    objective, batch, sizes = chain(*MEASURED)
    unit = _seconds(lambda: objective.at(batch).gradient())
    rows = []
    for row in ROWS:
        came = memory(row, objective, batch)
        if came is None:
            rows.append(f"| `{row.name}` | {row.memory} | - | - | {row.time} | - |")
            continue
        evaluation = objective.at(batch)
        seconds = _seconds(lambda row=row, e=evaluation: row.make(Fisher()).estimate(e))
        formula = 4 * row.numbers(sizes)
        rows.append(f"| `{row.name}` | {row.memory} | {formula:,} | {came:,} | {row.time} | {seconds / unit:.1f} |")
    head = [
        f"| approximation | numbers | bytes by this, D = {sizes.D:,} | bytes measured | operations | gradients |",
        "|---|---|---:|---:|---|---:|",
    ]
    return "\n".join([*head, *rows])


def _seconds(function: Callable[[], object]) -> float:
    function()
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        function()
        best = min(best, time.process_time() - start)
    return best


TEXT = """# What is exact, what is approximate, what is refused

Made by `python docs/coverage.py`: every cell is tried on eight examples in float64, squared error, with a dense matrix
by plain automatic differentiation beside it. "exact" is the whole matrix; "exact blocks" and "exact diagonal" are
that matrix inside the blocks of the approximation's own partition (layers, where it has no other), or on its diagonal,
and zero elsewhere; a number is the relative error in the Frobenius norm, of the whole matrix, 0.01 at
least; "refused" is an error that says why; "-" is no approximation of the matrix. One draw of labels for `Fisher`, the
same for both sides, but for "other draws", where an approximation draws in another order and is exact or approximate as
for `GGN`. Errors of approximations depend on network and data: on these small ones they say that a cell is not exact,
not how good it is. Names are shortened: `KFAC` is `KFAC(matrix)`.

{tables}

## Memory and time

d_i inputs (with the one of the bias), d_o outputs and P = d_i d_o parameters of a layer, D of all layers, N examples,
R = N T rows of all positions, V output-space vectors (1 for `Fisher(samples=1)`, the outputs of one example for
`GGN`), r a rank, l = r + 10. With `Fisher(samples=1)` on a 64-32-10 network and 500 examples: bytes by the formula and
of the estimate's tensors, in float32, and the processor time of one estimate in gradients. "-" does not apply to this
network; what holds a graph alone has no numbers.

{measured}
"""


if __name__ == "__main__":
    torch.set_num_threads(1)
    TARGET.write_text(TEXT.format(tables=tables(), measured=measured()))
