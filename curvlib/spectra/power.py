"""Real powers of C + damping I, square roots among them.

Symbols: C (D, D) the operator, e its eigenvalues, p the power.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.operators import Identity, LinearOperator, MatrixFree, Shifted
from curvlib.operators.checks import check_finite_number
from curvlib.solvers import SolveError, damped_inverse
from curvlib.solvers.damping_scale import checked_damping
from curvlib.spectra.function import NoStructureError, matrix_function


def matrix_power(operator: LinearOperator, power: float, damping: float = 0.0) -> LinearOperator:
    r"""Return a real power of the damped operator, by its structure.

    .. math:: (C + \lambda I)^p = Q \, \mathrm{diag}((e_i + \lambda)^p) \, Q^T

    The structures are those of :func:`matrix_function`. Other operators have whole powers only, which take \|p\|
    products, or solves with :func:`curvlib.solvers.damped_inverse`, at each product. 0 to the power 0 is 1. Negative
    eigenvalues at rounding level, abs(e) <= n eps max abs(e + lambda) among n of them, count as 0.

    Args:
        operator: C, symmetric.
        power: p, of any sign.
        damping: lambda >= 0, in the units of C.

    Returns:
        An operator whose products are (C + lambda I)^p V.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: the power or the damping is not finite, or the damping is negative.
        NoStructureError: the power is fractional, and the structure of C does not give its eigenvectors.
        SolveError: the power is fractional and C + lambda I has a negative eigenvalue, or the power is negative and it
            is singular, or an entry of the result would not be finite.

    Example:
        >>> from curvlib.operators import Diagonal
        >>> matrix_power(Diagonal(torch.tensor([3.0, 8.0])), -0.5, damping=1.0).diagonal()
        tensor([0.5000, 0.3333])
    """
    if not isinstance(operator, LinearOperator):
        raise TypeError(f"matrix_power: operator must be a LinearOperator, got {type(operator).__name__}.")
    p = check_finite_number("matrix_power", "power", power)
    damping = checked_damping(damping)
    try:
        return matrix_function(operator, _Power(p, damping, repr(operator)))
    except NoStructureError as error:
        if not p.is_integer():
            raise NoStructureError(f"A fractional power, {p}, needs eigenvectors. {error}") from error
    return _whole_power(operator, int(p), damping)


def matrix_sqrt(operator: LinearOperator, damping: float = 0.0) -> LinearOperator:
    r"""Return the symmetric positive semi-definite square root of C + damping I: :func:`matrix_power` with p = 1/2.

    Example:
        >>> from curvlib.operators import Diagonal
        >>> matrix_sqrt(Diagonal(torch.tensor([4.0, 9.0]))).diagonal()
        tensor([2., 3.])
    """
    return matrix_power(operator, 0.5, damping)


@dataclass(frozen=True)
class DampedPower:
    r"""The solver that gives a power of the damped inverse, (C + lambda I)^-alpha: see :func:`matrix_power`.

    Between the identity and the inverse: a preconditioner for matrices that are known roughly, such as a diagonal,
    whose large and small entries the inverse would trust too much (Martens 2010, section 4.7: alpha = 0.75).

    Args:
        power: alpha, any finite number.

    Example:
        >>> from curvlib.operators import Diagonal
        >>> DampedPower(0.5)(Diagonal(torch.tensor([3.0, 8.0])), 1.0).diagonal()
        tensor([0.5000, 0.3333])
    """

    power: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "power", check_finite_number("DampedPower", "power", self.power))

    def __call__(self, operator: LinearOperator, damping: float) -> LinearOperator:
        """Return (C + damping I)^-power.

        Raises:
            NoStructureError, SolveError, ValueError: as :func:`matrix_power`.
        """
        return matrix_power(operator, -self.power, damping)


@dataclass(frozen=True, eq=False)
class _Power:
    """e -> (e + damping)^p, with errors that say which eigenvalue stands against it."""

    power: float
    damping: float
    label: str

    def __call__(self, e: Float[Tensor, " *d"]) -> Float[Tensor, " *d"]:
        base = e + self.damping
        if not self.power.is_integer() and base.numel():
            rounding = base.numel() * torch.finfo(e.dtype).eps * base.abs().amax()
            base = torch.where((base < 0.0) & (base >= -rounding), 0.0, base)
        result = base**self.power
        # NaN from a negative base, infinity from 0; one look at the device for all.
        if not bool(result.isfinite().all()):
            self._explain(e, base)
        return result

    def _explain(self, e: Float[Tensor, " *d"], base: Float[Tensor, " *d"]) -> None:
        what = f"(C + damping I)^{self.power:g} of {self.label} with damping = {self.damping:.3g}"
        smallest, largest = (float(end) for end in e.aminmax())
        if not (isfinite(smallest) and isfinite(largest)):
            raise SolveError(f"{what}: C has eigenvalues that are not finite: skip this update.")
        if not self.power.is_integer() and float(base.min()) < 0.0:
            raise SolveError(
                f"{what} is a fractional power, which needs C + damping I positive semi-definite, but C has the "
                f"eigenvalue {smallest:.3g}. Use a damping of at least {-smallest:.3g}, or a whole power."
            )
        if self.power < 0.0 and bool((base == 0.0).any()):
            raise SolveError(f"{what} is a negative power of a singular matrix. Use a larger damping.")
        raise SolveError(
            f"{what} leaves the range of {e.dtype}: the eigenvalues of C reach from {smallest:.3g} to {largest:.3g}. "
            "Use a larger damping, a smaller power or a wider dtype."
        )


def _whole_power(operator: LinearOperator, power: int, damping: float) -> LinearOperator:
    if power == 0:
        return Identity(operator.size, operator.dtype, operator.device)
    base = damped_inverse(operator, damping) if power < 0 else Shifted(operator, damping)
    if abs(power) == 1:
        return base

    def matmat(V: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        for _ in range(abs(power)):
            V = base @ V
        return V

    return MatrixFree(matmat, operator.size, operator.dtype, operator.device)
