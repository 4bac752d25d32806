"""Validation that every operator shares: each message names the argument, what was expected, what came, the remedy."""

from __future__ import annotations

import math
from numbers import Real

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from curvlib.operators.state import OperatorError


def check_tensor(owner: str, name: str, value: Shaped[Tensor, " ..."], shape: tuple[int | str, ...]) -> None:
    """Check that ``value`` is a real floating-point tensor of ``shape``, in which a string stands for any length."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{owner}: {name} must be a tensor, got {type(value).__name__}: wrap it with torch.as_tensor.")
    if not value.is_floating_point():
        raise TypeError(f"{owner}: {name} must be a real floating-point tensor, got {value.dtype}: convert it first.")
    matches = value.ndim == len(shape) and all(
        isinstance(want, str) or want == have for want, have in zip(shape, value.shape, strict=True)
    )
    if not matches:
        expected = ", ".join(str(length) for length in shape) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{owner}: {name} must have shape ({expected}), got {tuple(value.shape)}.")


def check_finite_number(owner: str, name: str, value: float) -> float:
    """Return ``value`` as a float after checking that it is a finite real number and not a bool."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{owner}: {name} must be a real number, got {type(value).__name__}: pass a float.")
    if not math.isfinite(value):
        raise ValueError(f"{owner}: {name} must be finite, got {float(value)}.")
    return float(value)


def check_size(owner: str, size: int) -> None:
    """Check that ``size`` is a positive integer."""
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{owner}: size must be an int, got {type(size).__name__}.")
    if size < 1:
        raise ValueError(f"{owner}: size must be at least 1, got {size}.")


def check_alike(owner: str, **tensors: Shaped[Tensor, " ..."]) -> None:
    """Check that all tensors have one dtype and lie on one kind of device."""
    (first_name, first), *rest = tensors.items()
    for name, tensor in rest:
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise ValueError(
                f"{owner}: {name} must agree with {first_name} ({first.dtype} on {first.device}), got {tensor.dtype} "
                f"on {tensor.device}: convert one of them."
            )


def sum_of_logs(values: Shaped[Tensor, " D"], owner: str, damping: float) -> Shaped[Tensor, ""]:
    """Return sum_i log(values_i): a sum of logarithms, since the product of many numbers leaves the range of floats.

    Raises:
        ArithmeticError: a value is not positive, so that C + damping I is not positive definite.
    """
    smallest = float(values.min()) if values.numel() else 1.0
    if not smallest > 0.0:
        raise ArithmeticError(
            f"logdet of {owner} needs C + damping I positive definite, but with damping = {damping} the value "
            f"{smallest} occurs in its spectrum: use a damping above {damping - smallest}."
        )
    return values.log().sum()


def is_symmetric(M: Float[Tensor, "*B d d"]) -> Bool[Tensor, "*B"]:
    """Return for each matrix whether it is finite, and symmetric up to rounding, without waiting for the device.

    Rounding means max |M - M^T| <= tol max |M| with tol = max(1e-5, sqrt(eps)): far above what summation in another
    order leaves in a matrix of float32 precision, far below a mistake.
    """
    largest, asymmetry = M.abs().amax((-2, -1)), (M - M.mT).abs().amax((-2, -1))
    tolerance = max(1e-5, torch.finfo(M.dtype).eps ** 0.5)
    # Comparisons with NaN are false.
    return (asymmetry <= tolerance * largest) & (largest < math.inf)


def symmetrized(M: Float[Tensor, "*B d d"], label: str) -> Float[Tensor, "*B d d"]:
    """Return (M + M^T) / 2 after checking that every matrix is finite, and symmetric as :func:`is_symmetric` says.

    Raises:
        OperatorError: an entry is not finite, or a matrix is not symmetric.
    """
    correct = is_symmetric(M)
    if bool(correct.all()):
        return (M + M.mT) / 2
    first = int((~correct).reshape(-1).nonzero()[0])
    where = label if M.ndim == 2 else f"Matrix {first} of {label}"
    M = M.reshape(-1, *M.shape[-2:])[first]
    bad = int((~M.isfinite()).sum())
    if bad:
        raise OperatorError(
            f"{where} has {bad} entries that are not finite: skip this update, and look for overflow in the "
            "statistics it was made of."
        )
    raise OperatorError(
        f"{where} must be symmetric, but max|M - M^T| = {float((M - M.T).abs().max()):.3g} at max|M| = "
        f"{float(M.abs().max()):.3g}: pass (M + M.T) / 2 if that is what you mean."
    )
