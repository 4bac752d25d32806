"""The error that more damping heals is told from the others, also where it comes from a part of the operator."""

import pytest
import torch
from torch import nan

from curvlib.operators import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Kronecker,
    KroneckerEigen,
    KroneckerStack,
    LowRank,
    MatrixFree,
    Scaled,
    Shifted,
)
from curvlib.solvers import (
    CG,
    BlockwiseDamping,
    FactoredTikhonov,
    NotPositiveDefiniteError,
    SolveError,
    damped_inverse,
)

INDEFINITE = torch.tensor([[1.0, 0.0], [0.0, -2.0]], dtype=torch.float64)
DEFINITE = torch.eye(2, dtype=torch.float64)
U = torch.linspace(0.5, 1.0, 6, dtype=torch.float64).unsqueeze(1)


def free(matrix):
    return MatrixFree(lambda V: matrix @ V, len(matrix), matrix.dtype, matrix.device)


CASES = {
    "diagonal": lambda M: Diagonal(M.diagonal()),
    "dense": Dense,
    "scaled": lambda M: Scaled(0.5, Dense(M)),
    "minus": lambda M: Scaled(-1.0, Dense(M)),
    "shifted": lambda M: Shifted(Dense(M), -0.5),
    "blocks": lambda M: BlockDiagonal((Dense(DEFINITE), Dense(M)), (torch.arange(2), torch.arange(2, 4)), 5),
    "kronecker": lambda M: Kronecker((Dense(DEFINITE), Dense(M))),
    "stack": lambda M: KroneckerStack((torch.stack([DEFINITE, DEFINITE]), torch.stack([DEFINITE, M]))),
    "eigen": lambda M: KroneckerEigen((DEFINITE, DEFINITE), M.diagonal().repeat(2, 1)),
    "low rank": lambda M: LowRank(U, M.diagonal()[1:], torch.zeros(6, dtype=torch.float64)),
    "products": free,
}


def solve(solver, operator, damping=0.1):
    return solver(operator, damping) @ torch.ones(operator.size, dtype=operator.dtype)


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_more_damping_heals_what_is_not_definite_and_nothing_else(make):
    operator = make(INDEFINITE)
    with pytest.raises(NotPositiveDefiniteError):
        solve(damped_inverse, operator)
    solve(damped_inverse, operator, 10.0)
    with pytest.raises(SolveError) as caught:
        solve(damped_inverse, make(INDEFINITE * nan))
    assert not isinstance(caught.value, NotPositiveDefiniteError)


@pytest.mark.parametrize("name", ["dense", "blocks", "kronecker", "stack"])
@pytest.mark.parametrize("solver", [FactoredTikhonov(), CG()], ids=["factored", "cg"])
def test_other_solvers_tell_it_as_well(name, solver):
    operator = CASES[name](INDEFINITE)
    with pytest.raises(NotPositiveDefiniteError):
        solve(solver, operator)
    blockwise = BlockwiseDamping(factors=torch.ones(operator.size, dtype=torch.float64), solver=solver)
    with pytest.raises(NotPositiveDefiniteError):
        solve(blockwise, operator)


def test_the_error_of_a_whole_names_it_and_keeps_kind_and_solution():
    error = NotPositiveDefiniteError("no pivot", "what was reached").within("Block 3")
    assert type(error) is NotPositiveDefiniteError
    assert (str(error), error.solution) == ("Block 3: no pivot", "what was reached")
    assert type(SolveError("no").within("Block 3")) is SolveError
    with pytest.raises(NotPositiveDefiniteError, match=r"Block 1 of .*: C \+ damping I is not"):
        solve(damped_inverse, CASES["blocks"](INDEFINITE))


def test_a_singular_system_of_conjugate_gradients_is_not_definite():
    singular = free(torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64))
    with pytest.raises(NotPositiveDefiniteError, match="raise the damping"):
        solve(CG(), singular, 0.0)
