"""The methods: frozen settings that start a trainer. A new method is one subclass of :class:`Method`, registered.

The class defaults suit the small problems; what a problem needs otherwise stands in its ``settings``.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

import curvlib
from curvlib.approximations import Approximation, StructuralDamping
from curvlib.experiments.curvatures import PRECONDITIONERS, Curvature, CurvatureChoice
from curvlib.experiments.errors import ExperimentError
from curvlib.experiments.options import Bounds, Choices, check_options, option, options_of
from curvlib.experiments.problems import PROBLEM, Problem
from curvlib.experiments.registry import Registry
from curvlib.experiments.trainers import ClosureTrainer, GradientTrainer, SecondOrderTrainer, Trainer
from curvlib.solvers import (
    DampingControl,
    LevenbergMarquardt,
    ProgressTest,
    RelativeStart,
    StoppingRule,
    TighteningTest,
)

_COUNT = Bounds(at_least=1)
_POSITIVE = Bounds(above=0)
_PART = Bounds(above=0, at_most=1)
_FRACTION = Bounds(at_least=0, below=1)


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A way of training a network, with all of its settings.

    Args:
        batch_size: examples a step; a problem with fewer trains on all of them at every step.

    Raises:
        ExperimentError: an option has a wrong type or is out of bounds.
    """

    name: ClassVar[str]
    description: ClassVar[str]

    batch_size: int = option(250, "examples a step", _COUNT)

    def __post_init__(self) -> None:
        check_options(self.name, self)

    @abstractmethod
    def start(self, model: nn.Module, loss: nn.Module, l2: float, seed: int) -> Trainer:
        """Return a trainer that minimises loss(model(inputs), targets) + l2/2 |theta|^2.

        Args:
            model: at its initial parameters.
            loss: module whose mean is over examples.
            l2: weight of the regularisation.
            seed: of the method's own randomness.
        """

    def check(self, model: nn.Module, loss: nn.Module) -> None:
        """Refuse a model that the method cannot train with these settings, before any training.

        Raises:
            ExperimentError: names the setting.
        """
        del model, loss

    takes_curvature: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """Name in tables and figures."""
        return self.name

    def with_curvature(self, choice: CurvatureChoice) -> Method:
        """Return the method with another curvature.

        Raises:
            ExperimentError: the method has no curvature matrix.
        """
        del choice
        raise ExperimentError(
            f"{self.name} has no curvature matrix to choose: use it without --curvature and --matrix."
        )

    def settings(self) -> dict[str, str]:
        """Return every setting as text; two methods with equal settings train alike."""
        return {entry.name: repr(getattr(self, entry.name)) for entry in dataclasses.fields(self)}


@dataclass(frozen=True, kw_only=True)
class SGD(Method):
    """Stochastic gradient descent with Nesterov's momentum (Sutskever et al. 2013)."""

    name = "sgd"
    description = "stochastic gradient descent with Nesterov momentum"

    lr: float = option(0.01, "learning rate", _POSITIVE)
    momentum: float = option(0.9, "weight of the previous step", Bounds(above=0, below=1))

    def start(self, model: nn.Module, loss: nn.Module, l2: float, seed: int) -> Trainer:
        """Return the trainer."""
        optimizer = torch.optim.SGD(
            model.parameters(), lr=self.lr, momentum=self.momentum, nesterov=True, weight_decay=l2, fused=True
        )
        return GradientTrainer(model, loss, optimizer)


@dataclass(frozen=True, kw_only=True)
class Adam(Method):
    """Adam (Kingma and Ba 2015)."""

    name = "adam"
    description = "Adam: gradients scaled by a diagonal of second moments"

    lr: float = option(1e-3, "learning rate", _POSITIVE)
    beta1: float = option(0.9, "decay of the mean of gradients", _FRACTION)
    beta2: float = option(0.999, "decay of the mean of their squares", _FRACTION)

    def start(self, model: nn.Module, loss: nn.Module, l2: float, seed: int) -> Trainer:
        """Return the trainer."""
        optimizer = torch.optim.Adam(
            model.parameters(), lr=self.lr, betas=(self.beta1, self.beta2), weight_decay=l2, fused=True
        )
        return GradientTrainer(model, loss, optimizer)


