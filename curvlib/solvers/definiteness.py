"""Whether a solver can do with a C + damping I that is not positive definite."""

from __future__ import annotations


def takes_indefinite(solver: object) -> bool:
    """Return the solver's own word, its attribute ``takes_indefinite``; without one False.

    Args:
        solver: anything that turns (C, damping) into an inverse.

    Example:
        >>> from curvlib.solvers import CG, MINRES, DeterminismCheck
        >>> [takes_indefinite(solver) for solver in (CG(), MINRES(), DeterminismCheck(solver=MINRES()))]
        [False, True, True]
    """
    return bool(getattr(solver, "takes_indefinite", False))
