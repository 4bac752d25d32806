"""Every operator against the dense matrix that it stands for, in every method."""

from dataclasses import FrozenInstanceError, dataclass

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import HealthCheck, given, settings
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
    OperatorError,
    Scaled,
    Shifted,
    Sum,
)

seeds = st.integers(0, 2**32 - 1)
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
few = settings(max_examples=12, suppress_health_check=list(HealthCheck))


def test_the_suite_covers_every_operator_class():
    covered = {type(case(draw(0, torch.device("cpu")))[0]) for case in CASES.values()}
    assert subclasses() - covered == set()


@cases
@few
@given(seed=seeds, columns=st.integers(0, 4))
def test_products_and_entries_equal_the_dense_matrix(case, device, seed, columns):
    d = draw(seed, device, definite=seed % 2 == 0)
    C, M = case(d)
    scale = max(1.0, float(M.abs().max()))
    V = d.normal(C.size, columns)
    v = d.normal(C.size)
    before = V.clone()
    assert C.shape == tuple(M.shape) == (C.size, C.size)
    close(C @ V, M @ V, scale)
    close(C @ v, M @ v, scale)
    close(C @ V.T.contiguous().T, M @ V, scale)
    close(C.quadratic_form(V), V.T @ M @ V, scale * C.size)
    close(C.quadratic_form(v), v @ M @ v, scale * C.size)
    close(C.diagonal(), M.diagonal(), scale)
    close(C.trace(), M.trace(), scale)
    close(C.to_dense(), M, scale)
    assert torch.equal(V, before)


@cases
@few
@given(seed=seeds)
def test_frobenius_norm(case, device, seed):
    C, M = case(draw(seed, device, definite=seed % 2 == 0))
    # A difference inside LowRank and Shifted: accurate to sqrt(eps) where everything cancels.
    close(C.frobenius_norm(), torch.linalg.matrix_norm(M), tolerance=1e-7)


@cases
@few
@given(seed=seeds, damping=st.sampled_from([0.0, 0.3, 2.0]))
def test_logdet_and_spectrum_where_the_structure_gives_them(case, device, seed, damping):
    C, M = case(draw(seed, device))
    try:
        close(C.spectrum().sort().values, torch.linalg.eigvalsh(M), 1.0, 1e-11)
    except OperatorError as error:
        assert "Dense(C.to_dense())" in str(error)  # noqa: PT017
    try:
        actual = C.logdet(damping)
    except OperatorError:
        assert case.__name__ in WITHOUT_DETERMINANT
        return
    except ArithmeticError:
        assert torch.linalg.eigvalsh(M).min() + damping < 1e-9
        return
    assert case.__name__ not in WITHOUT_DETERMINANT
    e = torch.linalg.eigvalsh(M) + damping
    # The logarithm of an eigenvalue at rounding level says nothing.
    if e.min() > 1e-6 * e.max():
        close(actual, e.log().sum(), C.size, 1e-9)


WITHOUT_DETERMINANT = {
    "scaled_matrix_free",
    "sum_of_kronecker_and_diagonal",
    "sum_of_everything_that_merges",
    "sum_of_block_diagonals",
    "sum_of_block_diagonals_that_do_not_fit",
    "sum_of_low_rank_and_identity",
    "block_diagonal",
    "kronecker_of_any",
    "kronecker_congruence",
    "kronecker_congruence_of_two_terms",
    "symmetric_kronecker_chain",
    "general_kronecker_chain",
    "kronecker_markov_chain",
    "kronecker_markov_precision",
    "matrix_free",
    "matrix_free_with_form",
}


@pytest.mark.parametrize(
    "C",
    [
        Diagonal(torch.tensor([1.0, -2.0])),
        Dense(torch.tensor([[0.0, 1.0], [1.0, 0.0]])),
        LowRank(torch.ones(2, 1), -torch.ones(1), torch.ones(2)),
        LowRank(torch.ones(3, 1), torch.ones(1), torch.zeros(3)),
        Kronecker((torch.eye(2), torch.diag(torch.tensor([1.0, 0.0])))),
        KroneckerStack((torch.tensor([1.0, 0.0]).reshape(2, 1, 1), torch.eye(2).expand(2, 2, 2))),
        KroneckerEigenStack((None,), torch.tensor([[1.0], [0.0]])),
        BlockDiagonal((Identity(1),), (torch.tensor([1]),), 2),
        Scaled(-1.0, Identity(2)),
        Scaled(0.0, Identity(2)),
    ],
    ids=lambda C: type(C).__name__,
)
def test_logdet_of_a_matrix_that_is_not_positive_definite_is_refused(C):
    with pytest.raises(ArithmeticError, match="positive definite"):
        C.logdet()


