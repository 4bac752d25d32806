"""A forward pass that can be made again: with the same random numbers, in the same precision, at other parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import PackedSequence

Batch = tuple[Any, Any]


class ForwardPass:
    """One call of a model on inputs, and the surroundings it was made in.

    Args:
        model: the network.
        inputs: a tensor, a tuple of arguments or a mapping of keyword arguments.
        device: where the model lies.

    Attributes:
        differentiable_kernels: whether attention and recurrent layers use kernels whose backward pass can be
            differentiated, in place of fused ones.
    """

    def __init__(self, model: nn.Module, inputs: Any, device: torch.device) -> None:
        self._model, self._inputs, self._device = model, inputs, device
        self._random = torch.get_rng_state()
        self._random_cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._autocast = torch.is_autocast_enabled(device.type)
        self._autocast_type = torch.get_autocast_dtype(device.type)
        self.differentiable_kernels = False

    @property
    def autocast_type(self) -> torch.dtype | None:
        """The type that autocast computed in, None without autocast."""
        return self._autocast_type if self._autocast else None

    def __call__(self) -> Any:
        """Call the model at its own parameters."""
        if self._autocast:
            # autocast keeps low-precision copies of the parameters for a whole block, also of old ones
            torch.clear_autocast_cache()
        args, kwargs = _arguments(self._inputs)
        with self._kernels(), _one_function():
            return self._model(*args, **kwargs)

    def at(self, parameters: dict[str, Tensor]) -> Any:
        """Call the model at other parameters, with the same random numbers; the model itself stays as it is."""
        values = self._values_at(parameters)
        args, kwargs = _arguments(self._inputs)
        with self._same_random_numbers(), self.same_precision(), self._kernels(), _one_function():
            # Every place is named: PyTorch's own search for tied places replaces those of a module with two names for
            # good.
            return torch.func.functional_call(self._model, values, args, kwargs, tie_weights=False)

    def _values_at(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return new parameters and copies of the buffers by place, of every module once; shared ones stay shared."""
        own = dict(self._model.named_parameters())
        new = {id(own[name]): value for name, value in parameters.items()}
        values = {}
        for prefix, module in self._model.named_modules():
            for buffer in module._buffers.values():
                if buffer is not None:
                    new.setdefault(id(buffer), buffer.clone())
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if id(tensor) in new:
                    values[f"{prefix}.{key}" if prefix else key] = new[id(tensor)]
        return values

    @contextmanager
    def same_precision(self) -> Iterator[None]:
        """Switch autocast to what it was at the first call."""
        with torch.autocast(self._device.type, dtype=self._autocast_type, enabled=self._autocast):
            yield

    @contextmanager
    def _kernels(self) -> Iterator[None]:
        """Choose kernels that can be differentiated, twice if asked for, and whose dropout can be drawn again.

        cuDNN's recurrent layers have no second derivative, in evaluation mode not even a first one, and draw random
        numbers of their own between layers.
        """
        attention = sdpa_kernel(SDPBackend.MATH) if self.differentiable_kernels else nullcontext()
        recurrent = [module for module in self._model.modules() if isinstance(module, nn.RNNBase)]
        unfit = self.differentiable_kernels or any(not m.training or _draws(m) for m in recurrent)
        with attention, torch.backends.cudnn.flags(enabled=False) if recurrent and unfit else nullcontext():
            yield

    @contextmanager
    def _same_random_numbers(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=[self._device] if self._random_cuda is not None else []):
            torch.set_rng_state(self._random)
            if self._random_cuda is not None:
                torch.cuda.set_rng_state(self._random_cuda, self._device)
            yield


def _draws(module: nn.RNNBase) -> bool:
    return module.training and module.dropout > 0 and module.num_layers > 1


@contextmanager
def _one_function() -> Iterator[None]:
    """Switch off what PyTorch computes only where no gradient is asked for.

    In evaluation mode ``nn.TransformerEncoder`` then gives zeros at padded positions, and with gradients it does not.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors of inputs or targets: of a tensor, a tuple or a mapping, also within one another."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]  # its lengths are always on the CPU
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for item in items for tensor in tensors_of(item)]


def _arguments(inputs: Any) -> tuple[tuple, dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    # a packed sequence is a tuple as well
    return (inputs if isinstance(inputs, tuple) and not isinstance(inputs, PackedSequence) else (inputs,)), {}
