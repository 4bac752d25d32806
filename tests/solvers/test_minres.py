"""MINRES against dense solves, the minimum over the Krylov space and SciPy's; statuses of every kind of system."""

from math import ceil

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_cases import CASES, draw

from curvlib.operators import Dense, Diagonal, MatrixFree
from curvlib.solvers import (
    CG,
    MINRES,
    ConvergenceWarning,
    IterateGrid,
    MINRESInverse,
    ProgressTest,
    RaiseAtLimit,
    ResidualTest,
    SolveError,
    Status,
    damped_inverse,
)

TIGHT = ResidualTest(relative=1e-10)
seeds = st.integers(0, 2**31)
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
few = settings(max_examples=5, suppress_health_check=list(HealthCheck))


def system(seed, eigenvalues, dtype=torch.float64):
    """A matrix with these eigenvalues, its eigenvectors, and random numbers."""
    generator = torch.Generator().manual_seed(seed)
    e = torch.tensor(eigenvalues, dtype=torch.float64)
    Q, _ = torch.linalg.qr(torch.randn(len(e), len(e), generator=generator, dtype=torch.float64))
    M = Q * e @ Q.T

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return (0.5 * (M + M.T)).to(dtype), Q, normal


def spread(size, condition, signs=(1, -1)):
    return [signs[i % len(signs)] * condition ** (-i / max(size - 1, 1)) for i in range(size)]


# --- every operator, every condition ---------------------------------------------------------------------------------


