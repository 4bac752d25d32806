"""When conjugate gradients end: stopping rules, the limit, and the iterates that are kept on the way."""

from math import ceil

import pytest
import torch
from hypothesis import strategies as st
from linear_systems import EveryIterate, normal, spd

from curvlib.operators import Dense, Diagonal
from curvlib.solvers.cg import CG
from curvlib.solvers.errors import SolveError
from curvlib.solvers.solution import (
    ConvergenceWarning,
    IterateGrid,
    LimitAction,
    ProgressTest,
    RaiseAtLimit,
    ResidualTest,
    Status,
    StoppingRule,
)

TIGHT = ResidualTest(relative=1e-12)
seeds = st.integers(0, 2**31)
dampings = st.sampled_from([0.0, 1e-3, 1.0])
sizes = st.integers(1, 25)


def test_residual_test_relative_and_absolute():
    C, b = Dense(spd(0, 30, condition=100.0)), 100.0 * normal(0, 30)
    loose, tight, absolute, larger_of_both = (
        CG(stop=rule)(C, 0.0).solve(b)
        for rule in (
            ResidualTest(relative=1e-1),
            ResidualTest(relative=1e-8),
            ResidualTest(relative=0.0, absolute=1e-3),
            ResidualTest(relative=1e-8, absolute=1e-3),
        )
    )
    assert loose.iterations < absolute.iterations < tight.iterations
    assert float(absolute.residual_norm) * float(b.norm()) <= 1e-3 < float(loose.residual_norm) * float(b.norm())
    assert absolute.iterations == larger_of_both.iterations


@pytest.mark.parametrize(
    ("epsilon", "min_window", "fraction"), [(5e-4, 10, 0.1), (1e-2, 10, 0.1), (5e-4, 3, 0.0), (5e-4, 3, 0.5)]
)
@pytest.mark.parametrize("start", ["zero", "good", "bad"])
def test_progress_test_stops_where_the_paper_says(epsilon, min_window, fraction, start):
    C, b, damping = spd(3, 200, condition=100.0), normal(3, 200), 1e-3
    solved = CG(stop=TIGHT, max_iterations=500)(Dense(C), damping).solve(b).x
    x0 = {"zero": 0.0 * b, "good": 0.999 * solved, "bad": 100.0 * b}[start]
    rule = ProgressTest(epsilon=epsilon, min_window=min_window, fraction=fraction)
    solution = CG(stop=rule, max_iterations=60)(Dense(C), damping).solve(b, x0=x0)
    every = CG(stop=ResidualTest(relative=0.0), store=EveryIterate(), max_iterations=60)(Dense(C), damping).solve(
        b, x0=x0
    )
    iterates = [x0, *(x for _, x in every.iterates)]
    phi = [float(0.5 * x @ (C @ x + damping * x) - b @ x) for x in iterates]
    windows = {i: max(min_window, ceil(fraction * i)) for i in range(1, 61)}
    stops = [i for i, k in windows.items() if i > k and phi[i] < 0 and (phi[i] - phi[i - k]) / phi[i] < k * epsilon]
    assert solution.status is Status.CONVERGED
    assert solution.iterations == stops[0] < 60


def test_progress_test_accepts_a_singular_consistent_system():
    C = Diagonal(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    solution = CG(stop=ProgressTest())(C, 0.0).solve(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    assert solution.status is Status.CONVERGED
    torch.testing.assert_close(solution.x, torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("base", [1.3, 2.0])
def test_stored_iterates_are_the_grid_and_the_last(base):
    C, b = Dense(spd(1, 60, condition=1e5)), normal(1, 60)
    limit = 37
    options = {"max_iterations": limit, "stop": ResidualTest(relative=1e-30)}
    solution = CG(store=IterateGrid(base=base), **options)(C, 0.0).solve(b)
    expected = sorted({ceil(base**j) for j in range(40) if ceil(base**j) < limit} | {limit})
    assert [i for i, _ in solution.iterates] == expected
    assert torch.equal(solution.iterates[-1][1], solution.x)
    for i, x in solution.iterates:
        shorter = CG(**{**options, "max_iterations": i})(C, 0.0).solve(b)
        torch.testing.assert_close(x, shorter.x)
    assert CG(**options)(C, 0.0).solve(b).iterates == ()


def test_at_the_limit_warns_raises_or_does_what_a_third_party_wants():
    C, b = Dense(spd(1, 60, condition=1e5)), normal(1, 60)
    with pytest.warns(
        ConvergenceWarning, match=r"limit of 5 iterations with relative residual .* \(asked 1e-06\); raise"
    ):
        x = CG(max_iterations=5)(C, 0.0) @ b
    solution = CG(max_iterations=5)(C, 0.0).solve(b)
    assert (solution.status, solution.iterations) == (Status.ITERATION_LIMIT, 5)
    assert torch.equal(solution.x, x)
    with pytest.raises(SolveError, match="limit of 5") as caught:
        CG(max_iterations=5, on_limit=RaiseAtLimit())(C, 0.0) @ b
    assert caught.value.solution.status is Status.ITERATION_LIMIT

    class Ignore(LimitAction):
        def act(self, solution):
            pass

    assert torch.equal(CG(max_iterations=5, on_limit=Ignore())(C, 0.0) @ b, x)


def test_stopping_rule_of_a_third_party():
    class Three(StoppingRule):
        def satisfied(self, progress):
            return torch.full_like(progress.rhs_norm, progress.iteration >= 3, dtype=torch.bool)

    solution = CG(stop=Three())(Dense(spd(0, 20)), 0.0).solve(normal(0, 20))
    assert (solution.status, solution.iterations) == (Status.CONVERGED, 3)
