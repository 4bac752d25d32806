"""Which parameters belong to which layer, found from the model alone, before any computation.

A layer is a set of parameters that one affine map uses: the weight and the bias of a module, or of several modules that
share both. Parameters that no rule covers are listed with the reason.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor, nn

from curvlib.extensions.rule import LayerRule, find_rule
from curvlib.parameters import ParameterLayout, trainable_parameters


class UnsupportedLayerError(TypeError):
    """A parameter for which no layer rule holds, or a call of a module that its rule cannot describe."""


@dataclass(frozen=True, eq=False)
class Layer:
    """Trainable parameters of one affine map, as the matrix (W b) of shape (d_out, columns).

    Attributes:
        name: the first module's name.
        modules: names of all modules that use these parameters.
        weight: name of the weight, or None if it is frozen.
        bias: name of the bias, or None if there is none or it is frozen.
        coordinates: where the entries of (W b), row by row, lie in the flat vector.
        d_out: rows of the matrix.
        columns: columns of the matrix: d_in (if the weight is trained) plus one (if the bias is).
    """

    name: str
    modules: tuple[str, ...]
    weight: str | None
    bias: str | None
    coordinates: Int[Tensor, " d_out*columns"]
    d_out: int
    columns: int

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the layer's trainable parameters."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """The layers of a model and the parameters outside them.

    Attributes:
        layers: in the order of the model's modules.
        unsupported: the other trainable parameters by name, each with the reason.
        modules: the modules whose calls matter, with their names, rules and the index of their layer.
    """

    layers: tuple[Layer, ...]
    unsupported: dict[str, str]
    modules: tuple[tuple[str, nn.Module, LayerRule, int], ...]

    def without(self, escaped: dict[str, str]) -> LayerPlan:
        """Return the plan with the layers of the given parameters moved to the unsupported ones, for these reasons."""
        if not escaped:
            return self
        keep, moved = [], dict(self.unsupported)
        for index, layer in enumerate(self.layers):
            reasons = [escaped[name] for name in layer.parameters if name in escaped]
            if reasons:
                moved.update({name: escaped.get(name, reasons[0]) for name in layer.parameters})
            else:
                keep.append(index)
        renumbered = {old: new for new, old in enumerate(keep)}
        return replace(
            self,
            layers=tuple(self.layers[index] for index in keep),
            unsupported=moved,
            modules=tuple(
                (name, module, rule, renumbered[index])
                for name, module, rule, index in self.modules
                if index in renumbered
            ),
        )


def plan_layers(model: nn.Module, layout: ParameterLayout) -> LayerPlan:
    """Sort the trainable parameters of ``model`` into layers, by the rules registered for its modules."""
    names = {id(parameter): name for name, parameter in trainable_parameters(model).items()}
    groups: dict[tuple[str | None, str | None], list[tuple[str, nn.Module, LayerRule]]] = defaultdict(list)
    reasons: dict[str, str] = {}
    for module_name, module in model.named_modules():
        own = {attr: names[id(p)] for attr, p in module._parameters.items() if p is not None and id(p) in names}
        if not own:
            continue
        rule, reason = find_rule(module)
        extra = set(own) - {"weight", "bias"}
        if rule is not None and extra:
            rule, reason = None, f"{type(module).__name__} has the further parameter {sorted(extra)[0]!r}"
        if rule is not None and not {"weight", "bias"} <= set(module._parameters):
            rule, reason = None, f"the weight of {type(module).__name__} is computed (parametrised), not a parameter"
        if rule is None:
            reasons.update(dict.fromkeys(own.values(), f"{reason} ({module_name or 'the model itself'})"))
            continue
        groups[own.get("weight"), own.get("bias")].append((module_name, module, rule))
    _refuse_overlaps(groups, reasons)
    layers: list[Layer] = []
    modules: list[tuple[str, nn.Module, LayerRule, int]] = []
    for (weight, bias), members in groups.items():
        if {weight, bias} & reasons.keys():
            reason = reasons.get(weight or "") or reasons[bias or ""]
            reasons.update({name: reasons.get(name, reason) for name in (weight, bias) if name is not None})
            continue
        modules += [(*member, len(layers)) for member in members]
        layers.append(_layer(weight, bias, members, layout))
    ordered = {name: reasons[name] for name in layout.names if name in reasons}
    return LayerPlan(tuple(layers), ordered, tuple(modules))


def _refuse_overlaps(groups: dict, reasons: dict[str, str]) -> None:
    """Note every parameter that belongs to two groups: a weight shared by modules with different biases."""
    users: dict[str, list[str]] = defaultdict(list)
    for key, members in groups.items():
        for name in {name for name in key if name is not None}:
            users[name].append(members[0][0])
    for name, modules in users.items():
        if len(modules) > 1:
            reasons[name] = f"shared by {' and '.join(map(repr, modules))}, whose other parameters differ"


def _layer(
    weight: str | None, bias: str | None, members: list[tuple[str, nn.Module, LayerRule]], layout: ParameterLayout
) -> Layer:
    name, module, rule = members[0]
    parts = []
    if weight is not None:
        index = layout.coordinates(weight).view(layout.shapes[layout.names.index(weight)])
        parts.append(rule.weight_matrix(module, index))
    if bias is not None:
        parts.append(layout.coordinates(bias).unsqueeze(1))
    matrix = torch.cat(parts, dim=1)
    return Layer(
        name=name,
        modules=tuple(member for member, _, _ in members),
        weight=weight,
        bias=bias,
        coordinates=matrix.reshape(-1),
        d_out=matrix.shape[0],
        columns=matrix.shape[1],
    )
