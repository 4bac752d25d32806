"""ParameterLayout: the only place that knows both named parameter tensors and flat vectors.

Symbols: D number of trainable parameters. The flat vector lists the parameters that require a gradient in the order of
``model.named_parameters()``, each flattened row by row, a shared parameter once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter


@dataclass(frozen=True, eq=False)
class ParameterLayout:
    """Where each named parameter lies in the flat vector of length D.

    Attributes:
        names: names of the trainable parameters, in order.
        shapes: their shapes.
        dtypes: their types.
        dtype: type of flat vectors: the parameters' common type, float32 at least.
        device: device of flat vectors.

    Example:
        >>> layout = ParameterLayout.of(nn.Linear(2, 3))
        >>> layout.size, layout.names
        (9, ('weight', 'bias'))
        >>> layout.coordinates("bias")
        tensor([6, 7, 8])
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, model: nn.Module) -> ParameterLayout:
        """Return the layout of the parameters of ``model`` that require a gradient.

        Raises:
            ValueError: there is none, or they lie on different devices, or one is not a real floating-point tensor.
        """
        named = trainable_parameters(model)
        if not named:
            raise ValueError(
                f"{type(model).__name__} has no parameter that requires a gradient: there is nothing to optimise. "
                "Add parameters or call requires_grad_(True) on those to train."
            )
        for name, parameter in named.items():
            if isinstance(parameter, UninitializedParameter):
                raise ValueError(
                    f"parameter {name!r} is not initialised yet (a lazy module): call the model once first."
                )
            if not parameter.is_floating_point():
                raise ValueError(f"parameter {name!r} has dtype {parameter.dtype}; curvlib needs real floating point.")
        devices = {parameter.device for parameter in named.values()}
        if len(devices) > 1:
            raise ValueError(f"all parameters must lie on one device, got {sorted(map(str, devices))}: move the model.")
        dtype = torch.float32  # curvature statistics and solves need float32 at least
        for parameter in named.values():
            dtype = torch.promote_types(dtype, parameter.dtype)
        return cls(
            names=tuple(named),
            shapes=tuple(parameter.shape for parameter in named.values()),
            dtypes=tuple(parameter.dtype for parameter in named.values()),
            dtype=dtype,
            device=devices.pop(),
        )

    @cached_property
    def numels(self) -> tuple[int, ...]:
        """Number of entries of each parameter."""
        return tuple(prod(shape) for shape in self.shapes)

    @property
    def size(self) -> int:
        """D."""
        return sum(self.numels)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """The range of each parameter in the flat vector."""
        ranges, start = {}, 0
        for name, numel in zip(self.names, self.numels, strict=True):
            ranges[name] = slice(start, start + numel)
            start += numel
        return ranges

    def coordinates(self, name: str) -> Int[Tensor, " n"]:
        """Return the positions of a parameter's entries in the flat vector, row by row."""
        if name not in self.slices:
            raise KeyError(f"no trainable parameter {name!r}; known: {', '.join(self.names)}.")
        place = self.slices[name]
        return torch.arange(place.start, place.stop, device=self.device)

    def flatten(self, tensors: Sequence[Tensor | None] | Mapping[str, Tensor | None]) -> Float[Tensor, " D"]:
        """Return one vector (D,) from one tensor a parameter; None counts as zeros.

        Args:
            tensors: tensors of the parameters' shapes, in order or by name.

        Raises:
            ValueError: a tensor is missing, unknown or has the wrong shape.
        """
        if isinstance(tensors, Mapping):
            if set(tensors) != set(self.names):
                wrong = sorted(set(tensors) ^ set(self.names))
                raise ValueError(
                    f"flatten needs one tensor for each parameter; missing or unknown: {', '.join(wrong)}."
                )
            tensors = [tensors[name] for name in self.names]
        if len(tensors) != len(self.names):
            raise ValueError(f"flatten needs {len(self.names)} tensors, one for each parameter, got {len(tensors)}.")
        for name, shape, tensor in zip(self.names, self.shapes, tensors, strict=True):
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"tensor for {name!r} must have shape {tuple(shape)}, got {tuple(tensor.shape)}.")
        return self.join(tensors)

    def join(self, tensors: Sequence[Tensor | None]) -> Float[Tensor, " D"]:
        """Return :meth:`flatten` of tensors that are known to fit, such as gradients, without its checks."""
        pieces = [
            torch.zeros(numel, dtype=self.dtype, device=self.device)
            if tensor is None
            else (tensor.to_dense() if tensor.is_sparse else tensor).reshape(-1)
            for tensor, numel in zip(tensors, self.numels, strict=True)
        ]
        joined = torch.cat(pieces)
        # cat promotes mixed types; a single low-precision type still has to be lifted to float32
        return joined if joined.dtype == self.dtype else joined.to(self.dtype)

    def unflatten(self, vector: Float[Tensor, " D"]) -> tuple[Tensor, ...]:
        """Return the parts of a vector (D,) in the parameters' shapes and types (views where the type allows).

        Raises:
            ValueError: the vector does not have shape (D,).
        """
        self.check(vector)
        parts = vector.split(self.numels)
        return tuple(
            part.view(shape) if part.dtype == dtype else part.view(shape).to(dtype)
            for part, shape, dtype in zip(parts, self.shapes, self.dtypes, strict=True)
        )

    def to_dict(self, vector: Float[Tensor, " D"]) -> dict[str, Tensor]:
        """Return the parts of a vector (D,) by parameter name."""
        return dict(zip(self.names, self.unflatten(vector), strict=True))

    def check(self, vector: Float[Tensor, " D"]) -> None:
        """Raise ValueError unless the vector has shape (D,)."""
        if vector.ndim != 1 or vector.shape[0] != self.size:
            raise ValueError(f"expected a vector of shape ({self.size},), got {tuple(vector.shape)}.")

    def write(self, parameters: Iterable[nn.Parameter], vector: Float[Tensor, " D"]) -> None:
        """Copy a vector (D,) into the parameters, in place."""
        with torch.no_grad():
            for parameter, part in zip(parameters, self.unflatten(vector), strict=True):
                parameter.copy_(part)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient by name, in order; a shared one once, under its first name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
