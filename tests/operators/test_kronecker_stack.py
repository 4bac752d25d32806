"""Stacks of Kronecker products against the block diagonal of their blocks, in every method and under every solver."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import close, draw

from curvlib.operators import (
    BlockDiagonal,
    Dense,
    Identity,
    Kronecker,
    KroneckerEigen,
    KroneckerEigenStack,
    KroneckerStack,
    OperatorError,
    Scaled,
    Shifted,
)
from curvlib.solvers import Balance, FactoredTikhonov, FixedPi, SolveError, TraceNormPi, UnitPi, damped_inverse
from curvlib.solvers.inverse import eigendecompose

seeds = st.integers(0, 2**32 - 1)
dampings = st.sampled_from([0.05, 0.7, 3.0])
counts = st.integers(1, 5)
sizes = st.lists(st.integers(1, 4), min_size=1, max_size=3)
few = settings(max_examples=25)
CPU = torch.device("cpu")


def block_diagonal(blocks):
    coordinates = torch.arange(sum(block.size for block in blocks)).reshape(len(blocks), -1)
    return BlockDiagonal(tuple(blocks), tuple(coordinates), coordinates.numel())


def pair(d, count, sizes):
    """A stack, its blocks of very different scale, and the block diagonal that it must equal."""
    factors = tuple(torch.stack([d.symmetric(n) for _ in range(count)]) for n in sizes)
    factors = (factors[0] * 10.0 ** d.normal(count, 1, 1), *factors[1:])
    return KroneckerStack(factors), block_diagonal([Kronecker(block) for block in zip(*factors, strict=True)])


def eigen_pair(d, count, sizes):
    bases = tuple(torch.stack([d.orthogonal(n) for _ in range(count)]) if n > 1 else None for n in sizes)
    e = d.values(count, *sizes)
    blocks = [KroneckerEigen(tuple(Q if Q is None else Q[b] for Q in bases), e[b]) for b in range(count)]
    return KroneckerEigenStack(bases, e), block_diagonal(blocks)


pairs = pytest.mark.parametrize("make", [pair, eigen_pair])


@pairs
@few
@given(seed=seeds, count=counts, sizes=sizes, columns=st.integers(0, 3))
def test_products_and_entries(make, seed, count, sizes, columns):
    d = draw(seed, CPU, definite=seed % 2 == 0)
    C, expected = make(d, count, sizes)
    assert (C.size, C.block_count) == (expected.size, count)
    M = expected.to_dense()
    scale = max(1.0, float(M.abs().max()))
    V, v = d.normal(C.size, columns), d.normal(C.size)
    close(C @ V, expected @ V, scale)
    close(C @ V.T.contiguous().T, expected @ V, scale)
    close(C @ v, expected @ v, scale)
    close(C.quadratic_form(V), expected.quadratic_form(V), C.size * scale)
    close(C.to_dense(), M)
    close(C.diagonal(), expected.diagonal(), scale)
    close(C.trace(), expected.trace(), scale)
    close(C.frobenius_norm(), expected.frobenius_norm())


@pairs
@few
@given(seed=seeds, count=counts, sizes=sizes, damping=dampings)
def test_determinant_and_eigenvalues(make, seed, count, sizes, damping):
    C, expected = make(draw(seed, CPU), count, sizes)
    close(C.spectrum().sort().values, expected.spectrum().sort().values, 1.0)
    close(C.logdet(damping), expected.logdet(damping), C.size)


def test_determinant_without_damping_neither_underflows_nor_mixes_the_blocks():
    G, A = torch.tensor([1e-30, 1e20]).reshape(2, 1, 1), 1e-20 * torch.eye(20).expand(2, 20, 20)
    expected = block_diagonal([Kronecker(block) for block in zip(G, A, strict=True)]).logdet()
    torch.testing.assert_close(KroneckerStack((G, A)).logdet(), expected)
    assert expected.isfinite()


@pairs
@few
@given(seed=seeds, count=counts, sizes=sizes, damping=dampings, other=dampings)
def test_inverses_and_new_dampings(make, seed, count, sizes, damping, other):
    d = draw(seed, CPU)
    C, expected = make(d, count, sizes)
    V, spectral = d.normal(C.size, 2), eigendecompose(C)
    assert type(spectral) is type(damped_inverse(C, damping)) is KroneckerEigenStack
    close(spectral.to_dense(), expected.to_dense(), 1.0, 1e-11)
    close(damped_inverse(C, damping) @ V, damped_inverse(expected, damping) @ V, 1.0 / damping, 1e-11)
    close(damped_inverse(spectral, other) @ V, damped_inverse(expected, other) @ V, 1.0 / other, 1e-11)


class ByFirstEntry(Balance):
    """A third party's balance that knows single products alone."""

    def shares(self, factors):
        first, second = (float(1.0 + factor.diagonal()[0]) for factor in factors)
        return ((first / second) ** 0.5, (second / first) ** 0.5)


