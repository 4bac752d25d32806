"""Solvers on the chains of recurrent layers, against dense inverses in float64."""

import math
from dataclasses import replace

import pytest
import torch
from chain_cases import covariance, lag, over_all_lags, over_all_pairs, symmetric_root, transition, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import close, draw

from curvlib.operators import (
    BlockDiagonal,
    GeneralKroneckerChain,
    Identity,
    Kronecker,
    KroneckerCongruence,
    KroneckerEigen,
    Scaled,
    Shifted,
    SymmetricKroneckerChain,
)
from curvlib.solvers import FactoredTikhonov, FixedPi, SolveError, damped_inverse, eigendecompose
from curvlib.solvers.cg import CGInverse

seeds = st.integers(0, 2**32 - 1)
dampings = st.sampled_from([0.01, 0.5, 4.0])
CPU = torch.device("cpu")
few = settings(max_examples=15)
LENGTHS = {3: 0.5, 8: 0.5}


def eye(n, dtype=torch.float64):
    return torch.eye(n, dtype=dtype)


def pairs_of(d, symmetric, sizes=(2, 3), norm=0.8):
    return [(covariance(d, n), transition(d, n, norm, symmetric)) for n in sizes]


def sum_of(G, A, symmetric):
    return over_all_pairs(G, A, LENGTHS) if symmetric else over_all_lags(G, A, 120)


def chain_of(d, G, A, symmetric):
    lag0, lag1 = (G[0], A[0]), (lag(*G, 1), lag(*A, 1))
    return SymmetricKroneckerChain(lag0, lag1, weights(LENGTHS, d)) if symmetric else GeneralKroneckerChain(lag0, lag1)


def rewhitened(F, shift):
    """The same lag-1 moment under F_0 + shift I: the factor of a damped chain."""
    damped = F[0] + shift * eye(len(F[0]))
    inverse_root = torch.linalg.inv(symmetric_root(damped))
    return damped, inverse_root @ lag(*F, 1) @ inverse_root


kinds = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "general"])


@kinds
@few
@given(seed=seeds)
def test_without_damping_the_inverse_is_direct(symmetric, seed):
    d = draw(seed, CPU)
    G, A = pairs_of(d, symmetric)
    inverse = damped_inverse(chain_of(d, G, A, symmetric), 0.0)
    assert type(inverse) is KroneckerCongruence
    close(inverse.to_dense(), torch.linalg.inv(sum_of(G, A, symmetric)), 1.0, 1e-9)


@kinds
@few
@given(seed=seeds, damping=dampings)
def test_factored_damping_is_the_inverse_of_the_chain_of_damped_factors(symmetric, seed, damping):
    d = draw(seed, CPU)
    G, A = pairs_of(d, symmetric)
    G, A = (10.0 * G[0], G[1]), A
    pi = math.sqrt(float(A[0].trace() / len(A[0])) / float(G[0].trace() / len(G[0])))
    gamma = math.sqrt(damping)
    M = sum_of(rewhitened(G, gamma / pi), rewhitened(A, pi * gamma), symmetric)
    C = chain_of(d, G, A, symmetric)
    inverse = FactoredTikhonov()(C, damping)
    assert type(inverse) is KroneckerCongruence
    close(inverse.to_dense(), torch.linalg.inv(M), 1.0, 1e-9)
    fixed = FactoredTikhonov(balance=FixedPi(0.3))(C, damping)
    M = sum_of(rewhitened(G, gamma / 0.3), rewhitened(A, 0.3 * gamma), symmetric)
    close(fixed.to_dense(), torch.linalg.inv(M), 1.0, 1e-9)


@kinds
def test_without_correlation_it_is_the_damping_of_a_kronecker_product(symmetric):
    d = draw(0, CPU)
    G, A = ((covariance(d, n), torch.zeros(n, n, dtype=d.dtype)) for n in (2, 3))
    C, expected = chain_of(d, G, A, symmetric), Kronecker((G[0], A[0]))
    for damping in (0.0, 0.3):
        for solver in (FactoredTikhonov(), damped_inverse):
            close(solver(C, damping).to_dense(), solver(expected, damping).to_dense(), 1.0, 1e-9)


@kinds
def test_multiples_shifts_and_blocks_keep_the_structure(symmetric):
    """The curvature of sequences of mean length 5.5 with damping lambda: that of C with lambda / 5.5."""
    d = draw(1, CPU)
    G, A = pairs_of(d, symmetric)
    C, solver = chain_of(d, G, A, symmetric), FactoredTikhonov()
    for solve, kind in ((solver, KroneckerCongruence), (damped_inverse, CGInverse)):
        inverse = solve(Scaled(5.5, C), 0.3)
        assert type(inverse.operator) is kind
        close(inverse.to_dense(), solve(C, 0.3 / 5.5).to_dense() / 5.5, 1.0, 1e-9)
        close(solve(Shifted(C, 0.2), 0.3).to_dense(), solve(C, 0.5).to_dense(), 1.0, 1e-9)
        block = BlockDiagonal((C, Identity(1, d.dtype)), (torch.arange(1, 7), torch.tensor([0])), 7)
        close(solve(block, 0.3).to_dense()[1:, 1:], solve(C, 0.3).to_dense(), 1.0, 1e-9)
    absorbed = damped_inverse(Shifted(Scaled(5.5, C), 0.2), 0.0).to_dense()
    close(absorbed, torch.linalg.inv(5.5 * sum_of(G, A, symmetric) + 0.2 * eye(6)), 1.0, 1e-8)


