"""Another approximation for each layer, chosen by module, by class or by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

from torch import nn

from curvlib.approximations.assignment import AssignedApproximation, Assignment
from curvlib.approximations.fallbacks import Fallback
from curvlib.approximations.layerwise import LayerwiseApproximation
from curvlib.extensions import Layer, LayerPlan
from curvlib.matrices import CurvatureMatrix
from curvlib.objective import Objective

Selector = str | type[nn.Module] | nn.Module
Choice = tuple[Selector, LayerwiseApproximation | None]


@dataclass(frozen=True)
class PerLayer(AssignedApproximation):
    """The first choice whose selector fits a layer treats it, ``otherwise`` treats the rest; None gives no curvature.

    A selector is a pattern with ``*`` and ``?`` for the name of a layer, of a module or of a parameter; a module class;
    or a module, which stands for everything inside it. A parameter outside every layer that a selector fits gets its
    exact diagonal from ``Diagonal``, an exact dense block from ``BlockDiagonal``, what ``on_unsupported`` says from any
    other, and is left out for None. Choices of the same curvature matrix share their output-space vectors.

    Args:
        choices: pairs (selector, approximation or None).
        otherwise: for what no selector fits.

    Raises:
        TypeError: a choice is no such pair, or ``otherwise`` is no layerwise approximation.
        ValueError: (at the first use with a model) a selector fits nothing.

    Example:
        >>> import curvlib
        >>> from curvlib.approximations import KFAC, Diagonal
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 1))
        >>> C = PerLayer([("0", Diagonal(curvlib.GGN())), (nn.LayerNorm, None)], otherwise=KFAC(curvlib.GGN()))
        >>> [row.block for row in C.describe(curvlib.Objective(model, nn.MSELoss())).rows][::2]
        ['diagonal', 'none (zero curvature)', 'Kronecker: A 3 x 3, G 1 x 1']
    """

    choices: Sequence[Choice]
    otherwise: LayerwiseApproximation | None

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
            if approximation is not None and not isinstance(approximation, LayerwiseApproximation):
                raise TypeError(
                    "PerLayer needs layerwise approximations such as KFAC(Fisher()), Diagonal(GGN()) or None, got "
                    f"{approximation!r}."
                )
            if approximation is not None and approximation.alone is not None:
                raise TypeError(f"PerLayer cannot mix {approximation!r} with others: {approximation.alone}.")

    @property
    def may_be_indefinite(self) -> bool:
        """Whether one of the choices may be."""
        chosen = (*(approximation for _, approximation in self.choices), self.otherwise)
        return any(approximation is not None and approximation.may_be_indefinite for approximation in chosen)

    def assign(self, objective: Objective, plan: LayerPlan) -> Assignment:
        """Return the first choice that fits each layer and each other parameter."""
        self._check_selectors(objective)
        layers = {layer.name: self._chosen(partial(_fits_layer, layer))[1] for layer in plan.layers}
        others = {
            name: _fallback(*self._chosen(partial(_fits_parameter, name, objective.model))) for name in plan.unsupported
        }
        return Assignment(layers, others)

    def _chosen(self, fits: Callable[[Selector], bool]) -> tuple[bool, LayerwiseApproximation | None]:
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


def _fallback(selected: bool, approximation: LayerwiseApproximation | None) -> tuple[Fallback, CurvatureMatrix | None]:
    if approximation is None:
        return "exclude", None
    own = approximation.own_fallback if selected else None
    return own or approximation.on_unsupported, approximation.matrix
