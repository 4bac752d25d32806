"""What every run of a comparison shares: data and initial network, on their device."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from curvlib.experiments.budgets import Budget, EvaluationSchedule
from curvlib.experiments.comparison import Comparison
from curvlib.experiments.errors import ExperimentError
from curvlib.experiments.problems import Examples, LoadedProblem
from curvlib.experiments.tasks import Metric

# The evaluated examples are drawn once for all, whatever the seed of the run.
_EVALUATION_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every run of a comparison shares, on its device.

    Args:
        model: at the initial parameters; a run trains a copy.
        loss: module whose mean is over examples.
        l2: weight of the regularisation.
        metric: to be reported.
        train: training examples.
        evaluated_train: training examples on which loss and metric are computed.
        evaluated_test: the same for the test examples.
        budget: what a run may spend.
        schedule: when to evaluate.
        seed: of the data order and of all randomness in training.
        device: where everything is.
        timer: the clock of a run's seconds.
    """

    model: nn.Module
    loss: nn.Module
    l2: float
    metric: Metric
    train: Examples
    evaluated_train: Examples
    evaluated_test: Examples
    budget: Budget
    schedule: EvaluationSchedule
    seed: int
    device: torch.device
    timer: Callable[[], float] = time.perf_counter


def workload_of(comparison: Comparison, loaded: LoadedProblem) -> Workload:
    """Return the workload of a comparison; this seeds PyTorch's random numbers.

    Raises:
        ExperimentError: the data are not those of the comparison, or a method cannot train its network.
    """
    problem, device = comparison.problem, comparison.device
    if loaded.fingerprint != comparison.data:
        raise ExperimentError(
            f"The data of the comparison are {comparison.data}, those given are {loaded.fingerprint}: "
            "use Comparison(..., data=loaded.fingerprint)."
        )
    model = check_methods(comparison, loaded)
    return Workload(
        model=model.to(device),
        loss=loaded.loss.to(device),
        l2=problem.l2,
        metric=problem.task.metric,
        train=loaded.train.to(device),
        evaluated_train=_subset(loaded.train, problem.evaluated_examples).to(device),
        evaluated_test=_subset(loaded.test, problem.evaluated_examples).to(device),
        budget=comparison.budget,
        schedule=comparison.schedule,
        seed=comparison.seed,
        device=device,
    )


def check_methods(comparison: Comparison, loaded: LoadedProblem) -> nn.Module:
    """Return the freshly initialised network, on the CPU, which all methods can train; this seeds PyTorch.

    Raises:
        ExperimentError: a method cannot, with its settings.
    """
    torch.manual_seed(comparison.seed)
    network = comparison.problem.network
    model = (network if loaded.symbols is None else network.for_symbols(loaded.symbols)).build()
    for method in comparison.methods:
        method.check(model, loaded.loss)
    return model


def _subset(examples: Examples, count: int) -> Examples:
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(_EVALUATION_SEED))
    return examples[order[:count]]


def warm_up(workload: Workload) -> None:
    """Compute one gradient, so that no method pays for the libraries' first call."""
    model = copy.deepcopy(workload.model)
    inputs, targets = workload.train[torch.arange(min(500, len(workload.train)), device=workload.device)].batch
    workload.loss(model(inputs), targets).backward()
