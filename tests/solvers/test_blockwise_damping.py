"""BlockwiseDamping: every operator against the dense inverse, with factors that differ within and between blocks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import CASES, close, draw

from curvlib.operators import BlockDiagonal, Dense, Diagonal, Identity, Kronecker, Shifted
from curvlib.solvers import BlockwiseDamping, FactoredTikhonov, SolveError, damped_inverse, damping_structure

seeds = st.integers(0, 2**32 - 1)


def block_diagonal(device):
    """Two Kronecker blocks and two coordinates without a block."""
    d = draw(3, device)
    blocks = [(d.symmetric(2), d.symmetric(2)), (d.symmetric(1), d.symmetric(3))]
    coordinates = (torch.tensor([5, 0, 3, 7], device=device), torch.tensor([1, 2, 4], device=device))
    return BlockDiagonal(tuple(Kronecker(factors) for factors in blocks), coordinates, 9), coordinates


def by_block(operator, coordinates, values, rest=1.0):
    f = torch.full((operator.size,), rest, dtype=operator.dtype, device=operator.device)
    for index, value in zip(coordinates, values, strict=True):
        f[index] = value
    return f


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@settings(max_examples=4)
@given(seed=seeds, damping=st.sampled_from([0.05, 3.0]), equal=st.booleans())
def test_it_equals_the_dense_inverse(case, device, seed, damping, equal):
    d = draw(seed, device)
    C, M = case(d)
    f = torch.full_like(M[0], 2.5) if equal else 0.1 + d.normal(len(M)).abs()
    inverse = BlockwiseDamping(factors=f)(C, damping)
    expected = torch.linalg.inv(M + damping * torch.diag(f))
    B = d.normal(len(M), 2)
    # The residual of conjugate gradients is 1e-10 of B; an error of the solution is that times the inverse's norm.
    scale = torch.linalg.matrix_norm(expected, 2) * torch.linalg.vector_norm(B)
    close(inverse @ B, expected @ B, scale=scale, tolerance=1e-9)


def test_blocks_with_one_factor_keep_the_solver_and_its_damping(device):
    C, coordinates = block_diagonal(device)
    f = by_block(C, coordinates, (2.0, 0.5), rest=4.0)
    for solver in (damped_inverse, FactoredTikhonov()):
        inverse = BlockwiseDamping(factors=f, solver=solver)(Shifted(C, 0.1), 3.0)
        for block, index, damping in zip(C.blocks, coordinates, (6.1, 1.6), strict=True):
            expected = solver(block, damping).to_dense()
            close(inverse.to_dense()[index][:, index], expected, tolerance=1e-13)
        outside = torch.tensor([6, 8], device=device)
        close(inverse.diagonal()[outside], torch.full_like(outside, 1 / 12.1, dtype=C.dtype), tolerance=1e-13)


def test_the_same_factor_everywhere_is_the_solver_with_another_damping(device):
    C, _ = block_diagonal(device)
    f = torch.full((9,), 3.0, dtype=C.dtype, device=device)
    assert torch.equal(BlockwiseDamping(factors=f)(C, 0.2).to_dense(), damped_inverse(C, 0.2 * 3.0).to_dense())


def test_the_structure_for_quadratic_models_is_the_difference_to_one(device):
    f = torch.tensor([0.5, 2.0], dtype=torch.float64, device=device)
    like = Identity(2, torch.float32, device)
    R = damping_structure(BlockwiseDamping(factors=f), like)
    assert R.dtype == torch.float32
    assert R.diagonal().tolist() == [-0.5, 1.0]
    assert damping_structure(damped_inverse, like) is None
    assert damping_structure(FactoredTikhonov(), like) is None


def test_what_is_singular_is_refused():
    C, coordinates = block_diagonal("cpu")
    zero = by_block(C, coordinates, (1.0, 1.0), rest=0.0)
    with pytest.raises(SolveError, match="no block and have no damping"):
        BlockwiseDamping(factors=zero)(C, 1.0)
    singular = BlockDiagonal((Dense(torch.zeros(2, 2)),), (torch.arange(2),), 2)
    with pytest.raises(SolveError, match="Block 0"):
        BlockwiseDamping(factors=torch.zeros(2))(singular, 1.0)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "vector", lambda: BlockwiseDamping(factors=[1.0])),
        (TypeError, "floating-point", lambda: BlockwiseDamping(factors=torch.ones(2, dtype=torch.long))),
        (ValueError, ">= 0", lambda: BlockwiseDamping(factors=torch.tensor([1.0, -1.0]))),
        (ValueError, "finite", lambda: BlockwiseDamping(factors=torch.tensor([1.0, float("nan")]))),
        (TypeError, "solver", lambda: BlockwiseDamping(factors=torch.ones(2), solver="cg")),
        (ValueError, "size 2", lambda: BlockwiseDamping(factors=torch.ones(2))(Diagonal(torch.ones(3)), 1.0)),
        (TypeError, "LinearOperator", lambda: BlockwiseDamping(factors=torch.ones(2))(torch.ones(2, 2), 1.0)),
        (ValueError, "damping", lambda: BlockwiseDamping(factors=torch.ones(2))(Diagonal(torch.ones(2)), -1.0)),
    ],
    ids=["list", "integers", "negative", "nan", "solver", "size", "tensor", "negative damping"],
)
def test_wrong_arguments_are_refused(error, message, call):
    with pytest.raises(error, match=message):
        call()
