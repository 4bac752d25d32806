"""What the iterative solvers of (C + damping I) x = b share: options, the operator that they make, and the judgement.

Symbols, for each of the K columns:
    A = C + damping I     (D, D)   the matrix, symmetric
    P                     (D, D)   the preconditioner, positive definite, an approximation of A^-1 (of abs(A)^-1)
    b, x                  (D, K)   right-hand sides and iterates
    r = A x - b           (D, K)   residuals
    phi(x) = 1/2 x^T A x - b^T x = 1/2 x^T (r - b)   (K,)
    i                     the number of the iteration
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

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
from curvlib.solvers.units import Unit, power_of_two

_RUNNING = -1  # beside the values of Status

# The recurrence and the true residual part by about eps |A| |x|: what falls below a tenth of it is no information.
_NOISE_OF_RECURRENCE = 0.1
# A true residual within ten times that size is what backward stability gives; a larger one is worth a restart.
BACKWARD_STABLE = 10.0
_MOST_RESTARTS = 3
# Products that bring an estimate of |A| to at least D^(-1/10) of it from most starts.
_POWER_ITERATIONS = 5
# The true residual may exceed the target that the recurrence has met by so much of it: nobody asked for another digit.
_SLACK = 0.01
# A relative residual at the rounding floor that leaves fewer than two digits of b is no solution.
_LEAST_USEFUL = 1e-2
# On the CPU a look waits for nothing; elsewhere one for every product would keep the device waiting.
_LOOKS_ON_THE_CPU, _LOOKS_ELSEWHERE = 1, 5


@dataclass(frozen=True, kw_only=True, eq=False)
class KrylovMethod(ABC):
    """The options that :class:`CG` and :class:`MINRES` share; both describe them."""

    #: The method in diagnoses.
    title: ClassVar[str]

    max_iterations: int = 250
    stop: StoppingRule = field(default_factory=ResidualTest)
    preconditioner: LinearOperator | None = None
    store: IterateGrid | None = None
    check_every: int | None = None
    on_limit: LimitAction = field(default_factory=WarnAtLimit)

    def __post_init__(self) -> None:
        owner = type(self).__name__
        every = 1 if self.check_every is None else self.check_every
        for name, value in (("max_iterations", self.max_iterations), ("check_every", every)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{owner}({name}=...) must be an integer >= 1, got {value!r}.")
        for name, kind in (("preconditioner", LinearOperator), ("store", IterateGrid), ("on_limit", LimitAction)):
            value = getattr(self, name)
            if not (isinstance(value, kind) or (value is None and name != "on_limit")):
                raise TypeError(f"{owner}({name}=...) must be of type {kind.__name__}, got {value!r}.")
        if not isinstance(self.stop, StoppingRule):
            raise TypeError(
                f"{owner}(stop=...) must be a stopping rule, got {self.stop!r}: "
                "for a tolerance use ResidualTest(relative=...)."
            )

    def looks_every(self, device: torch.device) -> int:
        """Return the iterations between two looks of the host at a device."""
        if self.check_every is not None:
            return self.check_every
        return _LOOKS_ON_THE_CPU if device.type == "cpu" else _LOOKS_ELSEWHERE

    def check(self, size: int) -> None:
        """Refuse a preconditioner that fits no matrix of D = size, before there is one.

        Raises:
            ValueError: it has another size.
        """
        check_size(type(self).__name__, self.preconditioner, size)

    @abstractmethod
    def __call__(self, operator: LinearOperator, damping: float) -> IterativeInverse:
        """Return the operator that solves (C + damping I) x = b anew at each product."""


def check_size(owner: str, preconditioner: LinearOperator | None, size: int) -> None:
    """Raise ValueError for a preconditioner of another size than the parameters."""
    if preconditioner is not None and preconditioner.size != size:
        raise ValueError(
            f"{owner}(preconditioner=...) must be an operator on the D = {size} parameters, got {preconditioner!r}."
        )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class IterativeInverse(LinearOperator):
    """(C + damping I)^-1 by an iterative method.

    ``@`` gives the solution, warns or raises at the limit as ``on_limit`` says, and raises ``SolveError`` where the
    system cannot be solved. :meth:`solve` gives the whole outcome and never raises for numerical trouble. As a map of b
    it is linear and symmetric only up to the tolerance.
    """

    operator: LinearOperator
    damping: float
    method: KrylovMethod

    def __post_init__(self) -> None:
        object.__setattr__(self, "damping", checked_damping(self.damping))
        P = self.method.preconditioner
        if P is not None and (P.size, P.dtype, P.device.type) != (self.size, self.dtype, self.device.type):
            raise ValueError(
                f"{type(self.method).__name__}(preconditioner=...) must match {self.operator!r}, got {P!r}."
            )

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
            SolveError: a column could not be solved, see :class:`Status`; also at the limit under
                :class:`RaiseAtLimit`.
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
            return self._recurrence(b.detach().reshape(self.size, -1), start).run().outcome(b)

    @abstractmethod
    def _recurrence(self, b: Float[Tensor, "D K"], x0: Float[Tensor, "D K"] | None) -> Recurrence:
        """Return the solve, ready to run."""


class Recurrence(ABC):
    """The tensors of one solve. All decisions on columns are masks on the device; ``run`` alone looks at them.

    A method gives :meth:`start` and :meth:`advance`; what is shared is the scaling of b, the limit, stopping, statuses,
    restarts, and the judgement by true residuals.
    """

    def __init__(self, inverse: IterativeInverse, b: Float[Tensor, "D K"], x0: Float[Tensor, "D K"] | None) -> None:
        self.inverse = inverse
        self.method, self.operator, self.damping = inverse.method, inverse.operator, inverse.damping
        # b, A and P are brought to size 1 by powers of two, which round nothing, so that squares neither underflow nor
        # overflow; x is then in units of scale / unit.
        self.scale = power_of_two(b)
        self.unit, self.preconditioner_unit = Unit(self.scale), Unit(self.scale)
        self.b = b / self.scale
        self.rhs_norm = norm_of(self.b) * self.scale
        self.is_zero = (b == 0).all(0)
        self.products = 0
        self.iteration = 0
        self.limit = inverse.method.max_iterations  # less where systems beside this one took their share
        self.values: list[Float[Tensor, " K"]] = []
        self.stored: list[tuple[int, Float[Tensor, "D K"]]] = []
        self.status: Int[Tensor, " K"] = torch.full_like(self.scale, _RUNNING, dtype=torch.long)
        self.iterations: Int[Tensor, " K"] = torch.zeros_like(self.status)
        self.refinements: Int[Tensor, " K"] = torch.zeros_like(self.status)  # iterations in systems beside this one
        self.operator_norm = torch.zeros_like(self.scale)  # the largest |A p| / |p| so far, from below
        self.measured = False  # whether power iterations have raised it
        self.x = torch.zeros_like(b)
        self.r = -self.b
        if x0 is not None:
            finite = x0.isfinite().all(0)
            self.end(~finite, Status.NOT_FINITE)
            x0 = torch.where(finite & ~self.is_zero, x0 / self.scale, 0.0)
            product = self.apply(x0)  # finds the unit of A
            self.x, self.r = x0 * self.unit.value, product * self.unit.value - self.b
        self.values.append(self._phi(self.r))
        self._test(self.running)
        self.start()

    def run(self) -> Recurrence:
        """Iterate until no column runs and the true residuals have been judged."""
        numbers = self.method.store.numbers(self.limit) if self.method.store is not None else frozenset()
        every = self.method.looks_every(self.b.device)
        for restarts_left in reversed(range(_MOST_RESTARTS + 1)):
            while self.iteration < self.limit:
                # The only synchronisation inside the loop.
                if self.iteration % every == 0 and not bool(self.running.any()):
                    break
                self._step()
                if self.iteration in numbers:
                    self.stored.append((self.iteration, self.x))
            # Iterations after the last column had stopped changed nothing: forget them.
            self.iteration = int(self.iterations.max()) if len(self.iterations) else 0
            del self.values[self.iteration + 1 :]
            self.stored = [(i, x) for i, x in self.stored if i <= self.iteration]
            again = self._judge()
            if restarts_left == 0 or self.iteration >= self.limit or not bool(again.any()):
                break
            self.status = torch.where(again, _RUNNING, self.status)
            self.start()
        return self

    @property
    def running(self) -> Bool[Tensor, " K"]:
        """The columns that have no final status yet."""
        return self.status == _RUNNING

    @abstractmethod
    def start(self) -> None:
        """Start, or start again, from x and r."""

    @abstractmethod
    def advance(self) -> Bool[Tensor, " K"]:
        """Make one iteration in the columns that run, in ``x`` and ``r``; return which columns have a new iterate.

        ``iteration`` is the number of this one; columns that cannot go on are ended here.
        """

    def prepare(self) -> None:  # noqa: B027 - most methods have nothing to do
        """Get ready for the next iteration, once the columns that are good enough have been ended."""

    def needs_verification(self) -> bool:
        """Return whether the finished columns are held against their true residuals. Default: yes."""
        return True

    def conclude(self) -> Bool[Tensor, " K"]:
        """Judge what a method has ended with a status of its own, by the true ``r``; return what is worth a restart."""
        return torch.zeros_like(self.running)

    def _step(self) -> None:
        self.iteration += 1
        advanced = self.advance()
        self.iterations = torch.where(advanced, self.iteration, self.iterations)
        self.values.append(self._phi(self.r))
        self._test(advanced)
        self.prepare()

    def _test(self, columns: Bool[Tensor, " K"]) -> None:
        """End the columns that are good enough, below the rounding errors, or not finite."""
        norm = norm_of(self.r)
        progress = Progress(
            iteration=self.iteration, residual_norm=norm * self.scale, rhs_norm=self.rhs_norm, values=self.values
        )
        # At least 0, so that an exact solution ends here under any rule.
        noise = _NOISE_OF_RECURRENCE * torch.finfo(norm.dtype).eps * self.operator_norm * norm_of(self.x)
        self.end(columns & ~norm.isfinite(), Status.NOT_FINITE)
        self.end(columns & self.method.stop.satisfied(progress), Status.CONVERGED)
        self.end(columns & (norm <= noise) & noise.isfinite(), Status.ROUNDING_FLOOR)

    def preconditioned(self, r: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        """Return P r; the columns that have ended may hold anything and are kept from P."""
        return r if self.method.preconditioner is None else self.times_preconditioner(torch.where(self.running, r, 0.0))

    def times_preconditioner(self, r: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        """Return P r."""
        P = self.method.preconditioner
        if P is None:
            return r
        return self.preconditioner_unit.divide((P @ r).detach(), r)

    def _judge(self) -> Bool[Tensor, " K"]:
        """Hold the finished columns against their true residuals, and return those worth a restart from there."""
        if self.iterations.any() and self.needs_verification():
            self.r = self._true_residual()
        again = self.conclude()
        finished = (self.status == Status.CONVERGED.value) | (self.status == Status.ROUNDING_FLOOR.value)
        self.end(self.running, Status.ITERATION_LIMIT)
        judged = self._judged_by_residual()
        if not self.measured and bool((finished & (judged == Status.BREAKDOWN.value)).any()):
            self._measure_operator()
            judged = self._judged_by_residual()
        # Once x is as good as the dtype allows, directions are rounding errors and may well be flat.
        good = (self.status == Status.SINGULAR.value) & (judged <= Status.ROUNDING_FLOOR.value)
        self.status = torch.where(finished | good, judged, self.status)
        return again | (finished & (judged == Status.BREAKDOWN.value))

    def _judged_by_residual(self) -> Int[Tensor, " K"]:
        """Return each column's status by the true residual: a breakdown where rounding does not explain it."""
        norm = norm_of(self.r)
        error = torch.finfo(norm.dtype).eps * (self.operator_norm * norm_of(self.x) + norm_of(self.b))
        bound = BACKWARD_STABLE * error * self.scale
        target = self.method.stop.residual_target(self.rhs_norm)
        excess = norm * self.scale - target
        judged = torch.full_like(self.status, Status.BREAKDOWN.value)
        judged = torch.where(excess <= bound, Status.ILL_CONDITIONED.value, judged)
        # |A| |x| may exceed |b| by any factor, and then backward stability says nothing about this system.
        useful = norm * self.scale <= _LEAST_USEFUL * self.rhs_norm
        judged = torch.where((excess <= bound) & useful, Status.ROUNDING_FLOOR.value, judged)
        judged = torch.where(excess <= bound.minimum(_SLACK * target), Status.CONVERGED.value, judged)
        return torch.where(norm.isfinite(), judged, Status.NOT_FINITE.value)

    def _measure_operator(self) -> None:
        """Raise the estimate of |A|: behind a good preconditioner all directions p are those of small eigenvalues."""
        self.measured = True
        v = self.r
        for _ in range(_POWER_ITERATIONS):
            v = self.apply(v / norm_of(v))
            size = norm_of(v)
            self.operator_norm = torch.where(size.isfinite(), self.operator_norm.maximum(size), self.operator_norm)

    def outcome(self, b: Float[Tensor, " D *K"]) -> Solution:
        """Return the value, in the units and the shape of b."""
        columns, size = b.shape[1:], self.scale / self.unit.value
        # A solution beyond the largest number is none.
        fits = size.isfinite() & (self.x * size).isfinite().all(0)
        size = torch.where(fits, size, 1.0)
        self.status = torch.where(fits, self.status, Status.NOT_FINITE.value)
        self.x, self.r = torch.where(fits, self.x, 0.0), torch.where(fits, self.r, -self.b)
        relative = torch.where(self.is_zero, 0.0, norm_of(self.r) * self.scale / self.rhs_norm)
        phi = torch.where(self.is_zero, 0.0, self._phi(self.r) * size * self.scale)
        kept = [(i, x) for i, x in self.stored if i < self.iteration]
        if self.method.store is not None:
            kept.append((self.iteration, self.x))
        return Solution(
            x=(self.x * size).reshape(b.shape),
            statuses=tuple(Status(value) for value in self.status.tolist()),
            column_iterations=tuple((self.iterations + self.refinements).tolist()),
            residual_norm=relative.reshape(columns),
            model_value=phi.reshape(columns),
            products=self.products,
            iterates=tuple((i, torch.where(fits, x * size, 0.0).reshape(b.shape)) for i, x in kept),
            method=self.method.title,
            asked=str(self.method.stop),
            limit=self.method.max_iterations,
        )

    def end(self, columns: Bool[Tensor, " K"], status: Status) -> None:
        """Give the columns that still run a final status."""
        self.status = torch.where(columns & self.running, status.value, self.status)

    def apply(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        """Return A V."""
        product = (self.operator @ V).detach().add(V, alpha=self.damping)
        self.products += 1
        return self.unit.divide(product, V)

    def _true_residual(self) -> Float[Tensor, "D K"]:
        return self.apply(self.x) - self.b

    def _phi(self, r: Float[Tensor, "D K"]) -> Float[Tensor, " K"]:
        return 0.5 * dot(self.x, r - self.b)


def dot(u: Float[Tensor, "D K"], v: Float[Tensor, "D K"]) -> Float[Tensor, " K"]:
    """Return u^T v of each column."""
    return (u * v).sum(0)


def norm_of(v: Float[Tensor, "D K"]) -> Float[Tensor, " K"]:
    """Return the size of each column."""
    return torch.linalg.vector_norm(v, dim=0)
