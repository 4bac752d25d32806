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
