"""Small functions on tensors that the losses share: working precision, checks that name the argument, draws."""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


def working_precision(x: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """Return x in float32 at least; a wider type stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def full_scalar(outputs: Float[Tensor, "N *O"], number: float) -> Float[Tensor, ""]:
    """Return a number as a scalar of the outputs' working type, made on their device without a copy from the host."""
    return torch.full((), number, dtype=torch.promote_types(outputs.dtype, torch.float32), device=outputs.device)


def check_generator(outputs: Float[Tensor, "N *O"], generator: torch.Generator | None) -> None:
    """Raise ValueError for a source of randomness that lies on another device than the outputs."""
    if generator is not None and generator.device.type != outputs.device.type:
        raise ValueError(
            f"generator must be on {outputs.device.type}, where the outputs are, got {generator.device.type}: create "
            f"it with torch.Generator(device={outputs.device.type!r})."
        )


def check_tensor(name: str, x: object, outputs: Float[Tensor, "N *O"]) -> Tensor:
    """Return x, or raise: TypeError if it is no tensor, ValueError if it is not where the outputs are."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}: convert it with torch.as_tensor.")
    if x.device != outputs.device:
        raise ValueError(f"{name} must be on {outputs.device}, where the outputs are, got {x.device}: move it there.")
    return x


def on_host(x: Shaped[Tensor, "..."]) -> bool:
    """Return whether reading numbers of x is free of a device synchronisation."""
    return x.device.type == "cpu"


def broadcasts_to(x: Shaped[Tensor, "..."], outputs: Float[Tensor, "N *O"]) -> bool:
    """Return whether x broadcasts to the outputs' shape without making it larger."""
    trailing = outputs.shape[max(outputs.ndim - x.ndim, 0) :]
    return x.ndim <= outputs.ndim and all(a in (1, b) for a, b in zip(x.shape, trailing, strict=True))


def standard_normal(z: Float[Tensor, "N *O"], generator: torch.Generator | None) -> Float[Tensor, "N *O"]:
    """Return independent draws of N(0, 1), like z."""
    return torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
