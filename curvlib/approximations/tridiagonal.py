r"""K-FAC with a block-tridiagonal inverse, for chains of layers (Martens & Grosse 2015, sec. 4.3).

Symbols: layers 1 .. l in the order of the forward pass; a_i (N, columns_i) the inputs of layer i with the homogeneous
coordinate, g_i (N, d_out_i) its output gradients for the vectors v_k; A_ij = E[a_i a_j^T], G_ij = sum_k g_i^T g_j.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from curvlib.approximations.assignment import add_to, layer_key
from curvlib.approximations.base import StatisticalApproximation, with_l2
from curvlib.approximations.description import BlockRow, Description
from curvlib.approximations.layerwise import check_vectors
from curvlib.approximations.statistics import Statistics
from curvlib.extensions import DenseFactors, Layer, LayerFactors, LayerPlan, UnsupportedLayerError
from curvlib.matrices import CurvatureMatrix
from curvlib.objective import Evaluation, Objective
from curvlib.operators import BlockDiagonal, KroneckerMarkovChain, LinearOperator, full_precision


@dataclass(frozen=True)
class TridiagonalKFAC(StatisticalApproximation):
    r"""The matrix with K-FAC's blocks for each layer and each pair of neighbours whose inverse is block tridiagonal.

    .. math:: C^{-1} = \Xi^T \Lambda \, \Xi, \qquad C_{ii} = A_{ii} \otimes G_{ii}, \quad
        C_{i,i+1} = A_{i,i+1} \otimes G_{i,i+1}

    The gradient of a layer is taken for Gaussian, and for independent of all later layers' given the next one's: see
    :class:`~curvlib.operators.KroneckerMarkovChain`. ``FactoredTikhonov()`` is the paper's inverse, by structure;
    ``damped_inverse`` takes conjugate gradients, preconditioned with it.

    For layers that form a chain: the inputs of each are a function of the outputs of the one before, each is called
    once and at one position. Order and chain are found in the autograd graph of the forward pass, where a connection
    that carries no gradient (the model's inputs beside a hidden layer) is not seen. Anything else is refused by name,
    as are parameters outside of the chain.

    Args:
        matrix: ``Fisher()`` as in the paper, ``GGN()`` or ``EmpiricalFisher()``.

    Example:
        >>> import curvlib
        >>> from torch import nn
        >>> objective = Objective(nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)), nn.MSELoss())
        >>> C = TridiagonalKFAC(curvlib.GGN()).estimate(objective.at((torch.randn(9, 3), torch.zeros(9, 1))))
        >>> len(C.blocks[0].cross)
        1
    """

    matrix: CurvatureMatrix

    def __post_init__(self) -> None:
        check_vectors(self, self.matrix)

    def check(self, objective: Objective) -> None:
        """Refuse, by name, parameters outside every layer and layers that are no plain affine map."""
        _check_plan(objective.plan)

    def statistics(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> Statistics:
        """Return the moments of each layer and of each pair of neighbours: one backward pass for each vector.

        Raises:
            UnsupportedLayerError: the layers are no chain.
        """
        evaluation.check_fresh()
        _check_plan(evaluation.plan)
        chain = evaluation.layer_chain()
        _check_chain(chain, evaluation.plan)
        evaluation.check_examples_are_independent()
        statistics = Statistics()
        with full_precision(evaluation.layout.device):
            for vector in self.matrix.vectors(evaluation, generator):
                by_name = {factors.layer.name: factors for factors in evaluation.layer_factors(vector)}
                _accumulate([by_name[layer.name] for layer in chain], statistics)
        return statistics.to(evaluation.layout.dtype)

    def operator(self, objective: Objective, statistics: Statistics) -> LinearOperator:
        """Return the operator, a chain in the order of the forward pass."""
        chain = _ordered(objective.plan.layers, statistics)
        means, sums = statistics.means, statistics.sums
        own = [layer_key(layer, "") for layer in chain]
        beside = [layer_key(first, layer_key(second, "")) for first, second in pairwise(chain)]
        moments, cross = (tuple((sums[f"{key}G"], means[f"{key}A"]) for key in keys) for keys in (own, beside))
        coordinates = torch.cat([layer.coordinates for layer in chain])
        joined = BlockDiagonal((KroneckerMarkovChain(moments, cross),), (coordinates,), objective.layout.size)
        return with_l2(joined, objective)

    def describe(self, objective: Objective, plan: LayerPlan | None = None) -> Description:
        """Return the block of each parameter on the diagonal."""
        plan = plan if plan is not None else objective.plan
        of = {name: layer for layer in plan.layers for name in layer.parameters}
        rows = []
        for name, shape in zip(objective.layout.names, objective.layout.shapes, strict=True):
            if name not in of:
                rows.append(BlockRow(name, tuple(shape), "-", "-", "refused", plan.unsupported[name]))
                continue
            layer, part = of[name], of[name].maps[0]
            calls = str(plan.calls[layer.name]) if plan.calls else "-"
            refusal = _refusal(layer, plan)
            block = f"Kronecker: A {part.columns} x {part.columns}, G {part.d_out} x {part.d_out}, with its neighbours'"
            kept = (block, "in a chain of layers") if not refusal else ("refused", refusal)
            rows.append(BlockRow(name, tuple(shape), layer.name or "(model)", calls, *kept))
        return Description(repr(self), tuple(rows))


def _accumulate(chain: list[LayerFactors], statistics: Statistics) -> None:
    means, sums = statistics.means, statistics.sums
    gradients = [factors.maps[0].g[:, 0, 0] for factors in chain]
    inputs = None if means else [_inputs(factors) for factors in chain]  # the same for every vector
    for i, factors in enumerate(chain):
        for j in range(i, min(i + 2, len(chain))):
            key = layer_key(factors.layer, "" if i == j else layer_key(chain[j].layer, ""))
            add_to(sums, f"{key}G", gradients[i].T @ gradients[j])
            if inputs is not None:
                means[f"{key}A"] = inputs[i].T @ inputs[j] / max(len(inputs[i]), 1)


def _inputs(factors: LayerFactors) -> Tensor:
    """Return the inputs (n, columns) of the examples with a target that counts."""
    part = factors.maps[0]
    assert isinstance(part, DenseFactors)  # lookups are refused
    a = part.a[:, 0, 0]
    return a if factors.counted is None else a[factors.counted]


def _ordered(layers: tuple[Layer, ...], statistics: Statistics) -> list[Layer]:
    """Return the layers in the order of the chain, which the keys of the moments of neighbours say."""
    by_name = {layer.name: layer for layer in layers}
    links = [key.split("|") for key in statistics.sums]
    following = {names[0]: names[1] for names in links if len(names) == 3}
    (name,) = {names[0] for names in links} - set(following.values())
    chain = [by_name[name]]
    while name in following:
        name = following[name]
        chain.append(by_name[name])
    return chain


def _check_plan(plan: LayerPlan) -> None:
    refused = [f"{name}: {reason}" for name, reason in plan.unsupported.items()]
    refused += [f"layer {layer.name!r}: {reason}" for layer in plan.layers if (reason := _refusal(layer, plan))]
    if refused:
        raise UnsupportedLayerError(
            f"TridiagonalKFAC is for chains of linear layers alone; {'; '.join(refused)}. Freeze these parameters, or "
            "use KFAC."
        )


def _refusal(layer: Layer, plan: LayerPlan) -> str:
    """Return why a layer cannot be part of a chain, or ""."""
    part, kind = layer.maps[0], type(layer.members[0]).__name__
    if len(layer.modules) > 1:
        return f"its weight is shared by {', '.join(layer.modules)}"
    module = next(module for module in plan.modules if module.name == layer.modules[0])
    if len(module.targets) > 1:
        return f"{kind} has several maps"
    if part.elementwise:
        return f"{kind} scales and shifts features"
    if part.sparse:
        return f"the inputs of {kind} are lookups"
    return f"{kind} has {part.groups} groups" if part.groups > 1 else ""


def _check_chain(chain: tuple[Layer, ...], plan: LayerPlan) -> None:
    names = [layer.name for layer in chain]
    reasons = {layer.name: "the outputs do not depend on it" for layer in plan.layers if layer.name not in names}
    reasons |= {name: f"it is called {calls} times" for name, calls in plan.calls.items() if calls > 1}
    if reasons:
        listed = "; ".join(f"layer {name!r}: {reason}" for name, reason in reasons.items())
        raise UnsupportedLayerError(f"the layers of the model are no chain; {listed}. Use KFAC.")
