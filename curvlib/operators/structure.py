"""Arithmetic that keeps the structure of an operator, one short rule per structure.

``2.0 * C + D`` is a lazy sum, right for products. A solver would rather have one matrix: these functions give it, or
None where the structures do not go together. Add your own class with ``.register``; without a rule it is left as it is.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce, singledispatch
from operator import add

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.operators.base import LinearOperator, Scaled, Sum
from curvlib.operators.block_diagonal import BlockDiagonal
from curvlib.operators.dense import Dense
from curvlib.operators.diagonal import Diagonal, Identity, Shifted
from curvlib.operators.kronecker import Kronecker, KroneckerEigen
from curvlib.operators.kronecker_chain import GeneralKroneckerChain, SymmetricKroneckerChain
from curvlib.operators.kronecker_congruence import KroneckerCongruence
from curvlib.operators.kronecker_stack import KroneckerEigenStack, KroneckerStack
from curvlib.operators.low_rank import LowRank
from curvlib.operators.markov_chain import KroneckerMarkovChain


@singledispatch
def absorb_factor(operator: LinearOperator, factor: float) -> LinearOperator | None:
    """Return factor * C in C's own structure, or None where it has none for that."""
    return None


@absorb_factor.register
def _(operator: Identity, factor: float) -> LinearOperator:
    return Diagonal(factor * operator.diagonal())


@absorb_factor.register
def _(operator: Diagonal, factor: float) -> LinearOperator:
    return Diagonal(factor * operator.values)


@absorb_factor.register
def _(operator: Dense, factor: float) -> LinearOperator:
    return Dense(factor * operator.matrix)


@absorb_factor.register
def _(operator: Scaled, factor: float) -> LinearOperator | None:
    return absorb_factor(operator.operator, factor * operator.factor)


@absorb_factor.register
def _(operator: Shifted, factor: float) -> LinearOperator:
    return Shifted(Scaled(factor, operator.operator), factor * operator.shift)


@absorb_factor.register
def _(operator: Sum, factor: float) -> LinearOperator:
    return Sum(tuple(Scaled(factor, term) for term in operator.terms))


@absorb_factor.register
def _(operator: BlockDiagonal, factor: float) -> LinearOperator:
    return operator.with_blocks(tuple(Scaled(factor, block) for block in operator.blocks))


@absorb_factor.register
def _(operator: Kronecker, factor: float) -> LinearOperator | None:
    first = absorb_factor(operator.factors[0], factor)
    return None if first is None else Kronecker((first, *operator.factors[1:]))


@absorb_factor.register
def _(operator: KroneckerStack, factor: float) -> LinearOperator:
    return KroneckerStack((factor * operator.factors[0], *operator.factors[1:]))


@absorb_factor.register(KroneckerEigen)
@absorb_factor.register(KroneckerEigenStack)
def _(operator: KroneckerEigen | KroneckerEigenStack, factor: float) -> LinearOperator:
    return operator.map(lambda eigenvalues: factor * eigenvalues)


@absorb_factor.register
def _(operator: KroneckerCongruence, factor: float) -> LinearOperator:
    return KroneckerCongruence(operator.terms, factor * operator.values)


@absorb_factor.register(SymmetricKroneckerChain)
@absorb_factor.register(GeneralKroneckerChain)
def _(operator: SymmetricKroneckerChain | GeneralKroneckerChain, factor: float) -> LinearOperator | None:
    if factor < 0.0:
        return None  # no chain has negative second moments
    (G0, A0), (G1, A1) = operator.lag0, operator.lag1
    return replace(operator, lag0=(factor * G0, A0), lag1=(factor * G1, A1))


@absorb_factor.register
def _(operator: KroneckerMarkovChain, factor: float) -> LinearOperator | None:
    if factor < 0.0:
        return None  # no covariance is negative
    moments, cross = (tuple((factor * G, A) for G, A in pairs) for pairs in (operator.moments, operator.cross))
    return KroneckerMarkovChain(moments, cross)


