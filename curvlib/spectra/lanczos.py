r"""Eigenpairs at the ends of the spectrum from products alone.

Symbols: C (D, D) the operator; V (D, m) an orthonormal basis, kept as rows; H = V^T C V (m, m); W (D, b) what the
products with the last b columns of V leave outside the range of V, so that C V = V H + W E^T with E (m, b) the last b
columns of I; theta, y the eigenpairs of H, which give the Ritz pairs theta, V y.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.operators import LinearOperator, full_precision
from curvlib.solvers import SolveError, Status
from curvlib.spectra.ends import Largest, SpectrumEnd
from curvlib.spectra.probes import Normal, check_count, check_estimation, draw, multiply

# Added at random to each new direction, in eps: where the products give no new one, a random one is taken.
_SEED_IN_EPS = 10.0
# Residuals within this many eps sqrt(D) |C| are rounding errors of the products.
_ROUNDING_IN_EPS = 10.0

_DIAGNOSES = {
    Status.CONVERGED: "converged",
    Status.ROUNDING_FLOOR: "reached the rounding errors of {dtype}; compute in a wider dtype for smaller residuals",
    Status.ITERATION_LIMIT: "stopped at the limit of {limit} restarts; raise max_restarts, basis or tolerance",
    Status.BREAKDOWN: "broke down: the true residuals do not follow the recurrence; check that the operator is "
    "symmetric, linear and free of randomness",
    Status.NOT_FINITE: "met NaN or infinity in the products; check the operator",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Eigenpairs:
    r"""Approximate eigenpairs; ``str(pairs)`` is a diagnosis.

    Attributes:
        values: theta, in decreasing order. Each lies within its residual norm of an eigenvalue of C.
        vectors: orthonormal, one a column.
        residual_norms: \|C v - theta v\| of each pair, from explicit products at the end.
        status: CONVERGED, ROUNDING_FLOOR, ITERATION_LIMIT, BREAKDOWN or NOT_FINITE.
        products: the number of vectors that the operator was multiplied with.
        restarts: how often the basis was compressed.
        limit: the allowed number of restarts.
    """

    values: Float[Tensor, " count"]
    vectors: Float[Tensor, "D count"]
    residual_norms: Float[Tensor, " count"]
    status: Status
    products: int
    restarts: int
    limit: int

    @property
    def solved(self) -> bool:
        """Whether the residuals are as small as was asked, or as the dtype allows."""
        return self.status.solved

    def raise_if_failed(self) -> None:
        """Do nothing where the pairs are good.

        Raises:
            SolveError: they are not; its message is the diagnosis, its ``solution`` this value.
        """
        if not self.solved:
            raise SolveError(str(self), self)

    def __str__(self) -> str:
        ends = f"{float(self.values[0]):.6g} to {float(self.values[-1]):.6g}"
        diagnosis = _DIAGNOSES[self.status].format(dtype=self.values.dtype, limit=self.limit)
        return (
            f"{len(self.values)} eigenvalues from {ends}: Lanczos {diagnosis}; residuals up to "
            f"{float(self.residual_norms.max()):.1e} ({self.products} products, {self.restarts} restarts)"
        )


@dataclass(frozen=True, kw_only=True)
class Lanczos:
    r"""Thick-restart block Lanczos with full reorthogonalisation: ``Lanczos(count=5)(C)`` are :class:`Eigenpairs`.

    Wu & Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems" (2000). Departures: H is formed
    from all inner products, and every new direction gets a random part of some eps, so that a basis that is invariant
    under C, such as that of a multiple of the identity, goes on with a random direction. The host looks at the device
    once a restart.

    Of an eigenvalue with several eigenvectors, as many copies are sure to be found as ``block`` says; further ones
    appear late, and the next eigenvalue may be returned in their place. The same holds for clusters narrower than the
    tolerance, such as the small eigenvalues of a spectrum that decays to 0: there the wanted ones are found to about
    the tolerance alone. Where ``basis`` reaches D, the whole matrix is decomposed instead.

    Args:
        count: how many eigenpairs, at most D.
        which: :class:`Largest`, :class:`Smallest`, :class:`LargestMagnitude` or :class:`BothEnds`.
        block: vectors that are multiplied at once.
        basis: m, the most vectors in the basis, at least count + 2 block; None is 2 count + 20 or more.
        tolerance: a pair has converged with \|C v - theta v\| <= tolerance max\|theta\|. Its eigenvalue is then much
            more accurate: to about the residual's square over the distance to the next eigenvalue.
        max_restarts: the limit; a restart costs about (m - count) / 2 products.

    Example:
        >>> from curvlib.operators import Diagonal
        >>> C = Diagonal(torch.arange(100.0))
        >>> Lanczos(count=2, which=Largest())(C, torch.Generator().manual_seed(0)).values
        tensor([99.0000, 98.0000])
    """

    count: int = 10
    which: SpectrumEnd = field(default_factory=Largest)
    block: int = 1
    basis: int | None = None
    tolerance: float = 1e-5
    max_restarts: int = 200

    def __post_init__(self) -> None:
        check_count("Lanczos", "count", self.count, least=1)
        check_count("Lanczos", "block", self.block, least=1)
        check_count("Lanczos", "max_restarts", self.max_restarts, least=0)
        if self.basis is not None:
            check_count("Lanczos", "basis", self.basis, least=self.count + 2 * self.block)
        if not isinstance(self.which, SpectrumEnd):
            raise TypeError(f"Lanczos(which=...) must be a SpectrumEnd such as Largest(), got {self.which!r}.")
        if not (isinstance(self.tolerance, float) and isfinite(self.tolerance) and self.tolerance > 0.0):
            raise ValueError(f"Lanczos(tolerance=...) must be a finite float > 0, got {self.tolerance!r}.")

    def __call__(self, operator: LinearOperator, generator: torch.Generator | None = None) -> Eigenpairs:
        """Return the eigenpairs.

        Args:
            operator: C, symmetric, of any definiteness.
            generator: source of the random numbers, on the operator's device; None is PyTorch's global one.

        Raises:
            TypeError: the operator or the generator is of another kind.
            ValueError: more than D eigenpairs are asked for, or the generator is on another device.
        """
        check_estimation("Lanczos", operator, generator)
        if self.count > operator.size:
            raise ValueError(f"Lanczos(count={self.count}) asks for more eigenpairs than D = {operator.size}.")
        m = self.basis or max(2 * self.count + 20, self.count + 6 * self.block)
        with full_precision(operator.device):
            run = _Run(self, operator, generator, min(m, operator.size))
            if m >= operator.size:
                run.take_everything()
                return run.result(restarts=0, settled=True)
            for restart in range(self.max_restarts + 1):
                run.fill()
                if run.settled() or restart == self.max_restarts:
                    return run.result(restart, run.settled())
                run.compress()
        raise AssertionError("unreachable")


class _Run:
    """The basis of one call and what is done to it."""

    def __init__(self, method: Lanczos, operator: LinearOperator, generator: torch.Generator | None, m: int) -> None:
        self.method, self.operator, self.generator = method, operator, generator
        self.products = 0
        start = self._random()
        b, dtype = method.block, start.dtype
        self.rows = start.new_zeros(m + b, operator.size)  # V^T: its first rows are contiguous
        self.H = start.new_zeros(m, m)
        self.recurrence = start.new_zeros(())  # the largest wanted residual, as C V = V H + W E^T has it
        self.filled = 0  # columns of V that are in H; b more are ready
        self.W = start
        self.limit = m
        self.eps = torch.finfo(dtype).eps
        self.rows[:b] = torch.linalg.qr(start).Q.T

    def _random(self) -> Float[Tensor, "D b"]:
        return draw(Normal(), self.operator, self.method.block, self.generator) / self.operator.size**0.5

    def fill(self) -> None:
        """Multiply block after block until the basis is full, then take the Ritz values."""
        b = self.method.block
        while self.filled + b <= self.limit:
            end = self.filled + b
            V = self.rows[:end]
            W = multiply(self.operator, V[self.filled :].T)
            self.products += b
            h = V @ W
            self.W = W - V.T @ h
            self.H[:end, self.filled : end] = h
            self.H[self.filled : end, :end] = h.T
            self.filled = end
            self.rows[end : end + b] = self._next(V).T
        self._decompose(self.H[: self.filled, : self.filled])

    def _next(self, V: Float[Tensor, "m D"]) -> Float[Tensor, "D b"]:
        """Return b orthonormal directions outside the basis whose range holds that of W."""
        norms = torch.linalg.vector_norm(self.W, dim=0)
        unit = torch.where(norms > 0.0, self.W / norms, 0.0) + _SEED_IN_EPS * self.eps * self._random()
        # Twice, at length 1: a direction at rounding level is all but inside the basis.
        for _ in range(2):
            unit = torch.linalg.qr(unit - V.T @ (V @ unit)).Q
        return unit

    def _decompose(self, H: Float[Tensor, "m m"]) -> None:
        # NaN would make eigh raise: it is passed on, and the status says so.
        finite = H.isfinite().all()
        H = torch.where(finite, (H + H.T) / 2, torch.eye(len(H), dtype=H.dtype, device=H.device))
        self.theta, Y = torch.linalg.eigh(H)
        self.theta = torch.where(finite, self.theta, torch.nan)
        self.order = self.method.which.order(self.theta)
        self.Y = Y[:, self.order]
        self.scale = self.theta.abs().amax()

    def settled(self) -> bool:
        """Whether every wanted residual is small enough, or not finite: the one look at the device in a restart."""
        b, count = self.method.block, self.method.count
        self.recurrence = torch.linalg.vector_norm(self.W @ self.Y[-b:, :count], dim=0).amax()
        enough = self.recurrence <= max(self.method.tolerance, self.eps) * self.scale
        return bool(enough | ~self.recurrence.isfinite())

    def compress(self) -> None:
        """Keep the most wanted Ritz vectors and the block that continues them."""
        b, count = self.method.block, self.method.count
        keep = min(count + (self.filled - count) // 2, self.filled - b)
        following = self.rows[self.filled : self.filled + b].clone()
        kept = self.Y[:, :keep].T @ self.rows[: self.filled]
        # One Newton step back to orthonormal rows: over hundreds of restarts rounding would add up.
        self.rows[:keep] = 1.5 * kept - 0.5 * (kept @ kept.T) @ kept
        self.rows[keep : keep + b] = following
        self.H.zero_()
        self.H[:keep, :keep] = torch.diag(self.theta[self.order[:keep]])
        self.filled = keep

    def take_everything(self) -> None:
        """Decompose the whole matrix."""
        self.filled = self.operator.size
        self.rows = torch.eye(self.filled, dtype=self.H.dtype, device=self.H.device)
        self._decompose(self.operator.to_dense().to(self.H.dtype))
        self.products += self.filled

    def result(self, restarts: int, settled: bool) -> Eigenpairs:
        """Return the wanted pairs with their true residuals."""
        wanted = self.order[: self.method.count]
        vectors = self.rows[: self.filled].T @ self.Y[:, : self.method.count]
        values, position = self.theta[wanted].sort(descending=True)
        vectors = vectors[:, position]
        residuals = torch.linalg.vector_norm(multiply(self.operator, vectors) - vectors * values, dim=0)
        dtype = self.operator.dtype
        return Eigenpairs(
            values=values.to(dtype),
            vectors=vectors.to(dtype),
            residual_norms=residuals.to(dtype),
            status=self._status(float(residuals.max()), settled),
            products=self.products + len(wanted),
            restarts=restarts,
            limit=self.method.max_restarts,
        )

    def _status(self, residual: float, settled: bool) -> Status:
        scale = float(self.scale)
        if not isfinite(residual):
            return Status.NOT_FINITE
        if residual <= self.method.tolerance * scale:
            return Status.CONVERGED
        own = max(self.eps, torch.finfo(self.operator.dtype).eps)
        rounding = _ROUNDING_IN_EPS * own * self.operator.size**0.5 * scale
        if residual > 2.0 * float(self.recurrence) + rounding:
            return Status.BREAKDOWN
        return Status.ROUNDING_FLOOR if settled else Status.ITERATION_LIMIT
