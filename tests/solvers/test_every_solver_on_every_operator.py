"""Every exact solver on every operator, from well to hopelessly conditioned, against dense solves in float64.

Symbols: A = C + damping I, kappa its condition number, eps the rounding unit of the dtype, x* = A^-1 b.
"""

import warnings
from math import inf

import exported
import pytest
import torch
from operator_cases import CASES, draw

from curvlib import solvers
from curvlib.solvers import (
    CG,
    MINRES,
    BlockwiseDamping,
    DampedNewton,
    DeterminismCheck,
    MoreSorensen,
    ResidualTest,
    SolveError,
    Status,
    Steihaug,
    Subproblem,
    damped_inverse,
    eigendecompose,
)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
CONDITIONS = [(torch.float64, c) for c in (1.0, 1e3, 1e6, 1e9, 1e12)] + [(torch.float32, c) for c in (1.0, 1e3, 1e6)]


def krylov(method):
    return lambda C, damping: method(max_iterations=2000, stop=ResidualTest(relative=TOLERANCE[C.dtype]))(C, damping)


def descent(strategy):
    """A step in a region so large that it is Newton's."""

    def solve(C, damping, b):
        radius = 10.0 * float(b.norm()) / damping if strategy.has_radius else inf
        answer = strategy.solve(Subproblem(operator=C, gradient=-b, radius=radius, damping=damping))
        if answer.status is not Status.CONVERGED:
            raise SolveError(str(answer.status))
        return answer.step

    return solve


def product(inverse):
    return lambda C, damping, b: inverse(C, damping) @ b


# What gives x* itself; FactoredTikhonov is an approximation, Dogleg and the subspace steps leave out directions.
SOLVERS = {
    "damped_inverse": product(damped_inverse),
    "eigendecompose": product(lambda C, damping: damped_inverse(eigendecompose(C), damping)),
    "CG": product(krylov(CG)),
    "MINRES": product(krylov(MINRES)),
    "BlockwiseDamping": product(lambda C, damping: BlockwiseDamping(factors=torch.ones_like(C.diagonal()))(C, damping)),
    "DeterminismCheck": product(lambda C, damping: DeterminismCheck(solver=damped_inverse)(C, damping)),
    "DampedNewton": descent(DampedNewton()),
    "MoreSorensen": descent(MoreSorensen()),
    "Steihaug": descent(Steihaug(max_iterations=2000, stop=ResidualTest(relative=1e-10))),
}
NOT_EXACT = {"FactoredTikhonov", "Dogleg", "TwoDimensionalSubspace"}


def test_no_exported_solver_is_left_out():
    names = {x.__name__ for x in exported.exported_solvers() | exported.exported_descents()}
    assert names == (SOLVERS.keys() | NOT_EXACT) - {"eigendecompose"}
    assert all(hasattr(solvers, name) for name in names)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("name", SOLVERS)
def test_solution_or_refusal(name, case, device):
    for seed, (dtype, condition) in enumerate(CONDITIONS):
        d = draw(seed, device, dtype=dtype)
        C, M = case(d)
        M, b = M.double(), d.normal(C.size)
        largest = float(torch.linalg.eigvalsh(M)[-1])
        damping = largest / (condition - 1.0) if condition > 1.0 else 1e3 * max(largest, 1.0)
        A = M + damping * torch.eye(C.size, dtype=torch.float64, device=device)
        kappa, eps = float(torch.linalg.cond(A)), torch.finfo(dtype).eps
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)
                x = SOLVERS[name](C, damping, b).double()
        except (SolveError, RuntimeWarning) as refusal:
            # Only where the dtype holds no solution to the tolerance: eps kappa near the 1e-5 and 1e-10 above.
            if kappa * eps > 0.01 * TOLERANCE[dtype]:
                continue
            pytest.fail(f"kappa = {kappa:.1e} in {dtype}: {refusal}")
        expected = torch.linalg.solve(A, b.double())
        # Inverses applied factor by factor err by eps kappa |A^-1| |b|, times a small power of D; those by residuals by
        # their tolerance times as much.
        scale = float(torch.linalg.matrix_norm(torch.linalg.inv(A), ord=2) * b.double().norm())
        error = float((x - expected).norm()) / scale
        assert error <= 50 * eps * kappa + 2 * TOLERANCE[dtype], f"kappa = {kappa:.1e} in {dtype}: error {error:.1e}"