def test_logdet_neither_overflows_nor_underflows():
    C = Kronecker((1e-30 * torch.eye(20), 1e-20 * torch.eye(20)))
    assert float(C.logdet()) == pytest.approx(400 * np.log(1e-50), rel=1e-6)
    assert float(Diagonal(torch.full((1000,), 1e30)).logdet()) == pytest.approx(1000 * np.log(1e30), rel=1e-6)


def test_logdet_of_negative_factors_whose_product_is_positive():
    C = Kronecker((-2.0 * torch.eye(2), -3.0 * torch.eye(2)))
    assert float(C.logdet(1.0)) == pytest.approx(4 * np.log(7.0), rel=1e-6)
    assert float(C.logdet()) == pytest.approx(4 * np.log(6.0), rel=1e-6)


@given(seed=seeds)
@settings(max_examples=10)
def test_low_rank_spectrum_with_a_constant_diagonal(seed):
    d = draw(seed, torch.device("cpu"), definite=False)
    U, w = d.normal(5, d.integer(0, 6)), None
    w = d.values(U.shape[1])
    C = LowRank(U, w, torch.full((5,), 0.7, dtype=torch.float64))
    expected = torch.linalg.eigvalsh((U * w) @ U.T + 0.7 * torch.eye(5, dtype=torch.float64))
    close(C.spectrum().sort().values, expected, 1.0, 1e-11)


@given(seed=seeds, value=st.floats(-3, 3))
@settings(max_examples=20)
def test_block_diagonal_with_rest_fills_what_no_block_covers(seed, value):
    C, M = CASES["block_diagonal"](draw(seed, torch.device("cpu")))
    covered = torch.zeros(C.size, dtype=torch.bool)
    covered[torch.cat(C.coordinates)] = True
    assert C.uncovered().tolist() == (~covered).nonzero().squeeze(1).tolist()
    close(C.with_rest(value).to_dense(), M + value * torch.diag((~covered).double()), 1.0)


def test_block_diagonal_with_blocks_checks_the_sizes():
    C = BlockDiagonal((Identity(2), Identity(1)), (torch.tensor([2, 0]), torch.tensor([1])), 3)
    assert C.with_blocks((Diagonal(torch.tensor([5.0, 7.0])), Identity(1))).diagonal().tolist() == [7.0, 1.0, 5.0]
    assert C.diagonal().tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"sizes \[2, 1\], got \[1, 2\]"):
        C.with_blocks((Identity(1), Identity(2)))


def test_arithmetic(device):
    d = draw(3, device, definite=False)
    M, N = d.symmetric(4), d.symmetric(4)
    C, E = Dense(M), Dense(N)
    close((2.0 * C - E * 3 + (-C) + np.float64(0.5) * E).to_dense(), M - 2.5 * N)
    with pytest.raises(TypeError):
        C + 1.0
    with pytest.raises(TypeError):
        C * torch.ones(2)
    with pytest.raises(TypeError):
        True * C


@pytest.mark.parametrize("name", ["scaled", "kronecker", "matrix_free", "block_diagonal"])
def test_to_scipy_is_what_scipy_solvers_take(name):
    C, M = CASES[name](draw(5, torch.device("cpu")))
    exported = Shifted(C, 1.0).to_scipy()
    b = np.linspace(-1.0, 1.0, C.size)
    b.flags.writeable = False
    x, failure = scipy.sparse.linalg.cg(exported, b, rtol=1e-12)
    assert failure == 0
    np.testing.assert_allclose((M.numpy() + np.eye(C.size)) @ x, b, atol=1e-10)
    np.testing.assert_allclose(exported @ np.eye(C.size), M.numpy() + np.eye(C.size), atol=1e-12)
    assert exported.dtype == np.float64


def test_matrix_free_uses_its_quadratic_form():
    calls = []

    def form(V):
        calls.append(V.shape)
        return V.T @ V

    C = MatrixFree(lambda V: V, 3, torch.float32, quadratic_form=form)
    assert C.quadratic_form(torch.ones(3)).shape == ()
    assert (2.0 * C + C).quadratic_form(torch.ones(3, 2)).tolist() == [[9.0, 9.0], [9.0, 9.0]]
    assert calls == [(3, 1), (3, 2), (3, 2)]


