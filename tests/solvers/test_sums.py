"""Inverses of sums of Kronecker products and diagonals, against dense inverses in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curvlib.operators import Diagonal, Kronecker, KroneckerCongruence, Scaled, Shifted, Sum
from curvlib.solvers import SolveError, damped_inverse
from curvlib.solvers.cg import CGInverse

SIZES = [(3, 4), (2, 3, 2), (5,)]


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factor(seed, n, condition=1e2):
    Q, _ = torch.linalg.qr(normal(seed, n, n))
    return Q * torch.logspace(0, -torch.tensor(condition).log10().item(), n, dtype=torch.float64) @ Q.T


def product(seed, sizes, condition=1e2):
    return Kronecker(tuple(factor(seed + i, n, condition) for i, n in enumerate(sizes)))


def iterations_of(inverse, seed=0):
    solution = inverse.solve(normal(seed, inverse.size))
    assert solution.solved
    return solution.iterations


def plain(inverse):
    """The same solve without its preconditioner, and as in a large system."""
    method = type(inverse.method)(max_iterations=5000, stop=inverse.method.stop, reorthogonalize=0)
    return method(inverse.operator, inverse.damping)


@given(st.integers(0, 10_000), st.sampled_from(SIZES), st.sampled_from([0.0, 1e-3, 1.0]), st.sampled_from([0.0, 0.5]))
@settings(max_examples=40, deadline=None)
def test_two_kronecker_products(seed, sizes, damping, shift):
    C = Sum((product(seed, sizes), Shifted(Scaled(3.0, product(seed + 9, sizes)), shift)))
    inverse = damped_inverse(C, damping)
    assert isinstance(inverse, KroneckerCongruence) == (damping + shift == 0.0)
    oracle = torch.linalg.inv(C.to_dense() + damping * torch.eye(C.size, dtype=torch.float64))
    torch.testing.assert_close(inverse.to_dense(), oracle, rtol=1e-6, atol=1e-7 * float(oracle.abs().max()))


def test_one_of_the_two_may_be_singular():
    flat = Kronecker((torch.diag(torch.tensor([1.0, 0.0])).double(), torch.eye(3, dtype=torch.float64)))
    full = product(1, (2, 3))
    for C in (Sum((flat, full)), Sum((full, flat))):
        assert isinstance(damped_inverse(C, 0.0), KroneckerCongruence)
        torch.testing.assert_close(damped_inverse(C, 0.0).to_dense(), torch.linalg.inv(C.to_dense()))


def test_products_of_other_shapes_and_indefinite_sums():
    other = Sum((product(0, (2, 6)), product(1, (3, 4))))
    torch.testing.assert_close(damped_inverse(other, 0.1).to_dense(), torch.linalg.inv(
        other.to_dense() + 0.1 * torch.eye(12, dtype=torch.float64)), rtol=1e-6, atol=1e-6)  # fmt: skip
    indefinite = Sum((product(0, (2, 3)), Scaled(-3.0, product(1, (2, 3)))))
    for damping in (0.0, 1e-3):
        with pytest.raises(SolveError):
            damped_inverse(indefinite, damping) @ torch.ones(6, dtype=torch.float64)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_damping_beside_two_products_costs_few_iterations(scale):
    C = Sum((product(0, (20, 25), 1e4), Scaled(scale, product(2, (20, 25), 1e4))))
    inverse = damped_inverse(C, 1e-4)
    assert isinstance(inverse, CGInverse)
    assert 5 * iterations_of(inverse) < iterations_of(plain(inverse))


@given(st.integers(0, 10_000), st.sampled_from(SIZES), st.floats(0.0, 3.0), st.sampled_from([1e-3, 1.0]))
@settings(max_examples=40, deadline=None)
def test_a_product_and_a_diagonal(seed, sizes, spread, damping):
    K = product(seed, sizes)
    C = Sum((K, Diagonal((spread * normal(seed + 5, K.size)).exp())))
    oracle = torch.linalg.inv(C.to_dense() + damping * torch.eye(C.size, dtype=torch.float64))
    inverse = damped_inverse(C, damping)
    torch.testing.assert_close(inverse.to_dense(), oracle, rtol=1e-6, atol=1e-7 * float(oracle.abs().max()))


@pytest.mark.parametrize(
    ("scale", "spread", "chosen"), [(0.01, 2.0, Diagonal), (1.0, 2.0, Diagonal), (1e4, 0.1, None), (1e4, 2.0, None)]
)
def test_the_better_preconditioner_is_chosen(scale, spread, chosen):
    K = product(0, (20, 25), 1e4)
    C = Sum((Scaled(scale, K), Diagonal(0.1 * (spread * normal(7, K.size)).exp())))
    inverse = damped_inverse(C, 1e-4)
    assert (type(inverse.method.preconditioner) is Diagonal) == (chosen is Diagonal)
    assert 2 * iterations_of(inverse) < iterations_of(plain(inverse))


def test_a_constant_diagonal_beside_a_product_is_exact_at_once():
    K = product(0, (4, 5))
    inverse = damped_inverse(Sum((K, Diagonal(torch.full((20,), 0.3, dtype=torch.float64)))), 0.2)
    torch.testing.assert_close(
        inverse.to_dense(), torch.linalg.inv(K.to_dense() + 0.5 * torch.eye(20, dtype=torch.float64))
    )
    assert iterations_of(inverse) == 1


def test_diagonals_with_negative_entries_are_judged_by_the_solve():
    K = Kronecker((2.0 * torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)))
    d = torch.tensor([-1.0, 0.5, 0.5, 0.5], dtype=torch.float64)
    b = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(damped_inverse(Sum((K, Diagonal(d))), 0.1) @ b, 1 / (2.1 + d))
    with pytest.raises(SolveError):
        damped_inverse(Sum((K, Diagonal(3.0 * d))), 0.1) @ b
