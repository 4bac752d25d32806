"""K-FAC's statistics of a recurrent network, with one label drawn from the model for each step of each example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks.subjects import Benchmark, Call, Subject, Target
from benchmarks.workload import Problem, Workload
from curvlib import Fisher
from curvlib.approximations import KFAC, GeneralTransition, Independent, LinearGaussian, WeightSharing


class Tagger(nn.Module):
    """A class for every step of a sequence, by an LSTM."""

    def __init__(self, features: int, units: int, classes: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, units, batch_first=True)
        self.readout = nn.Linear(units, classes)

    def forward(self, x: Float[Tensor, "N T features"]) -> Float[Tensor, "N classes T"]:
        """Return the logits."""
        return self.readout(self.lstm(x)[0]).transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class TaggerProblem(Problem):
    """Random sequences and labels.

    Args:
        name: as it appears in the report.
        features: of a step.
        units: of the LSTM.
        classes: labels of a step.
        steps: T.
        examples: N.
    """

    name: str = "tagger"
    features: int = 128
    units: int = 128
    classes: int = 50
    steps: int = 100
    examples: int = 64

    def workload(self, device: torch.device) -> Workload:
        """Return the batch and a model of its own."""
        torch.manual_seed(0)
        x = torch.randn(self.examples, self.steps, self.features)
        y = torch.randint(self.classes, (self.examples, self.steps))
        model = Tagger(self.features, self.units, self.classes).to(device)
        return Workload(model=model, loss=nn.CrossEntropyLoss(), inputs=x.to(device), targets=y.to(device))

    def tiny(self) -> TaggerProblem:
        """Return the same with few units, steps and examples."""
        return replace(self, name=f"{self.name} (tiny)", features=4, units=4, classes=3, steps=5, examples=8)

    def __str__(self) -> str:
        return (
            f"{self.name}: LSTM of {self.features} features and {self.units} units, {self.classes} classes at each of "
            f"T = {self.steps} steps, N = {self.examples}, float32"
        )


def _statistics(sharing: WeightSharing) -> Callable[[Workload], Call]:
    def prepare(workload: Workload) -> Call:
        evaluation = workload.objective.at(workload.batch, linearize=False)
        approximation = KFAC(Fisher(), weight_sharing=sharing)
        return lambda: approximation.statistics(evaluation)

    return prepare


def _with_forward(sharing: WeightSharing) -> Callable[[Workload], Call]:
    def prepare(workload: Workload) -> Call:
        objective, approximation = workload.objective, KFAC(Fisher(), weight_sharing=sharing)
        return lambda: approximation.statistics(objective.at(workload.batch, linearize=False))

    return prepare


_INDEPENDENT = "curvlib: statistics alone, independent steps"
_OPTION_1 = "curvlib: statistics alone, linear Gaussian chain, option 1"
_OPTION_2 = "curvlib: statistics alone, linear Gaussian chain, option 2"

RECURRENT_STATISTICS = Benchmark(
    name="kfac-lstm",
    title="K-FAC statistics, LSTM",
    problem=TaggerProblem(),
    subjects=(
        Subject(name=_INDEPENDENT, prepare=_statistics(Independent())),
        Subject(name=_OPTION_1, prepare=_statistics(LinearGaussian())),
        Subject(name=_OPTION_2, prepare=_statistics(LinearGaussian(GeneralTransition()))),
        Subject(name="curvlib: forward pass and statistics, independent steps", prepare=_with_forward(Independent())),
        Subject(name="curvlib: forward pass and statistics, option 1", prepare=_with_forward(LinearGaussian())),
    ),
    targets=tuple(Target(subject=name, at_most=3.0) for name in (_INDEPENDENT, _OPTION_1, _OPTION_2)),
)