@pytest.mark.parametrize(
    "balance", [TraceNormPi(), UnitPi(), FixedPi(0.3), ByFirstEntry()], ids=lambda balance: type(balance).__name__
)
@few
@given(seed=seeds, count=counts, sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)), damping=dampings)
def test_factored_damping_shares_it_block_by_block(balance, seed, count, sizes, damping):
    C, expected = pair(draw(seed, CPU), count, sizes)
    solver = FactoredTikhonov(balance=balance)
    inverse, inverses = solver(C, damping), solver(expected, damping)
    assert type(inverse) is KroneckerStack
    close(inverse.to_dense(), inverses.to_dense(), 1.0, 1e-11)
    shares = [balance.shares(block.factors) for block in expected.blocks]
    close(balance.stack_shares(C), torch.tensor(shares, dtype=torch.float64).T, 1.0)
    for i, factor in enumerate(inverse.factors):
        close(factor, torch.stack([block.factors[i].to_dense() for block in inverses.blocks]), 1.0, 1e-11)


@few
@given(seed=seeds, count=counts, sizes=sizes, damping=dampings)
def test_factored_damping_of_any_number_of_factors_with_shift_and_multiple(seed, count, sizes, damping):
    C, expected = pair(draw(seed, CPU), count, sizes)
    solver = FactoredTikhonov()
    for wrap in (lambda block: block, lambda block: Shifted(block, 0.3), lambda block: Scaled(7.0, block)):
        close(solver(wrap(C), damping).to_dense(), solver(wrap(expected), damping).to_dense(), 1.0, 1e-11)


def test_a_dead_block_gets_equal_shares_and_leaves_the_others_theirs():
    G = torch.stack([torch.zeros(2, 2), 4.0 * torch.eye(2), -torch.eye(2)])
    shares = TraceNormPi().stack_shares(KroneckerStack((G, torch.eye(3).expand(3, 3, 3))))
    torch.testing.assert_close(shares.float(), torch.tensor([[1.0, 2.0, 1.0], [1.0, 0.5, 1.0]]))
    inverse = FactoredTikhonov()(KroneckerStack((G[:2], torch.eye(3).expand(2, 3, 3))), 4.0)
    expected = torch.tensor([1 / (2.0 * 3.0), 1 / (8.0 * 2.0)]).repeat_interleave(6)
    torch.testing.assert_close(inverse.diagonal(), expected)


@few
@given(seed=seeds, factor=st.sampled_from([-2.0, 0.3, 5.0]), shift=st.floats(-2.0, 2.0), damping=dampings)
def test_multiples_and_shifts_keep_the_structure(seed, factor, shift, damping):
    C, expected = pair(draw(seed, CPU, definite=False), 3, (2, 3))
    changed = eigendecompose(factor * C + shift * Identity(C.size, C.dtype))
    assert type(changed) is KroneckerEigenStack
    close(changed.to_dense(), factor * expected.to_dense() + shift * torch.eye(C.size, dtype=C.dtype), 1.0, 1e-11)
    negative = -1.0 * eigendecompose(pair(draw(seed, CPU), 2, (2, 2))[0])
    damping += float(negative.spectrum().abs().max())
    assert type(damped_inverse(negative, damping)) is KroneckerEigenStack
    inverse = torch.linalg.inv(negative.to_dense() + damping * torch.eye(8, dtype=C.dtype))
    close(damped_inverse(negative, damping).to_dense(), inverse, 1.0, 1e-10)


def test_powers():
    C, expected = pair(draw(0, CPU), 3, (2, 3))
    close(eigendecompose(C).map(torch.square).to_dense(), torch.linalg.matrix_power(expected.to_dense(), 2))


def test_rounding_is_judged_by_each_block_alone():
    G = torch.stack([torch.eye(2), 2.0**-100 * torch.eye(2), torch.ones(2, 2)]).double()
    e = eigendecompose(KroneckerStack((G,))).eigenvalues
    assert e.tolist() == [[1.0, 1.0], [2.0**-100, 2.0**-100], [0.0, pytest.approx(2.0)]]


def test_512_blocks_take_no_loop_over_them(monkeypatch):
    calls = []
    for name in ("eigh", "cholesky_ex"):
        function = getattr(torch.linalg, name)
        monkeypatch.setattr(torch.linalg, name, lambda M, f=function: calls.append(tuple(M.shape)) or f(M))
    d = draw(0, CPU, dtype=torch.float32)
    B = d.normal(512, 9, 9)
    C = KroneckerStack((d.values(512, 1, 1), B @ B.mT))
    for solver in (damped_inverse, FactoredTikhonov()):
        assert (solver(C, 0.1) @ d.normal(C.size)).isfinite().all()
    assert calls == 2 * [(512, 1, 1), (512, 9, 9)]


