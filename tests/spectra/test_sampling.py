"""sample and sample_inverse: exact covariances, by putting unit vectors in place of the random numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import CASES, close, draw

from curvlib.operators import BlockDiagonal, Dense, Diagonal, Identity, Kronecker, LowRank, MatrixFree
from curvlib.solvers import SolveError
from curvlib.spectra import NoStructureError, sample, sample_inverse, sampling

CPU = torch.device("cpu")
seeds = st.integers(0, 2**32 - 1)
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
few = settings(max_examples=5)
# Products alone have no root.
UNSTRUCTURED = {
    "scaled_matrix_free",
    "block_diagonal",
    "matrix_free",
    "matrix_free_with_form",
    "kronecker_congruence",
    "kronecker_congruence_of_two_terms",
    "symmetric_kronecker_chain",
    "general_kronecker_chain",
    "kronecker_markov_chain",
    "kronecker_markov_precision",
}
WIDTH = 80


@pytest.fixture
def units(monkeypatch):
    """Independent sources of noise become different columns of the identity: the draws are then S itself."""
    used = []

    def noise(size, count, like, generator):
        assert count == WIDTH
        start = sum(used)
        used.append(size)
        result = torch.zeros(size, WIDTH, dtype=like.dtype, device=like.device)
        rows = torch.arange(size, device=like.device)
        result[rows, start + rows] = 1.0
        return result

    monkeypatch.setattr(sampling, "_noise", noise)
    return used


def covariance(used, function, C, damping):
    used.clear()
    S = function(C, WIDTH, damping=damping)
    assert sum(used) <= WIDTH
    return S @ S.T


@cases
@few
@given(seed=seeds, damping=st.sampled_from([0.3, 2.0]))
def test_covariances_are_the_operator_and_its_inverse(case, device, units, seed, damping):
    C, M = case(draw(seed, device))
    damped = M + damping * torch.eye(len(M), dtype=M.dtype, device=device)
    if case.__name__ in UNSTRUCTURED:
        for function in (sample, sample_inverse):
            with pytest.raises(NoStructureError):
                covariance(units, function, C, damping)
        return
    close(covariance(units, sample, C, damping), damped, 1.0, 1e-11)
    # a sum without structure is solved by conjugate gradients
    tolerance = 1e-8 if case.__name__ == "sum_of_kronecker_and_diagonal" else 1e-11
    close(covariance(units, sample_inverse, C, damping), torch.linalg.inv(damped), 1 / damping, tolerance)


@cases
@few
@given(seed=seeds)
def test_a_semi_definite_operator_needs_no_damping(case, device, units, seed):
    C, M = case(draw(seed, device))
    if case.__name__ not in UNSTRUCTURED:
        close(covariance(units, sample, C, 0.0), M, 1.0, 1e-11)


def test_a_low_rank_with_a_varying_diagonal_and_negative_weights(units):
    d = draw(1, CPU)
    U = d.normal(6, 2)
    C = LowRank(U, torch.tensor([1.0, -0.01], dtype=torch.float64), 1.0 + d.values(6))
    close(covariance(units, sample, C, 0.0), C.to_dense(), 1.0, 1e-11)
    close(covariance(units, sample_inverse, C, 0.0), torch.linalg.inv(C.to_dense()), 1.0, 1e-11)
    indefinite = LowRank(U, torch.tensor([1.0, -9.0], dtype=torch.float64), C.diagonal_part)
    with pytest.raises(SolveError, match="relative to its diagonal it has the eigenvalue"):
        sample(indefinite, WIDTH)


def test_coordinates_without_a_block_have_the_damping(units):
    C = BlockDiagonal((Diagonal(torch.tensor([2.0])),), (torch.tensor([1]),), 3)
    for damping in (0.25, 4.0):
        expected = torch.diag(torch.tensor([damping, 2.0 + damping, damping]))
        close(covariance(units, sample, C, damping), expected, 1.0, 1e-6)
        close(covariance(units, sample_inverse, C, damping), torch.linalg.inv(expected), 1.0, 1e-6)


def test_negative_factors_and_shifts(units):
    C = Dense(torch.diag(torch.tensor([-1.0, -4.0])))
    close(covariance(units, sample, -1.0 * C, 0.0), -C.to_dense(), 1.0, 1e-6)
    shifted = -1.0 * C + -0.5 * Identity(2)
    close(covariance(units, sample, shifted, 0.1), torch.diag(torch.tensor([0.6, 3.6])), 1.0, 1e-6)
    assert float(covariance(units, sample, 0.0 * C, 0.0).abs().max()) == 0.0


def test_draws_have_the_covariance_and_follow_the_generator(device):
    C, M = CASES["kronecker"](draw(5, device))
    count = 20_000

    def draws(seed):
        return sample(C, count, torch.Generator(device).manual_seed(seed), 0.1)

    x = draws(0)
    assert x.shape == (C.size, count)
    assert torch.equal(x, draws(0))
    assert not torch.equal(x, draws(1))
    expected = M + 0.1 * torch.eye(C.size, dtype=M.dtype, device=device)
    # Var(x_i x_j) = C_ii C_jj + C_ij^2: five standard errors of the mean over the draws.
    d = expected.diagonal()
    bound = 5 * ((d.outer(d) + expected.square()) / count).sqrt()
    assert bool(((x @ x.T / count - expected).abs() <= bound).all())
    assert bool((x.mean(1).abs() <= 5 * (d / count).sqrt()).all())


def test_terms_and_blocks_use_different_noise():
    one = Diagonal(torch.ones(2000))
    x = sample(BlockDiagonal((one, one), (torch.arange(2000), torch.arange(2000, 4000)), 4000), 1)
    assert abs(float((x[:2000] * x[2000:]).mean())) < 5 / 2000**0.5
    with pytest.raises(SolveError, match="belong to no block, so that their variance is infinite"):
        sample_inverse(BlockDiagonal((one,), (torch.arange(2000),), 2001), 1)


def test_an_indefinite_term_of_a_sum_is_refused():
    C = Kronecker((torch.eye(2), torch.diag(torch.tensor([1.0, -1.0])))) + Diagonal(torch.arange(2.0, 6.0))
    with pytest.raises(SolveError, match=r"drawn from term by term.*Term 0: .*eigenvalue -1"):
        sample(C, 1)
    product = Kronecker((torch.eye(2), torch.eye(2)))
    with pytest.raises(SolveError, match="multiples of I add up to -1 < 0"):
        sample(product + Diagonal(torch.arange(4.0)) - Identity(4), 1)


def test_bad_arguments():
    C = Identity(3)
    with pytest.raises(TypeError, match="operator must be a LinearOperator"):
        sample(torch.eye(2), 1)
    with pytest.raises(ValueError, match=r"sample_inverse\(count=...\) must be an integer >= 1, got 0"):
        sample_inverse(C, 0)
    with pytest.raises(TypeError, match=r"manual_seed\(seed\)"):
        sample(C, 1, 0)
    with pytest.raises(ValueError, match="damping must be"):
        sample(C, 1, damping=-1.0)
    with pytest.raises(NoStructureError, match=r"Dense\(C.to_dense\(\)\)"):
        sample(MatrixFree(lambda V: V, 3), 1)
