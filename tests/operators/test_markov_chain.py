"""Markov chains of Kronecker products and their inverses, against dense matrices in float64."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import close, draw, kronecker_markov_chain, markov_covariance

from curvlib.operators import (
    BlockDiagonal,
    Dense,
    Kronecker,
    KroneckerMarkovChain,
    KroneckerMarkovPrecision,
    OperatorError,
    Scaled,
    Shifted,
    operator_from_state_dict,
)
from curvlib.operators.structure import absorb_factor
from curvlib.solvers import FactoredTikhonov, FixedPi, SolveError, UnitPi, damped_inverse
from curvlib.solvers.cg import CGInverse

seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=15)
CPU = torch.device("cpu")


def eye(n):
    return torch.eye(n, dtype=torch.float64)


def chain_of(samples, seed=0, sizes=((2, 3), (3, 2), (1, 4)), dtype=torch.float64):
    """A chain of second moments of so many samples; with few of them the factors are singular."""
    torch.manual_seed(seed)
    series = [[torch.randn(samples, n, dtype=torch.float64) for n in column] for column in zip(*sizes, strict=True)]
    own = [[(x.T @ x / samples).to(dtype) for x in column] for column in series]
    beside = [[(x.T @ y / samples).to(dtype) for x, y in pairwise(column)] for column in series]
    return KroneckerMarkovChain(tuple(zip(*own, strict=True)), tuple(zip(*beside, strict=True)))


def dense_of(chain):
    return markov_covariance(*([torch.kron(*pair) for pair in pairs] for pairs in (chain.moments, chain.cross)))


@few
@given(seed=seeds)
def test_the_inverse_is_block_tridiagonal_and_that_of_the_dense_matrix(seed):
    C, M = kronecker_markov_chain(draw(seed, CPU))
    P, expected = C.inverse(), torch.linalg.inv(M)
    assert isinstance(P, KroneckerMarkovPrecision)
    scale = float(expected.abs().max())
    close(P.to_dense(), expected, scale, 1e-9)
    close(P @ (C @ torch.ones(C.size).double()), torch.ones(C.size).double(), scale, 1e-9)
    sizes = [block.size for block in P.blocks]
    if len(sizes) == 3:
        assert bool((P.to_dense()[: sizes[0], sizes[0] + sizes[1] :] == 0).all())


@few
@given(seed=seeds)
def test_the_inverse_is_that_of_neighbouring_pairs(seed):
    """The precision of a Markov chain is the sum of those of all pairs of neighbours less those of the inner blocks."""
    C, M = kronecker_markov_chain(draw(seed, CPU))
    sizes = [len(G) * len(A) for G, A in C.moments]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    if len(sizes) == 1:
        expected = torch.linalg.inv(M)
    else:
        expected = torch.zeros_like(M)
        for i in range(len(sizes) - 1):
            both = slice(starts[i], starts[i] + sizes[i] + sizes[i + 1])
            expected[both, both] += torch.linalg.inv(M[both, both])
            if i > 0:
                own = slice(starts[i], starts[i] + sizes[i])
                expected[own, own] -= torch.linalg.inv(M[own, own])
    close(C.inverse().to_dense(), expected, float(expected.abs().max()), 1e-9)


def test_its_given_blocks_are_its_own():
    C = chain_of(30)
    M, start = C.to_dense(), 0
    for (pair, cross), following in zip(zip(C.moments, C.cross, strict=False), C.moments[1:], strict=True):
        end = start + len(pair[0]) * len(pair[1])
        stop = end + len(following[0]) * len(following[1])
        close(M[start:end, start:end], torch.kron(*pair), 1.0, 1e-12)
        close(M[start:end, end:stop], torch.kron(*cross), 1.0, 1e-12)
        start = end


@pytest.mark.parametrize("samples", [1, 2])
def test_singular_moments_have_products_but_no_inverse(samples):
    C = chain_of(samples)
    close(C.to_dense(), dense_of(C), 1.0, 1e-10)
    with pytest.raises(OperatorError, match=r"moments\[0\], [GA], .* is singular: use a damping > 0"):
        C.inverse()
    with pytest.raises(SolveError, match="singular"):
        damped_inverse(C, 0.0)
    close((damped_inverse(C, 0.3) @ eye(C.size)), torch.linalg.inv(dense_of(C) + 0.3 * eye(C.size)), 3.0, 1e-8)


def test_a_block_that_is_a_function_of_the_next_has_no_inverse():
    """Full rank everywhere, but x_1 = x_2."""
    F = 2.0 * eye(2)
    C = KroneckerMarkovChain(((F, F), (F, F)), ((F, F),))
    with pytest.raises(OperatorError, match="function of block 1"):
        C.inverse()


def test_without_correlation_it_is_block_diagonal():
    C = chain_of(30)
    alone = KroneckerMarkovChain(C.moments, tuple((0.0 * G, 0.0 * A) for G, A in C.cross))
    close(alone.to_dense(), torch.block_diag(*(torch.kron(*pair) for pair in C.moments)))
    inverse = torch.block_diag(*(torch.linalg.inv(torch.kron(*pair)) for pair in C.moments))
    close(alone.inverse().to_dense(), inverse, float(inverse.abs().max()), 1e-10)


def test_damped_inverse_is_exact_by_preconditioned_conjugate_gradients():
    C = chain_of(40)
    for damping in (1e-3, 0.1, 10.0):
        inverse = damped_inverse(C, damping)
        assert isinstance(inverse, CGInverse)
        close(inverse @ eye(C.size), torch.linalg.inv(dense_of(C) + damping * eye(C.size)), 1 / damping, 1e-8)
    close(damped_inverse(C, 0.0) @ eye(C.size), torch.linalg.inv(dense_of(C)), 1.0, 1e-9)


@pytest.mark.parametrize("balance", [UnitPi(), FixedPi(3.0), None], ids=str)
@pytest.mark.parametrize("samples", [1, 40])
def test_factored_tikhonov_damps_the_moments_and_not_the_cross_moments(balance, samples):
    C, damping, moments = chain_of(samples), 0.2, []
    for G, A in C.moments:
        pi = 3.0 if isinstance(balance, FixedPi) else 1.0
        if balance is None:
            pi = float((A.trace() / len(A)) / (G.trace() / len(G))) ** 0.5
        moments.append((G + damping**0.5 / pi * eye(len(G)), A + damping**0.5 * pi * eye(len(A))))
    solver = FactoredTikhonov() if balance is None else FactoredTikhonov(balance=balance)
    expected = torch.linalg.inv(dense_of(KroneckerMarkovChain(tuple(moments), C.cross)))
    inverse = solver(C, damping)
    assert isinstance(inverse, KroneckerMarkovPrecision)
    close(inverse.to_dense(), expected, float(expected.abs().max()), 1e-10)
    wrapped = BlockDiagonal((C,), (torch.arange(C.size).flip(0),), C.size)
    shifted = solver(Shifted(wrapped, 0.15), 0.05)
    close(shifted.to_dense().flip(0, 1), expected, float(expected.abs().max()), 1e-10)


def test_in_float32_decompositions_are_float64():
    C = chain_of(200, dtype=torch.float32)
    expected = torch.linalg.inv(dense_of(KroneckerMarkovChain(*(
        tuple((G.double(), A.double()) for G, A in pairs) for pairs in (C.moments, C.cross)
    ))))  # fmt: skip
    P = C.inverse()
    assert P.dtype == torch.float32
    # entries are rounded once to float32, eps 1.2e-7, and products of them are added up in it
    torch.testing.assert_close(P.to_dense().double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_multiples_keep_the_structure():
    C = chain_of(30)
    absorbed = absorb_factor(C, 2.5)
    assert isinstance(absorbed, KroneckerMarkovChain)
    close(absorbed.to_dense(), 2.5 * C.to_dense(), 1.0, 1e-10)
    assert absorb_factor(C, -1.0) is None
    close(damped_inverse(Scaled(2.0, C), 0.0) @ eye(C.size), torch.linalg.inv(2.0 * dense_of(C)), 1.0, 1e-9)


def test_states_of_both_operators_come_back():
    C = chain_of(30)
    for operator in (C, C.inverse()):
        again = operator_from_state_dict(operator.state_dict())
        assert torch.equal(again.to_dense(), operator.to_dense())


def test_wrong_arguments_are_named():
    one, two = eye(1), eye(2)
    with pytest.raises(TypeError, match="cross one of l - 1 pairs"):
        KroneckerMarkovChain(((one, one),), ((one, one),))
    with pytest.raises(ValueError, match=r"cross\[0\], A, must have shape \(1, 2\)"):
        KroneckerMarkovChain(((one, one), (one, two)), ((one, one),))
    with pytest.raises(ValueError, match=r"moments\[1\], G, must agree"):
        KroneckerMarkovChain(((one, one), (one.float(), one)), ((one, one),))
    with pytest.raises(OperatorError, match="positive semi-definite"):
        KroneckerMarkovChain(((one, one), (-two, one)), ((torch.zeros(1, 2).double(), one),)).inverse()
    with pytest.raises(OperatorError, match=r"cross\[0\], G, .* not finite"):
        KroneckerMarkovChain(((one, one), (one, one)), ((one / 0, one),)) @ torch.ones(2).double()
    with pytest.raises(TypeError, match="one less than blocks"):
        KroneckerMarkovPrecision((Dense(one),), ((one, one),))
    with pytest.raises(ValueError, match=r"transitions\[0\] must map block 1 of size 2"):
        KroneckerMarkovPrecision((Kronecker((one,)), Dense(two)), ((one, one),))
    with pytest.raises(ValueError, match="dtype"):
        KroneckerMarkovPrecision((Dense(one), Dense(one)), ((one.float(), one.float()),))
