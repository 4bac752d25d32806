"""The identity as a curvature: what turns a second-order method into a first-order one, for comparison."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from curvlib.approximations.base import StatisticalApproximation, with_l2
from curvlib.approximations.description import Description
from curvlib.approximations.exact import whole_matrix
from curvlib.approximations.statistics import Statistics
from curvlib.extensions import LayerPlan
from curvlib.objective import Evaluation, Objective
from curvlib.operators import Identity as IdentityOperator
from curvlib.operators import LinearOperator


@dataclass(frozen=True)
class Identity(StatisticalApproximation):
    """C = I (plus the l2 term), whatever the data."""

    def statistics(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> Statistics:
        """Return no statistics."""
        evaluation.check_fresh()
        return Statistics()

    def operator(self, objective: Objective, statistics: Statistics) -> LinearOperator:
        """Return the identity."""
        layout = objective.layout
        return with_l2(IdentityOperator(layout.size, dtype=layout.dtype, device=layout.device), objective)

    def describe(self, objective: Objective, plan: LayerPlan | None = None) -> Description:
        """All parameters have curvature one."""
        return whole_matrix(self, objective, "identity")
