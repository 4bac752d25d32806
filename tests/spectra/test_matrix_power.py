"""matrix_power, matrix_sqrt and matrix_function: every operator against the dense eigendecomposition."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import CASES, close, draw, subclasses

from curvlib.operators import (
    BlockDiagonal,
    CholeskyInverse,
    Dense,
    Diagonal,
    Identity,
    Kronecker,
    KroneckerEigen,
    KroneckerEigenStack,
    KroneckerStack,
    LinearOperator,
    LowRank,
    MatrixFree,
    Scaled,
    Shifted,
    Sum,
)
from curvlib.solvers import CG, SolveError
from curvlib.spectra import NoStructureError, matrix_function, matrix_power, matrix_sqrt

CPU = torch.device("cpu")
seeds = st.integers(0, 2**32 - 1)
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
few = settings(max_examples=5)
# Without eigenvectors by structure: only whole powers.
UNSTRUCTURED = {
    "scaled_matrix_free",
    "sum_of_kronecker_and_diagonal",
    "sum_of_low_rank_and_identity",
    "sum_of_block_diagonals",  # of a Kronecker product and a diagonal inside
    "sum_of_block_diagonals_that_do_not_fit",
    "block_diagonal",
    "matrix_free",
    "matrix_free_with_form",
    # their factors are not orthogonal
    "kronecker_congruence",
    "kronecker_congruence_of_two_terms",
    "symmetric_kronecker_chain",
    "general_kronecker_chain",
    "kronecker_markov_chain",
    "kronecker_markov_precision",
}


def structured(case, C):
    if case.__name__ == "low_rank":  # its diagonal is random
        return C.size == 1 or C.factor.shape[1] == 0
    return case.__name__ not in UNSTRUCTURED


def dense_power(M, p, damping=0.0):
    e, Q = torch.linalg.eigh(M)
    return Q @ torch.diag((e + damping) ** p) @ Q.T


@cases
@pytest.mark.parametrize("power", [-1.0, -0.5, 0.5, 1.0, 2.0, 0.0])
@few
@given(seed=seeds, damping=st.sampled_from([0.3, 2.0]))
def test_powers_equal_those_of_the_dense_matrix(case, power, device, seed, damping):
    C, M = case(draw(seed, device))
    if not structured(case, C) and not power.is_integer():
        with pytest.raises(NoStructureError, match=r"fractional power.*Dense\(C\.to_dense\(\)\)"):
            matrix_power(C, power, damping)
        return
    P = matrix_power(C, power, damping)
    expected = dense_power(M, power, damping)
    assert (P.size, P.dtype, P.device.type) == (C.size, C.dtype, C.device.type)
    # conjugate gradients stop at a relative residual of 1e-10
    close(P.to_dense(), expected, damping**power, 1e-11 if structured(case, C) else 1e-8)
    V = draw(seed, device).normal(C.size, 2)
    close(P @ V, expected @ V, damping**power * float(V.abs().max()), 1e-10 if structured(case, C) else 1e-8)


@cases
@few
@given(seed=seeds)
def test_the_root_of_a_semi_definite_operator_squares_to_it(case, device, seed):
    C, M = case(draw(seed, device))
    if structured(case, C):
        root = matrix_sqrt(C).to_dense()
        close(root @ root, M, 1.0, 1e-11)
        close(root, root.T)
        assert float(torch.linalg.eigvalsh(root).min()) >= -1e-12 * float(root.abs().max())


@cases
@few
@given(seed=seeds)
def test_whole_powers_of_an_indefinite_operator(case, device, seed):
    C, M = case(draw(seed, device, definite=False))
    for power in (0, 1, 2, 3):
        close(matrix_power(C, power, 0.4).to_dense(), dense_power(M, power, 0.4), 1.0, 1e-11)
    e = torch.linalg.eigvalsh(M) + 0.4
    if structured(case, C) and float(e.min()) < -1e-3:
        with pytest.raises(SolveError, match=r"fractional power, which needs .* semi-definite, but C has the eigenv"):
            matrix_power(C, 0.5, 0.4)
        if float(e.abs().min()) > 1e-3:
            expected = dense_power(M, -1.0, 0.4)
            close(matrix_power(C, -1, 0.4).to_dense(), expected, 1.0, 1e-11 * float(e.abs().max() / e.abs().min()))


@cases
@few
@given(seed=seeds)
def test_functions_of_indefinite_operators(case, device, seed):
    C, M = case(draw(seed, device, definite=False))
    if structured(case, C):
        expected = torch.linalg.matrix_exp(M)
        close(matrix_function(C, torch.exp).to_dense(), expected, 1.0, 1e-10)
    else:
        with pytest.raises(NoStructureError):
            matrix_function(C, torch.exp)


def test_every_operator_class_has_a_case():
    made = {type(part) for case in CASES.values() for part in [case(draw(3, CPU))[0]]}
    assert made >= subclasses()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("identity", Scaled),
        ("diagonal", Diagonal),
        ("dense", KroneckerEigen),
        ("kronecker", KroneckerEigen),
        ("kronecker_stack", KroneckerEigenStack),
        ("kronecker_eigen", KroneckerEigen),
        ("low_rank_alone", LowRank),
        ("block_diagonal_of_structures", BlockDiagonal),
        ("sum_of_everything_that_merges", KroneckerEigen),
        ("shifted", KroneckerEigen),
        ("scaled", KroneckerEigen),
        ("cholesky_inverse", KroneckerEigen),
    ],
)
def test_the_structure_stays(name, kind):
    assert type(matrix_power(CASES[name](draw(2, CPU))[0], -0.5, 0.1)) is kind


def test_nothing_as_large_as_the_matrix_is_made():
    n = 3000
    d = draw(0, CPU)
    low_rank = LowRank(d.normal(n, 3), d.values(3), torch.zeros(n, dtype=torch.float64))
    blocks = BlockDiagonal((Dense(d.symmetric(3)),), (torch.arange(3),), n)
    product = Kronecker((d.symmetric(50), d.symmetric(60)))
    for C in (low_rank, 2.0 * low_rank + Identity(n, torch.float64), blocks, product, Diagonal(d.values(n))):
        v = d.normal(n)
        root = matrix_power(C, 0.5, 0.1)
        close(root @ (root @ v), C @ v + 0.1 * v, 1.0, 1e-10)


def test_a_scaled_nothing_has_powers_whatever_it_scales():
    C = 0.0 * MatrixFree(lambda V: V, 3)
    assert matrix_power(C, 0.5, 4.0).diagonal().tolist() == [2.0, 2.0, 2.0]


def test_half_the_digits_are_not_lost_in_a_tall_float32_factor():
    U = torch.tensor([[1.0], [0.0], [0.0]])
    C = LowRank(U, torch.tensor([1e6]), torch.zeros(3))
    P = matrix_power(C, -0.5, 1e-2)
    assert P.dtype == torch.float32
    torch.testing.assert_close(P @ torch.ones(3), torch.tensor([1e-3, 10.0, 10.0]))


def test_negative_eigenvalues_at_rounding_level_count_as_zero():
    e = torch.tensor([-1e-16, 1.0], dtype=torch.float64)
    assert matrix_sqrt(Diagonal(e)).values.tolist() == [0.0, 1.0]
    with pytest.raises(SolveError, match=r"eigenvalue -1e-10. Use a damping of at least 1e-10"):
        matrix_sqrt(Diagonal(torch.tensor([-1e-10, 1.0], dtype=torch.float64)))


def test_singular_operators_have_no_negative_power():
    singular = Diagonal(torch.tensor([0.0, 1.0]))
    for power in (-0.5, -1, -2):
        with pytest.raises(SolveError, match=r"negative power of a singular matrix. Use a larger damping"):
            matrix_power(singular, power)
    assert matrix_power(singular, 0).diagonal().tolist() == [1.0, 1.0]
    uncovered = BlockDiagonal((Diagonal(torch.ones(1)),), (torch.tensor([1]),), 2)
    with pytest.raises(SolveError, match="singular"):
        matrix_power(uncovered, -0.5)
    assert matrix_power(uncovered, -0.5, 3.0).diagonal().tolist() == pytest.approx([3**-0.5, 0.5])
    assert matrix_sqrt(uncovered).diagonal().tolist() == [0.0, 1.0]


def test_results_that_leave_the_range_are_refused():
    with pytest.raises(SolveError, match=r"leaves the range of torch.float32"):
        matrix_power(Diagonal(torch.tensor([1e30, 1.0])), 3)
    with pytest.raises(SolveError, match="not finite: skip"):
        matrix_power(Diagonal(torch.tensor([float("nan"), 1.0])), 0.5)
    with pytest.raises(SolveError, match=r"not finite at the eigenvalue e = 0"):
        matrix_function(Diagonal(torch.tensor([0.0, 1.0])), torch.log)


def test_bad_arguments():
    C = Identity(2)
    with pytest.raises(TypeError, match="operator must be a LinearOperator"):
        matrix_power(torch.eye(2), 0.5)
    with pytest.raises(TypeError, match="power must be a real number"):
        matrix_power(C, "half")
    with pytest.raises(ValueError, match="power must be finite"):
        matrix_power(C, float("inf"))
    with pytest.raises(ValueError, match="damping must be a finite number >= 0"):
        matrix_power(C, 0.5, -1.0)
    with pytest.raises(TypeError, match="function must be callable"):
        matrix_function(C, 2.0)
    with pytest.raises(TypeError, match="operator must be"):
        matrix_function(torch.eye(2), torch.exp)
    with pytest.raises(ValueError, match="must return shape"):
        matrix_function(Diagonal(torch.ones(3)), torch.sum)


def test_what_stands_in_the_way_is_named():
    free = MatrixFree(lambda V: V, 3)
    with pytest.raises(NoStructureError, match=r"MatrixFree\(size=3.*matrix_function.register\(MatrixFree\)"):
        matrix_sqrt(free)
    with pytest.raises(NoStructureError, match="got Kronecker, Diagonal"):
        matrix_sqrt(Kronecker((torch.eye(2), torch.eye(2))) + Diagonal(torch.arange(4.0)))
    with pytest.raises(NoStructureError, match="constant diagonal_part, got values from 0 to 1"):
        matrix_sqrt(LowRank(torch.ones(2, 1), torch.ones(1), torch.tensor([0.0, 1.0])))
    with pytest.raises(NoStructureError, match="CGInverse"):
        matrix_sqrt(CG()(free, 1.0))


def test_a_rule_of_ones_own_also_serves_inside_other_operators():
    @dataclass(frozen=True, eq=False, repr=False)
    class Mine(LinearOperator):
        size: int = 2

        def matmat(self, V):
            return 4.0 * V

    with pytest.raises(NoStructureError):
        matrix_sqrt(Mine())
    matrix_function.register(Mine, lambda operator, function: Diagonal(function(torch.full((2,), 4.0))))
    C = BlockDiagonal((Shifted(Scaled(2.0, Mine()), 1.0),), (torch.tensor([2, 0]),), 3)
    assert matrix_sqrt(C).diagonal().tolist() == [3.0, 0.0, 3.0]
    assert matrix_sqrt(Sum((Mine(), Identity(2)))).diagonal().tolist() == pytest.approx([5**0.5, 5**0.5])


def test_a_stack_is_decomposed_block_by_block():
    d = draw(0, CPU)
    G, A = (torch.stack([d.symmetric(n) for _ in range(2)]) for n in (2, 3))
    stack, blocks = KroneckerStack((G, A)), [Kronecker((G[b], A[b])) for b in range(2)]
    coordinates = (torch.arange(6), torch.arange(6, 12))
    close(matrix_sqrt(stack).to_dense(), matrix_sqrt(BlockDiagonal(tuple(blocks), coordinates, 12)).to_dense())


def test_an_inverse_root_from_a_factor_in_a_wider_type():
    L = torch.linalg.cholesky(torch.diag(torch.tensor([1e-8, 1.0], dtype=torch.float64)))
    root = matrix_sqrt(CholeskyInverse(L, torch.float32))
    assert root.dtype == torch.float32
    torch.testing.assert_close(root.diagonal(), torch.tensor([1e4, 1.0]))
