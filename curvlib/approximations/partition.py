"""Which parameters share a block of a block-diagonal approximation.

Symbols: D parameters, B blocks of one size d.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from jaxtyping import Int
from torch import Tensor

from curvlib.extensions import Layer, LayerPlan
from curvlib.objective import Objective


@dataclass(frozen=True, eq=False)
class Group:
    """Blocks of one size that belong together.

    Attributes:
        name: for statistics and descriptions.
        parameters: names of the parameters that have entries in it.
        coordinates: (B, d), where the entries of each block lie in the flat vector.
    """

    name: str
    parameters: tuple[str, ...]
    coordinates: Int[Tensor, "B d"]


class Partition(ABC):
    """A way to cut the parameters into blocks, which may span layers."""

    @abstractmethod
    def groups(self, objective: Objective, plan: LayerPlan) -> tuple[Group, ...]:
        """Return disjoint groups.

        Args:
            objective: the objective.
            plan: its layers; every parameter is in a group, also those outside of them.
        """

    def check(self, objective: Objective) -> None:  # noqa: B027 - most partitions go with every model
        """Raise ValueError for a model that the partition does not fit."""


class LayerPartition(ABC):
    """A way to cut each layer by itself into blocks of one size."""

    @abstractmethod
    def blocks_of(self, layer: Layer) -> int:
        """Return B: the layer's coordinates, in their order, are B blocks of equal size."""


@dataclass(frozen=True)
class ByLayer(LayerPartition):
    """One block a layer: its weight and its bias together."""

    def blocks_of(self, layer: Layer) -> int:
        """One."""
        return 1


@dataclass(frozen=True)
class ByOutputUnit(LayerPartition):
    """One block an output unit: a row of (W b), for a convolution the weights and the bias of an output channel."""

    def blocks_of(self, layer: Layer) -> int:
        """As many as (W b) has rows."""
        return layer.maps[0].groups * layer.maps[0].d_out


@dataclass(frozen=True)
class ByParameter(Partition):
    """One block a parameter tensor."""

    def groups(self, objective: Objective, plan: LayerPlan) -> tuple[Group, ...]:
        """Return a group for each parameter."""
        return _groups(objective, {name: (name,) for name in objective.layout.names})


@dataclass(frozen=True)
class ByGroups(Partition):
    """Groups that the caller names: one block for all parameters of a group, in the model's order.

    Args:
        named: for each group the names of its parameters, or patterns for them with ``*`` and ``?``.

    Raises:
        TypeError: this is no sequence of sequences of strings.
        ValueError: (at the first use with a model) a pattern fits nothing, or a parameter is in no group or in two.
    """

    named: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        if isinstance(self.named, str) or any(isinstance(group, str) for group in self.named):
            raise TypeError(f"ByGroups needs a sequence of sequences of names, got {self.named!r}.")
        object.__setattr__(self, "named", tuple(tuple(group) for group in self.named))
        if not all(isinstance(name, str) for group in self.named for name in group):
            raise TypeError(f"ByGroups needs a sequence of sequences of names, got {self.named!r}.")

    def check(self, objective: Objective) -> None:
        """Refuse patterns that fit nothing and parameters that are not in exactly one group."""
        names = objective.layout.names
        for pattern in (pattern for group in self.named for pattern in group):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"ByGroups: {pattern!r} fits no trainable parameter; known: {', '.join(names)}.")
        for name in names:
            hits = [group for group in self.named if any(fnmatchcase(name, pattern) for pattern in group)]
            if len(hits) != 1:
                where = f"in {len(hits)} groups" if hits else "in no group"
                raise ValueError(f"ByGroups needs every trainable parameter in exactly one group; {name!r} is {where}.")

    def groups(self, objective: Objective, plan: LayerPlan) -> tuple[Group, ...]:
        """Return the groups, in the caller's order."""
        self.check(objective)
        names = objective.layout.names
        chosen = {
            f"group {i}": tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in group))
            for i, group in enumerate(self.named)
        }
        return _groups(objective, {key: group for key, group in chosen.items() if group})


@dataclass(frozen=True, repr=False)
class ByLabel(Partition):
    """One block for all parameters to whose names a function gives the same label.

    Args:
        label: a function of a parameter's name.
    """

    label: Callable[[str], Hashable]

    def __post_init__(self) -> None:
        if not callable(self.label):
            raise TypeError(f"ByLabel needs a function of a parameter's name, got {self.label!r}.")

    def groups(self, objective: Objective, plan: LayerPlan) -> tuple[Group, ...]:
        """Return a group for each label."""
        chosen: dict[str, tuple[str, ...]] = {}
        labels: dict[Hashable, str] = {}
        for name in objective.layout.names:
            key = labels.setdefault(self.label(name), f"group {len(labels)}")
            chosen[key] = (*chosen.get(key, ()), name)
        return _groups(objective, chosen)

    def __repr__(self) -> str:
        # the address of a function would make saved running averages useless in another process
        return f"ByLabel({getattr(self.label, '__qualname__', type(self.label).__name__)})"


def _groups(objective: Objective, chosen: dict[str, tuple[str, ...]]) -> tuple[Group, ...]:
    return tuple(Group(key, names, _coordinates(objective, names).unsqueeze(0)) for key, names in chosen.items())


def _coordinates(objective: Objective, names: Iterable[str]) -> Int[Tensor, " d"]:
    return torch.cat([objective.layout.coordinates(name) for name in names])
