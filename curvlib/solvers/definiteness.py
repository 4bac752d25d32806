"""What a solver makes of a C + damping I that is not positive definite."""

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


def gives_descent(solver: object) -> bool:
    """Return whether -X g goes downhill for the X that a solver makes of an indefinite C + damping I.

    The solver's own word, its attribute ``gives_descent``; without one False. It is right for an X that is positive
    definite all the same, such as the inverse of the matrix with the eigenvalues' absolute values. The inverse of an
    indefinite matrix, as of ``MINRES``, is not.

    Args:
        solver: anything that turns (C, damping) into an inverse.
    """
    return bool(getattr(solver, "gives_descent", False))
