"""The interface of every curvature matrix: a symmetric linear operator on R^D.

Symbols: C the operator, D its size, K the number of columns of a block of vectors.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from numbers import Real
from operator import add
from typing import Any

import torch
from jaxtyping import Float, Shaped
from scipy.sparse.linalg import LinearOperator as ScipyLinearOperator
from torch import Tensor
from typing_extensions import override

from curvlib.operators.attributes import overridable
from curvlib.operators.checks import check_finite_number, sum_of_logs
from curvlib.operators.precision import full_precision, in_full_precision
from curvlib.operators.state import OperatorError, register_class, state_from_operator

# Columns of the identity that a default (brute-force) method multiplies at once: D x 256 numbers of memory.
_COLUMNS_AT_ONCE = 256
# What users call on an operator, possibly under autocast; products have their check in ``@``.
_NUMBERS = frozenset({"diagonal", "trace", "to_dense", "frobenius_norm", "spectrum", "logdet"})


class LinearOperator(ABC):
    r"""Symmetric linear operator C on R^D, a frozen value.

    A subclass gives :attr:`size` (a property or a dataclass field) and :meth:`matmat`; everything else has a default
    that follows from products (and costs D of them where the docstring says so). Structured subclasses override what
    their structure gives. ``dtype`` and ``device`` default to PyTorch's default dtype and the CPU; operators that hold
    tensors override them. Tensors are held, not copied: do not change them afterwards.

    Sums, differences and scalar multiples of operators are operators: ``2.0 * C + D``.

    Example:
        >>> from curvlib.operators import Diagonal
        >>> C = Diagonal(torch.tensor([1.0, 2.0, 3.0]))
        >>> C @ torch.ones(3)
        tensor([1., 2., 3.])
        >>> float((2.0 * C + C).trace())
        18.0
    """

    # NumPy would otherwise take the operator for a scalar: np.float64(2.0) * C is to be ours.
    __array_ufunc__ = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in _NUMBERS.intersection(vars(cls)):
            setattr(cls, name, in_full_precision(vars(cls)[name]))
        register_class(cls)

    @overridable
    def size(self) -> int:
        """D, the dimension of the space."""
        raise NotImplementedError(f"{type(self).__name__} must define size, as a property or a dataclass field.")

    @abstractmethod
    def matmat(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        """Return C V. Called with a checked (D, K) block; users write ``C @ V`` or ``C @ v``."""

    @overridable
    def dtype(self) -> torch.dtype:
        """Type of the vectors that the operator takes and gives."""
        return torch.get_default_dtype()

    @overridable
    def device(self) -> torch.device:
        """Device of the vectors that the operator takes and gives."""
        return torch.device("cpu")

    @property
    def shape(self) -> tuple[int, int]:
        """(D, D)."""
        return (self.size, self.size)

    def __matmul__(self, x: Float[Tensor, "D *K"]) -> Float[Tensor, "D *K"]:
        """Return C x for a vector (D,) or a block of columns (D, K).

        Raises:
            TypeError: x is not a tensor, or has another dtype.
            ValueError: x has another length, more than two dimensions, or lies on another device.
        """
        self._check_vector(x)
        with full_precision(x.device):
            return self.matvec(x) if x.ndim == 1 else self.matmat(x)

    def matvec(self, v: Float[Tensor, " D"]) -> Float[Tensor, " D"]:
        """Return C v for a checked vector; operators with a shorter way than a block of one column override it."""
        return self.matmat(v.unsqueeze(1)).squeeze(1)

    def apply_along(self, X: Float[Tensor, " ..."], dim: int) -> Float[Tensor, " ..."]:
        """Return C applied to dimension ``dim`` (of length D) of a tensor: one factor of a Kronecker product.

        Default: the dimension is moved to the front, which copies; factors with a structure override it.
        """
        moved = X.movedim(dim, 0)
        return self.matmat(moved.reshape(self.size, -1)).reshape(moved.shape).movedim(0, dim)

    def quadratic_form(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "K K"]:
        """Return V^T C V; for a vector (D,) the number v^T C v. Exact operators override it: no backward pass."""
        with full_precision(V.device):
            return V.T @ (self @ V) if V.ndim == 2 else V @ (self @ V)

    def diagonal(self) -> Float[Tensor, " D"]:
        """Return the diagonal (D,). Default: D products."""
        parts = [block.gather(0, rows.unsqueeze(0)).squeeze(0) for rows, block in self._column_blocks()]
        return torch.cat(parts)

    def trace(self) -> Float[Tensor, ""]:
        """Return the sum of the diagonal. Default: D products."""
        return self.diagonal().sum()

    def to_dense(self) -> Float[Tensor, "D D"]:
        """Return the (D, D) matrix. Default: D products."""
        return torch.cat([block for _, block in self._column_blocks()], dim=1)

    def frobenius_norm(self) -> Float[Tensor, ""]:
        """Return the root of the sum of squares of all entries. Default: D products, never the whole matrix."""
        norms = [torch.linalg.vector_norm(block) for _, block in self._column_blocks()]
        return torch.linalg.vector_norm(torch.stack(norms))

    def spectrum(self) -> Float[Tensor, " D"]:
        """Return all D eigenvalues in no particular order, where the structure gives them.

        Raises:
            OperatorError: the operator has no structure that gives its eigenvalues.
        """
        raise OperatorError(
            f"The structure of {type(self).__name__} does not give its eigenvalues or its determinant. Use "
            f"curvlib.operators.Dense(C.to_dense()) if D = {self.size} is small enough."
        )

    def logdet(self, damping: float = 0.0) -> Float[Tensor, ""]:
        """Return log det(C + damping I), where the structure gives it.

        Raises:
            OperatorError: the operator has no structure that gives its determinant.
            ArithmeticError: C + damping I is not positive definite.
        """
        return sum_of_logs(self.spectrum() + damping, repr(self), damping)

    def to_scipy(self) -> ScipyLinearOperator:
        """Return a ``scipy.sparse.linalg.LinearOperator`` that takes and gives NumPy arrays."""
        numpy_dtype = torch.empty(0, dtype=self.dtype).numpy().dtype

        def matmat(x):  # type: ignore[no-untyped-def]
            # A copy: PyTorch warns of arrays that NumPy has marked read-only.
            columns = torch.tensor(x, dtype=self.dtype, device=self.device)
            return (self @ columns.reshape(self.size, -1)).reshape(columns.shape).detach().cpu().numpy()

        return ScipyLinearOperator(
            shape=self.shape, dtype=numpy_dtype, matvec=matmat, rmatvec=matmat, matmat=matmat, rmatmat=matmat
        )

    def state_dict(self) -> dict[str, Any]:
        """Return a dictionary for ``torch.save``; :func:`operator_from_state_dict` is its inverse.

        Raises:
            OperatorError: the operator is no dataclass, or holds something other than tensors, numbers and operators.
        """
        return state_from_operator(self)

    def __add__(self, other: LinearOperator) -> LinearOperator:
        return Sum((self, other)) if isinstance(other, LinearOperator) else NotImplemented

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        return Sum((self, Scaled(-1.0, other))) if isinstance(other, LinearOperator) else NotImplemented

    def __mul__(self, factor: float) -> LinearOperator:
        return Scaled(float(factor), self) if _is_number(factor) else NotImplemented

    __rmul__ = __mul__

    def __neg__(self) -> LinearOperator:
        return Scaled(-1.0, self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(size={self.size}, dtype={self.dtype}, device={self.device})"

    def _check_vector(self, x: Shaped[Tensor, " ..."]) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(
                f"C @ x needs a tensor x of shape ({self.size},) or ({self.size}, K), got {type(x).__name__}."
            )
        if x.ndim not in (1, 2) or x.shape[0] != self.size:
            raise ValueError(
                f"C @ x needs x of shape ({self.size},) or ({self.size}, K) for {self!r}, got {tuple(x.shape)}."
            )
        if x.dtype != self.dtype:
            raise TypeError(
                f"C @ x needs x of dtype {self.dtype} for {self!r}, got {x.dtype}: convert it with x.to(C.dtype)."
            )
        if x.device.type != self.device.type:
            raise ValueError(f"C @ x needs x on {self.device}, got {x.device}: move it with x.to(C.device).")

    def _column_blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (column numbers, those columns of C), at most 256 at once."""
        for start in range(0, self.size, _COLUMNS_AT_ONCE):
            columns = torch.arange(start, min(start + _COLUMNS_AT_ONCE, self.size), device=self.device)
            unit = torch.zeros(self.size, len(columns), dtype=self.dtype, device=self.device)
            unit[columns, torch.arange(len(columns), device=self.device)] = 1.0
            yield columns, self @ unit


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_operators(owner: str, name: str, operators: tuple[LinearOperator, ...]) -> None:
    """Check that ``operators`` is a non-empty tuple of operators with one dtype on one kind of device."""
    if not isinstance(operators, tuple) or not operators:
        raise TypeError(f"{owner}: {name} must be a non-empty tuple of operators, got {operators!r}.")
    for i, operator in enumerate(operators):
        if not isinstance(operator, LinearOperator):
            raise TypeError(f"{owner}: {name}[{i}] must be a LinearOperator, got {type(operator).__name__}.")
        if operator.dtype != operators[0].dtype or operator.device.type != operators[0].device.type:
            raise ValueError(
                f"{owner}: all {name} must have one dtype and device, got {operators[0]!r} and {operator!r}."
            )


