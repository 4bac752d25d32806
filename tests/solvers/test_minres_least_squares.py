"""MINRES where there is no solution, or none that the dtype can tell: what each status promises, against exact ones."""

import pytest
import torch

from curvlib.operators import Dense, Diagonal, MatrixFree
from curvlib.solvers import MINRES, IterateGrid, ResidualTest, Status

DOUBLE, SINGLE = torch.float64, torch.float32


class Case:
    """A singular system H y = c in the variables y = P^(-1/2) x, with eigenvalues from 1 to 1 / condition, and 0."""

    def __init__(self, dtype, size, condition, nullity, *, signs=(1,), precondition=False, consistent=False, seed=0):
        generator = torch.Generator().manual_seed(seed)
        Q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=DOUBLE))
        rank = size - nullity
        e = torch.tensor([signs[i % len(signs)] * condition ** (-i / max(rank - 1, 1)) for i in range(rank)]).double()
        span, null = Q[:, :rank], Q[:, rank:]
        c = torch.randn(size, generator=generator, dtype=DOUBLE)
        c = c - null @ (null.T @ c) if consistent else c
        root = (2 * torch.rand(size, generator=generator, dtype=DOUBLE) - 1).exp() if precondition else torch.ones(size)
        A = (span * e @ span.T) / root / root.unsqueeze(1)
        self.root, self.condition, self.dtype = root.double(), condition, dtype
        self.A, self.b = (0.5 * (A + A.T)).to(dtype), (c / root).to(dtype)
        self.c = self.root * self.b.double()
        self.P = Diagonal((root**2).to(dtype)) if precondition else None
        self.least = float((null.T @ self.c).norm())
        self.shortest = span @ ((span.T @ self.c) / e)

    def solve(self, limit=4000, **options):
        self.tolerance = 1e-10 if self.dtype == DOUBLE else 1e-5
        method = MINRES(
            max_iterations=limit, stop=ResidualTest(relative=self.tolerance), preconditioner=self.P, **options
        )
        return method(Dense(self.A), 0.0).solve(self.b)

    def size(self, x):
        """|A x - b|_P in float64."""
        return float((self.root * (self.A.double() @ x.double()) - self.c).norm())

    def rounding(self, x):
        """The errors of A x in |.|_P that MINRES takes for nothing, for P of condition e^2."""
        y = x.double() / self.root
        return 10 * 8 * torch.finfo(self.dtype).eps * float(y.norm() + self.c.norm())

    def error(self, x):
        return float((x.double() / self.root - self.shortest).norm())


CASES = [
    (DOUBLE, 5, 1e6, 1),
    (DOUBLE, 30, 1e3, 15),
    (DOUBLE, 30, 1e6, 1),
    (DOUBLE, 30, 1e6, 15),
    (SINGLE, 5, 1e3, 2),
    (SINGLE, 13, 1e3, 6),
    (SINGLE, 30, 1e2, 1),
    (SINGLE, 30, 1e3, 1),
    (SINGLE, 30, 1e3, 15),
    (SINGLE, 120, 1e3, 1),
]
kinds = pytest.mark.parametrize(
    ("signs", "precondition"),
    [((1,), False), ((1, -1), False), ((1, -1), True)],
    ids=["semi-definite", "indefinite", "preconditioned"],
)


@pytest.mark.parametrize("arguments", CASES, ids=str)
@kinds
def test_the_residual_of_least_squares_is_the_least_and_its_solution_the_shortest(arguments, signs, precondition):
    if arguments[1] == 120 and signs != (1,):
        pytest.skip("takes thousands of iterations")
    for seed in range(2):
        case = Case(*arguments, signs=signs, precondition=precondition, seed=seed)
        solution = case.solve(store=IterateGrid(base=1.05))
        assert solution.status is Status.LEAST_SQUARES
        assert case.size(solution.x) <= 1.005 * case.least + case.rounding(solution.x)
        # Rounding errors of products move x by the condition times as much, and the null vector, which is found to
        # 4 eps condition, moves the right-hand side, which moves x by the condition again.
        reach = case.condition * (case.rounding(solution.x) + case.tolerance * float(case.c.norm()))
        turned = 4 * torch.finfo(case.dtype).eps * case.condition**2 * case.least
        assert case.error(solution.x) <= reach + turned
        assert float((solution.x.double() / case.root).norm()) <= 1.02 * float(case.shortest.norm())


