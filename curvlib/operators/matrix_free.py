"""An operator that is only known through its products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from curvlib.operators.base import LinearOperator
from curvlib.operators.checks import check_size
from curvlib.operators.precision import full_precision
from curvlib.operators.state import OperatorError


@dataclass(frozen=True, eq=False, repr=False, init=False)
class MatrixFree(LinearOperator):
    """The symmetric linear map v -> function(v), such as an exact curvature matrix.

    Args:
        function: takes and gives a (D, K) block, or with ``columnwise`` a vector (D,); linear and symmetric, which is
            not checked.
        size: D.
        dtype: type of its vectors; None stands for PyTorch's default.
        device: device of its vectors; None stands for the CPU.
        quadratic_form: V (D, K) -> V^T C V (K, K), where there is a cheaper way than a product.
        columnwise: the function takes one vector at a time; blocks are multiplied column by column.

    Example:
        >>> C = MatrixFree(lambda V: 2.0 * V, 3)
        >>> C @ torch.ones(3)
        tensor([2., 2., 2.])
    """

    function: Callable[[Tensor], Tensor]
    size: int
    dtype: torch.dtype
    device: torch.device
    form: Callable[[Float[Tensor, "D K"]], Float[Tensor, "K K"]] | None
    columnwise: bool

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        quadratic_form: Callable[[Float[Tensor, "D K"]], Float[Tensor, "K K"]] | None = None,
        columnwise: bool = False,
    ) -> None:
        check_size("MatrixFree", size)
        for name, value in (("function", function), ("quadratic_form", quadratic_form)):
            if not callable(value) and (name == "function" or value is not None):
                raise TypeError(f"MatrixFree: {name} must be callable, got {type(value).__name__}.")
        object.__setattr__(self, "function", function)
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "dtype", dtype or torch.get_default_dtype())
        object.__setattr__(self, "device", torch.device(device or "cpu"))
        object.__setattr__(self, "form", quadratic_form)
        object.__setattr__(self, "columnwise", columnwise)

    @override
    def matmat(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        if self.columnwise and V.shape[1] > 0:
            return torch.stack([self._checked(v) for v in V.T.contiguous()], dim=1)
        return self._checked(V)

    @override
    def matvec(self, v: Float[Tensor, " D"]) -> Float[Tensor, " D"]:
        return self._checked(v) if self.columnwise else super().matvec(v)

    def _checked(self, V: Tensor) -> Tensor:
        product = self.function(V) if V.numel() > 0 else V
        if not isinstance(product, Tensor) or product.shape != V.shape or product.dtype != V.dtype:
            came = f"{tuple(product.shape)} {product.dtype}" if isinstance(product, Tensor) else type(product).__name__
            raise ValueError(f"MatrixFree: function must return {tuple(V.shape)} {V.dtype} for such a V, got {came}.")
        return product

    @override
    def quadratic_form(self, V: Float[Tensor, "D *K"]) -> Float[Tensor, "*K *K"]:
        if self.form is None:
            return super().quadratic_form(V)
        self._check_vector(V)
        if V.numel() == 0:
            return V.new_zeros(0, 0)
        with full_precision(V.device):
            return self.form(V) if V.ndim == 2 else self.form(V.unsqueeze(1)).reshape(())

    @override
    def state_dict(self) -> dict[str, Any]:
        raise OperatorError(
            "state_dict is not available for MatrixFree: it holds a function, not numbers. Save what the function was "
            "made from, or convert the operator first, for example Dense(C.to_dense())."
        )
