"""Structural damping of recurrent networks: the curvature of a change of hidden states.

Symbols: N examples, D parameters, h_1, h_2, ... the hidden states as functions of the parameters, J_i = dh_i/dtheta.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlib.approximations.base import Approximation
from curvlib.approximations.description import Description
from curvlib.approximations.exact import whole_matrix
from curvlib.approximations.joint import Map, ObservedProducts
from curvlib.approximations.loss_curvature import OverLoader, check_finite
from curvlib.approximations.matching import MatchingLoss, SquaredChange
from curvlib.extensions import LayerPlan
from curvlib.matrices import Products
from curvlib.objective import Batch, Evaluation, Objective, ObservedPass
from curvlib.operators import LinearOperator

Selector = str | type[nn.Module] | nn.Module


@dataclass(frozen=True, kw_only=True)
class StructuralDamping(Approximation):
    r"""The curvature S of a change of hidden states, by exact products, to be added to that of the objective.

    .. math:: S = \frac{1}{N} \sum_i J_i^T M_i J_i, \qquad
        \frac{1}{N} L(h(\theta + d), h(\theta)) \approx \mathrm{const} + \tfrac12 d^T S d

    M_i is the second derivative of the matching loss L at h' = h. S sums over time, units and calls; over examples it
    averages for an objective whose loss has the reduction "mean" (over all N, also where that divides by more, or
    ignores targets) and sums for "sum". There is no l2 term: S is no curvature of the objective. Hessian-free
    optimisation solves with C + lambda (I + mu S): see ``TruncatedNewton`` and the preset ``hessian_free``. Products of
    ``joined(C + c * S)``, where both are estimates on one evaluation, cost about as much as those of C.

    Martens & Sutskever (2011), "Structural damping". Departure: any modules, and the states of several calls and
    layers.

    Args:
        modules: whose outputs are the hidden states: module classes, names (with ``*`` and ``?``) or modules of the
            model. By default all recurrent layers and cells: their outputs at all times, of several layers those of
            the last (layers of their own are observed each). Of a tuple the first item counts, for LSTM h and not c.
        loss: ``SquaredChange()``, or ``MatchingCrossEntropy()`` of Martens & Sutskever.

    Raises:
        TypeError: an argument is none of these.
        ValueError: (at the first use with a model) a selector fits no module, or a module is not called.

    Example:
        >>> import curvlib
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> evaluation = curvlib.Objective(model, nn.MSELoss()).at((torch.ones(4, 2), torch.zeros(4, 1)))
        >>> S = StructuralDamping(modules=(nn.Tanh,)).estimate(evaluation)
        >>> (curvlib.approximations.Exact(curvlib.GGN()).estimate(evaluation) + 0.1 * S).shape
        (13, 13)
    """

    includes_l2: ClassVar[bool] = False
    modules: tuple[Selector, ...] = (nn.RNNBase, nn.RNNCellBase)
    loss: MatchingLoss = field(default_factory=SquaredChange)

    def __post_init__(self) -> None:
        if isinstance(self.modules, (list, tuple)):
            object.__setattr__(self, "modules", tuple(self.modules))
        if not (isinstance(self.modules, tuple) and self.modules and all(map(_is_selector, self.modules))):
            raise TypeError(
                "StructuralDamping needs modules to be a sequence of module classes, names or modules, such as "
                f"(nn.LSTM,) or ('encoder.rnn',), got {self.modules!r}."
            )
        if not isinstance(self.loss, MatchingLoss):
            raise TypeError(
                f"StructuralDamping needs loss to be a matching loss such as SquaredChange(), got {self.loss!r}."
            )

    def estimate(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> LinearOperator:
        """Return S of one evaluation, matrix-free; it holds the evaluation and a second graph.

        Raises:
            NonFiniteStatisticsError: the objective is NaN or infinite on the batch.
            ValueError: a module has another number of examples than the outputs, or states are out of bounds.
        """
        return self._estimate(evaluation)

    def estimate_over(
        self,
        objective: Objective,
        loader: Iterable[Batch],
        generator: torch.Generator | None = None,
        *,
        progress: bool = True,
    ) -> LinearOperator:
        """Return S of all batches together, by products that run through the loader; see ``Exact.estimate_over``."""
        self.check(objective)
        batches = _InBatches(self)
        return OverLoader(objective, batches, loader, generator, progress, batch_weight=_batch_weight).operator()

    def describe(self, objective: Objective, plan: LayerPlan | None = None) -> Description:
        """All parameters are in one exact block."""
        return whole_matrix(self, objective, f"change of {', '.join(self._selected(objective))}")

    def check(self, objective: Objective) -> None:
        """Refuse a model without a module that a selector fits."""
        self._selected(objective)

    def _estimate(self, evaluation: Evaluation) -> ObservedProducts:
        evaluation.check_fresh()
        modules = self._selected(evaluation.objective)
        check_finite(self, float(evaluation.value))
        observed = ObservedPass(evaluation, modules)
        scale = 1.0 if evaluation.objective.loss.additive else 1 / evaluation.examples
        return ObservedProducts(observed, (None, *(self._map(states, scale) for states in observed.values[1:])))

    def _map(self, states: Float[Tensor, " ..."], scale: float) -> Map:
        self.loss.check(states)
        product = self.loss.linearize(states)
        return lambda x: scale * product(x)

    def _selected(self, objective: Objective) -> dict[str, nn.Module]:
        """Return the modules that the selectors fit, by name.

        Raises:
            ValueError: a name or a module is not in the model, or none of the classes is.
        """
        named = {name or "(model)": module for name, module in objective.model.named_modules()}
        chosen: dict[str, nn.Module] = {}
        missing = []
        for selector in self.modules:
            fitting = {name: module for name, module in named.items() if _fits(name, module, selector)}
            if not fitting:
                missing.append(selector)
            chosen.update(fitting)
        # Of several classes some may be absent, as recurrent cells are beside recurrent layers.
        if not chosen or not all(isinstance(selector, type) for selector in missing):
            known = ", ".join(f"{name} ({type(module).__name__})" for name, module in named.items())
            raise ValueError(
                f"StructuralDamping: {', '.join(map(_in_words, missing))} fits no module of the model. Choose others "
                f"with modules=(...). Known: {known}."
            )
        return chosen


@dataclass(frozen=True)
class _InBatches:
    """What a sweep over batches asks for."""

    damping: StructuralDamping
    draws: bool = False

    def __repr__(self) -> str:
        return repr(self.damping)

    def products(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> Products:
        operator = self.damping._estimate(evaluation)
        return Products(product=operator.matvec, quadratic_form=operator.quadratic_form)


def _batch_weight(evaluation: Evaluation) -> Float[Tensor, ""]:
    """Return N for a mean over examples, 1 for a sum."""
    number = 1 if evaluation.objective.loss.additive else evaluation.examples
    return torch.full((), number, dtype=evaluation.layout.dtype, device=evaluation.layout.device)


def _is_selector(value: object) -> bool:
    return isinstance(value, (str, nn.Module)) or (isinstance(value, type) and issubclass(value, nn.Module))


def _fits(name: str, module: nn.Module, selector: Selector) -> bool:
    if isinstance(selector, str):
        return fnmatchcase(name, selector)
    return isinstance(module, selector) if isinstance(selector, type) else module is selector


def _in_words(selector: Selector) -> str:
    return selector.__name__ if isinstance(selector, type) else repr(selector)
