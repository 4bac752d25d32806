"""Inverses and eigendecompositions at the rounding errors of their dtype."""

import pytest
import torch
from linear_systems import dense_inverse
from operator_cases import close, draw

from curvlib.operators import (
    BlockDiagonal,
    Dense,
    Kronecker,
    Scaled,
)
from curvlib.solvers.errors import SolveError
from curvlib.solvers.inverse import damped_inverse, eigendecompose

CPU = torch.device("cpu")


def test_eigenvalues_at_rounding_level_are_zero_and_others_keep_their_sign():
    d = draw(4, CPU)
    Q = d.orthogonal(5)
    e = torch.tensor([1.0, 0.5, -1e-3, -1e-17, 1e-17], dtype=torch.float64)
    found = eigendecompose(Dense(Q @ torch.diag(e) @ Q.T)).eigenvalues
    assert (found == 0.0).sum() == 2
    close(found.sort().values, e.where(e.abs() > 1e-10, 0.0).sort().values, 1.0, 1e-14)


def spread_matrix(condition, n=24, seed=0):
    d = draw(seed, CPU)
    Q = d.orthogonal(n)
    return Q @ torch.diag(torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), n, dtype=d.dtype)) @ Q.T


def test_float32_at_condition_1e6_is_as_accurate_as_float32_can_be(device):
    M = spread_matrix(1e6).to(device).float()
    b = draw(1, device).normal(len(M)).float()
    exact = torch.linalg.solve(M.double(), b.double())
    for operator in (Dense(M), BlockDiagonal((Dense(M),), (torch.arange(len(M), device=device),), len(M))):
        x = damped_inverse(operator, 0.0) @ b
        assert x.dtype == torch.float32
        assert (x.double() - exact).norm() / exact.norm() < 1e6 * 1.2e-7 / 2
        residual = M.double() @ x.double() - b
        assert residual.norm() < 1e-6 * (torch.linalg.matrix_norm(M, 2) * x.norm())
    damped = damped_inverse(Kronecker((M, torch.eye(2, device=device))), 1e-2) @ b.repeat_interleave(2)
    expected = dense_inverse(M.double(), 1e-2) @ b.double()
    assert (damped[::2].double() - expected).norm() / expected.norm() < 1e-4


def test_a_failed_float32_factorisation_is_done_and_kept_in_float64(device):
    # det = 1 / 1.0005 beside entries of 4096: float32 cannot tell it from 0, although its entries are exact there.
    M = torch.tensor([[4097.0, 4096.0], [4096.0, 4095.0 + 2.0**-11]], device=device)
    inverse = damped_inverse(Dense(M), 0.0)
    assert inverse.factor.dtype == torch.float64
    assert inverse.dtype == torch.float32
    b = torch.tensor([1.0, 0.0], device=device)
    exact = torch.linalg.solve(M.double(), b.double())
    assert ((inverse @ b).double() - exact).norm() / exact.norm() < 1e-7


def test_a_failed_eigendecomposition_is_done_in_float64(monkeypatch):
    seen = []
    eigh = torch.linalg.eigh

    def fail_in_float32(M):
        seen.append(M.dtype)
        if M.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(M)

    monkeypatch.setattr(torch.linalg, "eigh", fail_in_float32)
    E = eigendecompose(Dense(torch.diag(torch.tensor([2.0, 3.0]))))
    assert seen == [torch.float32, torch.float64]
    assert E.eigenvalues.dtype == torch.float32
    assert E.eigenvalues.tolist() == [2.0, 3.0]

    def fail(M):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    with pytest.raises(SolveError, match=r"failed in every precision: torch.float32.*did not converge; torch.float64"):
        eigendecompose(Dense(torch.eye(2)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_factorised_in_float32(dtype):
    M = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=dtype)
    inverse = damped_inverse(Dense(M), 1.0)
    assert inverse.factor.dtype == torch.float32
    close(inverse @ torch.ones(2, dtype=dtype), torch.full((2,), 0.25, dtype=dtype), 1.0, 1e-2)
    assert eigendecompose(Dense(M)).eigenvalues.tolist() == [1.0, 3.0]


@pytest.mark.parametrize("factor", [1e-310, 1e-45, 1e300])
def test_extreme_factors_do_not_overflow(factor):
    x = damped_inverse(Scaled(factor, Dense(torch.eye(2, dtype=torch.float64))), 1.0) @ torch.ones(2).double()
    assert x.isfinite().all()
    assert x.tolist() == pytest.approx([1.0 / (factor + 1.0)] * 2, rel=1e-12)