@cases
@few
@given(seed=seeds, damping=st.sampled_from([0.0, 0.3]))
def test_every_operator_of_any_definiteness(case, device, seed, damping):
    d = draw(seed, device, definite=False)
    C, M = case(d)
    A = M + damping * torch.eye(C.size, dtype=M.dtype, device=device)
    B = d.normal(C.size, 2)
    solution = MINRES(stop=TIGHT, max_iterations=500)(C, damping).solve(B)
    e = torch.linalg.eigvalsh(A).abs()
    if float(e.min()) > 1e-3 * float(e.max()):
        assert solution.status is Status.CONVERGED
        expected = torch.linalg.solve(A, B)
        torch.testing.assert_close(solution.x, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    true = (B - A @ solution.x).norm(dim=0) / B.norm(dim=0)
    # a product A x rounds by eps |A| |x| times a small power of D
    rounding = 50 * torch.finfo(B.dtype).eps * (1 + e.max() * solution.x.norm(dim=0) / B.norm(dim=0))
    assert ((solution.residual_norm - true).abs() <= rounding).all()
    phi = 0.5 * (solution.x * (A @ solution.x)).sum(0) - (B * solution.x).sum(0)
    torch.testing.assert_close(solution.model_value, phi, rtol=1e-6, atol=1e-9 * float(phi.abs().max() + 1))


@pytest.mark.parametrize(
    ("dtype", "condition"),
    [(torch.float64, c) for c in (1.0, 1e2, 1e4, 1e8, 1e12)] + [(torch.float32, c) for c in (1.0, 1e2, 1e4, 1e6)],
    ids=str,
)
@pytest.mark.parametrize("signs", [(1,), (1, -1)], ids=["definite", "indefinite"])
@pytest.mark.parametrize("method", [CG, MINRES, damped_inverse], ids=lambda method: method.__name__)
def test_backward_errors_at_any_condition(method, dtype, condition, signs):
    """What is called solved is the exact solution of a system that differs in its last digits."""
    size, eps = 16, torch.finfo(dtype).eps
    if method is not MINRES and signs != (1,):
        pytest.skip("needs a positive definite matrix")
    for seed in range(3):
        M, _, normal = system(seed, spread(size, condition, signs), dtype)
        b = normal(size)
        if method is damped_inverse:
            x, status = damped_inverse(Dense(M), 0.0) @ b, Status.CONVERGED
        else:
            # Asked for more than there is, so that rounding errors end it.
            solution = method(stop=ResidualTest(relative=eps), max_iterations=4000)(Dense(M), 0.0).solve(b)
            x, status = solution.x, solution.status
        residual = (b.double() - M.double() @ x.double()).norm()
        backward = float(residual / (x.double().norm() + b.double().norm()))  # |A| = 1
        if status.solved:
            # ten times eps (|A| |x| + |b|) is what the solvers accept; a product of size 16 rounds by as much again
            assert backward <= 20 * eps
        else:
            # where eps times the condition leaves fewer than two digits, and nowhere else
            assert eps * condition > 1e-2
            assert status in (Status.ILL_CONDITIONED, Status.LEAST_SQUARES)


# --- the algorithm ---------------------------------------------------------------------------------------------------


@given(seeds, st.integers(2, 12), st.booleans())
@settings(max_examples=25)
def test_iterates_minimise_the_residual_over_the_krylov_space(seed, size, precondition):
    M, _, normal = system(seed, spread(size, 30.0))
    b, P = normal(size), torch.eye(size, dtype=torch.float64)
    if precondition:
        P = system(seed + 1, spread(size, 10.0, (1,)))[0]
    root = torch.linalg.cholesky(P)
    # Later the Lanczos vectors lose their orthogonality, as eigenvalues are found (Paige 1971).
    method = MINRES(stop=ResidualTest(relative=1e-14), max_iterations=(size + 1) // 2, store=IterateGrid(base=1.1))
    method = MINRES(**{**vars(method), "preconditioner": Dense(P) if precondition else None})
    solution = method(Dense(M), 0.0).solve(b)
    for i, x in solution.iterates:
        basis = [P @ b]
        for _ in range(i - 1):
            basis.append(P @ M @ (basis[-1] / basis[-1].norm()))
            for _ in range(2):
                for other in basis[:-1]:
                    basis[-1] = basis[-1] - (other @ basis[-1]) / (other @ other) * other
        K = torch.stack([v / v.norm() for v in basis], dim=1)
        best = root.T @ (b - M @ K @ torch.linalg.lstsq(root.T @ M @ K, (root.T @ b).unsqueeze(1)).solution.squeeze(1))
        assert float((root.T @ (b - M @ x)).norm()) <= float(best.norm()) + 1e-9 * float((root.T @ b).norm())


@pytest.mark.parametrize("precondition", [False, True])
def test_stopping_rules_see_the_residual_of_the_iterate(precondition):
    M, _, normal = system(0, spread(20, 30.0))
    B, seen = normal(20, 2), []

    class Watching(ResidualTest):
        def satisfied(self, progress):
            seen.append(progress.residual_norm)
            return super().satisfied(progress)

    P = Diagonal(normal(20).abs() + 0.5) if precondition else None
    solution = MINRES(stop=Watching(relative=1e-8), store=IterateGrid(base=1.01), preconditioner=P)(
        Dense(M), 0.0
    ).solve(B)
    assert len(seen) > solution.iterations
    torch.testing.assert_close(seen[0], B.norm(dim=0))
    for i, x in solution.iterates:
        torch.testing.assert_close(seen[i], (B - M @ x).norm(dim=0), rtol=1e-6, atol=1e-12)


@given(seeds, st.sampled_from([5, 40]), st.booleans(), st.booleans())
@settings(max_examples=25)
def test_agrees_with_scipy(seed, size, indefinite, precondition):
    M, _, normal = system(seed, spread(size, 20.0, (1, -1) if indefinite else (1,)))
    b, P = normal(size), Diagonal(normal(size).abs() + 0.5)
    count = 0

    def seen(_):
        nonlocal count
        count += 1

    theirs, flag = scipy.sparse.linalg.minres(
        M.numpy(), b.numpy(), rtol=1e-11, maxiter=500, callback=seen,
        M=np.diag(P.values.numpy()) if precondition else None,
    )  # fmt: skip
    reached = float((M @ torch.from_numpy(theirs) - b).norm() / b.norm())
    solution = MINRES(
        stop=ResidualTest(relative=max(reached, 1e-13)), max_iterations=500, preconditioner=P if precondition else None
    )(Dense(M), 0.0).solve(b)
    assert flag == 0
    assert solution.solved
    # theirs reaches the last digits, where rounding errors move the end by a few iterations
    assert solution.iterations <= 1.1 * count + 2
    torch.testing.assert_close(solution.x, torch.from_numpy(theirs), rtol=1e-6, atol=1e-7)


@given(seeds, st.integers(2, 20), st.integers(2, 9))
@settings(max_examples=20)
def test_columns_and_check_every(seed, size, every):
    M, _, normal = system(seed, spread(size, 10.0))
    B = normal(size, 3) * torch.tensor([1.0, 1e-30, 1e20], dtype=torch.float64)
    B[:, 1] = 0.0 if seed % 2 else B[:, 1]
    options = {"stop": TIGHT, "store": IterateGrid(), "max_iterations": 500}
    often, rarely = (MINRES(check_every=n, **options)(Dense(M), 0.2).solve(B) for n in (1, every))
    assert torch.equal(often.x, rarely.x)
    assert often.column_iterations == rarely.column_iterations
    assert [i for i, _ in often.iterates] == [i for i, _ in rarely.iterates]
    expected = sorted({ceil(1.3**j) for j in range(30) if ceil(1.3**j) < often.iterations} | {often.iterations})
    assert [i for i, _ in often.iterates] == expected
    for column in range(3):
        alone = MINRES(**options)(Dense(M), 0.2).solve(B[:, column])
        # Products of a block and of a vector round differently, which may move the last iterations.
        assert abs(alone.iterations - often.column_iterations[column]) <= 2
        size_of = max(float(B[:, column].norm()), 1e-300)
        torch.testing.assert_close(often.x[:, column] / size_of, alone.x / size_of, rtol=1e-6, atol=1e-7)


def test_warm_starts_limits_and_rules():
    M, _, normal = system(0, spread(40, 1e3))
    b = normal(40)
    inverse = MINRES(stop=TIGHT, max_iterations=500)(Dense(M), 0.0)
    cold = inverse.solve(b)
    assert inverse.solve(b, x0=cold.x).iterations <= 1
    torch.testing.assert_close(inverse.solve(b, x0=1e3 * normal(40)).x, cold.x, rtol=1e-6, atol=1e-6)
    with pytest.warns(ConvergenceWarning, match="MINRES stopped at its limit of 5 iterations"):
        MINRES(max_iterations=5)(Dense(M), 0.0) @ b
    with pytest.raises(SolveError, match="limit of 5"):
        MINRES(max_iterations=5, on_limit=RaiseAtLimit())(Dense(M), 0.0) @ b
    definite, _, _ = system(0, spread(40, 1e3, (1,)))
    stalled = MINRES(stop=ProgressTest(epsilon=1e-2))(Dense(definite), 0.0).solve(b)
    assert stalled.status is Status.CONVERGED
    assert stalled.iterations < MINRES(stop=TIGHT)(Dense(definite), 0.0).solve(b).iterations
    assert isinstance(inverse, MINRESInverse)
    assert inverse.shape == (40, 40)


def test_an_exact_preconditioner_takes_two_iterations():
    M, Q, normal = system(0, spread(20, 1e3))
    absolute = Q @ torch.diag((Q.T @ M @ Q).diagonal().abs().reciprocal()) @ Q.T
    P = Dense(0.5 * (absolute + absolute.T))
    assert MINRES(preconditioner=P, stop=ResidualTest(relative=1e-8))(Dense(M), 0.0).solve(normal(20)).iterations == 2


# --- singular systems ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@given(seeds, st.sampled_from([1.0, 1e1, 1e2]), st.integers(1, 3))
@settings(max_examples=25)
def test_singular_systems(dtype, tolerance, seed, condition, nullity):
    eps = torch.finfo(dtype).eps
    eigenvalues = [*spread(10, condition), *[0.0] * nullity]
    M, Q, normal = system(seed, eigenvalues, dtype)
    null = Q[:, 10:]
    b = normal(len(M)).double()
    inverse = MINRES(stop=ResidualTest(relative=tolerance), max_iterations=1000)(Dense(M), 0.0)
    pinv = Q[:, :10] / torch.tensor(eigenvalues[:10]).double() @ Q[:, :10].T
    shortest = pinv @ b

    solvable = (b - null @ (null.T @ b)).to(dtype)
    solution = inverse.solve(solvable)
    assert solution.solved
    # a residual of the tolerance, or of rounding, is an error of the condition times that
    bound = condition * max(tolerance, 20 * eps) * 3
    assert float((solution.x.double() - shortest).norm()) <= bound * float(shortest.norm()) * condition

    solution = inverse.solve(b.to(dtype))
    assert solution.status is Status.LEAST_SQUARES
    assert not solution.solved
    A = M.double()
    r = b - A @ solution.x.double()
    # what minimising |r| alone would leave, see _CANDIDATE in curvlib/solvers/minres.py, ten times over
    assert float((A @ r).norm()) <= 100 * eps**0.5 * float(r.norm())
    assert float(solution.residual_norm) == pytest.approx(float((null.T @ b).norm() / b.norm()), rel=1e-2)
    # an A r of that size is an error of the condition squared times that, |A| = 1
    error = float((solution.x.double() - shortest).norm())
    assert error <= 100 * eps**0.5 * condition**2 * float(r.norm()) + bound * float(shortest.norm())
    with pytest.raises(SolveError, match="right-hand side not in its range"):
        inverse @ b.to(dtype)


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
def test_larger_inconsistent_systems_end_before_x_has_grown(condition):
    eigenvalues, iterations = [*spread(18, condition), 0.0, 0.0], []
    for seed in range(8):
        M, Q, normal = system(seed, eigenvalues)
        b = normal(20)
        solution = MINRES(stop=TIGHT, max_iterations=2000)(Dense(M), 0.0).solve(b)
        assert solution.status is Status.LEAST_SQUARES
        shortest = Q[:, :18] / torch.tensor(eigenvalues[:18]).double() @ Q[:, :18].T @ b
        # A r is at the rounding of a flat minimum, eps^(1/2) |r|, and the condition multiplies it.
        assert float((solution.x - shortest).norm()) <= 1.5e-8 * condition * float(shortest.norm())
        iterations.append(solution.iterations)
    # Conditions of 1e5 find the shortest in 60 to 80; waiting for rounding errors alone would take hundreds.
    assert sorted(iterations)[4] < 90


def test_a_right_hand_side_in_the_null_space_and_a_zero_matrix():
    C = Diagonal(torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64))
    for operator, b in ((C, [0.0, 0.0, 3.0]), (0.0 * C, [1.0, 2.0, 3.0])):
        solution = MINRES()(operator, 0.0).solve(torch.tensor(b, dtype=torch.float64))
        assert (solution.status, solution.x.tolist()) == (Status.LEAST_SQUARES, [0.0] * 3)
        assert float(solution.residual_norm) == 1.0
    mixed = MINRES(stop=TIGHT)(C, 0.0).solve(torch.tensor([[0.0, 1.0], [0.0, 2.0], [3.0, 0.0]], dtype=torch.float64))
    assert mixed.statuses == (Status.LEAST_SQUARES, Status.CONVERGED)
    torch.testing.assert_close(mixed.x[:, 1], torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64))


