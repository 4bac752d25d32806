"""What every solver keeps: it undoes C + lambda I, or says that it cannot.

Symbols: C (D, D) the operator, lambda the damping, A = C + lambda I, X what the solver makes, b right-hand sides.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from jaxtyping import Float
from torch import Tensor

from curvlib.operators import Dense, Diagonal, LinearOperator, LowRank, MatrixFree
from curvlib.testing.identities import Subject, described
from curvlib.testing.numbers import draw, semidefinite_matrices
from curvlib.testing.search import search

# Columns of a wide right-hand side, beside the few that are drawn.
_WIDE = 40
Solver = Callable[[LinearOperator, float], LinearOperator]
Inverse = Callable[[LinearOperator, float], Float[Tensor, "D D"]]


def dense_inverse(operator: LinearOperator, damping: float) -> Float[Tensor, "D D"]:
    """Return (C + lambda I)^-1 by brute force in float64."""
    M = operator.to_dense().double()
    return torch.linalg.inv(M + damping * torch.eye(len(M), dtype=M.dtype, device=M.device)).to(operator.dtype)


def check_solver(
    solver: Solver,
    *,
    operators: SearchStrategy | None = None,
    inverse: Inverse = dense_inverse,
    tolerance: float = 1e-8,
    refuses_indefinite: bool = True,
    examples: int = 20,
) -> None:
    """Check that a solver inverts the damped operator over condition numbers, and refuses what has no inverse.

    Args:
        solver: (operator, damping) -> operator close to (C + damping I)^-1.
        operators: a strategy of positive semi-definite operators; by default dense, matrix-free and low-rank ones,
            singular ones among them, with condition numbers up to 1e6 of what is not zero.
        inverse: what the solver must give, (operator, damping) -> (D, D), by brute force.
        tolerance: largest error of a solution, relative to |X| |b|.
        refuses_indefinite: whether an indefinite C + damping I has to be refused; otherwise it is refused or solved.
        examples: how many operators are drawn.

    Raises:
        IdentityError: an identity breaks, with the smallest operator that was found.

    Example:
        >>> from curvlib.solvers import damped_inverse
        >>> check_solver(damped_inverse, examples=5)
    """
    if not callable(solver) or isinstance(solver, type):
        raise TypeError(
            f"check_solver needs a function of (operator, damping), or an instance such as CG(), "
            f"got {described(solver)}."
        )
    name = solver if hasattr(solver, "__dataclass_fields__") else getattr(solver, "__name__", solver)
    subject = Subject(f"the solver {name}")
    drawn = _operators() if operators is None else operators
    # relative to the largest eigenvalue, 1 or so for the drawn operators
    inputs = st.tuples(drawn, st.sampled_from((1.0, 1e-1, 1e-3)), st.integers(0, 3), st.integers(0, 2**16))

    def check(given: tuple[LinearOperator, float, int, int]) -> None:
        C, damping, columns, seed = given
        _inverts(subject, solver, inverse, tolerance, C, damping, columns, seed)

    search(inputs, check, examples)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if operators is None:
            _sizes_and_types(subject, solver, tolerance)
            _outcome_of_solve(subject, solver)
        _arguments(subject, solver)
        _singular(subject, solver)
        _not_finite(subject, solver)
        _indefinite(subject, solver, refuses_indefinite)


@st.composite
def _operators(draw_from: st.DrawFn) -> LinearOperator:
    M = draw_from(semidefinite_matrices())
    kind = draw_from(st.sampled_from(("dense", "products alone", "low rank")))
    if kind == "dense":
        return Dense(M)
    if kind == "low rank":
        e, Q = torch.linalg.eigh(M)
        kept = e > 1e-9 * e.max()
        return LowRank(Q[:, kept], e[kept], torch.zeros_like(e))
    return _matrix_free(M)


def _matrix_free(M: Tensor) -> LinearOperator:
    return MatrixFree(lambda V: M @ V, len(M), M.dtype)


def _inverts(
    subject: Subject,
    solver: Solver,
    inverse: Inverse,
    tolerance: float,
    C: LinearOperator,
    damping: float,
    columns: int,
    seed: int,
) -> None:
    d = draw(seed, C.device, dtype=C.dtype)
    as_it_was, state = C.to_dense().clone(), torch.get_rng_state()
    b, B = d.normal(C.size), d.normal(C.size, columns)
    before = b.clone(), B.clone()
    expected = inverse(C, damping)
    X = subject.value("solver(C, lambda)", lambda: solver(C, damping))
    kind = isinstance(X, LinearOperator) and X.shape == C.shape
    subject.holds("solver(C, lambda) is an operator of C's shape", kind, f"got {X!r}")
    size = C.size * float(expected.abs().max()) * max(1.0, float(b.abs().max()))

    def near(identity: str, got: Callable[[], Tensor], wanted: Tensor) -> None:
        subject.equal(identity, got, wanted, scale=size, tolerance=tolerance)

    near("X @ b = (C + lambda I)^-1 b", lambda: X @ b, expected @ b)
    subject.same("solver(C, lambda) @ b leaves C as it is", C.to_dense, as_it_was)
    subject.same("global random numbers are not used", torch.get_rng_state(), state)
    both = torch.cat([b.unsqueeze(1), B, torch.zeros_like(b).unsqueeze(1)], dim=1)
    near("X @ B = (C + lambda I)^-1 B, column by column", lambda: X @ both, expected @ both)
    near("X @ B of as many columns as there are", lambda: X @ B, expected @ B)
    wide = d.normal(C.size, _WIDE)
    near(f"X @ B of {_WIDE} columns", lambda: X @ wide, expected @ wide)
    near("X @ 0 = 0", lambda: X @ torch.zeros_like(b), torch.zeros_like(b))
    near("X @ (s b) = s X @ b", lambda: (X @ (1e-3 * b)) * 1e3, expected @ b)
    unchanged = torch.equal(b, before[0]) and torch.equal(B, before[1])
    subject.holds("X @ b leaves b as it is", unchanged, f"expected {before}, got {(b, B)}")
    other = inverse(C, 4.0 * damping)
    near("a new damping counts", lambda: solver(C, 4.0 * damping) @ b, other @ b)
    near("and the old one again", lambda: solver(C, damping) @ b, expected @ b)


def _sizes_and_types(subject: Subject, solver: Solver, tolerance: float) -> None:
    """Small and large numbers, and float32, on a well-conditioned matrix."""
    d = draw(0)
    Q, e, b = d.orthogonal(5), torch.linspace(0.5, 2.0, 5, dtype=torch.float64), d.normal(5)
    M = (Q * e) @ Q.T
    expected = dense_inverse(Dense(M), 0.5) @ b
    for s in (1e-8, 1e8):
        identity = f"solver(s C, s lambda) @ b = solver(C, lambda) @ b / s for s = {s:g}"
        got = partial(_solve, solver, Dense(s * M), 0.5 * s, b)
        subject.equal(identity, got, expected / s, scale=float((expected / s).abs().max()), tolerance=10 * tolerance)
    small = partial(_solve, solver, Dense(M.float()), 0.5, b.float())
    # the condition number 2.5 times the roundings of float32, or what was allowed
    tolerance = max(1e-4, 10 * tolerance)
    subject.equal("in float32, X @ b = (C + lambda I)^-1 b in float32", small, expected.float(), tolerance=tolerance)


def _outcome_of_solve(subject: Subject, solver: Solver) -> None:
    """Where X has a ``solve`` with a status and a start, both mean what they say."""
    d = draw(1)
    b, start = d.normal(6), d.normal(6)
    C = Diagonal(torch.linspace(1.0, 4.0, 6, dtype=torch.float64))
    solve: Any = getattr(subject.value("solver(C, lambda)", lambda: solver(C, 0.5)), "solve", None)
    if solve is None:
        return
    for identity, call in (("solve(b)", lambda: solve(b)), ("solve(b, x0)", lambda: solve(b, start))):
        solution = subject.value(identity, call)
        residual = (b - C @ solution.x - 0.5 * solution.x).norm() / b.norm()
        close = float((residual - solution.residual_norm).abs()) <= 1e-10
        said = f"said {float(solution.residual_norm):.3g}, is {float(residual):.3g}"
        subject.holds(f"{identity}.residual_norm = |b - (C + lambda I) x| / |b|", close, said)
        solved = solution.solved == (float(residual) < 1e-4)
        subject.holds(f"{identity}.solved says whether it is", solved, f"got {solution}")
    there = subject.value("solve(b, x0)", lambda: solve(b, b / (C.diagonal() + 0.5)))
    identity = "solve(b, x0) starts at x0: at the solution it takes no iteration, or one"
    subject.holds(identity, there.iterations <= 1, f"got {there}")


def _singular(subject: Subject, solver: Solver) -> None:
    """Without damping, a singular C has no inverse: an error, a warning, or an x that solves what can be solved."""
    e = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    b = torch.ones(3, dtype=torch.float64)
    identity = "a singular C without damping, with b outside of its range, is refused or warned of"
    for C in (Dense(torch.diag(e)), _matrix_free(torch.diag(e)), Diagonal(e)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            x, _ = _outcome(solver, C, 0.0, b)
        silent = x is not None and bool(x.isfinite().all()) and not caught
        subject.holds(identity, not silent, f"got {x} for {C!r}, and no x solves the system")


def _arguments(subject: Subject, solver: Solver) -> None:
    C = Dense(torch.eye(2, dtype=torch.float64))
    b = torch.ones(2, dtype=torch.float64)
    for wrong in (-1.0, float("nan"), float("inf")):
        identity = f"the damping {wrong} is refused by name"
        subject.refuses(identity, partial(_solve, solver, C, wrong, b), (ValueError, TypeError), "damping")


def _solve(solver: Solver, C: LinearOperator, damping: float, b: Tensor) -> Tensor:
    return solver(C, damping) @ b


def _outcome(solver: Solver, C: LinearOperator, damping: float, b: Tensor) -> tuple[Tensor | None, str]:
    """Return the solution and "", or None and why it was refused."""
    try:
        return _solve(solver, C, damping, b), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def _not_finite(subject: Subject, solver: Solver) -> None:
    M = torch.eye(3, dtype=torch.float64)
    M[1, 1] = float("nan")
    b = torch.ones(3, dtype=torch.float64)
    for C, kind in ((_matrix_free(M), "with products"), (None, "with entries")):
        identity = f"an operator {kind} that are not finite is refused"
        try:
            operator = Dense(M) if C is None else C
        except Exception:
            continue  # refused before the solver
        x, reason = _outcome(solver, operator, 0.1, b)
        subject.holds(identity, x is None, f"expected an error, got {x}")
        subject.holds(identity, len(reason) > 20, f"expected a reason, got {reason}")
    good, bad = Dense(torch.eye(3, dtype=torch.float64)), b.clone()
    bad[0] = float("nan")
    x, _ = _outcome(solver, good, 0.1, bad)
    shows = x is None or not bool(x.isfinite().all())
    subject.holds("a right-hand side that is not finite is refused, or shows in the result", shows, f"got {x}")


def _indefinite(subject: Subject, solver: Solver, refuses: bool) -> None:
    for size in (2, 5):
        d = draw(size)
        Q, e = d.orthogonal(size), torch.linspace(-1.0, 2.0, size, dtype=torch.float64)
        M = (Q * e) @ Q.T
        # a part along every eigenvector, so that an iteration meets the negative one
        b = Q.sum(1)
        for C in (Dense(0.5 * (M + M.T)), _matrix_free(M)):
            x, _ = _outcome(solver, C, 0.4, b)
            if x is None:
                continue
            solves = torch.allclose(M @ x + 0.4 * x, b, rtol=1e-6, atol=1e-6)
            identity = "C + lambda I with a negative eigenvalue is refused" + ("" if refuses else ", or solved")
            subject.holds(identity, solves and not refuses, f"got {x} for eigenvalues {(e + 0.4).tolist()}")
            _status(subject, solver, C, b)


def _status(subject: Subject, solver: Solver, C: LinearOperator, b: Tensor) -> None:
    """Where a solution has a status, it tells the same as the equation."""
    solve: Any = getattr(solver(C, 0.4), "solve", None)
    if solve is not None:
        solution = solve(b)
        r = C @ solution.x + 0.4 * solution.x - b
        near = float(r.norm()) <= 1e-4 * float(b.norm())
        subject.holds("a status says solved where A x = b alone", near or not solution.solved, f"got {solution}")