@absorb_factor.register
def _(operator: LowRank, factor: float) -> LinearOperator:
    return LowRank(operator.factor, factor * operator.weights, factor * operator.diagonal_part, operator.dtype)


@singledispatch
def add_diagonal(operator: LinearOperator, values: Float[Tensor, " D"]) -> LinearOperator | None:
    """Return C + diag(values) as one structure, or None where the sum has none."""
    own = diagonal_values(operator)
    return None if own is None else Diagonal(own + values)


@add_diagonal.register
def _(operator: Dense, values: Float[Tensor, " D"]) -> LinearOperator:
    return Dense(operator.matrix + torch.diag(values))


@add_diagonal.register
def _(operator: LowRank, values: Float[Tensor, " D"]) -> LinearOperator:
    return LowRank(operator.factor, operator.weights, operator.diagonal_part + values, operator.dtype)


@add_diagonal.register
def _(operator: Scaled, values: Float[Tensor, " D"]) -> LinearOperator | None:
    absorbed = absorb_factor(operator.operator, operator.factor)
    return None if absorbed is None else add_diagonal(absorbed, values)


@add_diagonal.register
def _(operator: Shifted, values: Float[Tensor, " D"]) -> LinearOperator | None:
    return add_diagonal(operator.operator, values + operator.shift)


@add_diagonal.register
def _(operator: BlockDiagonal, values: Float[Tensor, " D"]) -> LinearOperator | None:
    if len(operator.uncovered()):
        return None
    pairs = zip(operator.blocks, operator.coordinates, strict=True)
    parts = [(block, values.index_select(0, index)) for block, index in pairs]
    # Where a block and its diagonal have no common structure, the sum is at least the block's alone.
    return operator.with_blocks(
        tuple(add_diagonal(block, part) or Sum((block, Diagonal(part))) for block, part in parts)
    )


@singledispatch
def add_shift(operator: LinearOperator, shift: float) -> LinearOperator | None:
    """Return C + shift I as one structure, or None where the sum has none."""
    return add_diagonal(operator, torch.full((operator.size,), shift, dtype=operator.dtype, device=operator.device))


@add_shift.register
def _(operator: BlockDiagonal, shift: float) -> LinearOperator | None:
    if len(operator.uncovered()):
        return None
    return operator.with_blocks(tuple(add_shift(block, shift) or Shifted(block, shift) for block in operator.blocks))


@add_shift.register(KroneckerEigen)
@add_shift.register(KroneckerEigenStack)
def _(operator: KroneckerEigen | KroneckerEigenStack, shift: float) -> LinearOperator:
    return operator.map(lambda eigenvalues: eigenvalues + shift)


@singledispatch
def remove_shift(operator: LinearOperator, shift: float) -> LinearOperator:
    """Return C - shift I; for C = B + shift I that is B itself, without rounding."""
    return operator if shift == 0.0 else Shifted(operator, -shift)


@remove_shift.register
def _(operator: Shifted, shift: float) -> LinearOperator:
    return operator.operator if operator.shift == shift else Shifted(operator.operator, operator.shift - shift)


@singledispatch
def diagonal_values(operator: LinearOperator) -> Float[Tensor, " D"] | None:
    """Return the diagonal of an operator that is diagonal by its structure, None for any other."""
    return None


@diagonal_values.register(Identity)
@diagonal_values.register(Diagonal)
def _(operator: LinearOperator) -> Float[Tensor, " D"]:
    return operator.diagonal()


@diagonal_values.register(Scaled)
@diagonal_values.register(Shifted)
def _(operator: Scaled | Shifted) -> Float[Tensor, " D"] | None:
    return None if diagonal_values(operator.operator) is None else operator.diagonal()


@singledispatch
def dense_matrix(operator: LinearOperator) -> Float[Tensor, "D D"] | None:
    """Return the matrix of an operator that is kept in full, None for any other."""
    return None


@dense_matrix.register
def _(operator: Dense) -> Float[Tensor, "D D"]:
    return operator.matrix


@dense_matrix.register(Scaled)
@dense_matrix.register(Shifted)
def _(operator: Scaled | Shifted) -> Float[Tensor, "D D"] | None:
    return None if dense_matrix(operator.operator) is None else operator.to_dense()