def test_default_methods_read_more_columns_than_fit_one_block(device):
    d = draw(0, device)
    M = d.symmetric(300)
    C = MatrixFree(lambda V: M @ V, 300, M.dtype, device)
    close(C.to_dense(), M)
    close(C.diagonal(), M.diagonal())
    close(C.frobenius_norm(), torch.linalg.matrix_norm(M))


def test_operators_are_frozen_values():
    C = Diagonal(torch.ones(2))
    with pytest.raises(FrozenInstanceError):
        C.values = torch.zeros(2)
    assert Diagonal(C.values) != C
    assert repr(C) == "Diagonal(size=2, dtype=torch.float32, device=cpu)"


@dataclass(frozen=True, eq=False)
class FieldsOnly(LinearOperator):
    """A third party's operator whose size, dtype and device are plain fields."""

    size: int
    dtype: torch.dtype
    device: torch.device

    def matmat(self, V):
        return 3.0 * V


class Minimal(LinearOperator):
    def matmat(self, V):
        return V


def test_size_dtype_and_device_may_be_dataclass_fields():
    C = FieldsOnly(2, torch.float64, torch.device("cpu"))
    assert (C.size, C.dtype, C.device.type) == (2, torch.float64, "cpu")
    assert C.to_dense().tolist() == [[3.0, 0.0], [0.0, 3.0]]
    with pytest.raises(TypeError, match="missing 3 required"):
        FieldsOnly()


def test_an_operator_without_size_says_so():
    with pytest.raises(NotImplementedError, match="Minimal must define size"):
        _ = Minimal().size


