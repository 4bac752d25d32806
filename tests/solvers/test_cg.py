"""Conjugate gradients against dense float64 solves, SciPy's, and every way in which a solve can fail."""

from dataclasses import dataclass
from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_systems import EveryIterate, normal, spd

from curvlib.operators import Dense, Diagonal, LinearOperator, MatrixFree
from curvlib.solvers import damped_inverse
from curvlib.solvers.cg import CG
from curvlib.solvers.errors import SolveError
from curvlib.solvers.minres import MINRES
from curvlib.solvers.solution import (
    IterateGrid,
    ProgressTest,
    ResidualTest,
    Status,
)
from curvlib.solvers.tightening import TighteningTest

TIGHT = ResidualTest(relative=1e-12)
dampings = st.sampled_from([0.0, 1e-3, 1.0])
sizes = st.integers(1, 25)
seeds = st.integers(0, 2**31)


@dataclass(frozen=True, eq=False)
class Observed(LinearOperator):
    """The products of another operator, each block shown to a function that may replace the product."""

    inner: LinearOperator
    replace: object

    size = property(lambda self: self.inner.size)
    dtype = property(lambda self: self.inner.dtype)
    device = property(lambda self: self.inner.device)

    def matmat(self, V):
        return self.replace(V, self.inner.matmat(V))


@given(seeds, sizes, st.integers(1, 4), dampings)
@settings(max_examples=40)
def test_solution_is_that_of_the_dense_system(seed, size, columns, damping):
    C, B = spd(seed, size), normal(seed, size, columns)
    A = C + damping * torch.eye(size, dtype=C.dtype)
    solution = CG(stop=TIGHT, max_iterations=1000)(Dense(C), damping).solve(B)
    assert solution.status is Status.CONVERGED
    torch.testing.assert_close(solution.x, torch.linalg.solve(A, B), rtol=1e-7, atol=1e-7)
    true = (B - A @ solution.x).norm(dim=0) / B.norm(dim=0)
    torch.testing.assert_close(solution.residual_norm, true, rtol=1e-3, atol=1e-13)
    phi = 0.5 * (solution.x * (A @ solution.x)).sum(0) - (B * solution.x).sum(0)
    torch.testing.assert_close(solution.model_value, phi, rtol=1e-8, atol=1e-12)


@given(seeds, st.integers(2, 20), st.integers(2, 5))
@settings(max_examples=25)
def test_columns_do_not_know_of_each_other(seed, size, columns):
    C, B = (
        spd(seed, size, condition=10.0),
        normal(seed, size, columns) * torch.logspace(-30, 30, columns, dtype=torch.float64),
    )
    inverse = CG(stop=TIGHT, max_iterations=500)(Dense(C), 1e-2)
    together = inverse.solve(B)
    for column in range(columns):
        alone = inverse.solve(B[:, column])
        # Products of a block and of a vector round differently, which may move the last iteration.
        assert abs(together.column_iterations[column] - alone.iterations) <= 1
        torch.testing.assert_close(together.x[:, column] / B[:, column].norm(), alone.x / B[:, column].norm())
        assert alone.x.shape == (size,)
        assert alone.residual_norm.shape == alone.model_value.shape == ()


@given(seeds, st.integers(2, 20), st.integers(2, 11))
@settings(max_examples=25)
def test_check_every_changes_products_and_nothing_else(seed, size, every):
    C, B = spd(seed, size, condition=30.0), normal(seed, size, 2)
    B[:, 1] = 0.0
    options = {"stop": ResidualTest(relative=1e-8), "store": IterateGrid()}
    often, rarely = (CG(check_every=n, **options)(Dense(C), 0.1).solve(B) for n in (1, every))
    assert torch.equal(often.x, rarely.x)
    assert often.column_iterations == rarely.column_iterations
    assert [i for i, _ in often.iterates] == [i for i, _ in rarely.iterates]
    assert often.products == often.iterations + 1
    assert rarely.products == every * ceil(rarely.iterations / every) + 1


