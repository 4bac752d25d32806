"""Solvers behind preconditioners that are nearly the inverse: their directions say little of |A|."""

import pytest
import torch
from linear_systems import normal, spd

from curvlib.operators import Dense, Kronecker
from curvlib.solvers import CG, MINRES, Dogleg, SolveError, Subproblem, damped_inverse
from curvlib.solvers.solution import ResidualTest, Status

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-10}


def _backward_error(A, x, b):
    """In units of the dtype's eps."""
    eps, (A, x, b) = torch.finfo(x.dtype).eps, (v.double() for v in (A, x, b))
    return float((b - A @ x).norm() / (torch.linalg.matrix_norm(A, 2) * x.norm() + b.norm())) / eps


@pytest.mark.parametrize("method", [CG, MINRES])
@pytest.mark.parametrize(
    ("dtype", "condition"),
    [(torch.float32, 1e2), (torch.float32, 1e4), (torch.float32, 1e5), (torch.float64, 1e8), (torch.float64, 1e11)],
)
@pytest.mark.parametrize("error", [0.0, 1e-3, 0.3])
@pytest.mark.parametrize("size", [5, 60])
def test_rounding_errors_of_the_products_are_no_breakdown(method, dtype, condition, error, size):
    for seed in range(4):
        A, b = spd(seed, size, condition), normal(seed, size, dtype=dtype)
        e, Q = torch.linalg.eigh(A)
        P = Q / (e * (1 + error * torch.rand(size, generator=torch.Generator().manual_seed(seed)).double())) @ Q.T
        A, P = A.to(dtype), (0.5 * (P + P.T)).to(dtype)
        stop = ResidualTest(relative=TOLERANCE[dtype])
        solution = method(stop=stop, preconditioner=Dense(P))(Dense(A), 0.0).solve(b)
        assert solution.status in (Status.CONVERGED, Status.ROUNDING_FLOOR)
        # as the judgement allows: ten times the rounding errors, or what was asked
        assert float(solution.residual_norm) <= TOLERANCE[dtype] or _backward_error(A, solution.x, b) <= 10.0
        assert solution.iterations <= 40


@pytest.mark.parametrize("sizes", [(3, 4), (10, 12)])
def test_sums_of_ill_conditioned_kronecker_products_in_float32(sizes):
    for seed in range(5):
        first, second = (
            Kronecker(tuple(Dense(spd(seed + k + i, n, 1e4, torch.float32)) for i, n in enumerate(sizes)))
            for k in (0, 7)
        )
        C, b = first + 0.01 * second, normal(seed, first.size, dtype=torch.float32)
        x = damped_inverse(C, 1e-4) @ b
        assert _backward_error(C.to_dense() + 1e-4 * torch.eye(C.size), x, b) <= 10.0


def test_the_newton_step_of_a_dogleg():
    A, g = spd(0, 5, 1e4, torch.float32), torch.ones(5)
    descent = Dogleg(solver=CG(preconditioner=damped_inverse(Dense(A), 0.0)))
    step = descent.solve(Subproblem(operator=Dense(A), gradient=g, radius=1e9)).step
    assert _backward_error(A, step, -g) <= 10.0


def test_a_preconditioner_does_not_hide_a_random_operator():
    generator = torch.Generator().manual_seed(0)
    A = spd(0, 30, 1e4)

    class Jitter(Dense):
        def matmat(self, V):
            return super().matmat(V) * (1 + 1e-3 * torch.rand(V.shape, generator=generator, dtype=V.dtype))

    solution = CG(preconditioner=Dense(torch.linalg.inv(A)))(Jitter(A), 0.0).solve(normal(0, 30))
    assert solution.status is Status.BREAKDOWN
    with pytest.raises(SolveError, match=r"Dogleg's Newton step broke down .* free of randomness"):
        Dogleg(solver=CG()).solve(Subproblem(operator=Jitter(A), gradient=normal(0, 30), radius=1.0))
