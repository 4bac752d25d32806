"""Conjugate gradients never take more iterations than SciPy on the same system."""

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_systems import normal, spd

from curvlib.operators import Dense, Diagonal
from curvlib.solvers.cg import CG
from curvlib.solvers.solution import ResidualTest, Status

seeds = st.integers(0, 2**31)
dampings = st.sampled_from([0.0, 1e-3, 1.0])


def _scipy_iterations(A, b, tolerance, P=None):
    count = 0

    def seen(_):
        nonlocal count
        count += 1

    M = None if P is None else np.diag(P.numpy()) if P.ndim == 1 else P.numpy()
    scipy.sparse.linalg.cg(A.numpy(), b.numpy(), rtol=tolerance, maxiter=20_000, callback=seen, M=M)
    return count


@given(
    seeds,
    st.sampled_from([1, 2, 4, 11, 60, 90]),
    st.floats(0.5, 9.0),
    dampings,
    st.sampled_from([1e-2, 1e-4, 1e-6]),
    st.booleans(),
    st.sampled_from([1, 7]),
)
@settings(max_examples=60)
def test_never_more_iterations_than_scipy(seed, size, exponent, damping, tolerance, precondition, check_every):
    C, b = spd(seed, size, condition=10.0**exponent), normal(seed, size)
    A = C + damping * torch.eye(size, dtype=C.dtype)
    P = 1.0 / A.diagonal() if precondition else None
    solution = CG(
        stop=ResidualTest(relative=tolerance),
        max_iterations=20_000,
        check_every=check_every,
        preconditioner=None if P is None else Diagonal(P),
    )(Dense(C), damping).solve(b)
    assert solution.iterations <= min(size, _scipy_iterations(A, b, tolerance, P))
    assert float(solution.residual_norm) <= tolerance * (1 + 1e-6)


def _laplacian(size):
    return 2 * torch.eye(size, dtype=torch.float64) - torch.diag(torch.ones(size - 1).double(), 1) - torch.diag(
        torch.ones(size - 1).double(), -1
    )  # fmt: skip


def _even(size, condition):
    Q, _ = torch.linalg.qr(normal(6, size, size))
    A = Q * torch.linspace(1.0, 1.0 / condition, size).double() @ Q.T
    return 0.5 * (A + A.T)


def _clustered(size):
    Q, _ = torch.linalg.qr(normal(5, size, size))
    eigenvalues = torch.cat([torch.linspace(1.0, 1.01, size - 3).double(), torch.tensor([1e2, 1e3, 1e4]).double()])
    return Q * eigenvalues @ Q.T


SYSTEMS = {
    "laplacian": _laplacian(100),
    "clusters": _clustered(80),
    "graded": spd(1, 120, condition=1e4),
    "ill-conditioned": spd(2, 60, condition=1e6),
    "very-ill-conditioned": spd(2, 60, condition=1e11),
    "even-to-the-end": _even(57, condition=1e11),
    "low-rank-plus-identity": torch.eye(90).double() + 100 * normal(3, 90, 5) @ normal(3, 90, 5).T,
    "covariance": normal(4, 150, 300) @ normal(4, 150, 300).T / 300,
}


@pytest.mark.parametrize("tolerance", [1e-2, 1e-5, 1e-8])
@pytest.mark.parametrize("preconditioned", [False, True], ids=["plain", "jacobi"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_never_more_iterations_than_scipy_on_typical_systems(name, preconditioned, tolerance):
    A = SYSTEMS[name]
    b, P = normal(7, len(A)), 1.0 / A.diagonal()
    method = CG(
        stop=ResidualTest(relative=tolerance),
        max_iterations=20_000,
        preconditioner=Diagonal(P) if preconditioned else None,
    )
    solution = method(Dense(A), 0.0).solve(b)
    # ROUNDING_FLOOR: float64 holds no vector x with so small a residual.
    assert solution.status in (Status.CONVERGED, Status.ROUNDING_FLOOR)
    assert solution.iterations <= _scipy_iterations(A, b, tolerance, P if preconditioned else None)


def _nearly_inverse(A, error, seed):
    """The inverse of a matrix whose eigenvalues are off by up to that factor."""
    e, Q = torch.linalg.eigh(A)
    P = Q / (e * (1 + error * torch.rand(len(e), generator=torch.Generator().manual_seed(seed)).double())) @ Q.T
    return 0.5 * (P + P.T)


@given(
    seeds,
    st.sampled_from([8, 40, 90]),
    st.sampled_from([1e4, 1e8, 1e10]),
    st.sampled_from([0.0, 1e-3, 0.3, 3.0]),
    st.sampled_from([1e-3, 1e-6, 1e-10]),
    st.sampled_from([None, 0]),
)
@settings(max_examples=80)
def test_never_more_iterations_than_scipy_with_a_good_preconditioner(seed, size, condition, error, tolerance, kept):
    """Its directions are those of small eigenvalues alone; they say little of |A|, and so of the rounding errors."""
    A, b = spd(seed, size, condition), normal(seed, size)
    P = _nearly_inverse(A, error, seed)
    stop = ResidualTest(relative=tolerance)
    solution = CG(stop=stop, preconditioner=Dense(P), reorthogonalize=kept)(Dense(A), 0.0).solve(b)
    assert solution.iterations <= _scipy_iterations(A, b, tolerance, P)
    # that many digits are lost by the products; 20 for the bound of the products' rounding errors, as SciPy's are
    floor = 20 * torch.finfo(torch.float64).eps * float(solution.x.norm() / b.norm())
    assert solution.solved
    assert float(solution.residual_norm) <= max(tolerance, floor)
    assert (solution.status is Status.CONVERGED) == (float(solution.residual_norm) <= 1.01 * tolerance)
