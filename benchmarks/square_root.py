"""Conjugate gradients on C + damping I beside LSMR on a square root of C = V V^T, at equal numbers of products.

Run as ``python -m benchmarks.square_root``; it prints a table in Markdown.

A Gauss-Newton matrix has a square root V = J^T H^(1/2), and a gradient V y. Then (C + damping I) x = V y is the least
squares problem min_x |V^T x - y|^2 + damping |x|^2, whose methods see the condition of V and not its square. An
iteration of either method is one product with V^T and one with V.
"""

from __future__ import annotations

from dataclasses import dataclass

import click
import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, lsmr
from torch import Tensor

from curvlib.operators import LowRank
from curvlib.solvers import CG, ResidualTest

SMALLEST = (1e-2, 1e-3, 1e-4)
DAMPINGS = (1e2, 1.0, 1e-2)
ITERATIONS = (25, 50, 100, 200, 400, 800)


@dataclass(frozen=True, kw_only=True, eq=False)
class System:
    """(V V^T + damping I) x = V y in float64, with its solution.

    Attributes:
        V: the square root (D, R), with singular values at equal ratios from 1 to the smallest.
        y: (R,), normally distributed.
        damping: added to V V^T.
        x: the solution (D,).
    """

    V: Float[Tensor, "D R"]
    y: Float[Tensor, " R"]
    damping: float
    x: Float[Tensor, " D"]

    @classmethod
    def draw(cls, D: int, R: int, smallest: float, damping: float, generator: torch.Generator) -> System:
        """Return a system with random singular vectors."""
        left, right, y = (
            torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((D, R), (R, R), (R,))
        )
        left, right = torch.linalg.qr(left)[0], torch.linalg.qr(right)[0]
        values = smallest ** torch.linspace(0, 1, R, dtype=torch.float64)
        x = left @ (values / (values.square() + damping) * (right.T @ y))
        return cls(V=left * values @ right.T, y=y, damping=damping, x=x)

    def error(self, x: Tensor) -> float:
        """Return |x - solution| / |solution|."""
        return float(torch.linalg.vector_norm(x.double() - self.x) / torch.linalg.vector_norm(self.x))

    def by_conjugate_gradients(self, iterations: int, dtype: torch.dtype) -> float:
        """Return the error of curvlib's CG after so many iterations, all in one precision."""
        V = self.V.to(dtype)
        C = LowRank(V, V.new_ones(V.shape[1]), V.new_zeros(len(V)))
        tight = ResidualTest(relative=torch.finfo(dtype).tiny)
        method = CG(max_iterations=iterations, stop=tight, reorthogonalize=0)
        return self.error(method(C, self.damping).solve(V @ self.y.to(dtype)).x)

    def by_lsmr(self, iterations: int, dtype: torch.dtype) -> float:
        """Return the error of SciPy's LSMR: products in that precision, all else in float64, as SciPy has it."""
        V = self.V.to(dtype)

        def product(matrix: Tensor, v: NDArray[np.float64]) -> NDArray[np.float64]:
            return (matrix @ torch.as_tensor(v).to(dtype)).double().numpy()

        root = LinearOperator(
            shape=(V.shape[1], V.shape[0]),
            matvec=lambda v: product(V.T, v),
            rmatvec=lambda u: product(V, u),
            dtype=np.float64,
        )
        options = {"damp": self.damping**0.5, "atol": 0.0, "btol": 0.0, "conlim": 0.0, "maxiter": iterations}
        return self.error(torch.as_tensor(lsmr(root, self.y.numpy(), **options)[0]))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--size", default=1500, show_default=True, help="D, the number of unknowns.")
@click.option("--rank", default=400, show_default=True, help="R, the number of columns of V.")
@click.option("--dtype", type=click.Choice(["float32", "float64"]), default="float32", show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(size: int, rank: int, dtype: str, seed: int) -> None:
    """Print the relative error of x after equal numbers of iterations, CG / LSMR."""
    click.echo("| smallest singular value | damping | " + " | ".join(str(k) for k in ITERATIONS) + " |")
    click.echo("|---" * (2 + len(ITERATIONS)) + "|")
    precision = getattr(torch, dtype)
    for smallest in SMALLEST:
        for share in DAMPINGS:
            generator = torch.Generator().manual_seed(seed)
            system = System.draw(size, rank, smallest, share * smallest**2, generator)
            cells = [
                f"{system.by_conjugate_gradients(k, precision):.0e} / {system.by_lsmr(k, precision):.0e}"
                for k in ITERATIONS
            ]
            click.echo(f"| {smallest:.0e} | {system.damping:.0e} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.square_root")
