"""A case for every class that curvlib exports: add one line for a new class, beside its entry in operator_cases.CASES.

Operators have theirs in ``operator_cases.CASES``, losses in ``curvlib.testing.EVERY_LOSS``.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from curvlib import GGN, EmpiricalFisher, Fisher, Hessian
from curvlib.approximations import (
    EKFAC,
    KFAC,
    KFRA,
    LBFGS,
    BlockDiagonal,
    Dense,
    Diagonal,
    Exact,
    HutchinsonDiagonal,
    Identity,
    LanczosTruncation,
    LowRank,
    Nystrom,
    PerLayer,
    RandomizedSketch,
    Remainder,
    RootDiagonal,
    RootMeanSquareDiagonal,
    StructuralDamping,
    TridiagonalKFAC,
)
from curvlib.operators import Dense as DenseOperator
from curvlib.operators import Kronecker
from curvlib.solvers import (
    CG,
    MINRES,
    BlockwiseDamping,
    DeterminismCheck,
    FactoredTikhonov,
    RaiseAtLimit,
    ResidualTest,
    damped_inverse,
)
from curvlib.testing import (
    EVERYWHERE,
    ON_BLOCKS,
    ON_DIAGONAL,
    ON_TRACE,
    ONE_EXAMPLE,
    ExactOn,
    LayerCase,
    attentions,
    convolutions,
    draws,
    embedding_bags,
    embeddings,
    kronecker_factors,
    norms,
    recurrent_cells,
    recurrent_layers,
    transposed_convolutions,
)
from curvlib.testing.exactness import diagonal_entries, layer_blocks, matrix_of_loss


@dataclass(frozen=True)
class Case:
    """What is tested, and what a suite is told about it."""

    tested: Any
    claims: dict = field(default_factory=dict)
    note: str = ""

    def __str__(self):
        name = getattr(self.tested, "__name__", None) or repr(self.tested)
        # without addresses, which differ from one test process to the next
        return re.sub(r"<function (\w+) at 0x\w+>", r"\1", f"{name} {self.note}".strip())


def root(M, evaluation):
    return diagonal_entries(M, evaluation).sqrt()


def unit(network):
    return torch.eye(len(network.theta), dtype=torch.float64)


def twice_unit(network):
    return 2.0 * unit(network)


def absolute(network):
    return torch.diag(matrix_of_loss(network, Hessian()).diagonal().abs())


def ggn(network):
    return matrix_of_loss(network, GGN())


def leading(M, evaluation):
    """The two eigenvalues that are largest by size, with their vectors."""
    e, Q = torch.linalg.eigh(M)
    kept = e.abs().argsort(descending=True)[:2]
    return (Q[:, kept] * e[kept]) @ Q[:, kept].T


def eigenvalues(M):
    return torch.linalg.eigvalsh(M)


def part_beside_eigenpairs(C, M, evaluation):
    """Of U w U^T of eigenpairs of M, whichever of equal ones they are, C C = C M."""
    return C @ (C - M) / M.abs().max().clamp(min=1.0)


def remainder_of_blocks_and_neighbours(C, M, evaluation):
    """Of layers in the order of the model, those on the diagonal and beside it."""
    number = torch.zeros(len(M), dtype=torch.long)
    for i, layer in enumerate(evaluation.layers):
        number[layer.coordinates] = i
    return torch.where((number.unsqueeze(1) - number).abs() <= 1, C - M, 0.0)


def change_of_states(network):
    """J^T J of the outputs of the linear modules, of the mean over examples for the reduction "mean"."""
    modules = [module for module in network.model.modules() if isinstance(module, nn.Linear)]

    def states(theta):
        kept = []
        handles = [module.register_forward_hook(lambda *args: kept.append(args[2].flatten())) for module in modules]
        network.outputs(theta)
        for handle in handles:
            handle.remove()
        return torch.cat(kept)

    J = torch.autograd.functional.jacobian(states, network.theta)
    return J.T @ J / (1 if network.objective().loss.additive else len(network.inputs))


@dataclass(frozen=True, kw_only=True)
class WithPairs(LBFGS):
    """L-BFGS with pairs of steps and changes for whatever number of parameters, all of positive curvature."""

    def start(self):
        raise NotImplementedError("the pairs are those of an estimate")

    def known(self, layout):
        pairs = tuple((s.to(layout.dtype), y.to(layout.dtype)) for s, y in pairs_of(layout.size))
        return LBFGS(memory=3, initial=self.initial, history=pairs)

    def estimate(self, evaluation, generator=None):
        return self.known(evaluation.layout).estimate(evaluation)

    def estimate_over(self, objective, loader, generator=None, *, progress=True):
        return self.known(objective.layout).estimate_over(objective, loader)


def pairs_of(D):
    generator = torch.Generator().manual_seed(D)
    S = torch.randn(3, D, dtype=torch.float64, generator=generator)
    e = torch.linspace(1.0, 3.0, D, dtype=torch.float64)
    return tuple((s, e * s) for s in S)


def by_updates(network):
    """B - B s s^T B / s^T B s + y y^T / s^T y, one pair after the other."""
    B = twice_unit(network)
    for s, y in pairs_of(len(B)):
        B = B - (B @ s).outer(B @ s) / (s @ B @ s) + y.outer(y) / (s @ y)
    return B


BLOCKS_OF_ONE = ExactOn(matrix=ggn, part=layer_blocks, examples=1, positions=False)
CHAIN_OF_ONE = ExactOn(vanishing=remainder_of_blocks_and_neighbours, examples=1, positions=False)
TRACE_OF_ONE = ExactOn(compared=torch.trace, examples=1, positions=False)
# With as many columns or steps as parameters, nothing is cut off but by the rank.
OF_RANK_100 = (RandomizedSketch(100), Nystrom(100), LanczosTruncation(100))
OF_RANK_2 = (RandomizedSketch(2, oversampling=100), LanczosTruncation(2, steps=100))
# Of equal eigenvalues any vectors may be kept, by the random draws beside C.
LEADING = {
    "exact_on": (ExactOn(part=leading, compared=eigenvalues), ExactOn(vanishing=part_beside_eigenpairs)),
    "degree": None,
    "averages": False,
}
WITH_DIAGONAL = LowRank(GGN(), method=LanczosTruncation(1, steps=100), diagonal=Remainder())
SUM = 0.5 * Diagonal(GGN()) + 2.0 * BlockDiagonal(GGN())


def weighted(M, evaluation):
    return 0.5 * diagonal_entries(M, evaluation) + 2.0 * ON_BLOCKS.part(M, evaluation)


APPROXIMATIONS = (
    *(Case(Exact(matrix), {"exact_on": EVERYWHERE}) for matrix in (GGN(), EmpiricalFisher(), Fisher(samples=2))),
    Case(Exact(Hessian()), {"exact_on": EVERYWHERE, "semidefinite": False}),
    Case(Dense(GGN()), {"exact_on": EVERYWHERE}),
    *(Case(BlockDiagonal(matrix), {"exact_on": ON_BLOCKS}) for matrix in (GGN(), EmpiricalFisher(), Fisher())),
    *(Case(Diagonal(matrix), {"exact_on": ON_DIAGONAL}) for matrix in (GGN(), EmpiricalFisher(), Fisher())),
    Case(BlockDiagonal(Hessian()), {"exact_on": ON_BLOCKS, "semidefinite": False}),
    Case(Diagonal(Hessian()), {"exact_on": ON_DIAGONAL, "semidefinite": False}),
    *(Case(KFAC(matrix), {"exact_on": ONE_EXAMPLE}) for matrix in (GGN(), EmpiricalFisher(), Fisher())),
    *(Case(EKFAC(matrix), {"exact_on": (ONE_EXAMPLE, ON_TRACE)}) for matrix in (GGN(), EmpiricalFisher())),
    Case(TridiagonalKFAC(GGN()), {"exact_on": (CHAIN_OF_ONE, TRACE_OF_ONE), "positions": False}),
    Case(KFRA(GGN()), {"exact_on": ONE_EXAMPLE, "positions": False, "activations": (nn.Tanh, nn.ReLU)}),
    Case(RootDiagonal(GGN()), {"exact_on": ExactOn(part=root), "degree": 0.5}),
    Case(RootMeanSquareDiagonal(Dense(Hessian())), {"exact_on": ExactOn(matrix=absolute), "averages": False}),
    Case(HutchinsonDiagonal(GGN()), {"exact_on": ON_DIAGONAL, "semidefinite": False}),
    Case(LowRank(GGN()), {"exact_on": EVERYWHERE}),
    Case(LowRank(Fisher(samples=2)), {"exact_on": EVERYWHERE}),
    *(Case(LowRank(GGN(), method=method), {"exact_on": EVERYWHERE}) for method in OF_RANK_100),
    *(Case(LowRank(GGN(), method=method), LEADING) for method in OF_RANK_2),
    Case(WITH_DIAGONAL, {**LEADING, "exact_on": ExactOn(compared=torch.diagonal), "semidefinite": False}),
    Case(Identity(), {"exact_on": ExactOn(matrix=unit), "degree": 0.0}),
    Case(PerLayer([("0", BlockDiagonal(GGN()))], otherwise=KFAC(GGN())), {"exact_on": BLOCKS_OF_ONE}),
    Case(
        PerLayer([("0", EKFAC(GGN()))], otherwise=KFAC(GGN())),
        {"exact_on": ExactOn(matrix=ggn, part=ON_BLOCKS.part, examples=1, positions=False)},
    ),
    Case(PerLayer([], otherwise=Diagonal(GGN())), {"exact_on": ExactOn(matrix=ggn, part=diagonal_entries)}),
    # its scale is that of the examples, whatever the loss divides by
    Case(StructuralDamping(modules=(nn.Linear,)), {"exact_on": ExactOn(matrix=change_of_states), "degree": None}),
    Case(SUM, {"exact_on": ExactOn(matrix=ggn, part=weighted)}),
    # without pairs it is delta I
    Case(LBFGS(initial=2.0), {"exact_on": ExactOn(matrix=twice_unit), "degree": 0.0}),
    Case(WithPairs(initial=2.0), {"exact_on": ExactOn(matrix=by_updates), "degree": 0.0}),
    Case(1.0 * Exact(GGN()) + 0.0 * Exact(Hessian()), {"exact_on": ExactOn(matrix=ggn)}),
)


def linear(d):
    layer = nn.Linear(d.integer(1, 3), d.integer(1, 3), bias=d.integer(0, 1) == 1)
    return LayerCase(layer, d.normal(d.integer(1, 3), *(2,) * d.integer(0, 2), layer.in_features))


# module class -> strategy of LayerCase whose module is, or contains, one
LAYERS: dict[type[nn.Module], Any] = {
    nn.Linear: draws().map(linear),
    **{kind: convolutions(kinds=(kind,)) for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)},
    **{
        kind: transposed_convolutions(kinds=(kind,))
        for kind in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    },
    nn.BatchNorm1d: norms(names=("batch",), all_dimensions=(1,)),
    nn.BatchNorm2d: norms(names=("batch",), all_dimensions=(2,)),
    nn.BatchNorm3d: norms(names=("batch",), all_dimensions=(3,)),
    nn.InstanceNorm1d: norms(names=("instance",), all_dimensions=(1,)),
    nn.InstanceNorm2d: norms(names=("instance",), all_dimensions=(2,)),
    nn.InstanceNorm3d: norms(names=("instance",), all_dimensions=(3,)),
    nn.GroupNorm: norms(names=("group",)),
    nn.LayerNorm: norms(names=("layer",)),
    nn.RMSNorm: norms(names=("rms",)),
    nn.Embedding: embeddings(),
    nn.EmbeddingBag: embedding_bags(),
    nn.MultiheadAttention: attentions(),
    nn.RNN: recurrent_layers(kinds=("tanh", "relu")),
    nn.LSTM: recurrent_layers(kinds=("lstm",)),
    nn.GRU: recurrent_layers(kinds=("gru",)),
    nn.RNNCell: recurrent_cells(kinds=("tanh", "relu")),
    nn.LSTMCell: recurrent_cells(kinds=("lstm",)),
    nn.GRUCell: recurrent_cells(kinds=("gru",)),
}


def factored(C, damping):
    """Each factor of two with its share of the damping, by the traces."""
    G, A = (factor.to_dense() for factor in C.factors)
    pi = ((A.trace() / len(A)) / (G.trace() / len(G))) ** 0.5
    G, A = (
        torch.linalg.inv(F + share * damping**0.5 * torch.eye(len(F), dtype=F.dtype))
        for F, share in ((G, 1 / pi), (A, pi))
    )
    return torch.kron(G, A)


FACTORS = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)


def of_size_three(d):
    B = d.normal(3, 3)
    return DenseOperator(B @ B.T)


def by_coordinate(C, damping):
    return torch.linalg.inv(C.to_dense() + damping * torch.diag(FACTORS))


SOLVERS = (
    Case(DeterminismCheck()),
    Case(BlockwiseDamping(factors=FACTORS), {"operators": draws().map(of_size_three), "inverse": by_coordinate}),
    Case(damped_inverse),
    Case(FactoredTikhonov()),
    Case(FactoredTikhonov(), {"operators": kronecker_factors().map(Kronecker), "inverse": factored}, "of two factors"),
    Case(CG(stop=ResidualTest(relative=1e-12))),
    Case(MINRES(stop=ResidualTest(relative=1e-12)), {"refuses_indefinite": False}),
)


# The inverses that solve anew at each product: whose they are.
TIGHT = {"stop": ResidualTest(relative=1e-13), "on_limit": RaiseAtLimit()}
ITERATIVE = (CG(**TIGHT), MINRES(**TIGHT))
