"""The estimates of one approximation on one network, as the identities of its suite compare them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvlib.approximations import Approximation
from curvlib.testing.identities import Subject
from curvlib.testing.oracles import Network
from curvlib.testing.unchanged import Snapshot

# float64 sums of a few hundred products, with room for eigenvectors and large logits.
CLOSE = 1e-9


class Estimates:
    """An approximation on one network; estimates from generators with the same seed unless told otherwise."""

    def __init__(self, approximation: Approximation, subject: Subject, network: Network) -> None:
        self.approximation, self.subject, self.network = approximation, subject, network
        self.objective = network.objective()
        self.evaluation = self.objective.at(network.batch)
        # what the first estimate leaves behind, later ones find there
        self.before = Snapshot(network.model)
        self.C = self.dense()
        self.size = max(1.0, float(self.C.abs().max()))
        # beyond rounding, which draws that cancel may change
        self.random = not torch.allclose(self.C, self.dense(seed=1), rtol=0.0, atol=CLOSE * self.size)

    def dense(self, network: Network | None = None, seed: int = 0) -> Tensor:
        """Return the estimate at a seed as a matrix, of the network by default."""
        evaluation = self.evaluation if network is None else network.evaluate()
        operator = self.subject.value(
            "estimate(evaluation) is defined",
            lambda: self.approximation.estimate(evaluation, torch.Generator().manual_seed(seed)),
        )
        return self.subject.value("estimate(evaluation).to_dense()", operator.to_dense)

    def equal(self, identity: str, got: Tensor | Callable[[], Tensor], expected: Tensor) -> None:
        """Compare beside the size of the estimate."""
        self.subject.equal(identity, got, expected, scale=self.size, tolerance=CLOSE)