def test_a_failed_factorisation_of_one_block_is_done_in_float64():
    # det = 1 / 1.0005 beside entries of 4096: float32 cannot tell it from 0, although its entries are exact there.
    M = torch.tensor([[4097.0, 4096.0], [4096.0, 4095.0 + 2.0**-11]])
    inverse = FactoredTikhonov(balance=UnitPi())(KroneckerStack((torch.stack([torch.eye(2), M]),)), 0.0)
    exact = torch.linalg.inv(M.double())
    assert (inverse.factors[0][1].double() - exact).norm() / exact.norm() < 1e-7


def test_a_failed_eigendecomposition_is_done_in_float64_and_named_when_all_fail(monkeypatch):
    seen, eigh = [], torch.linalg.eigh

    def fail_in_float32(M):
        seen.append(M.dtype)
        if M.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(M)

    def fail(M):
        raise torch.linalg.LinAlgError("did not converge")

    C = KroneckerStack((2.0 * torch.eye(2).expand(3, 2, 2),))
    monkeypatch.setattr(torch.linalg, "eigh", fail_in_float32)
    assert eigendecompose(C).eigenvalues.tolist() == 3 * [[2.0, 2.0]]
    assert seen == [torch.float32, torch.float64]
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    with pytest.raises(SolveError, match=r"factors\[0\] of KroneckerStack.*\(3, 2, 2\) failed in every precision"):
        eigendecompose(C)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_factorised_in_float32(dtype):
    C = KroneckerStack((torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=dtype).expand(2, 2, 2),))
    assert eigendecompose(C).eigenvalues.tolist() == 2 * [[1.0, 3.0]]
    for solver in (damped_inverse, FactoredTikhonov()):
        close(solver(C, 1.0) @ torch.ones(4, dtype=dtype), torch.full((4,), 0.25, dtype=dtype), 1.0, 1e-2)


@pytest.mark.parametrize("solver", [damped_inverse, FactoredTikhonov(), lambda C, damping: eigendecompose(C)])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), "2 of factors.1..*KroneckerStack.*has 1 entries.*not finite"),
        (torch.tensor([[float("inf"), 0.0], [0.0, 1.0]]), "2 of factors.1..*KroneckerStack.*has 1 entries.*not finite"),
        (torch.tensor([[1.0, 1.0], [0.0, 1.0]]), "2 of factors.1..*KroneckerStack.*must be symmetric, but.* = 1 at"),
    ],
)
def test_a_block_that_is_not_finite_or_not_symmetric_is_named(solver, bad, message):
    C = KroneckerStack((torch.ones(4, 1, 1), torch.stack([torch.eye(2), torch.eye(2), bad, torch.eye(2)])))
    with pytest.raises(SolveError, match=f"Matrix {message}"):
        solver(C, 1.0)
    with pytest.raises(OperatorError, match=f"Matrix {message}"):
        C.logdet(1.0)


def test_an_indefinite_block_is_named_with_the_damping_that_works():
    A = torch.stack([torch.eye(2), torch.diag(torch.tensor([3.0, -0.25]))]).double()
    C = KroneckerStack((torch.ones(2, 1, 1, dtype=torch.float64), A))
    message = r"matrix 1 of factors\[1\] / p of KroneckerStack.*eigenvalue -0.25. Use a damping above 0.25"
    with pytest.raises(SolveError, match=message):
        FactoredTikhonov(balance=UnitPi())(C, 0.01)
    with pytest.raises(SolveError, match=r"KroneckerEigenStack.*eigenvalue -0.25. Use a damping above 0.25"):
        damped_inverse(C, 0.01)


def test_a_fixed_balance_needs_two_factors():
    with pytest.raises(ValueError, match="FixedPi needs blocks of two factors, got 1"):
        FactoredTikhonov(balance=FixedPi(2.0))(KroneckerStack((torch.ones(2, 1, 1),)), 1.0)


def test_a_stack_is_a_block_and_a_factor_like_any_other():
    d = draw(3, CPU)
    C, expected = pair(d, 2, (2, 2))
    M = d.symmetric(2)
    outside = Kronecker((C, M)), Kronecker((expected, M))
    close(outside[0].to_dense(), outside[1].to_dense(), 1.0)
    close(damped_inverse(outside[0], 0.5).to_dense(), damped_inverse(outside[1], 0.5).to_dense(), 1.0, 1e-11)
    inside = BlockDiagonal((C, Dense(M)), (torch.arange(8), torch.arange(8, 10)), 10)
    close(FactoredTikhonov()(inside, 0.5).to_dense()[:8, :8], FactoredTikhonov()(expected, 0.5).to_dense(), 1.0, 1e-11)


def test_products_and_solves_ignore_autocast():
    d = draw(0, CPU, dtype=torch.float32)
    C, _ = pair(d, 3, (2, 3))
    v = d.normal(C.size)
    outside = [C @ v, C.to_dense(), damped_inverse(C, 0.1) @ v, FactoredTikhonov()(C, 0.1) @ v]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = [C @ v, C.to_dense(), damped_inverse(C, 0.1) @ v, FactoredTikhonov()(C, 0.1) @ v]
    for a, b in zip(outside, inside, strict=True):
        assert torch.equal(a, b)
