"""Newton's method in a trust region, among the methods of the command line."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

import curvlib
from curvlib.experiments.curvatures import PRECONDITIONERS
from curvlib.experiments.methods import SecondOrderMethod, register_method
from curvlib.experiments.options import Bounds, Choices, option
from curvlib.experiments.trainers import SecondOrderTrainer, Trainer


@dataclass(frozen=True, kw_only=True)
class NewtonTrustRegion(SecondOrderMethod):
    """Truncated Newton steps in a trust region (Steihaug 1983), on the Hessian or another curvature.

    On large batches alone: the radius follows how well the model of a batch predicts the loss of that batch.
    """

    name = "newton-trust-region"
    description = "Steihaug's conjugate gradients on the Hessian, in a trust region"
    own_approximation = "exact"
    own_matrix = "ggn"

    batch_size: int = option(5000, "examples a step", Bounds(at_least=1))
    radius: float = option(1.0, "first radius, in the units of the parameters or of that norm", Bounds(above=0))
    curvature_fraction: float = option(1.0, "part of the batch for the curvature", Bounds(above=0, at_most=1))
    preconditioner: str = option(
        "none", "of the conjugate gradients, and the norm of the region", Choices(tuple(PRECONDITIONERS))
    )

    def start(self, model: nn.Module, loss: nn.Module, l2: float, seed: int) -> Trainer:
        """Return the trainer."""
        optimizer = curvlib.optimizers.newton_trust_region(
            curvlib.Objective(model, loss, l2=l2),
            curvature=self._approximation,
            radius=self.radius,
            preconditioner=PRECONDITIONERS.get(self.preconditioner),
            curvature_fraction=self.curvature_fraction,
            seed=seed,
        )
        return SecondOrderTrainer(optimizer)


register_method(NewtonTrustRegion)
