"""Conjugate gradients that stop at the boundary of a trust region.

Symbols: A = C + lambda I (D, D), P the preconditioner, g gradient, d (D,) the iterate, r = A d + g, p the search
direction, q = A p, Delta the radius, tau the step length to the boundary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.operators import LinearOperator, full_precision
from curvlib.solvers.cg import CG
from curvlib.solvers.descents.problem import Descent, DescentStep, Subproblem
from curvlib.solvers.descents.region import EuclideanNorm, RegionNorm
from curvlib.solvers.krylov import check_size
from curvlib.solvers.solution import Progress, ResidualTest, Status, StoppingRule
from curvlib.solvers.units import power_of_two

_RUNNING, _BOUNDARY = -1, -2  # beside the values of Status


@dataclass(frozen=True, kw_only=True, eq=False)
class Steihaug(Descent):
    r"""Preconditioned conjugate gradients until the model is minimised, the boundary or negative curvature is met.

    .. math:: |d + \tau p| = \Delta, \; \tau \ge 0 \quad \text{where} \quad p^T A p \le 0 \; \text{or} \;
        |d + \alpha p| \ge \Delta

    Steihaug, "The conjugate gradient method and trust regions in large scale optimization" (1983); Toint (1981);
    Nocedal & Wright, algorithm 7.2. The model falls along the whole path, and never less than to the Cauchy point.
    Departures: without ``region=PreconditionerNorm()``, which is the region of the papers, the ball is Euclidean
    whatever the preconditioner. A preconditioned path, whose |d| need not grow, then ends where it first leaves the
    ball, and a step that is worse than the Cauchy point is replaced by that, at the cost of a quadratic form. At a zero
    gradient the step is 0, also at a saddle.

    Args:
        max_iterations: the limit.
        stop: when the interior minimum is reached well enough; :class:`ResidualTest` with a loose tolerance as a rule.
        preconditioner: a positive definite operator that approximates (C + damping I)^-1.
        check_every: iterations between two looks of the host at the device, as in :class:`CG`.
        region: the norm that the radius bounds: :class:`EuclideanNorm`, or :class:`PreconditionerNorm`, in which the
            answer says its length.

    Example:
        >>> from curvlib.operators import Diagonal
        >>> C = Diagonal(torch.tensor([1.0, -1.0]))
        >>> answer = Steihaug().solve(Subproblem(operator=C, gradient=torch.tensor([0.0, 3.0]), radius=2.0))
        >>> answer.step, answer.on_boundary, answer.status
        (tensor([ 0., -2.]), True, <Status.NEGATIVE_CURVATURE: 6>)
    """

    max_iterations: int = 250
    stop: StoppingRule = field(default_factory=lambda: ResidualTest(relative=1e-3))
    preconditioner: LinearOperator | None = None
    check_every: int | None = None
    region: RegionNorm = field(default_factory=EuclideanNorm)

    def __post_init__(self) -> None:
        self.unconstrained()
        if not isinstance(self.region, RegionNorm):
            raise TypeError(
                "Steihaug(region=...) must be a RegionNorm such as EuclideanNorm() or PreconditionerNorm(), got "
                f"{self.region!r}."
            )

    def unconstrained(self) -> CG:
        """Return conjugate gradients with the same limits and no boundary.

        Raises:
            TypeError, ValueError: a field is none that conjugate gradients can have.
        """
        return CG(
            max_iterations=self.max_iterations,
            stop=self.stop,
            preconditioner=self.preconditioner,
            check_every=self.check_every,
        )

    @property
    def takes_preconditioner(self) -> bool:
        """Whether it has none yet."""
        return self.preconditioner is None

    @property
    def needs_preconditioner(self) -> bool:
        """Whether its region is that of a preconditioner and it has none."""
        return self.region.needs_preconditioner and self.preconditioner is None

    @property
    def euclidean_radius(self) -> bool:
        """Whether its region is no preconditioner's."""
        return not self.region.needs_preconditioner

    def preconditioned(self, preconditioner: LinearOperator) -> Steihaug:
        """Return the same with a preconditioner, in place of its own if it has one."""
        return replace(self, preconditioner=preconditioner)

    def check(self, size: int) -> None:
        """Refuse a preconditioner of another size."""
        check_size("Steihaug", self.preconditioner, size)

    def solve(self, problem: Subproblem) -> DescentStep:
        """Return the step.

        Its status is ``CONVERGED`` for a minimum inside and for a boundary that was reached along positive curvature,
        ``NEGATIVE_CURVATURE``, ``ITERATION_LIMIT`` (the last iterate, inside), ``ROUNDING_FLOOR``, ``BREAKDOWN`` (the
        preconditioner is not positive definite) or ``NOT_FINITE``.

        Raises:
            ValueError: the radius is infinite, or the preconditioner is missing or has another size than C.
        """
        problem.finite_radius("Steihaug")
        if self.needs_preconditioner:
            raise ValueError(
                f"{self.region!r} is the norm of a preconditioner, and this Steihaug has none: give "
                "Steihaug(preconditioner=...) as well, or use EuclideanNorm()."
            )
        self.unconstrained()(problem.operator, problem.damping)  # checks the preconditioner
        with full_precision(problem.gradient.device):
            path = _Path(self, problem)
            path.run()
        if path.status is Status.NOT_FINITE and path.iterations == 0:
            return problem.no_step(path.status)
        answer = problem.answer(
            path.step,
            on_boundary=path.on_boundary,
            multiplier=None if path.on_boundary else 0.0,
            status=path.status,
            iterations=path.iterations,
            length=path.length,
        )
        # In the norm of the preconditioner the first iterate is the Cauchy point.
        compare = self.preconditioner is not None and self.euclidean_radius
        return _better(answer, problem) if compare else answer


