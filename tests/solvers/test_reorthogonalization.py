"""Residuals of conjugate gradients that are kept orthogonal: what exact arithmetic promises holds again."""

import pytest
import torch

from curvlib.operators import Dense, Diagonal
from curvlib.solvers import CG, RaiseAtLimit, ResidualTest, SolveError, Status
from curvlib.solvers.reorthogonalization import PastResiduals


def graded(size, condition, dtype=torch.float64):
    generator = torch.Generator().manual_seed(size)
    Q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    A = Q * torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), size, dtype=torch.float64) @ Q.T
    return (0.5 * (A + A.T)).to(dtype), torch.randn(size, 2, generator=generator, dtype=torch.float64).to(dtype)


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def solve(A, b, **options):
    return CG(max_iterations=5000, stop=ResidualTest(relative=1e-6), **options)(Dense(A), 0.0).solve(b)


@pytest.mark.parametrize("preconditioned", [False, True], ids=["plain", "jacobi"])
def test_at_most_as_many_iterations_as_distinct_eigenvalues(preconditioned):
    A, b = graded(60, 1e8)
    P = Diagonal(1 / A.diagonal()) if preconditioned else None
    all_of_them = solve(A, b, reorthogonalize=60, preconditioner=P)
    none = solve(A, b, reorthogonalize=0, preconditioner=P)
    assert all_of_them.status is none.status is Status.CONVERGED
    assert max(all_of_them.column_iterations) <= 60
    assert max(none.column_iterations) > 200
    torch.testing.assert_close(A @ all_of_them.x, b, rtol=0, atol=1e-5)


def test_more_residuals_save_more_iterations():
    A, b = graded(80, 1e6)
    counts = [solve(A, b, reorthogonalize=kept).iterations for kept in (0, 40, 80)]
    assert counts[0] > counts[1] > counts[2]


def test_the_default_keeps_all_in_small_systems_alone():
    A, b = graded(40, 1e8)
    assert solve(A, b).iterations == solve(A, b, reorthogonalize=40).iterations
    # 300 columns of 40 numbers are more than 8192
    wide = b[:, :1].expand(-1, 300)
    assert solve(A, wide).iterations == solve(A, wide, reorthogonalize=0).iterations > 40


def test_well_conditioned_systems_do_not_notice():
    A, b = graded(50, 10.0)
    kept, none = solve(A, b, reorthogonalize=50), solve(A, b, reorthogonalize=0)
    assert kept.column_iterations == none.column_iterations
    torch.testing.assert_close(kept.x, none.x, rtol=1e-10, atol=1e-10)


def test_float32():
    A, b = graded(40, 1e3, torch.float32)
    kept = CG(max_iterations=500, stop=ResidualTest(relative=1e-3))(Dense(A), 0.0).solve(b)
    assert kept.status is Status.CONVERGED
    assert kept.iterations <= 40


def test_statuses_stay_what_they_are():
    indefinite = torch.diag(torch.tensor([3.0, 2.0, 1.0, -1.0], dtype=torch.float64))
    solution = solve(indefinite, torch.ones(4, dtype=torch.float64))
    assert solution.status is Status.NEGATIVE_CURVATURE
    assert bool(solution.x.isfinite().all())
    with pytest.raises(SolveError):
        CG(on_limit=RaiseAtLimit())(Dense(torch.full((3, 3), float("nan"))), 0.0) @ torch.ones(3)


@pytest.mark.parametrize("bad", [-1, 2.0, True, "all"])
def test_the_number_is_checked(bad):
    with pytest.raises(ValueError, match="reorthogonalize"):
        CG(reorthogonalize=bad)


def test_cleaning_keeps_residual_and_iterate_together():
    A, b = graded(30, 1e2)
    b = b[:, [0]]
    residuals, _ = torch.linalg.qr(normal(30, 8))
    past = PastResiduals(20)
    for r in residuals[:, :7].T:
        past.append(r[:, None], r[:, None], torch.ones(1, dtype=r.dtype), torch.linalg.solve(A, r[:, None] + b))
    lost = residuals[:, [7]] + 1e-2 * residuals[:, :7].sum(1, keepdim=True)
    x, r = past.clean(torch.linalg.solve(A, lost + b), lost)
    torch.testing.assert_close(residuals[:, :7].T @ r, torch.zeros(7, 1, dtype=r.dtype), rtol=0, atol=1e-14)
    torch.testing.assert_close(A @ x - b, r, rtol=1e-10, atol=1e-11)


def test_only_the_newest_are_kept():
    past = PastResiduals(3)
    unit = torch.eye(5, dtype=torch.float64)
    for row in range(4):
        past.append(unit[:, [row]], unit[:, [row]], torch.ones(1, dtype=torch.float64), torch.zeros(5, 1).double())
    r = 0.1 * torch.ones(5, 1, dtype=torch.float64)
    _, cleaned = past.clean(torch.zeros_like(r), r)
    assert cleaned.flatten().nonzero().flatten().tolist() == [0, 4]