THREE = torch.ones(3, 1, 1)
BAD = [
    (lambda: Identity(0), ValueError, "size must be at least 1, got 0"),
    (lambda: Identity(2.0), TypeError, "size must be an int, got float"),
    (lambda: Diagonal(torch.ones(2, 2)), ValueError, r"values must have shape \(D,\), got \(2, 2\)"),
    (lambda: Diagonal([1.0]), TypeError, "values must be a tensor, got list"),
    (lambda: Diagonal(torch.ones(0)), ValueError, "size must be at least 1"),
    (lambda: Diagonal(torch.ones(2, dtype=torch.long)), TypeError, "floating-point tensor, got torch.int64"),
    (lambda: Dense(torch.ones(2, 3)), ValueError, r"must be square, got shape \(2, 3\)"),
    (lambda: Dense(torch.tensor([[0.0, 1.0], [0.0, 0.0]])).symmetric_matrix(), OperatorError, "must be symmetric"),
    (lambda: Dense(torch.tensor([[float("nan")]])).spectrum(), OperatorError, "1 entries that are not finite"),
    (lambda: Dense(torch.tensor([[float("inf")]])).logdet(), OperatorError, "not finite"),
    (lambda: CholeskyInverse(torch.ones(2, 3)), ValueError, "must be square"),
    (lambda: Scaled(float("nan"), Identity(2)), ValueError, "factor must be finite, got nan"),
    (lambda: Scaled(True, Identity(2)), TypeError, "factor must be a real number, got bool"),
    (lambda: Scaled(1.0, torch.eye(2)), TypeError, r"operator\[0\] must be a LinearOperator, got Tensor"),
    (lambda: Shifted(Identity(2), float("inf")), ValueError, "shift must be finite"),
    (lambda: Sum(()), TypeError, "terms must be a non-empty tuple"),
    (lambda: Identity(2) + Identity(3), ValueError, r"all terms must have one size, got \[2, 3\]"),
    (lambda: Identity(2) + Identity(2, torch.float64), ValueError, "one dtype and device"),
    (lambda: Kronecker((torch.ones(2, 3),)), ValueError, "must be square"),
    (lambda: Kronecker(()), TypeError, "factors must be a non-empty tuple"),
    (lambda: KroneckerEigen((), torch.ones(1)), TypeError, "bases must be a non-empty tuple"),
    (lambda: KroneckerEigen((None,), torch.ones(2, 2)), ValueError, r"eigenvalues must have shape \(d1,\)"),
    (lambda: KroneckerEigen((torch.eye(3),), torch.ones(2)), ValueError, r"bases\[0\] must have shape \(2, 2\)"),
    (lambda: KroneckerEigen((torch.eye(2).double(),), torch.ones(2)), ValueError, "must agree with eigenvalues"),
    (lambda: KroneckerStack([torch.ones(2, 1, 1)]), TypeError, "factors must be a non-empty tuple, got list"),
    (lambda: KroneckerStack(()), TypeError, "factors must be a non-empty tuple"),
    (lambda: KroneckerStack((torch.eye(2),)), ValueError, r"factors\[0\] must have shape \(B, d, d\), got \(2, 2\)"),
    (lambda: KroneckerStack((torch.ones(2, 3, 4),)), ValueError, r"must have shape \(2, 3, 3\), got \(2, 3, 4\)"),
    (lambda: KroneckerStack((THREE, torch.ones(2, 1, 1))), ValueError, r"factors\[1\] must have shape \(3, 1, 1\)"),
    (lambda: KroneckerStack((THREE, THREE.double())), ValueError, r"factors\[1\] must agree with factors\[0\]"),
    (lambda: KroneckerStack((torch.ones(0, 2, 2),)), ValueError, "size must be at least 1, got 0"),
    (lambda: KroneckerStack((torch.ones(3, 1, 1).long(),)), TypeError, "floating-point tensor, got torch.int64"),
    (lambda: KroneckerEigenStack((), torch.ones(1)), TypeError, "bases must be a non-empty tuple"),
    (lambda: KroneckerEigenStack((None,), torch.ones(2)), ValueError, r"eigenvalues must have shape \(B, d1\)"),
    (lambda: KroneckerEigenStack((THREE,), torch.ones(2, 1)), ValueError, r"bases\[0\] must have shape \(2, 1, 1\)"),
    (lambda: KroneckerEigenStack((THREE.double(),), torch.ones(3, 1)), ValueError, "must agree with eigenvalues"),
    (lambda: KroneckerEigenStack((None,), torch.ones(0, 1)), ValueError, "size must be at least 1"),
    (lambda: LowRank(torch.ones(3, 2), torch.ones(3), torch.ones(3)), ValueError, r"weights must have shape \(2,\)"),
    (lambda: LowRank(torch.ones(3, 2), torch.ones(2), torch.ones(2)), ValueError, "diagonal_part must have shape"),
    (lambda: LowRank(torch.ones(2, 1), torch.ones(1), torch.arange(2.0)).spectrum(), OperatorError, "constant"),
    (lambda: MatrixFree(3, 2), TypeError, "function must be callable, got int"),
    (lambda: MatrixFree(lambda V: V, 2, quadratic_form=3), TypeError, "quadratic_form must be callable, got int"),
    (lambda: MatrixFree(lambda V: V[:1], 2) @ torch.ones(2), ValueError, r"must return \(2, 1\)"),
    (lambda: MatrixFree(lambda V: None, 2) @ torch.ones(2), ValueError, "got NoneType"),
    (lambda: MatrixFree(lambda V: V, 2).logdet(), OperatorError, "does not give"),
    (lambda: Identity(3) @ torch.ones(2), ValueError, r"x of shape \(3,\) or \(3, K\)"),
    (lambda: Identity(3) @ torch.ones(3, 1, 1), ValueError, r"got \(3, 1, 1\)"),
    (lambda: Identity(3) @ torch.ones(3).double(), TypeError, "got torch.float64: convert"),
    (lambda: Identity(3) @ [1.0, 1.0, 1.0], TypeError, "got list"),
    (lambda: Identity(3) @ np.ones(3), TypeError, "got ndarray"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


INDEX = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("coordinates", "size", "error", "message"),
    [
        ((INDEX,), 3, ValueError, "one index vector for each of the 2 blocks"),
        ([INDEX, INDEX], 4, ValueError, "must be a tuple"),
        ((INDEX, INDEX.int()), 4, TypeError, r"coordinates\[1\] must be a tensor of dtype torch.long, got torch.int32"),
        ((INDEX, torch.tensor([2])), 4, ValueError, r"coordinates\[1\] must have shape \(2,\)"),
        ((INDEX, torch.tensor([3, 4])), 4, ValueError, r"must lie in 0 .. 3, got 3 .. 4"),
        ((INDEX, torch.tensor([-1, 2])), 4, ValueError, r"got -1 .. 2"),
        ((INDEX, torch.tensor([1, 2])), 4, ValueError, "disjoint"),
        ((INDEX, torch.tensor([3, 3])), 4, ValueError, "disjoint"),
    ],
)
def test_bad_coordinates_are_named(coordinates, size, error, message):
    with pytest.raises(error, match=message):
        BlockDiagonal((Identity(2), Identity(2)), coordinates, size)


def test_a_dense_matrix_can_be_changed_without_the_operator():
    C = Dense(torch.eye(2))
    C.to_dense().mul_(0.0)
    assert torch.equal(C @ torch.ones(2), torch.ones(2))