def test_least_squares_with_a_preconditioner_are_those_of_its_norm():
    M, _, normal = system(2, [*spread(8, 5.0), 0.0, 0.0])
    P, b = system(3, spread(10, 10.0, (1,)))[0], normal(10)
    solution = MINRES(stop=TIGHT, preconditioner=Dense(P))(Dense(M), 0.0).solve(b)
    assert solution.status is Status.LEAST_SQUARES
    root = torch.linalg.cholesky(P)
    expected = root @ (torch.linalg.pinv(root.T @ M @ root, rtol=1e-10) @ (root.T @ b))
    torch.testing.assert_close(solution.x, expected, rtol=1e-5, atol=1e-6)


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("after", [1, 4])
def test_products_that_are_not_finite_keep_the_last_finite_iterate(bad, after):
    M, _, normal = system(0, spread(20, 10.0))
    b, products = normal(20), 0

    def spoilt(V):
        nonlocal products
        products += 1
        return M @ V if products < after else M @ V * bad

    C = MatrixFree(spoilt, 20, torch.float64)
    solution = MINRES(stop=TIGHT)(C, 0.0).solve(b)
    assert (solution.status, solution.iterations) == (Status.NOT_FINITE, after - 1)
    expected = MINRES(stop=TIGHT, max_iterations=after - 1)(Dense(M), 0.0).solve(b).x if after > 1 else 0.0 * b
    torch.testing.assert_close(solution.x, expected)
    products = 0
    with pytest.raises(SolveError, match="MINRES met NaN or infinity"):
        MINRES()(C, 0.0) @ b


