"""Random test vectors, and the checks that all estimators share.

Symbols: D the dimension, K the number of test vectors, z (D,) one of them, with E[z z^T] = I.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.operators import LinearOperator


class ProbeDistribution(ABC):
    """A distribution of random vectors z with E[z z^T] = I."""

    @abstractmethod
    def draw(
        self, size: int, count: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
    ) -> Float[Tensor, "D K"]:
        """Return K independent vectors."""


@dataclass(frozen=True)
class Rademacher(ProbeDistribution):
    """Independent signs. z^T C z has the variance 2 (|C|_F^2 - sum_i C_ii^2), the least of independent entries."""

    def draw(
        self, size: int, count: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
    ) -> Float[Tensor, "D K"]:
        """Return K independent vectors of signs."""
        signs = torch.randint(0, 2, (size, count), generator=generator, device=device, dtype=torch.int8)
        return signs.to(dtype).mul_(2.0).sub_(1.0)


@dataclass(frozen=True)
class Normal(ProbeDistribution):
    """Standard normal entries. z^T C z has the variance 2 |C|_F^2, in every basis the same."""

    def draw(
        self, size: int, count: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
    ) -> Float[Tensor, "D K"]:
        """Return K independent normal vectors."""
        return torch.randn(size, count, generator=generator, device=device, dtype=dtype)


@dataclass(frozen=True)
class Sphere(ProbeDistribution):
    """Uniform on the sphere of radius sqrt(D). z^T C z has a slightly smaller variance than with normal entries."""

    def draw(
        self, size: int, count: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
    ) -> Float[Tensor, "D K"]:
        """Return K independent vectors of length sqrt(D)."""
        z = Normal().draw(size, count, dtype, device, generator)
        return z * (size**0.5 / torch.linalg.vector_norm(z, dim=0))


def working_dtype(operator: LinearOperator) -> torch.dtype:
    """Return the type that estimators compute in: the operator's, float32 at least."""
    return torch.promote_types(operator.dtype, torch.float32)


def multiply(operator: LinearOperator, V: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
    """Return C V in V's type, whatever the operator's vectors are."""
    return (operator @ V.to(operator.dtype)).to(V.dtype)


def draw(
    distribution: ProbeDistribution, operator: LinearOperator, count: int, generator: torch.Generator | None
) -> Float[Tensor, "D K"]:
    """Return K vectors for the operator, in its working type on its device."""
    return distribution.draw(operator.size, count, working_dtype(operator), operator.device, generator)


def check_estimation(owner: str, operator: LinearOperator, generator: torch.Generator | None) -> None:
    """Check the two arguments of an estimator."""
    if not isinstance(operator, LinearOperator):
        raise TypeError(f"{owner}: operator must be a LinearOperator, got {type(operator).__name__}.")
    check_generator(generator, operator)


def check_generator(generator: torch.Generator | None, operator: LinearOperator) -> None:
    """Check that ``generator`` is None or a generator on the operator's device."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {type(generator).__name__}: for a seed use "
            "torch.Generator(C.device).manual_seed(seed)."
        )
    if generator.device.type != operator.device.type:
        raise ValueError(
            f"generator must be on the operator's device {operator.device}, got {generator.device}: make it with "
            "torch.Generator(C.device)."
        )


def check_count(owner: str, name: str, value: int, least: int) -> None:
    """Check that ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{owner}({name}=...) must be an integer >= {least}, got {value!r}.")


def check_distribution(owner: str, distribution: ProbeDistribution) -> None:
    """Check that ``distribution`` is one of test vectors."""
    if not isinstance(distribution, ProbeDistribution):
        raise TypeError(
            f"{owner}(distribution=...) must be a ProbeDistribution such as Rademacher(), got {distribution!r}."
        )
