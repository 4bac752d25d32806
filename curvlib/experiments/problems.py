"""The problems: data, a task, a network, and the settings with which the methods train it well.

A new problem is one :class:`Problem` given to :func:`register_problem`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from curvlib.experiments.errors import ExperimentError
from curvlib.experiments.images import MNIST, Curves, Digits, SmallMNIST
from curvlib.experiments.networks import Convolution, Convolutional, FullyConnected, Network, kaiming, sparse
from curvlib.experiments.options import Option, Value, options_of
from curvlib.experiments.registry import Registry
from curvlib.experiments.sources import Source
from curvlib.experiments.tasks import Classification, Reconstruction, Task

P = TypeVar("P")

# What stands in front of the name of a problem's option, where that of a method has the method's name.
PROBLEM = "problem"


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Inputs and targets, one row an example.

    Args:
        inputs: (N, ...).
        targets: (N, ...).
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, rows: Tensor) -> Examples:
        return Examples(inputs=self.inputs[rows], targets=self.targets[rows])

    def to(self, device: torch.device) -> Examples:
        """Return the same examples on a device."""
        return Examples(inputs=self.inputs.to(device), targets=self.targets.to(device))

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        """(inputs, targets)."""
        return self.inputs, self.targets


@dataclass(frozen=True, kw_only=True)
class LoadedProblem:
    """A problem with its data in memory.

    Args:
        train: training examples.
        test: test examples.
        loss: module, whose mean is over examples.
        symbols: size of the alphabet, where the data decide it.
        fingerprint: what tells data that a user brought along from others.
    """

    train: Examples
    test: Examples
    loss: nn.Module
    symbols: int | None = None
    fingerprint: str | None = None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A network to be trained on data: minimise loss(model(inputs), targets) + l2/2 |theta|^2.

    Args:
        name: what the command line calls it.
        description: one line.
        source: where the data come from.
        task: targets, loss and metric.
        network: the model.
        l2: weight of the regularisation.
        evaluated_examples: the loss and the metric are computed on that many training examples and test examples,
            chosen once, or on all where there are fewer.
        settings: per method the options that differ from the method's own defaults.
    """

    name: str
    description: str
    source: Source[Any]
    task: Task[Any]
    network: Network
    l2: float = 1e-5
    evaluated_examples: int = 5000
    settings: Mapping[str, Mapping[str, int | float | str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.l2 < 0:
            raise ExperimentError(f"l2 of problem {self.name!r} must be at least 0, got {self.l2}.")
        if self.evaluated_examples < 1:
            raise ExperimentError(f"evaluated_examples must be at least 1, got {self.evaluated_examples}.")

    def identity(self) -> dict[str, str]:
        """Return, as text, what distinguishes this problem from others of its name, the same in every process."""
        return {
            "problem": self.name,
            "problem.source": repr(self.source),
            "problem.task": repr(self.task),
            "problem.network": repr(self.network),
            "problem.l2": repr(self.l2),
            "problem.evaluated_examples": repr(self.evaluated_examples),
        }

    def load(self, path: Path | None = None) -> LoadedProblem:
        """Return the problem with its data.

        Args:
            path: where the data are, for problems that need files: a folder or, for a text, the file.

        Raises:
            ExperimentError: data are missing or damaged.
        """
        train, test = self.source.load(path)
        return LoadedProblem(
            train=Examples(inputs=train.inputs, targets=self.task.targets(train)),
            test=Examples(inputs=test.inputs, targets=self.task.targets(test)),
            loss=self.task.loss(train),
            symbols=train.symbols,
            fingerprint=train.fingerprint,
        )

    def options(self) -> Iterator[tuple[Option, Value]]:
        """Yield the options of data and network that can be set, with their values."""
        for part in (self.source, self.network):
            yield from ((entry, getattr(part, entry.name)) for entry in options_of(type(part)))

    def with_options(self, overrides: Mapping[str, str]) -> Problem:
        """Return the problem with other values of some options.

        Args:
            overrides: option name to text.

        Raises:
            ExperimentError: an unknown option, or a value that it does not take.
        """
        known = {entry.name: entry for entry, _ in self.options()}
        values = {}
        for key, text in overrides.items():
            if key not in known:
                names = ", ".join(known) or "none"
                raise ExperimentError(f"Unknown option {PROBLEM}.{key}. Known options of {self.name}: {names}.")
            values[key] = known[key].parse(PROBLEM, text)
        return dataclasses.replace(self, source=_changed(self.source, values), network=_changed(self.network, values))


def _changed(part: P, values: Mapping[str, Any]) -> P:
    """Return a source or a network with those of the values that are its options."""
    own = {entry.name: values[entry.name] for entry in options_of(type(part)) if entry.name in values}
    return dataclasses.replace(part, **own)  # type: ignore[type-var]


PROBLEMS: Registry[Problem] = Registry("problem")


def register_problem(problem: Problem) -> None:
    """Make a problem known to the command line under its name.

    Raises:
        ExperimentError: the name is taken.
    """
    PROBLEMS.register(problem.name, problem)


register_problem(
    Problem(
        name="digits-autoencoder",
        description="Compress 8x8 digits to 10 numbers and back",
        source=Digits(),
        task=Reconstruction(),
        network=FullyConnected(widths=(64, 100, 50, 10, 50, 100, 64), activation=nn.Tanh, linear_layers=(3,)),
        settings={"sgd": {"lr": 0.02}},
    )
)
register_problem(
    Problem(
        name="digits-classifier",
        description="Recognise 8x8 digits",
        source=Digits(),
        task=Classification(),
        network=FullyConnected(widths=(64, 100, 50, 10), activation=nn.Tanh),
        settings={"sgd": {"lr": 0.1}},
    )
)
register_problem(
    Problem(
        name="digits-small-classifier",
        description="Recognise 8x8 digits with few units, small enough to look at the whole curvature",
        source=Digits(),
        task=Classification(),
        network=FullyConnected(widths=(64, 12, 12, 12, 12, 12, 10), activation=nn.Tanh),
        settings={"sgd": {"lr": 0.1}, "adam": {"lr": 0.01}},
    )
)
register_problem(
    Problem(
        name="digits-convnet",
        description="Recognise 8x8 digits with convolutions",
        source=Digits(),
        task=Classification(),
        network=Convolutional(
            image=(1, 8, 8),
            convolutions=(
                Convolution(channels=8, kernel=3, padding=1),
                Convolution(channels=16, kernel=3, stride=2, padding=1),
            ),
            widths=(32, 10),
            activation=nn.Tanh,
        ),
        settings={"sgd": {"lr": 0.2}, "adam": {"lr": 0.01}},
    )
)
register_problem(
    Problem(
        name="curves-autoencoder",
        description="Compress 28x28 images of curves to the 6 numbers that made them",
        source=Curves(),
        task=Reconstruction(),
        network=FullyConnected(
            widths=(784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784),
            activation=nn.Sigmoid,
            initialise=sparse,
            linear_layers=(6,),
        ),
        settings={
            "kfac": {"batch_size": 1000},
            "hessian-free": {"curvature_fraction": 0.2},
            "sgd": {"lr": 0.02},
            "lbfgs": {"batch_size": 5000},
        },
    )
)
register_problem(
    Problem(
        name="mnist-autoencoder",
        description="Compress 28x28 digits to 30 numbers and back",
        source=MNIST(),
        task=Reconstruction(),
        network=FullyConnected(
            widths=(784, 1000, 500, 250, 30, 250, 500, 1000, 784), activation=nn.Tanh, linear_layers=(4,)
        ),
        settings={
            "kfac": {"batch_size": 1000},
            "hessian-free": {"curvature_fraction": 0.2},
            "sgd": {"lr": 0.003},
            "lbfgs": {"batch_size": 5000},
        },
    )
)
register_problem(
    Problem(
        # units and initialisation of Martens (2010), whose layers mnist-autoencoder has with tanh
        name="mnist-logistic-autoencoder",
        description="Compress 28x28 digits to 30 numbers and back, by logistic units from sparse weights",
        source=MNIST(),
        task=Reconstruction(),
        network=FullyConnected(
            widths=(784, 1000, 500, 250, 30, 250, 500, 1000, 784),
            activation=nn.Sigmoid,
            initialise=sparse,
            linear_layers=(4,),
        ),
        settings={
            "kfac": {"batch_size": 1000},
            "hessian-free": {"curvature_fraction": 0.2},
            "sgd": {"lr": 0.003},
            "lbfgs": {"batch_size": 5000},
        },
    )
)
register_problem(
    Problem(
        name="mnist-classifier",
        description="Recognise 28x28 digits",
        source=MNIST(),
        task=Classification(),
        network=FullyConnected(widths=(784, 500, 300, 10), activation=nn.ReLU, initialise=kaiming),
        settings={
            "kfac": {"batch_size": 1000},
            "hessian-free": {"curvature_fraction": 0.2},
            "sgd": {"lr": 0.05},
            "lbfgs": {"batch_size": 5000},
        },
    )
)
register_problem(
    Problem(
        # the network of figures 2 to 5 of Martens and Grosse (2015)
        name="mnist-small-classifier",
        description="Recognise digits of 16x16 pixels with few units",
        source=SmallMNIST(),
        task=Classification(),
        network=FullyConnected(widths=(256, 20, 20, 20, 20, 20, 10), activation=nn.Tanh),
        settings={
            "kfac": {"batch_size": 1000},
            "hessian-free": {"curvature_fraction": 0.2},
            "sgd": {"lr": 0.1},
            "adam": {"lr": 0.01},
            "lbfgs": {"batch_size": 5000},
        },
    )
)
register_problem(
    Problem(
        name="mnist-convnet",
        description="Recognise 28x28 digits with convolutions",
        source=MNIST(),
        task=Classification(),
        network=Convolutional(
            image=(1, 28, 28),
            convolutions=(Convolution(channels=16, kernel=5, stride=2), Convolution(channels=32, kernel=5, stride=2)),
            widths=(100, 10),
            activation=nn.ReLU,
            initialise=kaiming,
        ),
        settings={
            # a quarter of the batch predicts too badly here: accuracy would jump up and down
            "kfac": {"batch_size": 1000, "model_fraction": 1.0},
            "hessian-free": {"curvature_fraction": 0.2},
            "sgd": {"lr": 0.1},
            "adam": {"lr": 0.003},
            "lbfgs": {"batch_size": 5000},
        },
    )
)