@pytest.mark.parametrize("x0", [None, 0.1])
@pytest.mark.parametrize("always", [True, False])
@pytest.mark.parametrize("rule", [ResidualTest(relative=1e-6), ProgressTest(epsilon=1e-4, min_window=3)])
def test_a_residual_that_no_rule_asks_for_is_not_verified_unless_always(rule, always, x0):
    C, B = spd(0, 30, condition=100.0), normal(0, 30, 2)
    start = None if x0 is None else x0 * B
    solution = CG(stop=rule, always_verify=always)(Dense(C), 0.1).solve(B, start)
    verified = always or isinstance(rule, ResidualTest)
    assert solution.status is Status.CONVERGED
    assert solution.products == solution.iterations + (x0 is not None) + verified
    # a recurrence in float64 has parted from b - A x by rounding errors alone, whoever computed it
    A = C + 0.1 * torch.eye(30, dtype=C.dtype)
    torch.testing.assert_close(solution.residual_norm, (B - A @ solution.x).norm(dim=0) / B.norm(dim=0))
    phi = 0.5 * (solution.x * (A @ solution.x)).sum(0) - (B * solution.x).sum(0)
    torch.testing.assert_close(solution.model_value, phi)


def test_on_the_device(device):
    C, B = spd(0, 30).to(device), normal(0, 30, 3).to(device)
    solution = CG(stop=ProgressTest(epsilon=1e-9), store=IterateGrid(), check_every=4)(Dense(C), 1e-2).solve(B)
    assert solution.x.device.type == solution.residual_norm.device.type == device.type
    torch.testing.assert_close(
        solution.x, torch.linalg.solve(C + 1e-2 * torch.eye(30, device=device, dtype=C.dtype), B), rtol=1e-3, atol=1e-3
    )


# --- starting points -------------------------------------------------------------------------------------------------


@given(seeds, sizes, st.floats(-3, 3))
@settings(max_examples=30)
def test_warm_start_gives_the_same_solution(seed, size, exponent):
    C, b = spd(seed, size), normal(seed, size)
    inverse = CG(stop=TIGHT, max_iterations=1000)(Dense(C), 0.1)
    cold = inverse.solve(b)
    warm = inverse.solve(b, x0=10**exponent * normal(seed + 1, size))
    assert warm.solved
    torch.testing.assert_close(warm.x, cold.x, rtol=1e-7, atol=1e-8)
    again = inverse.solve(b, x0=cold.x)
    assert again.iterations <= 1
    assert again.x.dtype == b.dtype


def test_a_far_warm_start_in_float32_is_restarted_until_the_true_residual_is_right():
    C, b = spd(0, 40, condition=10.0, dtype=torch.float32), normal(0, 40, dtype=torch.float32)
    x0 = 1e6 * normal(5, 40, dtype=torch.float32)  # rounding of A x0 alone is of the size of b
    solution = CG(stop=ResidualTest(relative=1e-5))(Dense(C), 0.0).solve(b, x0=x0)
    assert solution.status is Status.CONVERGED
    assert float((b.double() - C.double() @ solution.x.double()).norm() / b.double().norm()) < 2e-5


def test_a_restart_keeps_count():
    class Watchful(ResidualTest):
        def satisfied(self, progress):
            assert len(progress.values) == progress.iteration + 1
            return super().satisfied(progress)

    C, b = Dense(spd(0, 40, condition=10.0, dtype=torch.float32)), normal(0, 40, 2, dtype=torch.float32)
    x0 = torch.tensor([1e6, 0.0]) * normal(5, 40, 2, dtype=torch.float32)
    often, rarely = (
        CG(stop=Watchful(relative=1e-5), check_every=n, store=EveryIterate())(C, 0.0).solve(b, x0=x0) for n in (1, 9)
    )
    assert often.solved
    assert torch.equal(often.x, rarely.x)
    assert often.column_iterations == rarely.column_iterations
    assert often.column_iterations[0] > often.column_iterations[1]
    for solution in (often, rarely):
        assert [i for i, _ in solution.iterates] == list(range(1, often.iterations + 1))
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(often.iterates, rarely.iterates, strict=True))


