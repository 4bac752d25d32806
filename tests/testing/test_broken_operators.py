"""Deliberately broken operators are caught by their suite, which names the identity that broke."""

import re
from dataclasses import dataclass

import pytest
import torch
from twins import broken, name

from curvlib.operators import Dense as DenseOperator
from curvlib.operators import LinearOperator, LowRank
from curvlib.solvers import damped_inverse, eigendecompose
from curvlib.testing import check_operator, draws


@dataclass(frozen=True, eq=False, repr=False)
class Matrix(LinearOperator):
    """A matrix whose methods are as they should be."""

    matrix: torch.Tensor
    size = property(lambda self: len(self.matrix))
    dtype = property(lambda self: self.matrix.dtype)
    device = property(lambda self: self.matrix.device)

    def matmat(self, V):
        return self.matrix @ V


class WrongSign(Matrix):
    def quadratic_form(self, V):
        return -super().quadratic_form(V)


class WrongScale(Matrix):
    def trace(self):
        return super().trace() / self.size


class Transposed(Matrix):
    """Right for symmetric parts alone: a matrix that is applied along another dimension by its transpose."""

    def apply_along(self, X, dim):
        return super().apply_along(X.flip(dim), dim)


class Stale(Matrix):
    """Keeps the first product for all blocks of the same shape."""

    def matmat(self, V):
        cache = self.__dict__.setdefault("cache", {})
        return cache.setdefault(tuple(V.shape), self.matrix @ V).clone()


class Rounds(Matrix):
    def matmat(self, V):
        return (self.matrix.float() @ V.float()).to(V.dtype)


class TakesAll(Matrix):
    def _check_vector(self, x):
        pass


class WritesToItsArgument(Matrix):
    def matmat(self, V):
        return V.copy_(self.matrix @ V)


class OwnProduct(Matrix):
    """A product that is taken before curvlib's own switches the low precision off."""

    def __matmul__(self, x):
        self._check_vector(x)
        return (self.matrix.float() @ x.float()).to(x.dtype) if torch.is_autocast_enabled("cpu") else self.matrix @ x


class Unfrozen(Matrix):
    """Another product each time."""

    def matmat(self, V):
        self.__dict__["calls"] = self.__dict__.get("calls", 0) + 1
        return self.matrix @ V * (1 + 1e-14 * self.__dict__["calls"])


class ManyColumns(Matrix):
    """Right for up to six columns."""

    def matmat(self, V):
        return torch.where(torch.arange(V.shape[1]) < 6, self.matrix @ V, 0.0)


class ItsArgument(Matrix):
    """The identity, as its argument itself."""

    def matmat(self, V):
        return V if torch.equal(self.matrix, torch.eye(self.size, dtype=V.dtype)) else self.matrix @ V


class OneBuffer(Matrix):
    """Every product of one shape is written to the same tensor."""

    def matmat(self, V):
        buffer = self.__dict__.setdefault("buffers", {}).setdefault(tuple(V.shape), torch.empty_like(V))
        return torch.mm(self.matrix, V, out=buffer)


class KeepsItsResults(Matrix):
    """Gives the same tensor for the same vectors, which a caller may have written to."""

    def matmat(self, V):
        kept = self.__dict__.setdefault("kept", {})
        return kept.setdefault((tuple(V.shape), tuple(V.flatten().tolist())), self.matrix @ V)


class WithGraph(Matrix):
    def matmat(self, V):
        return self.matrix.clone().requires_grad_() @ V


class AlongTheLast(Matrix):
    """Applies the matrix to the last dimension where the first was meant."""

    def apply_along(self, X, dim):
        return super().apply_along(X, dim) if dim else X @ self.matrix


class InFloat32(Matrix):
    def to_dense(self):
        return self.matrix.float()


class LogOfAbsolute(Matrix):
    """The determinant without its sign."""

    def logdet(self, damping=0.0):
        return torch.linalg.slogdet(self.matrix + damping * torch.eye(self.size, dtype=self.dtype)).logabsdet


class OfAllEntries(Matrix):
    def frobenius_norm(self):
        return self.matrix.abs().sum()


class ToAnother(Matrix):
    def to_scipy(self):
        return (2.0 * self).to_scipy()


class ShiftedDiagonal(Matrix):
    def diagonal(self):
        return super().diagonal() + 1.0


class AbsoluteEigenvalues(Matrix):
    def spectrum(self):
        return torch.linalg.eigvalsh(self.matrix).abs()


class LogOfTrace(Matrix):
    def logdet(self, damping=0.0):
        torch.linalg.cholesky(self.matrix + damping * torch.eye(self.size, dtype=self.dtype))
        return (self.matrix.diagonal() + damping).log().sum()


class SavesHalf(Matrix):
    def state_dict(self):
        state = super().state_dict()
        return {**state, "fields": {"matrix": self.matrix.half().to(self.dtype)}}


class FirstColumnOfForm(Matrix):
    """Right for one vector."""

    def quadratic_form(self, V):
        return super().quadratic_form(V) if V.ndim == 1 else torch.diag(super().quadratic_form(V).diagonal())


class OfStrides(Matrix):
    """Reads the memory of its argument as if rows followed one another."""

    def matmat(self, V):
        memory = torch.as_strided(V, V.shape, (V.shape[1], 1), V.storage_offset())
        return self.matrix @ (memory if V.shape[1] == 3 else V)


@dataclass(eq=False, repr=False)
class CanBeWrittenTo(LinearOperator):
    matrix: torch.Tensor
    size = property(lambda self: len(self.matrix))
    dtype = property(lambda self: self.matrix.dtype)
    matmat = Matrix.matmat


