"""Operators that act on each coordinate alone, and the shift of any operator by a multiple of the identity."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from curvlib.operators.base import LinearOperator, check_operators
from curvlib.operators.checks import check_finite_number, check_size, check_tensor
from curvlib.operators.precision import full_precision


def _column(values: Float[Tensor, " d"], X: Float[Tensor, " ..."], dim: int) -> Float[Tensor, " ..."]:
    """Return ``values`` shaped so that it multiplies dimension ``dim`` of X."""
    return values.reshape([-1 if axis == dim % X.ndim else 1 for axis in range(X.ndim)])


@dataclass(frozen=True, eq=False, repr=False)
class Identity(LinearOperator):
    """The identity I on R^D: what turns a second-order method into gradient descent.

    Args:
        size: D.
        dtype: type of its vectors; None stands for PyTorch's default.
        device: device of its vectors; None stands for the CPU.
    """

    size: int
    dtype: torch.dtype | None = None  # type: ignore[assignment]
    device: torch.device | str | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        check_size("Identity", self.size)
        object.__setattr__(self, "dtype", self.dtype or torch.get_default_dtype())
        object.__setattr__(self, "device", torch.device(self.device or "cpu"))

    @override
    def matmat(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        # A copy, so that a product never shares memory with its argument.
        return V.clone()

    @override
    def apply_along(self, X: Float[Tensor, " ..."], dim: int) -> Float[Tensor, " ..."]:
        return X

    @override
    def diagonal(self) -> Float[Tensor, " D"]:
        return torch.ones(self.size, dtype=self.dtype, device=self.device)

    @override
    def trace(self) -> Float[Tensor, ""]:
        return torch.tensor(float(self.size), dtype=self.dtype, device=self.device)

    @override
    def to_dense(self) -> Float[Tensor, "D D"]:
        return torch.eye(self.size, dtype=self.dtype, device=self.device)

    @override
    def frobenius_norm(self) -> Float[Tensor, ""]:
        return self.trace().sqrt()

    @override
    def spectrum(self) -> Float[Tensor, " D"]:
        return self.diagonal()


@dataclass(frozen=True, eq=False, repr=False)
class Diagonal(LinearOperator):
    """diag(values).

    Args:
        values: (D,), of any sign.
    """

    values: Float[Tensor, " D"]

    def __post_init__(self) -> None:
        check_tensor("Diagonal", "values", self.values, ("D",))
        check_size("Diagonal", len(self.values))

    @property
    @override
    def size(self) -> int:
        return self.values.shape[0]

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    @override
    def device(self) -> torch.device:
        return self.values.device

    @override
    def matmat(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        return self.values.unsqueeze(1) * V

    @override
    def apply_along(self, X: Float[Tensor, " ..."], dim: int) -> Float[Tensor, " ..."]:
        return _column(self.values, X, dim) * X

    @override
    def diagonal(self) -> Float[Tensor, " D"]:
        return self.values.clone()

    @override
    def trace(self) -> Float[Tensor, ""]:
        return self.values.sum()

    @override
    def to_dense(self) -> Float[Tensor, "D D"]:
        return torch.diag(self.values)

    @override
    def frobenius_norm(self) -> Float[Tensor, ""]:
        return torch.linalg.vector_norm(self.values)

    @override
    def spectrum(self) -> Float[Tensor, " D"]:
        return self.values.clone()


@dataclass(frozen=True, eq=False, repr=False)
class Shifted(LinearOperator):
    """C + shift I, for example the curvature of a loss with an l2 term.

    Solvers add the shift to the damping, so that it costs nothing: the inverse of Shifted(C, s) with damping lambda is
    the inverse of C with damping lambda + s.

    Args:
        operator: C.
        shift: a finite number, of any sign.
    """

    operator: LinearOperator
    shift: float

    def __post_init__(self) -> None:
        check_operators("Shifted", "operator", (self.operator,))
        object.__setattr__(self, "shift", check_finite_number("Shifted", "shift", self.shift))

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
        return torch.add(self.operator.matmat(V), V, alpha=self.shift)

    @override
    def apply_along(self, X: Float[Tensor, " ..."], dim: int) -> Float[Tensor, " ..."]:
        return torch.add(self.operator.apply_along(X, dim), X, alpha=self.shift)

    @override
    def quadratic_form(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "K K"]:
        with full_precision(V.device):
            gram = V.T @ V if V.ndim == 2 else V @ V
            return torch.add(self.operator.quadratic_form(V), gram, alpha=self.shift)

    @override
    def diagonal(self) -> Float[Tensor, " D"]:
        return self.operator.diagonal() + self.shift

    @override
    def trace(self) -> Float[Tensor, ""]:
        return self.operator.trace() + self.shift * self.size

    @override
    def to_dense(self) -> Float[Tensor, "D D"]:
        dense = self.operator.to_dense().clone()
        dense.diagonal().add_(self.shift)
        return dense

    @override
    def frobenius_norm(self) -> Float[Tensor, ""]:
        # |C + s I|^2 = (|C|^2 - tr(C)^2 / D) + D (tr(C) / D + s)^2: no loss unless C is near a multiple of I.
        norm, mean = self.operator.frobenius_norm().double(), self.operator.trace().double() / self.size
        spread = (norm.square() - self.size * mean.square()).clamp(min=0.0)
        return (spread + self.size * (mean + self.shift).square()).sqrt().to(self.dtype)

    @override
    def spectrum(self) -> Float[Tensor, " D"]:
        return self.operator.spectrum() + self.shift

    @override
    def logdet(self, damping: float = 0.0) -> Float[Tensor, ""]:
        return self.operator.logdet(damping + self.shift)