@pytest.mark.parametrize("rule", [ResidualTest(), ResidualTest(relative=0.0), ProgressTest(), TighteningTest()])
@pytest.mark.parametrize("start", [None, torch.ones(4, dtype=torch.float64)])
def test_zero_right_hand_side(rule, start):
    solution = CG(stop=rule)(Dense(spd(0, 4)), 0.0).solve(torch.zeros(4, dtype=torch.float64), x0=start)
    assert (solution.status, solution.iterations) == (Status.CONVERGED, 0)
    assert torch.equal(solution.x, torch.zeros(4, dtype=torch.float64))
    assert float(solution.residual_norm) == float(solution.model_value) == 0.0


def test_no_columns():
    solution = CG()(Dense(spd(0, 4)), 0.0).solve(torch.zeros(4, 0, dtype=torch.float64))
    assert solution.x.shape == (4, 0)
    assert solution.solved
    assert "converged after 0" in str(solution)


# --- preconditioning -------------------------------------------------------------------------------------------------


@given(seeds, st.integers(2, 20), dampings)
@settings(max_examples=25)
def test_preconditioner_changes_the_way_and_not_the_solution(seed, size, damping):
    C, b = spd(seed, size), normal(seed, size)
    A = C + damping * torch.eye(size, dtype=C.dtype)
    inverse = torch.linalg.inv(A)
    exact = CG(stop=ResidualTest(relative=1e-9), preconditioner=Dense(0.5 * (inverse + inverse.T)))
    solution = exact(Dense(C), damping).solve(b)
    assert solution.iterations <= 2
    torch.testing.assert_close(solution.x, inverse @ b, rtol=1e-5, atol=1e-6)


def test_an_indefinite_preconditioner_is_named():
    P = Diagonal(torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64))
    inverse = CG(preconditioner=P)(Dense(spd(0, 3)), 0.0)
    b = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    assert inverse.solve(b).status is Status.BREAKDOWN
    with pytest.raises(SolveError, match="preconditioner is positive definite"):
        inverse @ b


# --- failures --------------------------------------------------------------------------------------------------------


@given(seeds, st.integers(3, 20))
@settings(max_examples=25)
def test_negative_curvature_ends_with_the_last_good_iterate(seed, size):
    C = spd(seed, size, condition=10.0)
    values, Q = torch.linalg.eigh(C)
    values[0] = -0.5
    indefinite, b = Dense(Q * values @ Q.T), normal(seed, size) + Q[:, 0]
    inverse = CG(stop=TIGHT, store=EveryIterate())(indefinite, 0.0)
    solution = inverse.solve(b)
    assert solution.status is Status.NEGATIVE_CURVATURE
    assert solution.x.isfinite().all()
    phi = [float(0.5 * x @ (indefinite @ x) - b @ x) for i, x in solution.iterates if i > 0]
    assert all(later < earlier for earlier, later in zip([0.0, *phi], phi, strict=False))
    assert solution.iterations == len(phi)
    with pytest.raises(SolveError, match=r"negative curvature.*raise the damping") as caught:
        inverse @ b
    assert caught.value.solution.status is Status.NEGATIVE_CURVATURE
    assert CG(stop=TIGHT, max_iterations=500)(indefinite, 0.6).solve(b).status is Status.CONVERGED


def test_one_bad_column_leaves_the_others_alone():
    def finite_only(V, product):
        assert V.isfinite().all()
        return product

    C = Observed(Diagonal(torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)), finite_only)
    B = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, torch.nan]], dtype=torch.float64)
    solution = CG()(C, 0.0).solve(B)
    assert solution.statuses == (
        Status.CONVERGED,
        Status.NEGATIVE_CURVATURE,
        Status.CONVERGED,
        Status.NOT_FINITE,
    )
    assert solution.column_iterations == (2, 0, 0, 0)
    torch.testing.assert_close(solution.x[:, 0], torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))
    assert torch.equal(solution.x[:, 1:], torch.zeros(3, 3, dtype=torch.float64))
    assert str(solution).startswith("conjugate gradients (columns 3 of 4) met NaN")