@pytest.mark.parametrize(
    "arguments", [(SINGLE, 13, 1e4, 1), (SINGLE, 13, 1e4, 6), (SINGLE, 30, 1e4, 15), (DOUBLE, 13, 1e9, 3)], ids=str
)
@kinds
def test_no_result_is_worse_than_an_iterate_that_was_passed(arguments, signs, precondition):
    """Where the dtype hardly tells the smallest eigenvalues from 0."""
    for seed in range(2):
        case = Case(*arguments, signs=signs, precondition=precondition, seed=seed)
        for limit in (20, 1000):
            solution = case.solve(limit, store=IterateGrid(base=1.05))
            assert solution.iterations <= limit
            # Rounding errors of an x that has grown along the null space can make |A x - b| less than the least.
            passed = max(min(case.size(x) for _, x in solution.iterates), case.least)
            assert case.size(solution.x) <= 1.02 * passed + case.rounding(solution.x)
            assert solution.status in (Status.LEAST_SQUARES, Status.ILL_CONDITIONED, Status.ITERATION_LIMIT)
            if solution.status is Status.LEAST_SQUARES:
                assert case.size(solution.x) <= 1.005 * case.least + case.rounding(solution.x)


@pytest.mark.parametrize("arguments", [(SINGLE, 13, 1e3, 6), (SINGLE, 30, 1e4, 15), (DOUBLE, 30, 1e6, 15)], ids=str)
@kinds
def test_a_singular_system_with_a_solution_gets_the_shortest(arguments, signs, precondition):
    for seed in range(2):
        case = Case(*arguments, signs=signs, precondition=precondition, consistent=True, seed=seed)
        solution = case.solve()
        assert solution.solved
        assert case.size(solution.x) <= max(case.tolerance * float(case.c.norm()), case.rounding(solution.x)) * 3
        assert float((solution.x.double() / case.root).norm()) <= 1.1 * float(case.shortest.norm())


def test_a_small_regular_system_is_not_called_singular():
    """Whose smallest eigenvalue is 4500 eps; x is as good as that of a direct solve."""
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        Q, _ = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=DOUBLE))
        e = torch.tensor([1.0, -1e-3, 1e-6, -1e-9, 1e-12], dtype=DOUBLE)
        A = Q * e @ Q.T
        A, b = 0.5 * (A + A.T), torch.randn(5, generator=generator, dtype=DOUBLE)
        solution = MINRES(max_iterations=300, stop=ResidualTest(relative=1e-8))(Dense(A), 0.0).solve(b)
        assert solution.status is Status.ROUNDING_FLOOR
        # 10 eps |A| |x|, |x| <= 1e12 |b|
        assert float((A @ solution.x - b).norm()) <= 10 * 2.3e-16 * float(solution.x.norm())


@pytest.mark.parametrize(("dtype", "size", "condition"), [(SINGLE, 40, 1e4), (SINGLE, 16, 1e5), (DOUBLE, 16, 1e10)])
@pytest.mark.parametrize("signs", [(1,), (1, -1)], ids=["definite", "indefinite"])
def test_rounding_errors_grow_with_the_condition_and_not_with_its_square(dtype, size, condition, signs):
    """Rounding errors of x grow with the condition, not with its square as those of plain MINRES."""
    for seed in range(3):
        case = Case(dtype, size, condition, 0, signs=signs, seed=seed)
        solution = case.solve()
        assert solution.solved
        assert case.size(solution.x) <= 10 * torch.finfo(dtype).eps * float(solution.x.double().norm() + case.c.norm())


def test_the_search_for_least_squares_keeps_to_the_limit_and_counts():
    case, products = Case(DOUBLE, 30, 1e6, 1), 0
    free = case.solve()
    assert free.status is Status.LEAST_SQUARES

    def product(V):
        nonlocal products
        products += 1
        return case.A @ V

    for limit in (60, free.iterations - 1):
        products = 0
        solution = MINRES(max_iterations=limit, stop=ResidualTest(relative=1e-10))(
            MatrixFree(product, 30, DOUBLE), 0.0
        ).solve(case.b)
        assert solution.status is Status.ITERATION_LIMIT
        assert solution.iterations == limit
        assert solution.products == products <= limit + 10
        assert case.size(solution.x) < float(case.b.norm())


def test_columns_with_and_without_a_solution():
    case = Case(DOUBLE, 13, 1e3, 3, signs=(1, -1), precondition=True)
    within = case.A @ case.b
    B = torch.stack([case.b, within, 0.0 * case.b, 1e150 * case.b, torch.nan * case.b], dim=1)
    method = MINRES(stop=ResidualTest(relative=1e-10), preconditioner=case.P, max_iterations=1000)
    together = method(Dense(case.A), 0.0).solve(B)
    none = Status.LEAST_SQUARES
    assert together.statuses == (none, Status.CONVERGED, Status.CONVERGED, none, Status.NOT_FINITE)
    for column, scale in ((0, 1.0), (3, 1e150)):
        assert case.error(together.x[:, column] / scale) <= 1e-6 * float(case.shortest.norm())
    alone = method(Dense(case.A), 0.0).solve(within)
    torch.testing.assert_close(together.x[:, 1], alone.x, rtol=1e-6, atol=1e-8)
    started = method(Dense(case.A), 0.0).solve(case.b, x0=1e3 * within)
    assert started.status is none
    assert case.size(started.x) <= 1.005 * case.least
