"""Which parameters belong to which layer, found from the model alone, before any computation.

A layer is a set of parameters that one affine map uses: the weight and the bias of a module, or of several modules that
share both. Parameters that no rule covers are listed with the reason.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Int
from torch import Tensor, nn

from curvlib.extensions.rule import LayerRule, Part, find_rule
from curvlib.parameters import ParameterLayout, trainable_parameters


class UnsupportedLayerError(TypeError):
    """A parameter for which no layer rule holds, or a call of a module that its rule cannot describe."""


@dataclass(frozen=True, eq=False, kw_only=True)
class AffineMap:
    """One way in which modules use a layer's parameters: as the matrices (W b) of shape (groups, d_out, columns).

    Attributes:
        name: the first module's name, with the part's own where a module has several.
        weight: whether the weight is trained.
        bias: whether there is a bias and it is trained.
        groups: how many matrices stand side by side.
        d_out: rows of each.
        columns: columns of each: d_in (if the weight is trained) plus one (if the bias is).
        elementwise: whether W is a scale of each feature.
        sparse: whether the inputs are lookups.
        ordered: whether positions follow one another.
        order: where the entries, row by row, stand among the layer's coordinates; None is the same order.
    """

    name: str
    weight: bool
    bias: bool
    groups: int
    d_out: int
    columns: int
    elementwise: bool
    sparse: bool
    ordered: bool = False
    order: Int[Tensor, " size"] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Layer:
    """Trainable parameters that are used together, and the affine maps they make.

    Attributes:
        name: the first map's name.
        modules: names of all modules that use these parameters.
        members: those modules.
        parameters: names of the parameters; one may belong to several layers, each with rows of its own.
        coordinates: where the entries of the first map's (W b), row by row, lie in the flat vector.
        maps: one; several only where modules use the same weight in different ways, such as an embedding and the output
            layer that shares its weight.
    """

    name: str
    modules: tuple[str, ...]
    members: tuple[nn.Module, ...]
    parameters: tuple[str, ...]
    coordinates: Int[Tensor, " size"]
    maps: tuple[AffineMap, ...]

    @property
    def size(self) -> int:
        """How many entries the layer's parameters have in it."""
        return len(self.coordinates)


@dataclass(frozen=True, eq=False)
class PlannedModule:
    """A module whose calls matter.

    Attributes:
        name: its name.
        module: the module.
        rule: the rule of its class.
        targets: for each part of the rule the layer and the number of the layer's map, or None if nothing is trained.
    """

    name: str
    module: nn.Module
    rule: LayerRule
    targets: tuple[tuple[Layer, int] | None, ...]


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """The layers of a model and the parameters outside them.

    Attributes:
        layers: in the order of the model's modules.
        unsupported: the other trainable parameters by name, each with the reason.
        modules: the modules whose calls matter.
        calls: by layer name how often the layer was called in a forward pass; empty before one.
    """

    layers: tuple[Layer, ...]
    unsupported: dict[str, str]
    modules: tuple[PlannedModule, ...]
    calls: dict[str, int] = field(default_factory=dict)

    def without(self, escaped: dict[str, str]) -> LayerPlan:
        """Return the plan with the layers of the given parameters moved to the unsupported ones, for these reasons."""
        reasons, kept = {**self.unsupported, **escaped}, list(self.layers)
        # A parameter may belong to several layers: with one of them the others go as well, until none is left over.
        while hit := next((layer for layer in kept if not reasons.keys().isdisjoint(layer.parameters)), None):
            kept.remove(hit)
            reason = next(reasons[name] for name in hit.parameters if name in reasons)
            for name in hit.parameters:
                reasons.setdefault(name, reason)
        return replace(self, layers=tuple(kept), unsupported=reasons)


@dataclass(frozen=True, eq=False)
class _Member:
    """One part of one module, before layers are made."""

    module_name: str
    module: nn.Module
    rule: LayerRule
    index: int  # of the part
    part: Part
    weight: str | None  # names in the model; None if frozen or absent
    bias: str | None

    @property
    def name(self) -> str:
        # a colon, which no module's name has
        return f"{self.module_name}:{self.part.name}" if self.part.name else self.module_name

    @property
    def key(self) -> tuple:
        return self.weight, self.bias, self.part.weight_rows, self.part.bias_rows

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(name for name in (self.weight, self.bias) if name is not None)


def plan_layers(model: nn.Module, layout: ParameterLayout) -> LayerPlan:
    """Sort the trainable parameters of ``model`` into layers, by the rules registered for its modules."""
    members, reasons = _members(model)
    groups: dict[tuple, list[_Member]] = defaultdict(list)
    for member in members:
        groups[member.key].append(member)
    _refuse_overlaps(groups, reasons)
    targets: dict[tuple[str, int], tuple[Layer, int]] = {}
    layers: list[Layer] = []
    for together in groups.values():
        layer, places = _layer(together, layout)
        layers.append(layer)
        for member, place in zip(together, places, strict=True):
            targets[member.module_name, member.index] = layer, place
    modules = {member.module_name: member for member in members}
    planned = tuple(
        PlannedModule(
            name,
            member.module,
            member.rule,
            tuple(targets.get((name, index)) for index in range(len(member.rule.parts(member.module)))),
        )
        for name, member in modules.items()
    )
    plan = LayerPlan(tuple(layers), {}, planned).without(reasons)
    return replace(
        plan, unsupported={name: plan.unsupported[name] for name in layout.names if name in plan.unsupported}
    )