@singledispatch
def blocks_of(operator: LinearOperator) -> BlockDiagonal | None:
    """Return an operator as blocks on disjoint coordinates where that is its structure, None for any other."""
    return None


@blocks_of.register
def _(operator: BlockDiagonal) -> BlockDiagonal:
    return operator


@blocks_of.register
def _(operator: Scaled) -> BlockDiagonal | None:
    inner = blocks_of(operator.operator)
    return None if inner is None else inner.with_blocks(tuple(Scaled(operator.factor, C) for C in inner.blocks))


@singledispatch
def identity_multiple(operator: LinearOperator) -> float | None:
    """Return c for an operator that is c I by its structure, None for any other."""
    return None


@identity_multiple.register
def _(operator: Identity) -> float:
    return 1.0


@identity_multiple.register
def _(operator: Scaled) -> float | None:
    inner = identity_multiple(operator.operator)
    return 0.0 if operator.factor == 0.0 else None if inner is None else operator.factor * inner


@identity_multiple.register
def _(operator: Shifted) -> float | None:
    inner = identity_multiple(operator.operator)
    return None if inner is None else inner + operator.shift


@singledispatch
def _terms(operator: LinearOperator) -> tuple[LinearOperator, ...]:
    return (operator,)


@_terms.register
def _(operator: Sum) -> tuple[LinearOperator, ...]:
    return tuple(part for term in operator.terms for part in _terms(term))


@_terms.register
def _(operator: Shifted) -> tuple[LinearOperator, ...]:
    identity = Identity(operator.size, operator.dtype, operator.device)
    return (*_terms(operator.operator), Scaled(operator.shift, identity))


def merge(operator: Sum) -> tuple[LinearOperator, float]:
    """Return (R, c) with R + c I equal to the sum: multiples of I in c; diagonals, full matrices and blocks in R.

    Blocks on the same coordinates become sums, block by block. R is a :class:`Sum` only where its terms have no common
    structure.
    """
    terms = _terms(operator)
    multiples = [identity_multiple(term) for term in terms]
    shift = sum(multiple for multiple in multiples if multiple is not None)
    rest = [term for term, multiple in zip(terms, multiples, strict=True) if multiple is None]
    diagonals = [values for term in rest if (values := diagonal_values(term)) is not None]
    rest = [term for term in rest if diagonal_values(term) is None]
    matrices = [matrix for term in rest if (matrix := dense_matrix(term)) is not None]
    rest = [term for term in rest if dense_matrix(term) is None]
    if matrices:
        rest.append(Dense(reduce(add, matrices)))
    rest = _blockwise(rest)
    if diagonals:
        values = reduce(add, diagonals)
        joined = add_diagonal(rest[0], values) if len(rest) == 1 else None
        rest = [*rest, Diagonal(values)] if joined is None else [joined]
    if not rest:
        return Scaled(0.0, Identity(operator.size, operator.dtype, operator.device)), shift
    return (rest[0] if len(rest) == 1 else Sum(tuple(rest))), shift


def _blockwise(terms: list[LinearOperator]) -> list[LinearOperator]:
    """Add up, block by block, the block-diagonal terms that have the coordinates of the first of them."""
    blocks = [blocks_of(term) for term in terms]
    first = next((operator for operator in blocks if operator is not None), None)
    if first is None:
        return terms
    together = [operator for operator in blocks if operator is not None and _same_coordinates(operator, first)]
    if len(together) == 1:
        return terms
    others = [
        term
        for term, operator in zip(terms, blocks, strict=True)
        if operator is None or not _same_coordinates(operator, first)
    ]
    columns = zip(*(operator.blocks for operator in together), strict=True)
    return [first.with_blocks(tuple(Sum(tuple(column)) for column in columns)), *others]


def _same_coordinates(one: BlockDiagonal, other: BlockDiagonal) -> bool:
    return len(one.coordinates) == len(other.coordinates) and all(
        torch.equal(mine, its) for mine, its in zip(one.coordinates, other.coordinates, strict=True)
    )