@dataclass(frozen=True, kw_only=True)
class LBFGS(Method):
    """Limited-memory BFGS with a strong-Wolfe line search, on batches so large that they change little."""

    name = "lbfgs"
    description = "limited-memory BFGS with a strong-Wolfe line search"

    batch_size: int = option(10_000, "examples a step", _COUNT)
    lr: float = option(1.0, "first trial length of the line search", _POSITIVE)
    iterations: int = option(5, "inner iterations a step", _COUNT)
    history: int = option(50, "pairs that are remembered", _COUNT)

    def start(self, model: nn.Module, loss: nn.Module, l2: float, seed: int) -> Trainer:
        """Return the trainer."""
        optimizer = torch.optim.LBFGS(
            model.parameters(),
            lr=self.lr,
            max_iter=self.iterations,
            history_size=self.history,
            line_search_fn="strong_wolfe",
        )
        return ClosureTrainer(model, loss, optimizer, l2)


@dataclass(frozen=True, kw_only=True)
class SecondOrderMethod(Method):
    """What the methods with a curvature matrix share.

    Args:
        curvature: to be used in place of the preset's own.
    """

    takes_curvature = True
    own_approximation: ClassVar[str]
    own_matrix: ClassVar[str]

    curvature: Curvature | None = field(default=None)

    @property
    def label(self) -> str:
        """Name, and the curvature where it is not the preset's own."""
        return self.name if self.curvature is None else f"{self.name} ({self.curvature.name})"

    def with_curvature(self, choice: CurvatureChoice) -> Method:
        """Return the method with another curvature."""
        return dataclasses.replace(self, curvature=choice.resolve(self.own_approximation, self.own_matrix))

    @property
    def _approximation(self) -> Approximation | None:
        return self.curvature.approximation if self.curvature is not None else None


@dataclass(frozen=True, kw_only=True)
class KFACMethod(SecondOrderMethod):
    """Kronecker-factored approximate curvature (Martens and Grosse 2015)."""

    name = "kfac"
    description = "Kronecker-factored approximate curvature"
    own_approximation = "kfac"
    own_matrix = "fisher"

    batch_size: int = option(500, "examples a step", _COUNT)
    damping: float | None = option(None, "first damping; auto: on the curvature's scale", _POSITIVE)
    statistics_fraction: float = option(1 / 4, "part of the batch for the curvature", _PART)
    model_fraction: float = option(1 / 4, "part of the batch for the quadratic model", _PART)

    def start(self, model: nn.Module, loss: nn.Module, l2: float, seed: int) -> Trainer:
        """Return the trainer."""
        optimizer = curvlib.optimizers.kfac(
            curvlib.Objective(model, loss, l2=l2),
            curvature=self._approximation,
            damping=self.damping,
            statistics_fraction=self.statistics_fraction,
            model_fraction=self.model_fraction,
            seed=seed,
        )
        return SecondOrderTrainer(optimizer)


@dataclass(frozen=True)
class Rules:
    """When Hessian-free optimisation ends a solve, and how its damping moves.

    Args:
        stop: of the conjugate gradients; None: the preset's.
        damping: (the first lambda or None) -> what the preset takes.
    """

    stop: StoppingRule | None
    damping: Callable[[float | None], float | DampingControl | None]


def _damping_of_martens(first: float | None) -> DampingControl:
    return LevenbergMarquardt.martens(initial=RelativeStart(0.3) if first is None else first)


RULES: Registry[Rules] = Registry("set of rules")
RULES.register("short", Rules(None, lambda first: first))
# For K-FAC as the preconditioner, of whose solves an iteration does more (benchmarks/README.md).
RULES.register("shorter", Rules(TighteningTest(epsilon=0.1, min_window=1), lambda first: first))
RULES.register("martens", Rules(ProgressTest(), _damping_of_martens))


