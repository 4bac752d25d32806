"""Exact products that share one pass through the model, and the sum of such operators as one.

Symbols: D parameters, K columns; y_0 = z the model's outputs, y_1, y_2, ... those of observed modules,
J_i = dy_i/dtheta, M_i a matrix in y_i's space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce, singledispatch

from torch import Tensor

from curvlib.matrices import Products
from curvlib.objective import Evaluation, ObservedPass
from curvlib.operators import Identity, LinearOperator, MatrixFree, Scaled, Shifted, Sum

Map = Callable[[Tensor], Tensor]
Maps = tuple[Map | None, ...]


@dataclass(frozen=True, eq=False, repr=False, init=False)
class OutputProducts(MatrixFree):
    """The exact matrix of one evaluation by its products, which knows the evaluation and M where it is J^T M J.

    Args:
        evaluation: the objective on a batch.
        products: of the matrix, without the l2 term.
    """

    evaluation: Evaluation
    output_product: Map | None

    def __init__(self, evaluation: Evaluation, products: Products) -> None:
        layout = evaluation.layout
        super().__init__(
            products.product,
            layout.size,
            layout.dtype,
            layout.device,
            quadratic_form=products.quadratic_form,
            columnwise=True,
        )
        object.__setattr__(self, "evaluation", evaluation)
        object.__setattr__(self, "output_product", products.output_product)


@dataclass(frozen=True, eq=False, repr=False, init=False)
class ObservedProducts(MatrixFree):
    """sum_i J_i^T M_i J_i of one observed pass: all parts at the price of one product with the outputs alone.

    Args:
        observed: the pass.
        maps: x -> M_i x for every i, None for M_i = 0.
    """

    observed: ObservedPass
    maps: Maps

    def __init__(self, observed: ObservedPass, maps: Maps) -> None:
        layout = observed.evaluation.layout
        super().__init__(
            lambda v: observed.product(maps, v),
            layout.size,
            layout.dtype,
            layout.device,
            quadratic_form=lambda V: observed.quadratic_form(maps, V),
            columnwise=True,
        )
        object.__setattr__(self, "observed", observed)
        object.__setattr__(self, "maps", maps)


def joined(operator: LinearOperator) -> LinearOperator:
    """Return the same operator, with the terms of a sum that one pass through the model can serve made at once.

    In C + c S for ``C = Exact(GGN()).estimate(evaluation)`` and ``S = StructuralDamping().estimate(evaluation)`` a
    product then costs about what one of the two does. Operators without such terms are returned as they are, and so are
    those of matrices that are more than J^T M J (``Hessian()``).

    Args:
        operator: any operator (D, D).
    """
    terms = tuple(_terms(operator, 1.0))
    observed = next((found for _, term in terms if (found := _observed_pass(term)) is not None), None)
    if observed is None:
        return operator
    maps = [_maps(term, observed) for _, term in terms]
    if sum(found is not None for found in maps) < 2:
        return operator
    scaled = [
        tuple(_times(factor, function) for function in found)
        for (factor, _), found in zip(terms, maps, strict=True)
        if found is not None
    ]
    together = ObservedProducts(observed, tuple(reduce(_plus, functions) for functions in zip(*scaled, strict=True)))
    rest = [Scaled(factor, term) for (factor, term), found in zip(terms, maps, strict=True) if found is None]
    return Sum((together, *rest)) if rest else together


@singledispatch
def _terms(operator: LinearOperator, factor: float) -> Iterator[tuple[float, LinearOperator]]:
    """Yield (c, C) with sum c C = factor * operator, the C no sums."""
    yield factor, operator


@_terms.register
def _(operator: Sum, factor: float) -> Iterator[tuple[float, LinearOperator]]:
    for term in operator.terms:
        yield from _terms(term, factor)


@_terms.register
def _(operator: Scaled, factor: float) -> Iterator[tuple[float, LinearOperator]]:
    yield from _terms(operator.operator, factor * operator.factor)


@_terms.register
def _(operator: Shifted, factor: float) -> Iterator[tuple[float, LinearOperator]]:
    yield from _terms(operator.operator, factor)
    yield factor * operator.shift, Identity(operator.size, operator.dtype, operator.device)


@singledispatch
def _observed_pass(operator: LinearOperator) -> ObservedPass | None:
    return None


@_observed_pass.register
def _(operator: ObservedProducts) -> ObservedPass | None:
    return operator.observed


@singledispatch
def _maps(operator: LinearOperator, observed: ObservedPass) -> Maps | None:
    """Return the maps of an operator that this pass can serve, None for any other."""
    return None


@_maps.register
def _(operator: ObservedProducts, observed: ObservedPass) -> Maps | None:
    return operator.maps if operator.observed is observed else None


@_maps.register
def _(operator: OutputProducts, observed: ObservedPass) -> Maps | None:
    if operator.output_product is None or operator.evaluation is not observed.evaluation:
        return None
    return (operator.output_product, *(None for _ in observed.values[1:]))


def _times(factor: float, function: Map | None) -> Map | None:
    return None if function is None else lambda x: factor * function(x)


def _plus(one: Map | None, other: Map | None) -> Map | None:
    if one is None or other is None:
        return one if other is None else other
    return lambda x: one(x) + other(x)
