"""Deliberately broken variants of every approximation are caught with the claims of its own conformance case."""

from dataclasses import fields

import pytest
import torch
from conformance_cases import APPROXIMATIONS
from twins import broken

from curvlib.operators import Dense
from curvlib.testing import check_approximation

EXACT = "C = the dense matrix that it is exact for"


def larger(M, layers):
    return 1.05 * M


def negated(M, layers):
    return -M


def diagonal_alone(M, layers):
    return M.diagonal().diag()


def without_signs(M, layers):
    return M.abs()


def without_root(M, layers):
    return M * M


def half_beside_the_diagonal(M, layers):
    return 0.5 * M + 0.5 * M.diagonal().diag()


def transposed(M, layers):
    """Each W column by column where its rows were meant."""
    order = torch.arange(len(M))
    for layer in layers:
        order[layer.coordinates] = layer.coordinates.view(layer.maps[0].d_out, -1).T.flatten()
    return M[order][:, order]


def number_of_layer(M, layers):
    number = torch.zeros(len(M), dtype=torch.long)
    for i, layer in enumerate(layers):
        number[layer.coordinates] = i
    return number


def without_neighbours(M, layers):
    number = number_of_layer(M, layers)
    return torch.where(number.unsqueeze(1) == number, M, 0.0)


def opposite_neighbours(M, layers):
    """As negated moments of neighbours make it: no eigenvalue changes."""
    sign = 1 - 2 * (number_of_layer(M, layers) % 2)
    return sign.unsqueeze(1) * M * sign


def last_layer_twice(M, layers):
    number = number_of_layer(M, layers)
    return torch.where((number == len(layers) - 1).unsqueeze(1), 2.0 * M, M)


def case_of(name):
    return next(case for case in APPROXIMATIONS if repr(case.tested).startswith(name))


def variant(tested, title, methods):
    """The same strategy of a class of its own with other methods."""
    kind = type(f"{title}_{type(tested).__name__}", (type(tested),), methods)
    return kind(**{field.name: getattr(tested, field.name) for field in fields(tested) if field.init})


def changed(tested, change):
    """Its operators, however they are asked for, with another matrix; the l2 term stays."""
    base = type(tested)

    def of(C, objective):
        eta = objective.l2 * torch.eye(C.size, dtype=C.dtype) if tested.includes_l2 else 0.0
        return Dense(change(C.to_dense() - eta, objective.plan.layers) + eta)

    def operator(self, objective, statistics):
        return of(base.operator(self, objective, statistics), objective)

    def estimate(self, evaluation, generator=None):
        return of(base.estimate(self, evaluation, generator), evaluation.objective)

    def estimate_over(self, objective, loader, generator=None, *, progress=True):
        return of(base.estimate_over(self, objective, loader, generator, progress=progress), objective)

    averages = getattr(base, "operator", None) is not None and tested.averages
    return variant(
        tested,
        change.__name__,
        {"operator": operator} if averages else {"estimate": estimate, "estimate_over": estimate_over},
    )


def stale(tested, fresh=True):
    """Keeps the first estimate of a model on a batch for good."""
    base, kept = type(tested), {}

    def estimate(self, evaluation, generator=None):
        if fresh:
            evaluation.check_fresh()
        model = evaluation.objective.model
        key = id(model), str(evaluation.targets)
        if key not in kept:
            kept[key] = model, Dense(base.estimate(self, evaluation, generator).to_dense())
        return kept[key][1]

    return variant(tested, "stale", {"estimate": estimate})


def check(name, twin, identity):
    claims = case_of(name).claims
    with broken(identity):
        check_approximation(twin, **claims, examples=4, draws=200)


LOW_RANK = "LowRank(matrix=GGN(), method=LanczosTruncation(rank=2"
WITH_DIAGONAL = "LowRank(matrix=GGN(), method=LanczosTruncation(rank=1,"
MEAN = "the mean over random draws = the dense matrix"
MIXED = "PerLayer(choices=(('0', BlockDiagonal"
SUM = "0.5 * Diagonal"


@pytest.mark.parametrize(
    ("name", "change", "identity"),
    [
        ("EKFAC", transposed, EXACT),
        ("EKFAC", half_beside_the_diagonal, EXACT),
        ("TridiagonalKFAC", without_neighbours, "remainder_of_blocks_and_neighbours vanishes"),
        ("TridiagonalKFAC", opposite_neighbours, "remainder_of_blocks_and_neighbours vanishes"),
        ("KFRA", diagonal_alone, EXACT),
        ("KFRA", transposed, EXACT),
        (LOW_RANK, transposed, "part_beside_eigenpairs vanishes"),
        (LOW_RANK, larger, f"{EXACT}, compared by eigenvalues"),
        (WITH_DIAGONAL, larger, f"{EXACT}, compared by diagonal"),
        ("WithPairs", larger, EXACT),
        ("WithPairs", transposed, EXACT),
        ("RootDiagonal", without_root, "2^degree C of a sum, the l2 apart"),
        ("RootDiagonal", larger, EXACT),
        ("HutchinsonDiagonal", larger, MEAN),
        ("HutchinsonDiagonal", without_signs, MEAN),
        ("RootMeanSquareDiagonal", negated, "no eigenvalue is negative"),
        ("RootMeanSquareDiagonal", last_layer_twice, EXACT),
        (MIXED, transposed, EXACT),
        (MIXED, last_layer_twice, EXACT),
        ("StructuralDamping", larger, EXACT),
        ("StructuralDamping", transposed, EXACT),
        ("StructuralDamping", diagonal_alone, EXACT),
        ("StructuralDamping", half_beside_the_diagonal, EXACT),
        ("Identity", negated, "no eigenvalue is negative"),
        ("Identity", larger, EXACT),
        (SUM, transposed, EXACT),
        (SUM, half_beside_the_diagonal, EXACT),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_variants_of_every_class(name, change, identity):
    check(name, changed(case_of(name).tested, change), identity)


@pytest.mark.parametrize("name", ["EKFAC", "TridiagonalKFAC", "KFRA", LOW_RANK, MIXED, "StructuralDamping", SUM])
def test_stale_caches(name):
    tested = case_of(name).tested
    check(name, stale(tested), "after the parameters have moved, the estimate is that at the new ones")
    check(name, stale(tested, fresh=False), "an evaluation of other parameters is refused")