class _Path:
    """The iterates of one solve; scalars stay on the device, in float64 against the squares of a far radius."""

    def __init__(self, method: Steihaug, problem: Subproblem) -> None:
        self.method, self.problem, self.A = method, problem, problem.damped
        g = problem.gradient
        self.scale = power_of_two(g.unsqueeze(1)).squeeze()  # the unit of steps too
        self.g = g / self.scale
        self.radius = problem.radius / self.scale.double()
        self.d, self.r = torch.zeros_like(g), self.g
        self.iteration = 0
        self.state = torch.full((), _RUNNING, dtype=torch.long, device=g.device)
        self.count, self.at_boundary = torch.zeros_like(self.state), torch.zeros_like(self.state, dtype=torch.bool)
        self.operator_norm = torch.zeros_like(self.radius)
        self.values = [torch.zeros_like(g[:1])]
        self.p, self.rho = torch.zeros_like(g), torch.ones_like(self.radius)
        self.lengths = method.region.start(g)
        self.tau = torch.zeros_like(self.radius)  # of the last step along p, to the boundary

    def run(self) -> None:
        """Follow the path to its end and fetch it."""
        self._test()
        self._new_direction()
        every = self.method.unconstrained().looks_every(self.g.device)
        while self.iteration < self.method.max_iterations:
            # The only synchronisation inside the loop.
            if self.iteration % every == 0 and int(self.state) != _RUNNING:
                break
            self._advance()
        state, self.iterations, at_boundary = torch.stack([self.state, self.count, self.at_boundary.long()]).tolist()
        named = {_RUNNING: Status.ITERATION_LIMIT, _BOUNDARY: Status.CONVERGED}
        self.status = named[state] if state in named else Status(state)
        self.on_boundary = bool(at_boundary)
        # tau may be beyond the dtype's range in units of a small gradient.
        self.step = self.d * self.scale + (self.tau * self.scale).to(self.p) * self.p
        if not bool(self.step.isfinite().all()):
            self.status, self.on_boundary, self.step = Status.NOT_FINITE, False, self.d * self.scale
        length = self.lengths.of_path()
        self.length = None if length is None else float(length * self.scale.double())

    def _advance(self) -> None:
        self.iteration += 1
        running = self.state == _RUNNING
        p = torch.where(running, self.p, 0.0)
        q = (self.A @ p).detach()
        curvature = _dot(p, q)
        alpha = self.rho / curvature
        outside = self.lengths.after(self.d, p, alpha) >= self.radius
        negative = curvature <= 0
        finite = curvature.isfinite() & q.isfinite().all()
        leave = running & finite & (negative | outside)
        stay = running & finite & ~negative & ~outside
        self.tau = torch.where(leave, self.lengths.to_boundary(self.d, p, self.radius), self.tau)
        moved = leave | stay
        self.lengths.move(moved, torch.where(leave, self.tau, alpha))
        self.d = torch.where(stay, self.d + alpha.to(p) * p, self.d)
        self.r = torch.where(stay, self.r + alpha.to(p) * q, self.r)
        self.count = torch.where(moved, self.iteration, self.count)
        self.at_boundary = self.at_boundary | leave
        self.operator_norm = torch.where(moved, self.operator_norm.maximum(_norm(q) / _norm(p)), self.operator_norm)
        self.values.append(0.5 * ((self.r + self.g) @ self.d).reshape(1))
        self._end(~finite, Status.NOT_FINITE.value)
        self._end(leave & negative, Status.NEGATIVE_CURVATURE.value)
        self._end(leave, _BOUNDARY)
        self._test()
        self._new_direction()

    def _test(self) -> None:
        norm = torch.linalg.vector_norm(self.r).reshape(1)
        progress = Progress(
            iteration=self.iteration,
            residual_norm=norm * self.scale,
            rhs_norm=torch.linalg.vector_norm(self.g).reshape(1) * self.scale,
            values=self.values,
        )
        self._end(~norm.isfinite().squeeze(), Status.NOT_FINITE.value)
        self._end(self.method.stop.satisfied(progress).squeeze() | (norm.squeeze() == 0), Status.CONVERGED.value)
        noise = 0.1 * torch.finfo(norm.dtype).eps * self.operator_norm * _norm(self.d)
        self._end(norm.squeeze().double() <= noise, Status.ROUNDING_FLOOR.value)

    def _new_direction(self) -> None:
        P = self.method.preconditioner
        r = torch.where(self.state == _RUNNING, self.r, 0.0)
        y = r if P is None else (P @ r).detach()
        rho = _dot(r, y)
        self._end(~rho.isfinite(), Status.NOT_FINITE.value)
        self._end(rho <= 0, Status.BREAKDOWN.value)
        # The first time p is 0; at the end it stays, for the step to the boundary.
        beta = rho / self.rho
        self.p = torch.where(self.state == _RUNNING, beta.to(y) * self.p - y, self.p)
        self.lengths.turn(beta, rho)
        self.rho = rho

    def _end(self, where: Tensor, state: int) -> None:
        self.state = torch.where(where & (self.state == _RUNNING), state, self.state)


def _better(answer: DescentStep, problem: Subproblem) -> DescentStep:
    """Return the answer, or the Cauchy point where the model is lower there."""
    scale = power_of_two(problem.gradient.unsqueeze(1)).squeeze()
    g = problem.gradient / scale
    norm = torch.linalg.vector_norm(g)
    unit = g / torch.where(norm > 0, norm, 1.0)
    slope, curvature = float(norm * scale), float(problem.damped.quadratic_form(unit.unsqueeze(1)))
    inside = curvature > 0 and slope < problem.radius * curvature
    length = slope / curvature if inside else problem.radius
    predicted = answer.prediction.damped
    # 0 is a change that has underflowed, and says nothing.
    if predicted == 0.0 or not predicted > length * (0.5 * length * curvature - slope):
        return answer
    return problem.answer(
        -length * unit,
        on_boundary=not inside,
        multiplier=0.0 if inside else None,
        status=answer.status,
        iterations=answer.iterations,
    )


def _dot(u: Float[Tensor, " D"], v: Float[Tensor, " D"]) -> Float[Tensor, ""]:
    return (u @ v).double()


def _norm(v: Float[Tensor, " D"]) -> Float[Tensor, ""]:
    return torch.linalg.vector_norm(v).double()