def _members(model: nn.Module) -> tuple[list[_Member], dict[str, str]]:
    """Return the parts of all modules that have a rule, and the parameters that have none, each with the reason."""
    names = {id(parameter): name for name, parameter in trainable_parameters(model).items()}
    members: list[_Member] = []
    reasons: dict[str, str] = {}
    claimed: set[int] = set()  # modules whose parameters belong to the rule of a module around them
    for module_name, module in model.named_modules():
        if id(module) in claimed or not any(id(parameter) in names for parameter in module.parameters()):
            continue
        own = {key: names[id(p)] for key, p in module._parameters.items() if id(p) in names}
        rule, reason = find_rule(module)
        parts = rule.parts(module) if rule is not None else ()
        paths = [path for part in parts for path in (part.weight, part.bias) if path is not None]
        if not all(_is_parameter(module, path) for path in paths):
            rule, reason = None, f"the weight of {type(module).__name__} is computed (parametrised), not a parameter"
        where = f" ({module_name or 'the model itself'})"
        if rule is None:
            reasons.update(dict.fromkeys(own.values(), reason + where))
            continue
        for extra in own.keys() - set(paths):
            reasons[own[extra]] = f"{type(module).__name__} has the further parameter {extra!r}{where}"
        claimed.update(id(module.get_submodule(path.rpartition(".")[0])) for path in paths if "." in path)
        for index, part in enumerate(parts):
            weight, bias = (names.get(id(_parameter(module, path))) for path in (part.weight, part.bias))
            if weight is not None or bias is not None:
                members.append(_Member(module_name, module, rule, index, part, weight, bias))
    return members, reasons


def _parameter(module: nn.Module, path: str | None) -> nn.Parameter | None:
    if path is None:
        return None
    owner, _, key = path.rpartition(".")
    return module.get_submodule(owner)._parameters[key]


def _is_parameter(module: nn.Module, path: str) -> bool:
    owner, _, key = path.rpartition(".")
    return key in module.get_submodule(owner)._parameters


def _refuse_overlaps(groups: dict[tuple, list[_Member]], reasons: dict[str, str]) -> None:
    """Note every parameter that belongs to two groups: a weight shared by maps with different biases."""
    users: dict[str, list[_Member]] = defaultdict(list)
    for together in groups.values():
        for name in together[0].parameters:
            users[name].append(together[0])
    for name, first in users.items():
        modules = {member.module_name: None for member in first}
        # parts of one module may have rows of their own
        rows = [member.part.weight_rows if name == member.weight else member.part.bias_rows for member in first]
        if len(modules) > 1 or (len(first) > 1 and (None in rows or len(set(rows)) < len(rows))):
            owners = {member.name: None for member in first}
            reasons[name] = f"shared by {' and '.join(map(repr, owners))}, whose other parameters differ"


def _layer(together: list[_Member], layout: ParameterLayout) -> tuple[Layer, list[int]]:
    """Return the layer of members that share their parameters, and for each the number of its map."""
    maps: list[AffineMap] = []
    matrices: list[Tensor] = []
    kinds: list[tuple[LayerRule, int]] = []
    places = []
    for member in together:
        matrix = _matrix(member, layout)
        kind = (member.rule, member.part.groups)
        same = [i for i, other in enumerate(matrices) if kinds[i] == kind and torch.equal(other, matrix)]
        if not same:
            maps.append(_map(member, matrix, matrices[0] if matrices else matrix))
            matrices.append(matrix)
            kinds.append(kind)
        places.append(same[0] if same else len(maps) - 1)
    layer = Layer(
        name=maps[0].name,
        modules=tuple(dict.fromkeys(member.module_name for member in together)),
        members=tuple(member.module for member in together),
        parameters=together[0].parameters,
        coordinates=matrices[0].reshape(-1),
        maps=tuple(maps),
    )
    return layer, places


def _matrix(member: _Member, layout: ParameterLayout) -> Int[Tensor, "d_out columns"]:
    """Return where the entries of a member's (W b) lie in the flat vector, groups one below the other."""
    weight_rows, bias_rows = (
        slice(*rows) if rows is not None else slice(None) for rows in (member.part.weight_rows, member.part.bias_rows)
    )
    columns = []
    if member.weight is not None:
        index = layout.coordinates(member.weight).view(layout.shapes[layout.names.index(member.weight)])
        columns.append(member.rule.weight_matrix(member.module, index[weight_rows]))
    if member.bias is not None:
        columns.append(layout.coordinates(member.bias)[bias_rows].reshape(-1, 1))
    return torch.cat(columns, dim=1)


def _map(member: _Member, matrix: Int[Tensor, "d_out columns"], first: Int[Tensor, "d_out columns"]) -> AffineMap:
    order = None
    if not torch.equal(matrix, first):
        # both are permutations of the same numbers
        place = first.reshape(-1).argsort()
        order = place[torch.searchsorted(first.reshape(-1).sort().values, matrix.reshape(-1))]
    return AffineMap(
        name=member.name,
        weight=member.weight is not None,
        bias=member.bias is not None,
        groups=member.part.groups,
        d_out=matrix.shape[0] // member.part.groups,
        columns=matrix.shape[1],
        elementwise=member.rule.elementwise,
        sparse=member.rule.sparse,
        ordered=member.rule.ordered,
        order=order,
    )
