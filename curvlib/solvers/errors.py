"""The error of every solver that cannot answer."""

from __future__ import annotations


class SolveError(RuntimeError):
    """A linear system that could not be solved; never a silently wrong answer.

    Attributes:
        solution: what the solver has reached before it failed, or None.
    """

    def __init__(self, message: str, solution: object | None = None) -> None:
        super().__init__(message)
        self.solution = solution

    def within(self, whole: str) -> SolveError:
        """Return the error of the same kind for a system of which this one's is a part, the whole named first."""
        return type(self)(f"{whole}: {self}", self.solution)


class NotPositiveDefiniteError(SolveError):
    """C + damping I is not positive definite to working precision: more damping is the remedy."""
