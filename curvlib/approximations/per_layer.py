"""Another approximation for each layer, chosen by module, by class or by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import nn

from curvlib.approximations.assignment import AssignedApproximation, Assignment
from curvlib.approximations.eigenbasis import Basis, InEigenbasis
from curvlib.approximations.ekfac import EKFAC, EigenbasisAverage
from curvlib.approximations.fallbacks import Fallback
from curvlib.approximations.layerwise import LayerwiseApproximation
from curvlib.approximations.moving_average import MovingAverage
from curvlib.approximations.running import RunningAverage, running_average
from curvlib.approximations.statistics import Statistics
from curvlib.approximations.two_sweeps import Standing, TwoSweeps
from curvlib.extensions import Layer, LayerPlan
from curvlib.matrices import CurvatureMatrix
from curvlib.objective import Batch, Evaluation, Objective
from curvlib.operators import LinearOperator

Selector = str | type[nn.Module] | nn.Module
Chosen = LayerwiseApproximation | EKFAC
Choice = tuple[Selector, Chosen | None]


@dataclass(frozen=True)
class PerLayer(AssignedApproximation, TwoSweeps):
    """The first choice whose selector fits a layer treats it, ``otherwise`` treats the rest; None gives no curvature.

    A selector is a pattern with ``*`` and ``?`` for the name of a layer, of a module or of a parameter; a module class;
    or a module, which stands for everything inside it. A parameter outside every layer that a selector fits gets its
    exact diagonal from ``Diagonal``, an exact dense block from ``BlockDiagonal``, what ``on_unsupported`` says from any
    other, and is left out for None. Choices of the same curvature matrix share their output-space vectors.

    With ``EKFAC`` among the choices an estimate takes two sweeps over the layers, as its own does, with the same draws
    in both, and ``EigenbasisAverage`` stands for ``MovingAverage``; all eigenbases are made anew together.

    Args:
        choices: pairs (selector, approximation or None).
        otherwise: for what no selector fits.

    Raises:
        TypeError: a choice is no such pair, or ``otherwise`` is no layerwise approximation.
        ValueError: several ``EKFAC`` have another ``basis_every``; (at the first use with a model) a selector fits
            nothing.

    Example:
        >>> import curvlib
        >>> from curvlib.approximations import KFAC, Diagonal
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 1))
        >>> C = PerLayer([("0", Diagonal(curvlib.GGN())), (nn.LayerNorm, None)], otherwise=KFAC(curvlib.GGN()))
        >>> [row.block for row in C.describe(curvlib.Objective(model, nn.MSELoss())).rows][::2]
        ['diagonal', 'none (zero curvature)', 'Kronecker: A 3 x 3, G 1 x 1']
    """

    choices: Sequence[Choice]
    otherwise: Chosen | None

    def __post_init__(self) -> None:
        pairs = tuple(tuple(choice) if isinstance(choice, (tuple, list)) else (choice,) for choice in self.choices)
        object.__setattr__(self, "choices", pairs)
        for pair in pairs:
            if len(pair) != 2 or not (isinstance(pair[0], (str, nn.Module)) or _is_module_class(pair[0])):
                raise TypeError(
                    "PerLayer needs choices to be pairs (selector, approximation), the selector a name pattern, a "
                    f"module class or a module, got {pair!r}."
                )
        for approximation in (*(pair[1] for pair in pairs), self.otherwise):
            if approximation is not None and not isinstance(approximation, (LayerwiseApproximation, EKFAC)):
                raise TypeError(
                    "PerLayer needs layerwise approximations such as KFAC(Fisher()), Diagonal(GGN()) or None, got "
                    f"{approximation!r}."
                )
            if approximation is not None and approximation.alone is not None:
                raise TypeError(f"PerLayer cannot mix {approximation!r} with others: {approximation.alone}.")
        periods = sorted({chosen.basis_every for chosen in self._chosen() if isinstance(chosen, EKFAC)})
        if len(periods) > 1:
            raise ValueError(
                f"PerLayer makes all eigenbases anew together: give each EKFAC the same basis_every, got {periods}."
            )

    @property
    def may_be_indefinite(self) -> bool:
        """Whether one of the choices may be."""
        return any(approximation.may_be_indefinite for approximation in self._chosen())

    @property
    def basis_every(self) -> int:  # type: ignore[override]
        """Updates of a running average from one eigenbasis to the next, 0 without ``EKFAC``."""
        return next((chosen.basis_every for chosen in self._chosen() if isinstance(chosen, EKFAC)), 0)

    @property
    def averages(self) -> bool:
        """Whether statistics of batches add up: not in eigenbases that differ from batch to batch."""
        return not self.basis_every

    def estimate(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> LinearOperator:
        """Return the operator of one batch.

        Raises:
            NonFiniteStatisticsError: the statistics hold NaN or infinity.
        """
        if self.averages:
            return super().estimate(evaluation, generator)
        return self.estimate_in_two_sweeps(evaluation, generator)

    def estimate_over(
        self,
        objective: Objective,
        loader: Iterable[Batch],
        generator: torch.Generator | None = None,
        *,
        progress: bool = True,
    ) -> LinearOperator:
        """Return the operator of all batches; with ``EKFAC`` the loader is run through twice."""
        if self.averages:
            return super().estimate_over(objective, loader, generator, progress=progress)
        return self.estimate_over_in_two_sweeps(objective, loader, generator, progress)

    def statistics(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> Statistics:
        """Return the statistics of all layers.

        Raises:
            TypeError: a choice is ``EKFAC``, whose statistics need a basis.
        """
        if not self.averages:
            raise TypeError(f"{self!r} has no statistics before its eigenbases are made: see EigenbasisAverage.")
        return super().statistics(evaluation, generator)

    def first_sweep(self, standing: Standing) -> PerLayer:
        """Return K-FAC for the layers of ``EKFAC``, nothing for the others."""
        return self._with(lambda chosen: chosen.first_sweep(standing) if isinstance(chosen, EKFAC) else None)

    def second_sweep(self, bases: Mapping[str, Basis], standing: Standing, *, with_factors: bool = False) -> PerLayer:
        """Return the scales in given bases for the layers of ``EKFAC``, and the other choices."""
        return self._with(
            lambda chosen: (
                chosen.second_sweep(bases, standing, with_factors=with_factors)
                if isinstance(chosen, EKFAC)
                else replace(chosen, matrix=standing.get(chosen.matrix, chosen.matrix))
            )
        )

    def assign(self, objective: Objective, plan: LayerPlan) -> Assignment:
        """Return the first choice that fits each layer and each other parameter."""
        self._check_selectors(objective)
        layers = {layer.name: _of_layer(self._choice(partial(_fits_layer, layer))[1]) for layer in plan.layers}
        others = {
            name: _fallback(*self._choice(partial(_fits_parameter, name, objective.model))) for name in plan.unsupported
        }
        return Assignment(layers, others)

    def _chosen(self) -> list[Chosen]:
        """Return the approximations of all choices."""
        return [chosen for chosen in (*(chosen for _, chosen in self.choices), self.otherwise) if chosen is not None]

    def _with(self, changed: Callable[[Chosen], LayerwiseApproximation | None]) -> PerLayer:
        """Return the same selectors with other approximations."""
        choices = [(selector, None if chosen is None else changed(chosen)) for selector, chosen in self.choices]
        return PerLayer(choices, otherwise=None if self.otherwise is None else changed(self.otherwise))

    def _choice(self, fits: Callable[[Selector], bool]) -> tuple[bool, Chosen | None]:
        """Return whether a selector fits, and the approximation."""
        for selector, approximation in self.choices:
            if fits(selector):
                return True, approximation
        return False, self.otherwise

    def _check_selectors(self, objective: Objective) -> None:
        plan = objective.plan
        for selector, _ in self.choices:
            fits = any(_fits_layer(layer, selector) for layer in plan.layers) or any(
                _fits_parameter(name, objective.model, selector) for name in plan.unsupported
            )
            if not fits:
                known = [layer.name or "(model)" for layer in plan.layers] + list(plan.unsupported)
                raise ValueError(
                    f"PerLayer: the selector {selector!r} fits no layer and no parameter. Known: {', '.join(known)}."
                )


def _is_module_class(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def _fits_layer(layer: Layer, selector: Selector) -> bool:
    if isinstance(selector, str):
        names = {part.name for part in layer.maps} | set(layer.modules) | set(layer.parameters)
        return any(fnmatchcase(name, selector) for name in names)
    if isinstance(selector, nn.Module):
        return not {id(module) for module in selector.modules()}.isdisjoint(map(id, layer.members))
    return any(isinstance(member, selector) for member in layer.members)


def _fits_parameter(name: str, model: nn.Module, selector: Selector) -> bool:
    place = name.rpartition(".")[0]
    owner = model.get_submodule(place)
    if isinstance(selector, str):
        return fnmatchcase(name, selector) or fnmatchcase(place, selector)
    if isinstance(selector, nn.Module):
        return any(module is owner for module in selector.modules())
    return isinstance(owner, selector)


def _of_layer(chosen: Chosen | None) -> LayerwiseApproximation | None:
    return InEigenbasis(chosen.matrix, bases={}) if isinstance(chosen, EKFAC) else chosen


def _fallback(selected: bool, approximation: Chosen | None) -> tuple[Fallback, CurvatureMatrix | None]:
    if approximation is None:
        return "exclude", None
    own = approximation.own_fallback if selected else None
    return own or approximation.on_unsupported, approximation.matrix


@running_average.register
def _(approximation: PerLayer, decay: float) -> RunningAverage:
    return (MovingAverage if approximation.averages else EigenbasisAverage)(approximation, decay)