def test_a_zero_operator_without_damping_is_no_positive_matrix():
    zero = Diagonal(torch.zeros(3, dtype=torch.float64))
    assert CG()(zero, 0.0).solve(torch.ones(3, dtype=torch.float64)).status is Status.SINGULAR
    assert torch.allclose(CG()(zero, 0.5) @ torch.ones(3, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("after", [1, 4])
def test_products_that_are_not_finite_keep_the_last_finite_iterate(bad, after):
    C, b = Dense(spd(0, 20)), normal(0, 20)
    products = 0

    def spoil(_, product):
        nonlocal products
        products += 1
        return product if products < after else product * bad

    inverse = CG(store=EveryIterate())(Observed(C, spoil), 0.0)
    solution = inverse.solve(b)
    assert (solution.status, solution.iterations) == (Status.NOT_FINITE, after - 1)
    expected = CG(max_iterations=after - 1)(C, 0.0).solve(b).x if after > 1 else torch.zeros_like(b)
    torch.testing.assert_close(solution.x, expected)
    products = 0
    with pytest.raises(SolveError, match="NaN or infinity"):
        inverse @ b


def test_start_or_preconditioner_that_is_not_finite():
    C, b = Dense(spd(0, 5)), normal(0, 5, 2)
    x0 = torch.zeros_like(b)
    x0[3, 1] = torch.nan
    solution = CG(stop=TIGHT)(C, 0.1).solve(b, x0=x0)
    assert solution.statuses == (Status.CONVERGED, Status.NOT_FINITE)
    assert torch.equal(solution.x[:, 1], torch.zeros_like(b[:, 1]))
    torch.testing.assert_close(solution.x[:, 0], CG(stop=TIGHT)(C, 0.1).solve(b[:, 0]).x)
    assert "check the right-hand side, the start" in str(solution)
    P = Diagonal(torch.full((5,), torch.nan, dtype=torch.float64))
    assert CG(preconditioner=P)(C, 0.1).solve(b[:, 0]).status is Status.NOT_FINITE


def test_a_random_operator_does_not_pass_for_a_solution():
    generator = torch.Generator().manual_seed(0)

    def jitter(V, product):
        return product * (1 + 0.3 * torch.rand(V.shape, generator=generator, dtype=V.dtype))

    solution = CG(max_iterations=500)(Observed(Dense(spd(0, 30, condition=3.0)), jitter), 0.0).solve(normal(0, 30))
    assert not solution.solved


# --- float32 ---------------------------------------------------------------------------------------------------------


@given(seeds, st.sampled_from([1e2, 1e5]))
@settings(max_examples=15)
def test_float32_stops_at_its_rounding_errors_and_says_so(seed, condition):
    size = 40
    C, b = spd(seed, size, condition, dtype=torch.float32), normal(seed, size, dtype=torch.float32)
    solution = CG(stop=ResidualTest(relative=1e-12), max_iterations=2000)(Dense(C), 0.0).solve(b)
    assert solution.status is Status.ROUNDING_FLOOR
    assert solution.iterations < 400
    x = solution.x.double()
    backward = (b.double() - C.double() @ x).norm() / (torch.linalg.matrix_norm(C.double(), 2) * x.norm() + b.norm())
    assert float(backward) < 20 * torch.finfo(torch.float32).eps
    assert "rounding errors of float32" in str(solution)
    assert torch.equal(CG(stop=ResidualTest(relative=1e-12), max_iterations=2000)(Dense(C), 0.0) @ b, solution.x)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_float32_does_not_underflow_or_overflow(scale):
    C, b = spd(0, 20, 10.0, dtype=torch.float32), normal(0, 20, dtype=torch.float32)
    expected = CG(stop=ResidualTest(relative=1e-5))(Dense(C), 0.1).solve(b)
    scaled = CG(stop=ResidualTest(relative=1e-5))(Dense(C), 0.1).solve(b * scale)
    assert scaled.status is Status.CONVERGED
    torch.testing.assert_close(scaled.x / scale, expected.x, rtol=1e-4, atol=1e-4)


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [-1e-9, torch.nan, torch.inf])
def test_bad_damping_is_refused(damping):
    with pytest.raises(ValueError, match=r"damping must be a finite number >= 0"):
        CG()(Dense(spd(0, 3)), damping)


@pytest.mark.parametrize("damping", [True, "1", None])
def test_damping_of_another_type_is_refused(damping):
    with pytest.raises(TypeError, match=r"damping must be a number"):
        CG()(Dense(spd(0, 3)), damping)


@pytest.mark.parametrize(
    "make",
    [
        lambda: CG(max_iterations=0),
        lambda: CG(check_every=0),
        lambda: CG(max_iterations=2.5),
        lambda: CG(check_every=True),
        lambda: ResidualTest(relative=-1.0),
        lambda: ResidualTest(absolute=torch.nan),
        lambda: ProgressTest(epsilon=0.0),
        lambda: ProgressTest(min_window=0),
        lambda: ProgressTest(fraction=1.0),
        lambda: TighteningTest(epsilon=0.0),
        lambda: TighteningTest(tightest=0.0),
        lambda: TighteningTest(power=-1.0),
        lambda: TighteningTest(epsilon=0.1, tightest=0.2),
        lambda: IterateGrid(base=1.0),
        lambda: CG(preconditioner=Diagonal(torch.ones(4)))(Diagonal(torch.ones(3)), 0.0),
        lambda: CG(preconditioner=Diagonal(torch.ones(3).double()))(Diagonal(torch.ones(3)), 0.0),
        lambda: CG()(Diagonal(torch.ones(3)), 0.0).solve(torch.ones(3), x0=torch.ones(3, 1)),
        lambda: CG()(Diagonal(torch.ones(3)), 0.0) @ torch.ones(4),
    ],
)
def test_bad_values_are_refused(make):
    with pytest.raises(ValueError, match="got"):
        make()


def test_a_number_is_no_stopping_rule():
    with pytest.raises(TypeError, match="use ResidualTest"):
        CG(stop=1e-3)


def test_the_inverse_is_an_operator():
    C = spd(0, 6)
    inverse = CG(stop=TIGHT)(Dense(C), 0.1)
    expected = torch.linalg.inv(C + 0.1 * torch.eye(6, dtype=C.dtype))
    torch.testing.assert_close(inverse.to_dense(), expected)
    torch.testing.assert_close(inverse.trace(), expected.trace())
    assert (inverse.shape, inverse.dtype, inverse.device.type) == ((6, 6), torch.float64, "cpu")


@pytest.mark.parametrize("seed", range(6))
def test_a_solution_that_rounding_errors_have_made_useless_is_not_called_solved(seed):
    """Singular up to the damping in float32: x grows until its own rounding errors exceed b."""
    torch.manual_seed(seed)
    U = torch.randn(14, 10)
    C = MatrixFree(lambda V: U @ (U.T @ V), 14)
    solution = CG(max_iterations=300, stop=ResidualTest(relative=1e-5))(C, 1e-6).solve(torch.ones(14))
    assert not solution.solved or solution.residual_norm <= 1e-2
    with pytest.raises(SolveError, match="raise the damping"):
        damped_inverse(C, 1e-6) @ torch.ones(14)


def test_how_often_the_host_looks():
    C, b = Dense(spd(0, 40, condition=10.0)), normal(0, 40)
    at_once, later = (CG(check_every=n)(C, 0.0).solve(b) for n in (None, 50))
    assert at_once.products < later.products
    torch.testing.assert_close(at_once.x, later.x, rtol=0, atol=0)
    assert CG().looks_every(torch.device("cpu")) == 1
    assert CG().looks_every(torch.device("cuda")) == MINRES().looks_every(torch.device("cuda")) == 5
    assert CG(check_every=3).looks_every(torch.device("cuda")) == 3