class OfLeadingEigenvalues(Matrix):
    pass


@eigendecompose.register(OfLeadingEigenvalues)
def _(operator):
    M = operator.matrix
    return eigendecompose(DenseOperator(M + 0.1 * torch.eye(len(M), dtype=M.dtype)))


class OfAnySign(Matrix):
    pass


@damped_inverse.register(OfAnySign)
def _(operator, damping):
    return DenseOperator(torch.linalg.inv(operator.matrix + damping * torch.eye(operator.size, dtype=operator.dtype)))


@pytest.mark.parametrize(
    ("twin", "identity"),
    [
        (WrongSign, "C.quadratic_form(v) = v^T C v"),
        (WrongScale, "C.trace() = sum of the diagonal"),
        (Transposed, "C.apply_along(X, 1) = C on dimension 1 of X"),
        (Stale, "C = C^T"),
        (Rounds, "C @ v = the matrix times v"),
        (TakesAll, "C @ x refuses x of"),
        (WritesToItsArgument, "C @ V leaves V as it is"),
        (OwnProduct, "C @ V inside autocast = C @ V"),
        (Unfrozen, "repeated products are the same"),
        (ManyColumns, "C @ V of 8 columns = the matrix times V"),
        (OneBuffer, "a later product leaves an earlier one as it is"),
        (KeepsItsResults, "writing into C @ V leaves C as it is"),
        (WithGraph, "C @ V carries no graph"),
        (AlongTheLast, "C.apply_along(X, 0) = C on the first one"),
        (InFloat32, "C.to_dense() = the matrix of the products"),
        (LogOfAbsolute, "C.logdet(lambda) refuses a C + lambda I with a negative eigenvalue"),
        (OfAllEntries, "C.frobenius_norm() = |C|_F"),
        (ToAnother, "C.to_scipy() @ v = C @ v"),
        (ShiftedDiagonal, "C.diagonal() = diagonal of the matrix"),
        (AbsoluteEigenvalues, "C.spectrum() = eigenvalues of the matrix"),
        (LogOfTrace, "C.logdet(lambda) = sum of log(e + lambda)"),
        (SavesHalf, "operator_from_state_dict(C.state_dict()) = C"),
        (FirstColumnOfForm, "C.quadratic_form(V) = V^T C V"),
        (OfStrides, "C @ V does not depend on strides"),
        (CanBeWrittenTo, "an operator is a frozen value"),
        (OfLeadingEigenvalues, "eigendecompose(C) = C"),
        (OfAnySign, "damped_inverse(C, lambda) refuses a C + lambda I with a negative eigenvalue"),
    ],
    ids=name,
)
def test_broken_operators(twin, identity):
    def make(d):
        M = d.symmetric(d.integer(2, 4))
        return twin(M), M

    with broken(identity) as caught:
        check_operator(draws(definite=None).map(make), examples=10)
    assert twin.__name__ in caught.value.subject
    assert twin.__name__ in caught.value.example


def test_a_determinant_without_sign_of_definite_matrices():
    """An even number of negative eigenvalues leaves the determinant positive: dampings below 0 show it."""
    with broken("C.logdet(lambda) refuses a C + lambda I with a negative eigenvalue"):
        check_operator(LogOfAbsolute(torch.diag(torch.tensor([1.0, 2.0]))), semidefinite=True)


def test_an_operator_that_gives_its_argument():
    with broken("C @ V is no view of V"):
        check_operator(ItsArgument(torch.eye(3)))


def test_an_operator_that_is_not_symmetric():
    with broken("C = C^T"):
        check_operator(Matrix(torch.tensor([[1.0, 2.0], [0.0, 1.0]])))


def test_an_operator_that_is_another_matrix():
    with broken("C @ v = the matrix times v"):
        check_operator(DenseOperator(torch.eye(2)), dense=2.0 * torch.eye(2))


def test_an_operator_that_claims_to_be_semidefinite():
    check_operator(DenseOperator(-torch.eye(2)))
    with broken("no eigenvalue is negative"):
        check_operator(DenseOperator(-torch.eye(2)), semidefinite=True)


@dataclass(frozen=True, eq=False, repr=False)
class OfLowRank(LinearOperator):
    """u u^T with a rule of its own for the inverse."""

    u: torch.Tensor
    size = property(lambda self: len(self.u))
    dtype = property(lambda self: self.u.dtype)

    def matmat(self, V):
        return self.u.outer(self.u @ V)


class WithoutComplement(OfLowRank):
    pass


@damped_inverse.register(WithoutComplement)
def _(operator, damping):
    u = operator.u
    weight = 1 / (u @ u * (u @ u + damping))
    return LowRank(u.unsqueeze(1), weight.reshape(1), torch.zeros_like(u))


def test_an_inverse_without_the_orthogonal_complement():
    check_operator(draws().map(lambda d: OfLowRank(d.normal(3))), semidefinite=True, examples=3)
    with broken("damped_inverse(C, lambda) @ (C + lambda I) v = v"):
        check_operator(draws().map(lambda d: WithoutComplement(d.normal(3))), examples=3)


def test_the_smallest_input_is_small():
    with broken("C.trace() = sum of the diagonal") as caught:
        check_operator(draws().map(lambda d: WrongScale(d.symmetric(d.integer(2, 9)))), examples=20)
    smallest = re.search(r"matrix=tensor\(\[(.*?)\]\]", caught.value.example, re.DOTALL)[1]
    assert smallest.count("[") == 2
    assert "expected tensor" in str(caught.value)
    assert "got " in str(caught.value)
