"""Deliberately broken solvers are caught by their suite, which names the identity that broke."""

from dataclasses import dataclass, replace

import pytest
import torch
from twins import broken, name

from curvlib.operators import Dense as DenseOperator
from curvlib.operators import MatrixFree
from curvlib.solvers import CG, CGInverse, ResidualTest, Status, damped_inverse
from curvlib.testing import check_solver


def without_damping(C, damping):
    return damped_inverse(C, 1e-9)


def half_the_damping(C, damping):
    return damped_inverse(C, 0.5 * damping)


def of_the_range_alone(C, damping):
    """Inverts on the range of C, and gives zero on the orthogonal complement."""
    e, Q = torch.linalg.eigh(C.to_dense())
    inverse = torch.where(e > 1e-9 * e.max(), 1 / (e + damping), 0.0)
    return DenseOperator((Q * inverse) @ Q.T)


def wrong_sign(C, damping):
    return -damped_inverse(C, damping)


CACHE = {}


def stale(C, damping):
    """Keeps the inverse of an operator for all dampings."""
    key = (id(C), C)
    if key not in CACHE:
        CACHE.clear()
        CACHE[key] = damped_inverse(C, damping)
    return CACHE[key]


def silent(C, damping):
    """Never says that it cannot solve: a pseudo-inverse of what is finite."""
    M = C.to_dense().nan_to_num() + damping * torch.eye(C.size, dtype=C.dtype)
    if not 0 < damping < float("inf"):
        raise ValueError(f"damping must be positive and finite, got {damping}.")
    return DenseOperator(torch.linalg.pinv(M))


def of_any_sign(C, damping):
    if not 0 < damping < float("inf"):
        raise ValueError(f"damping must be positive and finite, got {damping}.")
    M = C.to_dense()
    if not M.isfinite().all():
        raise ValueError("the operator has entries that are not finite")
    return DenseOperator(torch.linalg.inv(M + damping * torch.eye(C.size, dtype=C.dtype)))


def first_column_alone(C, damping):
    X = damped_inverse(C, damping)
    return MatrixFree(lambda V: (X @ V[:, :1]).expand_as(V).clone(), C.size, C.dtype)


def unchecked(C, damping):
    return damped_inverse(C, abs(damping))


def damps_in_place(C, damping):
    """Adds the damping to C's own entries."""
    if isinstance(C, DenseOperator):
        C.matrix.diagonal().add_(damping)
        return damped_inverse(C, 0.0)
    return damped_inverse(C, damping)


def of_few_columns(C, damping):
    X = damped_inverse(C, damping)
    return MatrixFree(lambda V: torch.where(torch.arange(V.shape[1]) < 9, X @ V, 0.0), C.size, C.dtype)


def from_a_random_start(C, damping):
    X = CG(stop=ResidualTest(relative=1e-12))(C, damping)
    return MatrixFree(lambda V: X.solve(V, torch.randn_like(V)).x, C.size, C.dtype)


def scales_to_size_one(C, damping):
    X = damped_inverse(C, damping)

    def matmat(V):
        size = V.square().sum(0).sqrt()
        return (X @ (V / size)) * size

    return MatrixFree(matmat, C.size, C.dtype)


def with_a_floor(C, damping):
    """Eigenvalues below a number without units are lifted to it."""
    damped_inverse(C, damping) @ torch.zeros(C.size, dtype=C.dtype)
    e, Q = torch.linalg.eigh(C.to_dense())
    return DenseOperator((Q / (e + damping).clamp(min=1e-6)) @ Q.T)


def in_double(C, damping):
    X = damped_inverse(C, damping)
    return DenseOperator(X.to_dense().double())


def of_the_pseudo_inverse(C, damping):
    if damping == 0.0:
        return DenseOperator(torch.linalg.pinv(C.to_dense()))
    return damped_inverse(C, damping)


def changed_solve(change):
    """Conjugate gradients whose outcome of ``solve`` is another one."""

    @dataclass(frozen=True, kw_only=True, eq=False, repr=False)
    class Inverse(CGInverse):
        def solve(self, b, x0=None):
            return change(super().solve, b, x0)

        def matmat(self, V):
            return CGInverse(operator=self.operator, damping=self.damping, method=self.method).matmat(V)

    def solver(C, damping):
        return Inverse(operator=C, damping=damping, method=CG(stop=ResidualTest(relative=1e-12)))

    solver.__name__ = change.__name__
    return solver


def ignores_the_start(solve, b, x0):
    return solve(b)


def residual_of_its_preconditioner(solve, b, x0):
    solution = solve(b, x0)
    return replace(solution, residual_norm=0.1 * solution.residual_norm + 1e-3)


def always_converged(solve, b, x0):
    solution = solve(b, x0)
    r = b - 0.9 * b if x0 is None else b
    return replace(solution, x=0.9 * solution.x, residual_norm=r.norm() / b.norm())


def never_converged(solve, b, x0):
    return replace(solve(b, x0), statuses=(Status.ITERATION_LIMIT,))


INVERTS = "X @ b = (C + lambda I)^-1 b"


@pytest.mark.parametrize(
    ("twin", "identity"),
    [
        (without_damping, "(C + lambda I)^-1 b"),
        (half_the_damping, INVERTS),
        (of_the_range_alone, INVERTS),
        (wrong_sign, INVERTS),
        (stale, "a new damping counts"),
        (first_column_alone, "X @ B = (C + lambda I)^-1 B, column by column"),
        (silent, "that are not finite is refused"),
        (of_any_sign, "C + lambda I with a negative eigenvalue is refused"),
        (unchecked, "the damping -1.0 is refused by name"),
        (damps_in_place, "solver(C, lambda) @ b leaves C as it is"),
        (from_a_random_start, "global random numbers are not used"),
        (of_few_columns, "X @ B of 40 columns"),
        (scales_to_size_one, "X @ B = (C + lambda I)^-1 B, column by column"),
        (with_a_floor, "solver(s C, s lambda) @ b = solver(C, lambda) @ b / s for s = 1e-08"),
        (in_double, "in float32, X @ b = (C + lambda I)^-1 b in float32"),
        (of_the_pseudo_inverse, "a singular C without damping, with b outside of its range"),
        (changed_solve(ignores_the_start), "solve(b, x0) starts at x0"),
        (changed_solve(residual_of_its_preconditioner), "solve(b).residual_norm = |b - (C + lambda I) x| / |b|"),
        (changed_solve(always_converged), "solve(b).solved says whether it is"),
        (changed_solve(never_converged), "solve(b).solved says whether it is"),
    ],
    ids=name,
)
def test_broken_solvers(twin, identity):
    with broken(identity) as caught:
        check_solver(twin)
    assert twin.__name__ in caught.value.subject


def test_a_solver_that_takes_any_sign_may_say_so():
    check_solver(of_any_sign, refuses_indefinite=False, examples=5)


@pytest.mark.filterwarnings("ignore::curvlib.solvers.ConvergenceWarning")
def test_a_solver_that_stops_early():
    with broken(INVERTS):
        check_solver(CG(max_iterations=1))