@dataclass(frozen=True, eq=False, repr=False)
class Scaled(LinearOperator):
    """factor * C: a multiple of an operator, of any sign.

    Args:
        factor: a finite number.
        operator: C.
    """

    factor: float
    operator: LinearOperator

    def __post_init__(self) -> None:
        check_operators("Scaled", "operator", (self.operator,))
        object.__setattr__(self, "factor", check_finite_number("Scaled", "factor", self.factor))

    @property
    @override
    def size(self) -> int:
        return self.operator.size

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self.operator.dtype

    @property
    @override
    def device(self) -> torch.device:
        return self.operator.device

    @override
    def matmat(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        return self.factor * self.operator.matmat(V)

    @override
    def apply_along(self, X: Float[Tensor, " ..."], dim: int) -> Float[Tensor, " ..."]:
        return self.factor * self.operator.apply_along(X, dim)

    @override
    def quadratic_form(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "K K"]:
        return self.factor * self.operator.quadratic_form(V)

    @override
    def diagonal(self) -> Float[Tensor, " D"]:
        return self.factor * self.operator.diagonal()

    @override
    def trace(self) -> Float[Tensor, ""]:
        return self.factor * self.operator.trace()

    @override
    def to_dense(self) -> Float[Tensor, "D D"]:
        return self.factor * self.operator.to_dense()

    @override
    def frobenius_norm(self) -> Float[Tensor, ""]:
        return abs(self.factor) * self.operator.frobenius_norm()

    @override
    def spectrum(self) -> Float[Tensor, " D"]:
        return self.factor * self.operator.spectrum()

    @override
    def logdet(self, damping: float = 0.0) -> Float[Tensor, ""]:
        # Only a positive factor leaves the definiteness as it is, which the operator's own rule checks.
        if self.factor <= 0.0:
            return super().logdet(damping)
        return self.size * math.log(self.factor) + self.operator.logdet(damping / self.factor)


@dataclass(frozen=True, eq=False, repr=False)
class Sum(LinearOperator):
    """C_1 + ... + C_n for operators of one size.

    Args:
        terms: the operators, at least one.
    """

    terms: tuple[LinearOperator, ...]

    def __post_init__(self) -> None:
        check_operators("Sum", "terms", self.terms)
        sizes = [term.size for term in self.terms]
        if len(set(sizes)) > 1:
            raise ValueError(f"Sum: all terms must have one size, got {sizes}.")

    @property
    @override
    def size(self) -> int:
        return self.terms[0].size

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self.terms[0].dtype

    @property
    @override
    def device(self) -> torch.device:
        return self.terms[0].device

    @override
    def matmat(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        return reduce(add, (term.matmat(V) for term in self.terms))

    @override
    def quadratic_form(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "K K"]:
        return reduce(add, (term.quadratic_form(V) for term in self.terms))

    @override
    def diagonal(self) -> Float[Tensor, " D"]:
        return reduce(add, (term.diagonal() for term in self.terms))

    @override
    def trace(self) -> Float[Tensor, ""]:
        return reduce(add, (term.trace() for term in self.terms))

    @override
    def to_dense(self) -> Float[Tensor, "D D"]:
        return reduce(add, (term.to_dense() for term in self.terms))
