"""Preconditioned conjugate gradients for (C + damping I) x = b, several right-hand sides at once.

Symbols, for each of the K columns:
    A = C + damping I     (D, D)   the matrix, symmetric positive definite
    P                     (D, D)   the preconditioner, an approximation of A^-1
    b, x                  (D, K)   right-hand sides and iterates
    r = A x - b           (D, K)   residuals, the gradient of phi
    p, q = A p            (D, K)   search directions and their products
    phi(x) = 1/2 x^T A x - b^T x = 1/2 x^T (r - b)   (K,) the quadratic that the iterates minimise
    i                     the number of the iteration
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from curvlib.operators.base import LinearOperator
from curvlib.operators.precision import full_precision
from curvlib.solvers.damping_scale import checked_damping
from curvlib.solvers.solution import (
    IterateGrid,
    LimitAction,
    Progress,
    ResidualTest,
    Solution,
    Status,
    StoppingRule,
    WarnAtLimit,
)

_RUNNING = -1  # beside the values of Status

# The recurrence and the true residual part by about eps |A| |x|: what falls below a tenth of it is no information.
_NOISE_OF_RECURRENCE = 0.1
# A true residual within ten times that size is what backward stability gives; a larger one is worth a restart.
_BACKWARD_STABLE = 10.0
_MOST_RESTARTS = 3
# A relative residual at the rounding floor that leaves fewer than two digits of b is no solution.
_LEAST_USEFUL = 1e-2


@dataclass(frozen=True, kw_only=True, eq=False)
class CG:
    r"""Preconditioned conjugate gradients: ``CG(max_iterations=50)(C, damping) @ b`` is (C + damping I)^-1 b.

    .. math:: x \leftarrow x + \alpha p, \quad r \leftarrow r + \alpha q, \quad \alpha = r^T P r / p^T q, \quad
        p \leftarrow -P r + \beta p

    Hestenes & Stiefel (1952); Nocedal & Wright, "Numerical Optimization", algorithm 5.3. Departures: b is scaled to
    size 1, so that float32 does not underflow; the true residual is computed once at the end, and where it does not
    follow the recurrence the solve goes on from there; p^T A p <= 0 ends it with the iterate before; a recurrence
    that has sunk below the rounding errors of A x is not continued.

    Args:
        max_iterations: the limit.
        stop: the stopping rule, :class:`ResidualTest` or :class:`ProgressTest`.
        preconditioner: a positive definite operator that approximates (C + damping I)^-1, applied with ``@``.
        store: which iterates to keep in :attr:`Solution.iterates`; None keeps none.
        check_every: iterations between two looks of the host at the device. In between nothing is synchronised, and
            finished columns are frozen on the device, so that the result is the same for every value; up to
            ``check_every - 1`` products are wasted at the end.
        on_limit: what ``@`` does at the limit: :class:`WarnAtLimit` or :class:`RaiseAtLimit`.

    Example:
        >>> from curvlib.operators import Diagonal
        >>> inverse = CG(max_iterations=50)(Diagonal(torch.tensor([3.0, 3.0])), 1.0)
        >>> inverse @ torch.tensor([4.0, 8.0])
        tensor([1., 2.])
        >>> print(inverse.solve(torch.zeros(2)))
        conjugate gradients converged after 0 iterations with relative residual 0.0e+00 (asked 1e-06)
    """

    max_iterations: int = 250
    stop: StoppingRule = field(default_factory=ResidualTest)
    preconditioner: LinearOperator | None = None
    store: IterateGrid | None = None
    check_every: int = 5
    on_limit: LimitAction = field(default_factory=WarnAtLimit)

    def __post_init__(self) -> None:
        for name, value in (("max_iterations", self.max_iterations), ("check_every", self.check_every)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"CG({name}=...) must be an integer >= 1, got {value!r}.")
        for name, kind in (("preconditioner", LinearOperator), ("store", IterateGrid), ("on_limit", LimitAction)):
            value = getattr(self, name)
            if not (isinstance(value, kind) or (value is None and name != "on_limit")):
                raise TypeError(f"CG({name}=...) must be of type {kind.__name__}, got {value!r}.")
        if not isinstance(self.stop, StoppingRule):
            raise TypeError(
                f"CG(stop=...) must be a stopping rule, got {self.stop!r}: "
                "for a tolerance use ResidualTest(relative=...)."
            )

    def __call__(self, operator: LinearOperator, damping: float) -> CGInverse:
        """Return the operator that solves (C + damping I) x = b anew at each product.

        Raises:
            ValueError: damping is negative, NaN or infinite, or the preconditioner has another size than C.
        """
        return CGInverse(operator=operator, damping=damping, method=self)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CGInverse(LinearOperator):
    """(C + damping I)^-1 by conjugate gradients; made by calling a :class:`CG`.

    ``@`` gives the solution, warns or raises at the limit as :attr:`CG.on_limit` says, and raises ``SolveError`` where
    the system cannot be solved. :meth:`solve` gives the whole outcome and never raises for numerical trouble. As a map
    of b it is linear and symmetric only up to the tolerance.
    """

    operator: LinearOperator
    damping: float
    method: CG

    def __post_init__(self) -> None:
        object.__setattr__(self, "damping", checked_damping(self.damping))
        P = self.method.preconditioner
        if P is not None and (P.size, P.dtype, P.device.type) != (self.size, self.dtype, self.device.type):
            raise ValueError(f"CG(preconditioner=...) must match {self.operator!r}, got {P!r}.")

    @property
    def size(self) -> int:
        """D."""
        return self.operator.size

    @property
    def dtype(self) -> torch.dtype:
        """That of C."""
        return self.operator.dtype

    @property
    def device(self) -> torch.device:
        """That of C."""
        return self.operator.device

    def matmat(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        """Return the solutions for the columns of V.

        Raises:
            SolveError: the matrix or the preconditioner is not positive definite, or something is not finite; also at
                the limit under :class:`RaiseAtLimit`.
        """
        solution = self.solve(V)
        if solution.status is Status.ITERATION_LIMIT:
            self.method.on_limit.act(solution)
        else:
            solution.raise_if_failed()
        return solution.x

    def solve(self, b: Float[Tensor, " D *K"], x0: Float[Tensor, " D *K"] | None = None) -> Solution:
        """Return the outcome for the right-hand side b, whatever it is.

        Args:
            b: right-hand side (D,), or one a column (D, K).
            x0: where to start, in the shape of b; zero by default.

        Raises:
            TypeError, ValueError: shape, dtype or device of b or x0 do not match.
        """
        self._check_vector(b)
        if x0 is not None:
            self._check_vector(x0)
            if x0.shape != b.shape:
                raise ValueError(f"solve(b, x0) needs x0 in the shape of b, {tuple(b.shape)}, got {tuple(x0.shape)}.")
        start = None if x0 is None else x0.detach().reshape(self.size, -1)
        with full_precision(b.device):
            return _Recurrence(self, b.detach().reshape(self.size, -1), start).run().outcome(b)


class _Recurrence:
    """The tensors of one solve. All decisions on columns are masks on the device; ``run`` alone looks at them."""

    p: Float[Tensor, "D K"]
    rho: Float[Tensor, " K"]  # r^T P r

    def __init__(self, inverse: CGInverse, b: Float[Tensor, "D K"], x0: Float[Tensor, "D K"] | None) -> None:
        self.method, self.operator, self.damping = inverse.method, inverse.operator, inverse.damping
        largest = b.abs().amax(0)
        # A power of two, so that scaling rounds nothing.
        scale = largest.clamp(min=torch.finfo(b.dtype).tiny).log2().floor().exp2()
        self.scale = torch.where((largest > 0) & largest.isfinite(), scale, 1.0)
        self.b = b / self.scale
        self.rhs_norm = _norm(self.b) * self.scale
        self.is_zero = largest == 0
        self.products = 0
        self.iteration = 0
        self.values: list[Float[Tensor, " K"]] = []
        self.stored: list[tuple[int, Float[Tensor, "D K"]]] = []
        self.status: Int[Tensor, " K"] = torch.full_like(largest, _RUNNING, dtype=torch.long)
        self.iterations: Int[Tensor, " K"] = torch.zeros_like(self.status)
        self.operator_norm = torch.zeros_like(largest)  # the largest |A p| / |p| so far, from below
        self.x = torch.zeros_like(b)
        self.r = -self.b
        if x0 is not None:
            usable = x0.isfinite().all(0) & ~self.is_zero
            self.x = torch.where(usable, x0 / self.scale, 0.0)
            self.r = self._true_residual()
        self.values.append(self._phi(self.r))
        self._test(self._running)
        self._new_directions()

    def run(self) -> _Recurrence:
        """Iterate until no column runs and the true residuals have been judged."""
        limit = self.method.max_iterations
        numbers = self.method.store.numbers(limit) if self.method.store is not None else frozenset()
        for restarts_left in reversed(range(_MOST_RESTARTS + 1)):
            while self.iteration < limit:
                # The only synchronisation inside the loop.
                if self.iteration % self.method.check_every == 0 and not bool(self._running.any()):
                    break
                self._step()
                if self.iteration in numbers:
                    self.stored.append((self.iteration, self.x))
            # Iterations after the last column had stopped changed nothing: forget them.
            self.iteration = int(self.iterations.max()) if len(self.iterations) else 0
            del self.values[self.iteration + 1 :]
            self.stored = [(i, x) for i, x in self.stored if i <= self.iteration]
            again = self._judge()
            if restarts_left == 0 or self.iteration >= limit or not bool(again.any()):
                break
            self.status = torch.where(again, _RUNNING, self.status)
            self._new_directions()
        return self

    @property
    def _running(self) -> Bool[Tensor, " K"]:
        return self.status == _RUNNING

    def _step(self) -> None:
        """Make one iteration in the columns that run: the loop of Nocedal & Wright, algorithm 5.3."""
        self.iteration += 1
        p = torch.where(self._running, self.p, 0.0)
        q = self._apply(p)
        curvature = _dot(p, q)
        alpha = self.rho / curvature
        x, r = self.x + alpha * p, self.r + alpha * q
        # A product that overflows or holds NaN shows in these three scalars, and x stays the last finite iterate.
        finite = curvature.isfinite() & x.abs().amax(0).isfinite() & r.abs().amax(0).isfinite()
        advance = self._running & (curvature > 0) & finite
        self._end(self._running & (curvature <= 0) & curvature.isfinite(), Status.NEGATIVE_CURVATURE)
        self._end(self._running & ~advance, Status.NOT_FINITE)
        self.x, self.r = torch.where(advance, x, self.x), torch.where(advance, r, self.r)
        self.iterations = torch.where(advance, self.iteration, self.iterations)
        self.operator_norm = torch.where(advance, self.operator_norm.maximum(_norm(q) / _norm(p)), self.operator_norm)
        self.values.append(self._phi(self.r))
        self._test(advance)
        y, rho = self._preconditioned()
        self.p, self.rho = (rho / self.rho) * p - y, rho

    def _test(self, columns: Bool[Tensor, " K"]) -> None:
        """End the columns that are good enough, below the rounding errors, or not finite."""
        norm = _norm(self.r)
        progress = Progress(
            iteration=self.iteration, residual_norm=norm * self.scale, rhs_norm=self.rhs_norm, values=self.values
        )
        # At least 0, so that an exact solution ends here under any rule.
        noise = _NOISE_OF_RECURRENCE * torch.finfo(norm.dtype).eps * self.operator_norm * _norm(self.x)
        self._end(columns & ~norm.isfinite(), Status.NOT_FINITE)
        self._end(columns & self.method.stop.satisfied(progress), Status.CONVERGED)
        self._end(columns & (norm <= noise) & noise.isfinite(), Status.ROUNDING_FLOOR)

    def _new_directions(self) -> None:
        """Start, or start again, along the preconditioned gradient."""
        y, self.rho = self._preconditioned()
        self.p = -y

    def _preconditioned(self) -> tuple[Float[Tensor, "D K"], Float[Tensor, " K"]]:
        """Return y = P r and r^T y, and end the columns where that is not positive."""
        P = self.method.preconditioner
        y = self.r if P is None else P @ torch.where(self._running, self.r, 0.0)
        rho = _dot(self.r, y)
        self._end(~rho.isfinite(), Status.NOT_FINITE)
        self._end(rho <= 0, Status.BREAKDOWN)
        return y, rho

    def _judge(self) -> Bool[Tensor, " K"]:
        """Hold the finished columns against their true residuals, and return those worth a restart from there."""
        if self.iterations.any():
            self.r = self._true_residual()
        finished = (self.status == Status.CONVERGED.value) | (self.status == Status.ROUNDING_FLOOR.value)
        norm = _norm(self.r)
        error = torch.finfo(norm.dtype).eps * (self.operator_norm * _norm(self.x) + _norm(self.b))
        bound = _BACKWARD_STABLE * error * self.scale
        target = self.method.stop.residual_target(self.rhs_norm)
        excess = norm * self.scale - target
        self._end(self._running, Status.ITERATION_LIMIT)
        judged = torch.full_like(self.status, Status.BREAKDOWN.value)
        judged = torch.where(excess <= bound, Status.ILL_CONDITIONED.value, judged)
        # |A| |x| may exceed |b| by any factor, and then backward stability says nothing about this system.
        useful = norm * self.scale <= _LEAST_USEFUL * self.rhs_norm
        judged = torch.where((excess <= bound) & useful, Status.ROUNDING_FLOOR.value, judged)
        judged = torch.where(excess <= bound.minimum(target), Status.CONVERGED.value, judged)
        judged = torch.where(norm.isfinite(), judged, Status.NOT_FINITE.value)
        self.status = torch.where(finished, judged, self.status)
        return finished & (judged == Status.BREAKDOWN.value)

    def outcome(self, b: Float[Tensor, " D *K"]) -> Solution:
        """Return the value, in the units and the shape of b."""
        columns = b.shape[1:]
        relative = torch.where(self.is_zero, 0.0, _norm(self.r) * self.scale / self.rhs_norm)
        phi = torch.where(self.is_zero, 0.0, self._phi(self.r) * self.scale.square())
        kept = [(i, x) for i, x in self.stored if i < self.iteration]
        if self.method.store is not None:
            kept.append((self.iteration, self.x))
        return Solution(
            x=(self.x * self.scale).reshape(b.shape),
            statuses=tuple(Status(value) for value in self.status.tolist()),
            column_iterations=tuple(self.iterations.tolist()),
            residual_norm=relative.reshape(columns),
            model_value=phi.reshape(columns),
            products=self.products,
            iterates=tuple((i, (x * self.scale).reshape(b.shape)) for i, x in kept),
            asked=str(self.method.stop),
            limit=self.method.max_iterations,
        )

    def _end(self, columns: Bool[Tensor, " K"], status: Status) -> None:
        """Give the columns that still run a final status."""
        self.status = torch.where(columns & self._running, status.value, self.status)

    def _apply(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        self.products += 1
        return (self.operator @ V).detach().add(V, alpha=self.damping)

    def _true_residual(self) -> Float[Tensor, "D K"]:
        return self._apply(self.x) - self.b

    def _phi(self, r: Float[Tensor, "D K"]) -> Float[Tensor, " K"]:
        return 0.5 * _dot(self.x, r - self.b)


def _dot(u: Float[Tensor, "D K"], v: Float[Tensor, "D K"]) -> Float[Tensor, " K"]:
    return (u * v).sum(0)


def _norm(v: Float[Tensor, "D K"]) -> Float[Tensor, " K"]:
    return torch.linalg.vector_norm(v, dim=0)
