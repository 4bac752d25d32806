"""Ends of solves within training: loose while the damping is large, tight once it has fallen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite

from curvlib.solvers.solution import ProgressTest


@dataclass(frozen=True, kw_only=True)
class TighteningTest(ProgressTest):
    r"""A progress test whose epsilon falls with the damping.

    .. math:: \epsilon_k = \min(\text{epsilon}, \max(\text{tightest}, \text{epsilon} \, (\lambda_k / \lambda_0)^p))

    for the solve with damping lambda_k, lambda_0 the first one, whatever the control. An early end and the damping both
    keep a step to where the quadratic model holds. A control such as ``LevenbergMarquardt`` lowers the damping while
    the model predicts well; short solves would then be what limits the steps, and long ones find the directions of low
    curvature that they leave out. Where longer solves lead to steps that the model predicts badly, the damping rises
    and solves are short again. By itself it is the test of ``epsilon``.

    Args:
        epsilon: the least relative progress of an iteration at the first damping and above.
        min_window: the least number of iterations that are looked back.
        fraction: the part of all iterations that is looked back.
        tightest: the least epsilon; by default that of Martens (2010).
        power: p >= 0. A larger one suits long training: solves get longer sooner.

    Example:
        >>> rule = TighteningTest()
        >>> [rule.at(share).epsilon for share in (4.0, 1.0, 1 / 16, 1e-12)]
        [0.05, 0.05, 0.025, 0.0005]
    """

    epsilon: float = 0.05
    min_window: int = 2
    tightest: float = 5e-4
    power: float = 1 / 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.tightest <= self.epsilon:
            raise ValueError(
                f"TighteningTest needs 0 < tightest <= epsilon, got tightest={self.tightest!r}, "
                f"epsilon={self.epsilon!r}."
            )
        if not (isfinite(self.power) and self.power >= 0):
            raise ValueError(f"TighteningTest(power=...) must be a finite number >= 0, got {self.power!r}.")

    def at(self, damping_share: float) -> TighteningTest:
        """Return the test with the epsilon of that damping over the first one."""
        wanted = self.epsilon * min(damping_share, 1.0) ** self.power
        return replace(self, epsilon=max(self.tightest, wanted))
