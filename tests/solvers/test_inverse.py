"""damped_inverse and eigendecompose: every operator against the dense inverse, and the ways to fail."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linear_systems import dense_inverse
from operator_cases import CASES, close, draw

from curvlib.operators import (
    BlockDiagonal,
    CholeskyInverse,
    Dense,
    Diagonal,
    GeneralKroneckerChain,
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
    SymmetricKroneckerChain,
)
from curvlib.solvers.cg import CGInverse
from curvlib.solvers.errors import SolveError
from curvlib.solvers.inverse import damped_inverse, eigendecompose

seeds = st.integers(0, 2**32 - 1)
dampings = st.sampled_from([0.05, 0.7, 3.0])
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
few = settings(max_examples=10, suppress_health_check=list(HealthCheck))
CPU = torch.device("cpu")

# Their products run conjugate gradients, to a relative residual of 1e-10; all others are direct.
BY_CG = {
    "scaled_matrix_free",
    "sum_of_kronecker_and_diagonal",
    "sum_of_block_diagonals",
    "sum_of_block_diagonals_that_do_not_fit",
    "block_diagonal",
    "kronecker_congruence",
    "kronecker_congruence_of_two_terms",
    "symmetric_kronecker_chain",
    "general_kronecker_chain",
    "kronecker_markov_chain",
    "kronecker_markov_precision",
    "matrix_free",
    "matrix_free_with_form",
}


def contains_cg(operator):
    parts = getattr(operator, "blocks", None) or [getattr(operator, "operator", None)]
    return isinstance(operator, CGInverse) or any(contains_cg(part) for part in parts if part is not None)


@cases
@few
@given(seed=seeds, damping=dampings)
def test_damped_inverse_equals_the_dense_inverse(case, device, seed, damping):
    d = draw(seed, device)
    C, M = case(d)
    inverse = damped_inverse(C, damping)
    b = d.normal(C.size, 2)
    expected = dense_inverse(M, damping)
    tolerance = 1e-8 if case.__name__ in BY_CG else 1e-10
    close(inverse @ b, expected @ b, 1.0 / damping, tolerance)
    close(inverse @ b[:, 0], expected @ b[:, 0], 1.0 / damping, tolerance)
    assert contains_cg(inverse) == (case.__name__ in BY_CG)


@cases
@few
@given(seed=seeds, margin=dampings)
def test_an_indefinite_operator_is_inverted_once_the_damping_covers_it(case, device, seed, margin):
    C, M = case(draw(seed, device, definite=False))
    lowest = float(torch.linalg.eigvalsh(M).min())
    damping = max(0.0, -lowest) + margin
    b = torch.ones(C.size, dtype=C.dtype, device=device)
    close(damped_inverse(C, damping) @ b, dense_inverse(M, damping) @ b, 1.0 / margin, 1e-8)


@cases
@few
@given(seed=seeds)
def test_an_indefinite_matrix_is_refused(case, device, seed):
    C, M = case(draw(seed, device, definite=False))
    lowest = float(torch.linalg.eigvalsh(M).min())
    if lowest < -0.1:
        # A right-hand side with a part along every eigenvector, so that conjugate gradients meet the negative one.
        b = torch.linalg.eigh(M).eigenvectors.sum(1)
        with pytest.raises(SolveError):
            damped_inverse(C, -lowest / 2) @ b


@cases
@few
@given(seed=seeds, damping=dampings, other=dampings)
def test_a_new_damping_after_eigendecompose_equals_a_fresh_inverse(case, device, seed, damping, other):
    d = draw(seed, device)
    C, M = case(d)
    E = eigendecompose(C)
    close(E.to_dense(), M, 1.0, 1e-11)
    b = d.normal(C.size, 2)
    for value in (damping, other):
        inverse = damped_inverse(E, value)
        assert not contains_cg(inverse)
        close(inverse @ b, dense_inverse(M, value) @ b, 1.0 / value, 1e-10)


@cases
@few
@given(seed=seeds)
def test_eigendecompose_of_an_indefinite_operator_keeps_its_sign(case, device, seed):
    C, M = case(draw(seed, device, definite=False))
    close(eigendecompose(C).to_dense(), M, 1.0, 1e-11)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("identity", Identity),
        ("diagonal", Diagonal),
        ("dense", KroneckerEigen),
        ("scaled", KroneckerEigen),
        ("scaled_matrix_free", KroneckerEigen),
        ("shifted", KroneckerEigen),
        ("sum_of_everything_that_merges", KroneckerEigen),
        ("kronecker", KroneckerEigen),
        ("kronecker_of_three", KroneckerEigen),
        ("kronecker_of_any", KroneckerEigen),
        ("kronecker_stack", KroneckerEigenStack),
        ("kronecker_eigen_stack", KroneckerEigenStack),
        ("low_rank", KroneckerEigen),  # of full rank
        ("matrix_free", KroneckerEigen),
    ],
)
def test_eigendecompose_keeps_the_structure_in_which_a_new_damping_is_cheap(name, expected):
    assert type(eigendecompose(CASES[name](draw(2, CPU))[0])) is expected


def test_eigendecompose_leaves_a_low_rank_that_does_not_cover_the_space():
    C = LowRank(*(torch.ones(shape, dtype=torch.float64) for shape in ((4, 2), 2, 4)))
    assert eigendecompose(C) is C


def test_structures_of_inverses():
    d = draw(0, CPU)
    assert type(damped_inverse(Dense(d.symmetric(3)), 1.0)) is CholeskyInverse
    assert type(damped_inverse(Kronecker((d.symmetric(3), d.symmetric(2))), 1.0)) is KroneckerEigen
    assert type(damped_inverse(LowRank(d.normal(5, 2), d.values(2), d.values(5)), 1.0)) is LowRank
    assert type(damped_inverse(Sum((Diagonal(d.values(3)), Identity(3, d.dtype))), 1.0)) is Diagonal
    kronecker = Kronecker((d.symmetric(3), d.symmetric(2)))
    assert type(damped_inverse(kronecker + 2.0 * Identity(6, d.dtype), 1.0)) is KroneckerEigen
    low_rank = LowRank(d.normal(5, 2), d.values(2), d.values(5))
    assert type(damped_inverse(3.0 * low_rank + Diagonal(d.values(5)), 1.0)) is LowRank


def test_sums_of_block_diagonals_are_solved_block_by_block():
    d = draw(0, CPU)
    coordinates = (torch.tensor([3, 0]), torch.tensor([1, 2]))
    one, other = (BlockDiagonal((Dense(d.symmetric(2)), Diagonal(d.values(2))), coordinates, 4) for _ in range(2))
    inverse = damped_inverse(one + 2.0 * other + Diagonal(d.values(4)), 1.0)
    assert type(inverse) is BlockDiagonal
    assert [type(block) for block in inverse.blocks] == [CholeskyInverse, Diagonal]
    eigen = eigendecompose(one + other)
    assert [type(block) for block in eigen.blocks] == [KroneckerEigen, Diagonal]
    shifted = damped_inverse(Shifted(one, -0.5), 0.4 + float(one.trace()))
    assert type(shifted) is BlockDiagonal
    assert not contains_cg(shifted)


def test_a_kronecker_basis_has_no_matrix_for_a_diagonal_factor():
    C = eigendecompose(Kronecker((Diagonal(torch.tensor([1.0, 2.0])), torch.eye(3), Identity(2))))
    assert [basis is None for basis in C.bases] == [True, False, True]


@dataclass(frozen=True, eq=False)
class Counted(LinearOperator):
    """A diagonal that counts its products and hides its structure."""

    values: torch.Tensor
    products: list = field(default_factory=list)

    @property
    def size(self):
        return len(self.values)

    @property
    def dtype(self):
        return self.values.dtype

    def matmat(self, V):
        self.products.append(V.shape)
        return self.values.unsqueeze(1) * V


def test_an_operator_without_a_rule_is_solved_by_cg_and_after_one_register_directly():
    class MyOperator(Counted):
        pass

    C = MyOperator(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    b = torch.ones(3, dtype=torch.float64)
    expected = 1.0 / (C.values + 0.5)
    block = BlockDiagonal((C, Identity(1, torch.float64)), (torch.tensor([3, 0, 1]), torch.tensor([2])), 4)
    in_block = torch.tensor([expected[1], expected[2], 1 / 1.5, expected[0]], dtype=torch.float64)

    assert type(damped_inverse(C, 0.5)) is CGInverse
    close(damped_inverse(C, 0.5) @ b, expected, 1.0, 1e-9)
    assert 3 <= len(C.products) <= 10
    C.products.clear()
    close(damped_inverse(block, 0.5) @ torch.ones(4, dtype=torch.float64), in_block, 1.0, 1e-9)
    assert 3 <= len(C.products) <= 10

    C.products.clear()
    ran = []

    @damped_inverse.register(MyOperator)
    def _(operator, damping):
        ran.append(damping)
        return Diagonal(1.0 / (operator.values + damping))

    close(damped_inverse(C, 0.5) @ b, expected)
    close(damped_inverse(block, 0.5) @ torch.ones(4, dtype=torch.float64), in_block)
    close(damped_inverse(Shifted(2.0 * C, 0.5), 0.5) @ b, 1.0 / (2.0 * C.values + 1.0))
    assert ran == [0.5, 0.5, 0.5]
    assert C.products == []
    assert damped_inverse.dispatch(MyOperator)(C, 1.0).diagonal().tolist() == [0.5, 1 / 3, 0.2]
    assert damped_inverse.dispatch(Counted) is damped_inverse.dispatch(LinearOperator)


def test_eigendecompose_may_be_registered_too():
    class MyOperator(Counted):
        pass

    C = MyOperator(torch.tensor([1.0, 2.0]))
    assert type(eigendecompose(C)) is KroneckerEigen
    assert C.products

    eigendecompose.register(MyOperator)(lambda operator: Diagonal(operator.values))
    C.products.clear()
    assert type(eigendecompose(C)) is Diagonal
    assert type(eigendecompose(Kronecker((C, torch.eye(2))))) is KroneckerEigen
    assert C.products == []


def test_cg_that_does_not_converge_raises():
    # Every product differs, so that no recurrence can be right.
    noise = iter(torch.randn(10_000, dtype=torch.float64))
    C = MatrixFree(lambda V: V * (1.0 + next(noise).abs()), 5, torch.float64)
    with pytest.raises(SolveError, match="conjugate gradients"):
        damped_inverse(C, 0.1) @ torch.ones(5, dtype=torch.float64)


@pytest.mark.parametrize(
    "C",
    [
        Diagonal(torch.tensor([1.0, 0.0])),
        Dense(torch.ones(3, 3, dtype=torch.float64)),
        Dense(torch.ones(3, 3)),
        Kronecker((torch.ones(2, 2), torch.eye(2))),
        KroneckerEigen((None,), torch.tensor([0.0, 1.0])),
        KroneckerStack((torch.stack([torch.eye(2), torch.ones(2, 2)]), torch.ones(2, 1, 1))),
        KroneckerEigenStack((None,), torch.tensor([[0.0], [1.0]])),
        LowRank(torch.ones(3, 1), torch.ones(1), torch.zeros(3)),
        LowRank(torch.ones(2, 3), torch.ones(3), torch.zeros(2)),
        GeneralKroneckerChain((torch.ones(2, 2), torch.eye(2)), (torch.zeros(2, 2), torch.eye(2))),
        SymmetricKroneckerChain((torch.eye(2), torch.ones(2, 2)), (torch.eye(2), torch.zeros(2, 2)), torch.ones(1)),
        Scaled(0.0, Identity(2)),
        Shifted(Identity(2), -1.0),
        Identity(2) - Identity(2),
        BlockDiagonal((Identity(1),), (torch.tensor([1]),), 2),
        BlockDiagonal((Diagonal(torch.zeros(1)),), (torch.tensor([0]),), 1),
    ],
    ids=lambda C: type(C).__name__,
)
def test_singular_without_damping_is_refused(C):
    with pytest.raises(SolveError, match="amping"):
        damped_inverse(C, 0.0)
    assert (damped_inverse(C, 0.5) @ torch.ones(C.size, dtype=C.dtype)).isfinite().all()


def test_a_rank_deficient_matrix_is_refused_although_its_factorisation_runs_through():
    refused = 0
    for seed in range(20):
        B = draw(seed, CPU).normal(8, 5)
        with pytest.raises(SolveError, match="Use a damping above"):
            damped_inverse(Dense(B @ B.T), 0.0)
        refused += int(torch.linalg.cholesky_ex(B @ B.T).info == 0)
    assert refused > 0  # the plain factorisation would have answered


def test_the_scale_of_the_coordinates_is_no_reason_to_refuse():
    M = torch.diag(torch.tensor([1e20, 1.0, 1e-12], dtype=torch.float64))
    close(damped_inverse(Dense(M), 0.0).diagonal() * M.diagonal(), torch.ones(3, dtype=torch.float64))


def test_the_message_names_the_eigenvalue_and_the_damping_that_works():
    C = Dense(torch.diag(torch.tensor([1.0, -0.25], dtype=torch.float64)))
    with pytest.raises(SolveError, match=r"damping = 0.1: C has the eigenvalue -0.25. Use a damping above 0.25"):
        damped_inverse(C, 0.1)
    with pytest.raises(SolveError, match=r"Block 1 of BlockDiagonal.*eigenvalue -0.25"):
        damped_inverse(BlockDiagonal((Identity(1, C.dtype), C), (torch.tensor([0]), torch.tensor([1, 2])), 3), 0.1)
    with pytest.raises(SolveError, match=r"Diagonal.*eigenvalue -2. Use a damping above 2"):
        damped_inverse(Diagonal(torch.tensor([1.0, -2.0])), 1.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "make",
    [
        lambda v: Diagonal(v),
        lambda v: Dense(torch.diag(v)),
        lambda v: Kronecker((torch.diag(v), torch.eye(2))),
        lambda v: KroneckerEigen((None,), v),
        lambda v: KroneckerStack((torch.eye(2).expand(2, 2, 2), v.reshape(2, 1, 1))),
        lambda v: KroneckerEigenStack((None,), v.unsqueeze(1)),
        lambda v: GeneralKroneckerChain((torch.diag(v), torch.eye(2)), (torch.eye(2), torch.eye(2))),
        lambda v: SymmetricKroneckerChain((torch.eye(2), torch.eye(2)), (torch.eye(2), torch.diag(v)), torch.ones(1)),
        lambda v: LowRank(v.unsqueeze(1), torch.ones(1), torch.ones(2)),
        lambda v: LowRank(torch.ones(2, 1), torch.ones(1), v),
        lambda v: BlockDiagonal((Diagonal(v),), (torch.tensor([0, 1]),), 2),
        lambda v: 2.0 * Dense(torch.diag(v)) + Identity(2),
    ],
)
def test_what_is_not_finite_is_refused(make, bad):
    with pytest.raises(SolveError, match="not finite"):
        damped_inverse(make(torch.tensor([1.0, bad])), 1.0)


def test_eigendecompose_refuses_what_it_cannot_do():
    with pytest.raises(SolveError, match="not finite"):
        eigendecompose(Dense(torch.tensor([[float("nan")]])))
    with pytest.raises(SolveError, match="must be symmetric"):
        eigendecompose(Dense(torch.tensor([[0.0, 1.0], [0.0, 0.0]])))
    with pytest.raises(
        SolveError, match=r"above D = 20000. Register a rule with eigendecompose.register\(MatrixFree\)"
    ):
        eigendecompose(MatrixFree(lambda V: V, 20_001))
    with pytest.raises(TypeError, match="must be a LinearOperator, got Tensor"):
        eigendecompose(torch.eye(2))


@pytest.mark.parametrize(
    ("damping", "error"),
    [(-1e-9, ValueError), (float("nan"), ValueError), (float("inf"), ValueError), (True, TypeError), ("1", TypeError)],
)
def test_bad_dampings_are_named(damping, error):
    with pytest.raises(error, match="damping must be"):
        damped_inverse(Identity(2), damping)


def test_only_operators_are_inverted():
    with pytest.raises(TypeError, match="operator must be a LinearOperator, got Tensor"):
        damped_inverse(torch.eye(2), 1.0)


def test_blocks_may_be_slow_or_direct_in_one_operator():
    d = draw(1, CPU)
    M = d.symmetric(3)
    C = BlockDiagonal(
        (MatrixFree(lambda V: M @ V, 3, d.dtype), Dense(M)), (torch.tensor([0, 2, 4]), torch.tensor([1, 3, 5])), 7
    )
    inverse = damped_inverse(C, 0.1)
    assert [type(block) for block in inverse.blocks] == [CGInverse, CholeskyInverse, Diagonal]
    b = d.normal(7)
    close((inverse @ b)[6], b[6] / 0.1)
    close((inverse @ b)[1:6:2], dense_inverse(M, 0.1) @ b[1:6:2], 1.0, 1e-10)


def test_a_negative_shift_is_solved_where_the_rest_is_large_enough():
    C = Shifted(Dense(torch.diag(torch.tensor([3.0, 5.0]))), -2.0)
    assert (damped_inverse(C, 0.0) @ torch.ones(2)).tolist() == pytest.approx([1.0, 1 / 3])
    free = Shifted(MatrixFree(lambda V: 3.0 * V, 2), -2.0)
    assert (damped_inverse(free, 1.0) @ torch.ones(2)).tolist() == pytest.approx([0.5, 0.5])
    with pytest.raises(SolveError):
        damped_inverse(Shifted(free, -2.0), 0.5) @ torch.ones(2)
