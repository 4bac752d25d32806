"""Factored Tikhonov regularisation against its formulas, factor by factor."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import close, draw

from curvlib.operators import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Identity,
    Kronecker,
    LinearOperator,
    MatrixFree,
    Scaled,
    Shifted,
)
from curvlib.solvers.errors import SolveError
from curvlib.solvers.factored_tikhonov import Balance, FactoredTikhonov, FixedPi, TraceNormPi, UnitPi
from curvlib.solvers.inverse import damped_inverse

seeds = st.integers(0, 2**32 - 1)
dampings = st.sampled_from([0.01, 0.5, 4.0])
CPU = torch.device("cpu")
few = settings(max_examples=25)


def eye(n):
    return torch.eye(n, dtype=torch.float64)


def two_factor_formula(G, A, damping, pi):
    gamma = math.sqrt(damping)
    return torch.kron(torch.linalg.inv(G + gamma / pi * eye(len(G))), torch.linalg.inv(A + pi * gamma * eye(len(A))))


def paper_pi(G, A):
    return math.sqrt(float(A.trace() / len(A)) / float(G.trace() / len(G)))


@few
@given(seed=seeds, damping=dampings)
def test_two_factors_follow_the_paper(seed, damping):
    d = draw(seed, CPU)
    G, A = d.symmetric(3), 10.0 * d.symmetric(4)
    inverse = FactoredTikhonov()(Kronecker((G, A)), damping)
    close(inverse.to_dense(), two_factor_formula(G, A, damping, paper_pi(G, A)), 1.0, 1e-9)
    assert [type(factor) for factor in inverse.factors] == [Dense, Dense]


@few
@given(seed=seeds, damping=dampings, k=st.integers(1, 4))
def test_k_factors_follow_the_scaled_formula(seed, damping, k):
    d = draw(seed, CPU)
    factors = [d.factor() * d.symmetric(n) for n in (3, 2, 2, 1)[:k]]
    n = [float(F.trace()) / len(F) for F in factors]
    c = math.prod(n) ** (1.0 / k)
    expected = torch.ones(1, 1, dtype=torch.float64)
    for F, n_i in zip(factors, n, strict=True):
        expected = torch.kron(expected, torch.linalg.inv(c / n_i * F + damping ** (1.0 / k) * eye(len(F))))
    close(FactoredTikhonov()(Kronecker(tuple(factors)), damping).to_dense(), expected, 1.0, 1e-8)


@few
@given(seed=seeds, damping=dampings, c=st.floats(1e-6, 1e6))
def test_invariance_under_a_change_of_scale_between_the_factors(seed, damping, c):
    d = draw(seed, CPU)
    G, A = d.symmetric(3), d.symmetric(2)
    solver = FactoredTikhonov()
    expected = solver(Kronecker((G, A)), damping).to_dense()
    close(solver(Kronecker((G / c, c * A)), damping).to_dense(), expected, 1.0, 1e-8)


def test_without_the_balance_the_scale_matters():
    d = draw(0, CPU)
    G, A = d.symmetric(3), d.symmetric(2)
    solver = FactoredTikhonov(balance=UnitPi())
    difference = solver(Kronecker((G, A)), 0.5).to_dense() - solver(Kronecker((G / 9, 9 * A)), 0.5).to_dense()
    assert difference.abs().max() > 0.01


@few
@given(seed=seeds, damping=dampings, pi=st.floats(0.1, 10.0))
def test_every_balance_is_what_it_says(seed, damping, pi):
    d = draw(seed, CPU)
    G, A = d.symmetric(3), d.symmetric(2)
    block = Kronecker((G, A))
    unit = FactoredTikhonov(balance=UnitPi())(block, damping).to_dense()
    close(unit, two_factor_formula(G, A, damping, 1.0), 1.0, 1e-9)
    fixed = FactoredTikhonov(balance=FixedPi(pi))(block, damping).to_dense()
    close(fixed, two_factor_formula(G, A, damping, pi), 1.0, 1e-9)


def test_shares_have_product_one_and_do_not_underflow():
    factors = (Diagonal(torch.full((2,), 1e-30)), Diagonal(torch.full((3,), 1e-35)), Diagonal(torch.ones(2)))
    assert math.prod(TraceNormPi().shares(factors)) == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [torch.zeros(2, 2), -torch.eye(2)])
def test_pi_is_one_where_a_trace_is_not_positive(bad):
    assert TraceNormPi().shares((Dense(bad), Identity(3))) == (1.0, 1.0)


def test_a_dead_layer_is_still_solved():
    inverse = FactoredTikhonov()(Kronecker((torch.zeros(2, 2), 3.0 * torch.eye(2))), 4.0)
    torch.testing.assert_close(inverse.to_dense(), torch.eye(4) / (2.0 * 5.0))


@few
@given(seed=seeds, damping=dampings)
def test_it_regularises_at_least_as_much_as_the_damping(seed, damping):
    d = draw(seed, CPU)
    block = Kronecker((d.symmetric(3), d.symmetric(2)))
    gap = damped_inverse(block, damping).to_dense() - FactoredTikhonov()(block, damping).to_dense()
    assert torch.linalg.eigvalsh((gap + gap.T) / 2).min() > -1e-9 / damping


@few
@given(seed=seeds, damping=dampings)
def test_blocks_shifts_and_factors(seed, damping):
    d = draw(seed, CPU)
    G, A, M = d.symmetric(2), d.symmetric(2), d.symmetric(2)
    solver = FactoredTikhonov()
    block = Kronecker((G, A))
    close(solver(Shifted(block, 0.3), damping).to_dense(), solver(block, damping + 0.3).to_dense())
    # c (G x A) is (c G) x A: the balance makes the place of the factor irrelevant.
    close(
        solver(Scaled(7.0, block), damping).to_dense(), solver(Kronecker((7.0 * G, A)), damping).to_dense(), 1.0, 1e-9
    )
    coordinates = (torch.tensor([6, 1, 4, 2]), torch.tensor([5, 0]))
    result = solver(BlockDiagonal((block, Dense(M)), coordinates, 7), damping).to_dense()
    close(result[coordinates[0]][:, coordinates[0]], solver(block, damping).to_dense())
    close(result[coordinates[1]][:, coordinates[1]], torch.linalg.inv(M + damping * eye(2)), 1.0, 1e-9)
    assert float(result[3, 3]) == pytest.approx(1.0 / damping)
    assert result[0, 1] == 0.0


def test_other_structures_get_the_exact_inverse():
    C = Diagonal(torch.tensor([1.0, 3.0]))
    assert FactoredTikhonov()(C, 1.0).diagonal().tolist() == [0.5, 0.25]
    assert FactoredTikhonov()(Scaled(0.0, C), 2.0).diagonal().tolist() == [0.5, 0.5]
    free = FactoredTikhonov()(MatrixFree(lambda V: 3.0 * V, 2), 1.0)
    torch.testing.assert_close(free @ torch.ones(2), torch.full((2,), 0.25))


def test_diagonal_factors_stay_diagonal():
    inverse = FactoredTikhonov()(Kronecker((torch.eye(2), Diagonal(torch.ones(3)))), 1.0)
    assert [type(factor) for factor in inverse.factors] == [Dense, Diagonal]
    torch.testing.assert_close(inverse.to_dense(), torch.eye(6) / 4)


def test_without_damping_it_is_the_inverse():
    d = draw(0, CPU)
    G, A = (d.symmetric(n) + eye(n) for n in (3, 2))
    close(FactoredTikhonov()(Kronecker((G, A)), 0.0).to_dense(), torch.linalg.inv(torch.kron(G, A)), 1.0, 1e-10)
    with pytest.raises(SolveError, match=r"Factor 1 of Kronecker.*Use a damping above"):
        FactoredTikhonov()(Kronecker((G, torch.ones(2, 2).double())), 0.0)


def test_errors_name_block_and_factor():
    nan = torch.full((2, 2), float("nan"))
    block = Kronecker((torch.eye(2), nan))
    with pytest.raises(SolveError, match=r"Block 0 of BlockDiagonal.*Factor 1 of Kronecker.*not finite"):
        FactoredTikhonov()(BlockDiagonal((block,), (torch.arange(4),), 4), 1.0)
    with pytest.raises(SolveError, match="no block"):
        FactoredTikhonov()(BlockDiagonal((Identity(1),), (torch.tensor([0]),), 2), 0.0)
    with pytest.raises(SolveError, match=r"damping \+ shift >= 0"):
        FactoredTikhonov()(Shifted(Identity(2), -2.0), 1.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: FactoredTikhonov()(Identity(2), -1.0), ValueError, "damping must be"),
        (lambda: FactoredTikhonov()(torch.eye(2), 1.0), TypeError, "must be a LinearOperator, got Tensor"),
        (lambda: FactoredTikhonov(balance="trace"), TypeError, "balance must be a Balance.*got str"),
        (lambda: FixedPi(0.0), ValueError, "pi must be a finite number > 0, got 0.0"),
        (lambda: FixedPi(2.0).shares((Identity(2),)), ValueError, "blocks of two factors, got 1"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_third_parties_add_structures_and_balances():
    class MyOperator(LinearOperator):
        size = 4

        def matmat(self, V):
            return 2.0 * V

    seen = []

    @FactoredTikhonov.register(MyOperator)
    def _(operator, damping, solver):
        seen.append(solver.balance)
        return Identity(4)

    class Mine(Balance):
        def shares(self, factors):
            return (0.5, 2.0)

    solver = FactoredTikhonov(balance=Mine())
    block = BlockDiagonal((MyOperator(),), (torch.arange(4),), 4)
    assert solver(block, 1.0).diagonal().tolist() == [1.0] * 4
    assert seen == [solver.balance]
    G, A = 3.0 * eye(2), 5.0 * eye(2)
    close(solver(Kronecker((G, A)), 1.0).to_dense(), two_factor_formula(G, A, 1.0, 2.0))