def test_bad_columns_leave_the_others_alone():
    def finite_only(V):
        assert V.isfinite().all()
        return torch.tensor([[1.0], [2.0], [-1.0]], dtype=torch.float64) * V

    B = torch.tensor([[1.0, torch.nan, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    solution = MINRES()(MatrixFree(finite_only, 3, torch.float64), 0.0).solve(B)
    assert solution.statuses == (Status.CONVERGED, Status.NOT_FINITE, Status.CONVERGED)
    torch.testing.assert_close(solution.x[:, 0], torch.tensor([1.0, 0.5, -1.0], dtype=torch.float64))
    assert torch.equal(solution.x[:, 1:], torch.zeros(3, 2, dtype=torch.float64))


def test_an_indefinite_preconditioner_and_random_products_are_no_solution():
    M, _, normal = system(0, spread(20, 3.0))
    b, generator = normal(20), torch.Generator().manual_seed(0)
    signs = Diagonal(torch.tensor([1.0, -1.0] * 10, dtype=torch.float64))
    assert MINRES(preconditioner=signs, stop=TIGHT)(Dense(M), 0.0).solve(b).status is Status.BREAKDOWN

    def jitter(V):
        return M @ V * (1 + 0.3 * torch.rand(V.shape, generator=generator, dtype=V.dtype))

    assert not MINRES(max_iterations=300)(MatrixFree(jitter, 20, torch.float64), 0.0).solve(b).solved


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: MINRES(max_iterations=0), ValueError),
        (lambda: MINRES(stop=1e-3), TypeError),
        (lambda: MINRES(preconditioner=Diagonal(torch.ones(4)))(Diagonal(torch.ones(3)), 0.0), ValueError),
        (lambda: MINRES()(Diagonal(torch.ones(3)), -1.0), ValueError),
    ],
    ids=["limit", "rule", "preconditioner", "damping"],
)
def test_bad_arguments_are_refused(make, error):
    with pytest.raises(error, match=r"MINRES\(|damping"):
        make()


@pytest.mark.parametrize(
    ("dtype", "condition", "signs", "limit"),
    [
        (torch.float64, 1e14, (1,), 1000),
        (torch.float64, 1e12, (1, -1), 1000),
        (torch.float32, 1e6, (1, -1), 500),
        (torch.float32, 1e5, (1, -1), 2000),
    ],
    ids=str,
)
def test_what_rounding_errors_have_carried_away_is_given_up(dtype, condition, signs, limit):
    for seed in range(4):
        A, _, normal = system(seed, spread(40, condition, signs), dtype)
        b = normal(40)
        solution = MINRES(max_iterations=limit)(Dense(A), 0.0).solve(b)
        assert float((A.double() @ solution.x.double() - b.double()).norm()) <= 1.02 * float(b.double().norm())
        assert solution.status is not Status.LEAST_SQUARES  # no column of these matrices is zero