@dataclass(frozen=True, kw_only=True)
class HessianFree(SecondOrderMethod):
    """Hessian-free optimisation (Martens 2010), with structural damping if asked for (Martens & Sutskever 2011).

    Args:
        structural_weight: mu of the damping lambda (I + mu S), S the curvature of a change of the hidden states of all
            recurrent layers; 0 leaves S out.
    """

    name = "hessian-free"
    description = "Hessian-free: conjugate gradients on exact curvature products"
    own_approximation = "exact"
    own_matrix = "ggn"

    batch_size: int = option(5000, "examples a step", _COUNT)
    damping: float | None = option(None, "first damping; auto: on the curvature's scale", _POSITIVE)
    curvature_fraction: float = option(1.0, "part of the batch for the curvature", _PART)
    cg_iterations: int = option(250, "conjugate gradients a step at most", _COUNT)
    preconditioner: str = option("none", "of the conjugate gradients", Choices(tuple(PRECONDITIONERS)))
    rules: str = option(
        "short",
        "of the ends of solves and of the damping: the preset's; shorter, for K-FAC as preconditioner; or Martens's",
        Choices(tuple(RULES)),
    )
    structural_weight: float = option(0.0, "of structural damping, for recurrent networks; 0: none", Bounds(at_least=0))

    def check(self, model: nn.Module, loss: nn.Module) -> None:
        """Refuse structural damping of a model without recurrent layers."""
        if self._structure is None:
            return
        try:
            self._structure.check(curvlib.Objective(model, loss))
        except ValueError as error:
            raise ExperimentError(
                f"{self.name}.structural_weight={self.structural_weight:g} is for networks with recurrent layers; for "
                f"this one use 0. {error}"
            ) from error

    @property
    def _structure(self) -> StructuralDamping | None:
        return StructuralDamping() if self.structural_weight > 0 else None

    def start(self, model: nn.Module, loss: nn.Module, l2: float, seed: int) -> Trainer:
        """Return the trainer."""
        rules = RULES.get(self.rules)
        optimizer = curvlib.optimizers.hessian_free(
            curvlib.Objective(model, loss, l2=l2),
            curvature=self._approximation,
            damping=rules.damping(self.damping),
            stop=rules.stop,
            preconditioner=PRECONDITIONERS.get(self.preconditioner),
            structural_damping=self._structure,
            # not looked at where there is none, and the preset takes no 0
            structural_weight=self.structural_weight or 1.0,
            curvature_fraction=self.curvature_fraction,
            max_iterations=self.cg_iterations,
            seed=seed,
        )
        return SecondOrderTrainer(optimizer)


METHODS: Registry[type[Method]] = Registry("method")


def register_method(method: type[Method]) -> None:
    """Make a method known to the command line under its name.

    Raises:
        ExperimentError: the name is taken.
    """
    if method.name == PROBLEM:
        raise ExperimentError(f"No method can be named {PROBLEM!r}, which is in front of a problem's options.")
    METHODS.register(method.name, method)


for _method in (KFACMethod, HessianFree, SGD, Adam, LBFGS):
    register_method(_method)


def configure(name: str, problem: Problem, overrides: Mapping[str, str]) -> Method:
    """Return a method with the settings of a problem and with texts that override some of its options.

    Args:
        name: of the method.
        problem: whose settings take precedence over the method's defaults.
        overrides: option name to text, which take precedence over both.

    Raises:
        ExperimentError: an unknown method or option, or a value that the option does not take.
    """
    method = METHODS.get(name)
    known = {entry.name: entry for entry in options_of(method)}
    values: dict[str, Any] = dict(problem.settings.get(name, {}))
    for key, text in overrides.items():
        if key not in known:
            raise ExperimentError(f"Unknown option {name}.{key}. Known options of {name}: {', '.join(known)}.")
        values[key] = known[key].parse(name, text)
    return method(**values)
