"""The chains of recurrent layers against sums over all pairs of times, in float64."""

from itertools import pairwise

import pytest
import torch
from chain_cases import (
    covariance,
    lag,
    mean_length,
    over_all_lags,
    over_all_pairs,
    symmetric_root,
    transition,
    weights,
    zero_padded_moments,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import close, draw

from curvlib.operators import (
    GeneralKroneckerChain,
    Kronecker,
    KroneckerCongruence,
    OperatorError,
    SymmetricKroneckerChain,
)
from curvlib.operators.structure import absorb_factor

seeds = st.integers(0, 2**32 - 1)
CPU = torch.device("cpu")
few = settings(max_examples=20)
DRAWN_LENGTHS = [
    {1: 1.0},
    {2: 1.0},
    {7: 1.0},
    {50: 1.0},
    {1: 0.5, 2: 0.5},
    {3: 0.2, 4: 0.5, 11: 0.3},
    {1: 0.9, 30: 0.1},
]


def symmetric_chain(d, sizes, lengths, norm=0.95):
    """An operator and its oracle, with transitions that have eigenvalues of both signs."""
    G, A = ((covariance(d, n), transition(d, n, norm, symmetric=True)) for n in sizes)
    moments = [(lag(*F, 0), lag(*F, 1)) for F in (G, A)]
    C = SymmetricKroneckerChain(*(tuple(F[i] for F in moments) for i in (0, 1)), weights(lengths, d))
    return C, over_all_pairs(G, A, lengths)


def general_chain(d, sizes, norm=0.8):
    """An operator and its two factors (F_0, Psi)."""
    G, A = ((covariance(d, n), transition(d, n, norm)) for n in sizes)
    return GeneralKroneckerChain((G[0], A[0]), (lag(*G, 1), lag(*A, 1))), G, A


@pytest.mark.parametrize("lengths", DRAWN_LENGTHS, ids=str)
def test_symmetric_chain_is_the_sum_over_all_pairs_of_times(lengths, device):
    for seed in range(3):
        C, M = symmetric_chain(draw(seed, device), (2, 3), lengths)
        close(C.to_dense(), M, 1.0, 1e-11)
        close(C.diagonal(), M.diagonal(), 1.0, 1e-11)
        close(C.trace(), M.trace(), 1.0, 1e-11)


@few
@given(seed=seeds, T=st.integers(1, 50))
def test_the_inverse_of_a_symmetric_chain_is_the_dense_inverse(seed, T):
    C, M = symmetric_chain(draw(seed, CPU), (3, 2), {T: 1.0})
    expected = torch.linalg.inv(M)
    close(C.inverse().to_dense(), expected, 1.0, 1e-9)
    close(C.inverse().diagonal(), expected.diagonal(), 1.0, 1e-9)
    close(C.inverse().trace(), expected.trace(), 1.0, 1e-9)


@pytest.mark.parametrize("lengths", DRAWN_LENGTHS, ids=str)
def test_the_inverse_is_exact_for_drawn_lengths(lengths, device):
    C, M = symmetric_chain(draw(5, device), (2, 3), lengths)
    close(C.inverse().to_dense(), torch.linalg.inv(M), 1.0, 1e-9)


@few
@given(seed=seeds, norm=st.floats(0.0, 0.9))
def test_a_general_chain_is_the_sum_over_all_lags(seed, norm):
    C, G, A = general_chain(draw(seed, CPU), (2, 3), norm)
    # 0.81^150 < 1e-13
    M = over_all_lags(G, A, 150)
    close(C.to_dense(), M, 1.0, 1e-11)
    close(C.diagonal(), M.diagonal(), 1.0, 1e-11)
    close(C.trace(), M.trace(), 1.0, 1e-11)
    close(C.inverse().to_dense(), torch.linalg.inv(M), 1.0, 1e-9)
    close(C.inverse().diagonal(), torch.linalg.inv(M).diagonal(), 1.0, 1e-9)


def test_a_general_chain_approaches_the_sum_over_pairs_at_rate_one_over_length():
    C, G, A = general_chain(draw(1, CPU), (2, 2))
    inverse, errors = C.inverse().to_dense(), []
    for T in (20, 40, 80):
        exact = torch.linalg.inv(over_all_pairs(G, A, {T: 1.0}))
        errors.append(float((inverse - exact).norm() / exact.norm()))
    # The boundary terms are a / T + O(1 / T^2): halved at every doubling, up to a tenth of that.
    assert errors[0] > 1e-3
    assert [b / a for a, b in pairwise(errors)] == pytest.approx([0.5, 0.5], abs=0.05)


def test_a_symmetric_transition_is_no_different_in_a_general_chain():
    d = draw(2, CPU)
    G, A = ((covariance(d, n), transition(d, n, 0.7, symmetric=True)) for n in (2, 3))
    lag0, lag1 = (G[0], A[0]), (lag(*G, 1), lag(*A, 1))
    general = GeneralKroneckerChain(lag0, lag1)
    close(general.to_dense(), over_all_lags(G, A, 100), 1.0, 1e-11)
    T, errors = 2000, []
    for length in (T, 2 * T):
        finite = SymmetricKroneckerChain(lag0, lag1, 1.0 - torch.arange(length).double() / length)
        errors.append(float((finite.to_dense() - general.to_dense()).norm() / general.to_dense().norm()))
    assert errors[0] < 10 / T
    assert errors[1] / errors[0] == pytest.approx(0.5, abs=1e-2)


@pytest.mark.parametrize("zero", [0, 1])
def test_all_three_agree_without_correlation_in_time(zero, device):
    d = draw(3, device)
    G, A = covariance(d, 2), covariance(d, 3)
    lag1 = [0.5 * G, 0.5 * A]
    lag1[zero] = torch.zeros_like(lag1[zero])
    expected = Kronecker((G, A))
    for C in (
        SymmetricKroneckerChain((G, A), tuple(lag1), weights({9: 1.0}, d)),
        GeneralKroneckerChain((G, A), tuple(lag1)),
        SymmetricKroneckerChain((G, A), (0.5 * G, 0.5 * A), weights({1: 1.0}, d)),
    ):
        close(C.to_dense(), expected.to_dense())
        close(C.diagonal(), expected.diagonal())
        close(C.inverse().to_dense(), torch.linalg.inv(expected.to_dense()), 1.0, 1e-11)


def test_the_curvature_of_alternating_signs_is_not_overestimated():
    one = torch.ones(1, 1).double()
    lengths = {20: 1.0}
    r = weights(lengths, draw(0, CPU))
    chain = {psi: SymmetricKroneckerChain((one, one), (0.9 * one, psi * one), r).trace() for psi in (-0.9, 0.9)}
    psi = torch.tensor([[-0.9]], dtype=torch.float64)
    close(chain[-0.9], over_all_pairs((one, -psi), (one, psi), lengths).squeeze(), 1.0)
    assert chain[-0.9] < 0.2
    assert chain[0.9] > 5.0
    general = GeneralKroneckerChain((one, one), (0.9 * one, -0.9 * one))
    close(general.trace(), torch.tensor((1 - 0.81) / (1 + 0.81), dtype=torch.float64), 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("gap", [0.0, 1e-12, 1e-7, 1e-3])
def test_products_and_inverses_stay_finite_as_the_correlation_becomes_perfect(dtype, sign, gap, device):
    d = draw(4, device)
    Q, R = (d.orthogonal(n) for n in (2, 3))
    ends = torch.tensor([sign, 0.3, -0.4], dtype=torch.float64, device=device)
    lag0 = tuple(torch.eye(n, dtype=dtype, device=device) for n in (2, 3))
    G1 = (1.0 - gap) * Q @ Q.T
    A1 = R @ torch.diag((1.0 - gap) * ends) @ R.T
    lag1 = (G1.to(dtype), A1.to(dtype))
    odd, v = weights({7: 1.0}, draw(4, device)), d.normal(6).to(dtype)
    for C in (SymmetricKroneckerChain(lag0, lag1, odd), GeneralKroneckerChain(lag0, lag1)):
        assert (C @ v).isfinite().all()
        assert (C.inverse() @ v).isfinite().all()
        assert C.diagonal().isfinite().all()
        assert torch.linalg.eigvalsh(C.to_dense().double()).min() > -1e-6 * C.to_dense().norm()


def test_a_perfectly_correlated_sequence_counts_once_for_every_pair():
    one = torch.ones(1, 1).double()
    C = SymmetricKroneckerChain((one, one), (one, one), weights({12: 1.0}, draw(0, CPU)))
    assert float(C.trace()) == pytest.approx(144 / 12)
    assert float(C.inverse().trace()) == pytest.approx(12 / 144)


def test_an_alternating_direction_cancels_over_an_even_number_of_steps():
    one = torch.ones(1, 1).double()
    even, odd = (SymmetricKroneckerChain((one, one), (one, -one), weights({T: 1.0}, draw(0, CPU))) for T in (12, 13))
    assert float(even.trace()) == 0.0
    with pytest.raises(OperatorError, match="even number of steps"):
        even.inverse()
    assert float(odd.trace()) == pytest.approx(1 / 13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_of_the_weights_makes_no_cancelled_sum_negative(dtype):
    one = torch.ones(1, 1).double()
    for T in range(2, 60, 2):
        C = SymmetricKroneckerChain((one, one), (one, -one), weights({T: 1.0}, draw(0, CPU, dtype=dtype)))
        assert float(C.trace()) == 0.0
        with pytest.raises(OperatorError, match="is singular"):
            C.inverse()


def test_only_the_symmetric_part_of_lag_1_counts_in_a_symmetric_chain():
    d = draw(13, CPU)
    C, M = symmetric_chain(d, (2, 3), {6: 1.0})
    B, L = d.normal(2, 2), d.normal(3, 3)
    skewed = SymmetricKroneckerChain(C.lag0, (C.lag1[0] + B - B.T, C.lag1[1] + L - L.T), C.weights)
    close(skewed.to_dense(), M, 1.0, 1e-11)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_moments_that_no_chain_has_are_those_of_the_nearest_one(sign):
    d = draw(12, CPU)
    G, A = covariance(d, 2), covariance(d, 3)
    for make in (lambda *lags: SymmetricKroneckerChain(*lags, R8), GeneralKroneckerChain):
        possible, impossible = (make((G, A), (sign * c * G, 0.5 * A)) for c in (1.0, 1.5))
        close(impossible.to_dense(), possible.to_dense(), 1.0, 1e-11)
        close(impossible.inverse().to_dense(), possible.inverse().to_dense(), 1.0, 1e-11)


@pytest.mark.parametrize("norm", [0.999, 1.0 - 1e-6, 1.0])
def test_the_clamp_is_the_same_in_every_method(norm):
    """Diagonal, matrix and inverse of one chain; clamped is only what lies within sqrt(eps) = 1.5e-8 of 1."""
    d = draw(6, CPU)
    Q = torch.linalg.qr(d.normal(3, 3)).Q.contiguous()  # not symmetric, all singular values 1
    eye = torch.eye(3, dtype=d.dtype), torch.eye(2, dtype=d.dtype)
    C = GeneralKroneckerChain(eye, (norm * Q, torch.diag(torch.tensor([norm, -norm])).double()))
    M = C.to_dense()
    # The condition is up to ((1 + x) / (1 - x))^2, x = norm^2; 1e-15 of the product of the norms.
    condition = float(M.norm() * C.inverse().to_dense().norm())
    close(C.diagonal(), M.diagonal(), 1.0, 1e-7)
    close(M @ C.inverse().to_dense(), torch.eye(6, dtype=d.dtype), condition, 1e-14)
    if norm < 1.0:
        P = torch.kron(norm * Q, C.lag1[1])
        eye = torch.eye(6, dtype=d.dtype)
        expected = torch.linalg.inv(eye - P) + torch.linalg.inv(eye - P.T) - eye
        close(M, expected, 1.0, 1e-8)


@few
@given(seed=seeds, norm=st.floats(0.0, 0.98), T=st.integers(1, 40))
def test_solving_a_product_gives_the_vector_back(seed, norm, T):
    d = draw(seed, CPU)
    general, _, _ = general_chain(d, (3, 2), norm)
    symmetric, _ = symmetric_chain(d, (3, 2), {T: 1.0}, norm)
    for C in (general, symmetric):
        V = d.normal(C.size, 2)
        close(C.inverse() @ (C @ V), V, 1.0, 1e-8)


@pytest.mark.parametrize("norm", [0.5, 0.95])
def test_float32_is_as_accurate_as_float32_can_be(norm, device):
    d = draw(7, device)
    general, _, _ = general_chain(d, (8, 6), norm)
    symmetric, _ = symmetric_chain(d, (8, 6), {20: 1.0}, norm)
    V = d.normal(48, 3)
    for C, single in (
        (general, GeneralKroneckerChain(*(tuple(F.float() for F in pair) for pair in (general.lag0, general.lag1)))),
        (
            symmetric,
            SymmetricKroneckerChain(
                *(tuple(F.float() for F in pair) for pair in (symmetric.lag0, symmetric.lag1)),
                symmetric.weights.float(),
            ),
        ),
    ):
        assert (single @ V.float()).dtype == torch.float32
        for wide, narrow in ((C, single), (C.inverse(), single.inverse())):
            condition = float(torch.linalg.cond(C.to_dense())) if wide is not C else 1.0
            error = ((wide @ V) - (narrow @ V.float()).double()).norm() / (wide @ V).norm()
            assert error < 1e-6 * max(10.0, condition)


@pytest.mark.parametrize("make", [lambda *lags: SymmetricKroneckerChain(*lags, R8), GeneralKroneckerChain])
def test_singular_moments_keep_to_their_range(make):
    """Dead units and rank-deficient moments: the chain of the range, embedded."""
    d = draw(8, CPU)
    B, L = d.normal(4, 2), d.normal(3, 3)
    psi = 0.5 * d.orthogonal(2)
    small_lag0, small_lag1 = (torch.eye(2, dtype=d.dtype), L @ L.T), (psi, 0.3 * L @ L.T)
    lag0, lag1 = (B @ B.T, small_lag0[1]), (B @ psi @ B.T, small_lag1[1])
    U = torch.kron(B, torch.eye(3, dtype=d.dtype))
    C = make(lag0, lag1)
    close(C.to_dense(), U @ make(small_lag0, small_lag1).to_dense() @ U.T, 1.0, 1e-11)
    with pytest.raises(OperatorError, match=r"factor G of .*Chain.* is singular, of rank 2 and size 4"):
        C.inverse()


R8 = 1.0 - torch.arange(8).double() / 8


def test_dead_factors_give_zero():
    zero, one = torch.zeros(2, 2), torch.eye(3)
    for C in (
        GeneralKroneckerChain((zero, one), (zero, one / 2)),
        SymmetricKroneckerChain((zero, one), (zero, one), R8),
    ):
        assert torch.equal(C.to_dense(), torch.zeros(6, 6))


class TestZeroPaddedEstimates:
    """Moments of random sequences, with zeros after their ends."""

    @staticmethod
    def moments(seed, N, T, sizes):
        d = draw(seed, CPU)
        keep = torch.arange(T) < torch.randint(1, T + 1, (N, 1), generator=d.generator)
        mixing = [d.normal(n, n) for n in sizes]
        # Random walks: strong correlations of consecutive steps.
        series = [(d.normal(N, T, n).cumsum(1) @ B) * keep.unsqueeze(2) for n, B in zip(sizes, mixing, strict=True)]
        return [zero_padded_moments(f) for f in series]

    @given(seed=seeds, N=st.integers(1, 4), T=st.integers(1, 12), n=st.integers(1, 4))
    @settings(max_examples=30)
    def test_lags_0_and_1_are_a_covariance(self, seed, N, T, n):
        ((F0, F1),) = self.moments(seed, N, T, (n,))
        toeplitz = torch.cat([torch.cat([F0, F1.T], 1), torch.cat([F1, F0], 1)])
        assert torch.linalg.eigvalsh(toeplitz).min() > -1e-12 * toeplitz.abs().max()

    @given(seed=seeds, N=st.integers(1, 4), T=st.integers(1, 12), sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)))
    @settings(max_examples=40)
    def test_operators_are_symmetric_and_positive_semi_definite(self, seed, N, T, sizes):
        G, A = self.moments(seed, N, T, sizes)
        lag0, lag1 = (G[0], A[0]), (G[1], A[1])
        r = weights({T: 0.5, max(T // 2, 1): 0.5}, draw(0, CPU))
        for C in (SymmetricKroneckerChain(lag0, lag1, r), GeneralKroneckerChain(lag0, lag1)):
            M = C.to_dense()
            # A walk is correlated up to 1 - O(1 / T^2), and rounding grows by 1 / (1 - x).
            close(M, M.T, 1e-30, 1e-10)
            assert torch.linalg.eigvalsh((M + M.T) / 2).min() >= -1e-10 * M.abs().max()
            # More than the diagonal of lag 0 in the mean where everything is a positive multiple of one walk.
            assert M.isfinite().all()


def test_transitions_of_an_estimate_are_those_of_the_series():
    d = draw(9, CPU)
    psi = transition(d, 3, 0.8)
    noise = symmetric_root(torch.eye(3).double() - psi @ psi.T)
    x = [d.normal(400, 3)]
    for _ in range(400):
        x.append(x[-1] @ psi.T + d.normal(400, 3) @ noise)
    F0, F1 = zero_padded_moments(torch.stack(x, dim=1))
    C = GeneralKroneckerChain((torch.eye(1).double(), F0), (0.9 * torch.eye(1).double(), F1))
    expected = over_all_lags((torch.eye(1).double(), 0.9 * torch.eye(1).double()), (torch.eye(3).double(), psi), 150)
    # 160,000 correlated samples: errors of about 1 / 400 times the length of memory.
    assert (C.to_dense() - expected).norm() / expected.norm() < 0.03


def test_factors_are_absorbed_by_the_first_one():
    C, _, _ = general_chain(draw(10, CPU), (2, 3))
    symmetric, M = symmetric_chain(draw(10, CPU), (2, 3), {5: 1.0})
    for operator in (C, symmetric):
        tripled = absorb_factor(operator, 3.0)
        assert type(tripled) is type(operator)
        close(tripled.to_dense(), 3.0 * operator.to_dense(), 1.0)
        close(absorb_factor(operator, 0.0).to_dense(), 0.0 * M)
        assert absorb_factor(operator, -1.0) is None
    inverse = C.inverse()
    close(absorb_factor(inverse, -2.0).to_dense(), -2.0 * inverse.to_dense())


def test_long_sums_take_a_number_of_products_that_grows_with_the_logarithm():
    one = torch.ones(1, 1).double()
    lengths = [len(GeneralKroneckerChain((one, one), (one, x * one))._powers) for x in (0.0, 0.5, 0.99, 1.0)]
    # log2(log(eps / 4) / log(x)) with x clamped to (1 - sqrt(eps))^2
    assert lengths == [0, 6, 12, 31]


def test_decompositions_are_made_once(monkeypatch):
    C, _, _ = general_chain(draw(0, CPU), (2, 3))
    symmetric, _ = symmetric_chain(draw(0, CPU), (2, 3), {5: 1.0})
    calls = []
    for name in ("eigh", "svd"):
        function = getattr(torch.linalg, name)
        monkeypatch.setattr(torch.linalg, name, lambda M, f=function: calls.append(M.dtype) or f(M))
    v = torch.ones(6).double()
    for operator in (C, symmetric):
        for _ in range(2):
            assert (operator @ v + operator.inverse() @ v + operator.diagonal()).isfinite().all()
    assert calls == 8 * [torch.float64]


E2, E3, HALF = torch.eye(2), torch.eye(3), 0.5 * torch.eye(2)
NAN = torch.full((2, 2), float("nan"))
R2 = torch.tensor([1.0, 0.5])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: GeneralKroneckerChain([E2, E2], (E2, E2)),
            TypeError,
            "lag0 must be a tuple of two matrices.*got list",
        ),
        (lambda: GeneralKroneckerChain((E2, E2), (E2,)), TypeError, "lag1 must be a tuple of two.*got 1 of them"),
        (
            lambda: GeneralKroneckerChain((E2, torch.ones(2, 3)), (E2, E2)),
            ValueError,
            r"lag0\[1\].*\(2, 2\), got \(2, 3",
        ),
        (
            lambda: GeneralKroneckerChain((E2, E2), (E2, E3)),
            ValueError,
            r"lag1\[1\] must have shape \(2, 2\), got \(3, 3",
        ),
        (
            lambda: GeneralKroneckerChain((E2, E2), (E2, E2.double())),
            ValueError,
            r"lag1\[1\] must agree with lag0\[0\]",
        ),
        (lambda: GeneralKroneckerChain((E2, 1.0), (E2, E2)), TypeError, r"lag0\[1\] must be a tensor, got float"),
        (lambda: GeneralKroneckerChain((E2[:0, :0], E2), (E2[:0, :0], E2)), ValueError, "size must be at least 1"),
        (lambda: SymmetricKroneckerChain((E2, E2), (E2, E2), [1.0]), TypeError, "weights must be a tensor, got list"),
        (lambda: SymmetricKroneckerChain((E2, E2), (E2, E2), E2), ValueError, r"weights must have shape \(L,\)"),
        (lambda: SymmetricKroneckerChain((E2, E2), (E2, E2), R2[:0]), ValueError, "weights must not be empty"),
        (lambda: KroneckerCongruence((), E2), TypeError, "terms must be a non-empty tuple, got tuple"),
        (lambda: KroneckerCongruence(((E2,), (E2, E2)), R2), TypeError, r"terms\[1\] must be a tuple of as many"),
        (lambda: KroneckerCongruence(((E2, E2),), R2), ValueError, r"values must have shape \(r1, r2\), got \(2,\)"),
        (
            lambda: KroneckerCongruence(((E3,),), R2),
            ValueError,
            r"terms\[0\]\[0\] must have shape \(2, d\), got \(3, 3\)",
        ),
        (lambda: KroneckerCongruence(((E2,), (E3[:2],)), R2), ValueError, r"terms\[1\]\[0\] must have shape \(2, 2\)"),
        (lambda: KroneckerCongruence(((E2.double(),),), R2), ValueError, "must agree with values"),
    ],
    ids=range(16),
)
def test_bad_arguments_are_named_at_once(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("lag0", "lag1", "message"),
    [
        ((E2, NAN), (HALF, HALF), "lag0, factor A of .*Chain.*4 entries that are not finite"),
        ((E2, E2), (NAN, HALF), "lag1, factor G of .*Chain.*4 entries that are not finite"),
        ((E2 + torch.tensor([[0.0, 1.0], [0.0, 0.0]]), E2), (HALF, HALF), "lag0, factor G of .*must be symmetric"),
        ((E2, -E2), (HALF, HALF), "lag0, factor A of .*must be positive semi-definite.*eigenvalue -1 beside 1"),
    ],
)
def test_bad_entries_are_named_at_the_first_use(lag0, lag1, message):
    for C in (SymmetricKroneckerChain(lag0, lag1, R2), GeneralKroneckerChain(lag0, lag1)):
        for use in (C.to_dense, C.diagonal, C.inverse):
            with pytest.raises(OperatorError, match=message):
                use()


@pytest.mark.parametrize("bad", [[1.0, 0.5, 0.5], [1.0, 0.0, 0.5], [2.0, 1.0], [1.0, float("nan")], [1.0, 1.0]])
def test_weights_of_no_lengths_are_refused(bad):
    with pytest.raises(OperatorError, match=r"weights of SymmetricKroneckerChain.*must be 1, r_1, .*convex"):
        SymmetricKroneckerChain((E2, E2), (HALF, HALF), torch.tensor(bad)).to_dense()


def test_a_failed_decomposition_names_the_factor(monkeypatch):
    def fail(M):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", fail)
    with pytest.raises(
        OperatorError, match=r"factor G of GeneralKroneckerChain.*shape \(2, 2\) failed: did not converge"
    ):
        GeneralKroneckerChain((E2, E2), (HALF, HALF)).to_dense()


def test_mean_length_is_the_scale_of_whole_sequences():
    d, lengths = draw(11, CPU), {2: 0.5, 5: 0.5}
    C, _ = symmetric_chain(d, (2, 2), lengths)
    # sum over the pairs of a sequence in which every step is the same: E[T^2] lag 0
    same = SymmetricKroneckerChain(C.lag0, C.lag0, C.weights)
    expected = 0.5 * (4 + 25) * Kronecker(C.lag0).to_dense()
    close(mean_length(lengths) * same.to_dense(), expected, 1.0)