@kinds
def test_the_preconditioner_saves_iterations(symmetric):
    d = draw(2, CPU)
    # lag-0 moments of condition 1e6
    spread = torch.logspace(0, -6, 12, dtype=d.dtype)
    G, A = ((Q @ torch.diag(spread) @ Q.T, 0.5 * transition(d, 12, 1.0, symmetric)) for Q in (d.orthogonal(12),) * 2)
    C, b = chain_of(d, G, A, symmetric), d.normal(144)
    inverse = damped_inverse(C, 1e-6)
    # As in large systems, whose residuals are not all kept: within D iterations 144 distinct eigenvalues are found.
    method = replace(inverse.method, reorthogonalize=0)
    with_it = method(C, 1e-6).solve(b)
    without = replace(method, max_iterations=5000, preconditioner=None)(C, 1e-6).solve(b)
    assert with_it.solved
    assert max(with_it.column_iterations) < 0.5 * max(without.column_iterations)
    exact = torch.linalg.solve(sum_of(G, A, symmetric) + 1e-6 * eye(144), b)
    close(with_it.x, exact, 1.0, 1e-6)


@kinds
@pytest.mark.parametrize("solver", [damped_inverse, FactoredTikhonov()], ids=["damped_inverse", "FactoredTikhonov"])
def test_float32(symmetric, solver, device):
    d = draw(3, device)
    G, A = pairs_of(d, symmetric, (6, 5))
    C = chain_of(d, G, A, symmetric)
    fields = [tuple(F.float() for F in pair) for pair in (C.lag0, C.lag1)]
    single = SymmetricKroneckerChain(*fields, C.weights.float()) if symmetric else GeneralKroneckerChain(*fields)
    b = d.normal(30)
    expected, actual = solver(C, 0.1) @ b, solver(single, 0.1) @ b.float()
    assert actual.dtype == torch.float32
    # conjugate gradients to a residual of 1e-5, times a condition of the damped matrix of up to about 100
    assert (actual.double() - expected).norm() / expected.norm() < 1e-3


@kinds
def test_eigendecompose_gives_the_whole_spectrum(symmetric):
    d = draw(4, CPU)
    G, A = pairs_of(d, symmetric)
    E = eigendecompose(chain_of(d, G, A, symmetric))
    assert type(E) is KroneckerEigen
    close(E.to_dense(), sum_of(G, A, symmetric), 1.0, 1e-11)


ONES, E2 = torch.ones(2, 2), torch.eye(2)
ALTERNATING = SymmetricKroneckerChain((E2, E2), (E2, -E2), torch.tensor([1.0, 0.5]))


@pytest.mark.parametrize(
    ("C", "message"),
    [
        (GeneralKroneckerChain((E2, ONES), (E2 / 2, ONES / 2)), "factor A of General.*singular, of rank 1 and size 2"),
        (SymmetricKroneckerChain((0 * E2, E2), (0 * E2, E2), torch.ones(1)), "factor G of Symm.*of rank 0 and size 2"),
        (ALTERNATING, "even number of steps"),
    ],
    ids=["general", "symmetric", "alternating"],
)
def test_singular_chains_need_a_damping(C, message):
    for solver in (damped_inverse, FactoredTikhonov()):
        with pytest.raises(SolveError, match=f"{message}.*damping > 0"):
            solver(C, 0.0)
        assert (solver(C, 0.5) @ torch.ones(4)).isfinite().all()
    dense = torch.linalg.inv(C.to_dense() + 0.5 * E2.repeat(2, 2) * torch.kron(E2, ONES))
    torch.testing.assert_close(damped_inverse(C, 0.5).to_dense(), dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("solver", [damped_inverse, FactoredTikhonov()], ids=["damped_inverse", "FactoredTikhonov"])
def test_what_is_not_finite_is_refused_before_any_product(solver, damping):
    nan = torch.full((2, 2), float("nan"))
    for C in (
        GeneralKroneckerChain((nan, E2), (E2 / 2, E2 / 2)),
        GeneralKroneckerChain((E2, E2), (E2 / 2, nan)),
        SymmetricKroneckerChain((E2, nan), (E2 / 2, E2 / 2), torch.ones(1)),
    ):
        with pytest.raises(SolveError, match=r"lag., factor . of .*Chain.*not finite"):
            solver(C, damping)


def test_products_and_solves_ignore_autocast():
    d = draw(5, CPU, dtype=torch.float32)
    for symmetric in (True, False):
        v = d.normal(6)
        outcomes = []
        moments = pairs_of(d, symmetric)
        for enabled in (False, True):
            C = chain_of(d, *moments, symmetric)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                solvers = (damped_inverse, FactoredTikhonov())
                outcomes.append([C @ v, C.diagonal(), C.to_dense(), *(solver(C, 0.1) @ v for solver in solvers)])
        for a, b in zip(*outcomes, strict=True):
            assert torch.equal(a, b)
