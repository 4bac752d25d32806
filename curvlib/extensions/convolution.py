"""The layer rules of convolutions and transposed convolutions in one, two and three dimensions.

Symbols: N examples, S* the spatial dimensions (one to three), T positions = output locations, k* the kernel's sizes,
C_in and C_out channels. A convolution is the affine map y_t = W a_t + b of the patch a_t of its padded input (Grosse &
Martens 2016, sec. 2.1); a transposed one is an ordinary one of the input spread out by its stride.
"""

from __future__ import annotations

from functools import reduce
from math import prod
from operator import add
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from curvlib.extensions.patches import Window, slides, sliding_moments
from curvlib.extensions.rule import LayerRule, Part, register
from curvlib.extensions.uses import AffineUse, InputMoments, at_least_float32, chunks_of


class ConvolutionRule(LayerRule):
    """``nn.Conv1d/2d/3d`` with every stride, padding, padding mode, dilation and number of groups.

    Patches are made for as many examples at a time as hold 64 MiB in float32, and for one at least. The second moment
    of the patches of ungrouped convolutions of stride 1 is made of products of the input's rows with shifted rows,
    without all patches.
    """

    computed_by: ClassVar[tuple[str, ...]] = ("forward", "_conv_forward")

    def parts(self, module: Any) -> tuple[Part, ...]:
        """Return one map a group, of the group's own channels."""
        return (Part(groups=module.groups),)

    def inputs(self, module: Any, x: Float[Tensor, "N C_in *S"]) -> Float[Tensor, "N T C_in*k"]:
        """Return the patches."""
        _check_dimensions(module, x)
        return _window(module).patches(_padded(module, x))

    def output_gradients(self, module: Any, g: Float[Tensor, "N C_out *S"]) -> Float[Tensor, "N T C_out"]:
        """Return the gradients with the channels last."""
        _check_dimensions(module, g)
        return g.flatten(2).transpose(1, 2)

    def input_numbers(self, module: Any, x: Float[Tensor, "N C_in *S"], g: Float[Tensor, "N C_out *S"]) -> int:
        """Return T C_in k."""
        return g[0, 0].numel() * module.in_channels * prod(module.kernel_size)

    def input_moments(self, use: AffineUse, groups: int) -> InputMoments:
        """Return the sums by shifted rows where patches overlap enough, else from the patches."""
        module, window = use.module, _window(use.module)
        _check_dimensions(module, use.input)
        if groups != 1 or not slides(window):
            return super().input_moments(use, groups)
        zeros = _zero_rows(module)
        a_row = use.input[0, :, 0].numel() * (use.input.shape[2] + sum(zeros)) * prod(window.kernel[1:])
        inputs = (use.take(chunk).input.detach() for chunk in chunks_of(use.examples, a_row))
        return reduce(add, (sliding_moments(at_least_float32(_padded(module, x)), window, zeros) for x in inputs))


class TransposedConvolutionRule(LayerRule):
    """``nn.ConvTranspose1d/2d/3d`` with every stride, padding, output padding, dilation and number of groups."""

    def parts(self, module: Any) -> tuple[Part, ...]:
        """Return one map a group, of the group's own channels."""
        return (Part(groups=module.groups),)

    def weight_matrix(self, module: Any, weight: Int[Tensor, "C_in C_out *k"]) -> Int[Tensor, "C_out C_in*k"]:
        """Return the kernels turned around: output location u sees input (u + padding - dilation k) / stride."""
        grouped = weight.flatten(2).unflatten(0, (module.groups, -1))  # (groups, C_in, C_out, k), channels of a group
        return grouped.flip(-1).transpose(1, 2).flatten(2).flatten(0, 1)

    def call_input(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the input and the size of the output that was asked for."""
        x = args[0] if args else kwargs["input"]
        size = args[1] if len(args) > 1 else kwargs.get("output_size")
        if size is None:
            return x, tuple(module.output_padding)
        return x, tuple(_output_padding(module, x, size))

    def inputs(self, module: Any, x: Any) -> Float[Tensor, "N T C_in*k"]:
        """Return the patches of the spread input."""
        tensor, output_padding = x if isinstance(x, tuple) else (x, module.output_padding)
        _check_dimensions(module, tensor)
        window = Window(module.kernel_size, (1,) * len(module.stride), module.dilation)
        return window.patches(_spread(module, tensor, output_padding))

    def output_gradients(self, module: Any, g: Float[Tensor, "N C_out *S"]) -> Float[Tensor, "N T C_out"]:
        """Return the gradients with the channels last."""
        _check_dimensions(module, g)
        return g.flatten(2).transpose(1, 2)

    def input_numbers(self, module: Any, x: Any, g: Float[Tensor, "N C_out *S"]) -> int:
        """Return T C_in k."""
        return g[0, 0].numel() * module.in_channels * prod(module.kernel_size)


def _check_dimensions(module: Any, x: Tensor) -> None:
    if x.ndim != len(module.kernel_size) + 2:
        raise ValueError(
            f"{type(module).__name__} was called with an input or gave an output of shape {tuple(x.shape)}; layer "
            "statistics need the examples first: (N, channels, ...)."
        )


def _padded(module: Any, x: Float[Tensor, "N C_in *S"]) -> Float[Tensor, "N C_in *P"]:
    """Return the input with the padding that the module's forward pass gives it, whatever its mode."""
    if module.padding == "valid":
        return x
    # PyTorch keeps the padding of both ends of every dimension, last one first, also for 'same'.
    both_ends = list(module._reversed_padding_repeated_twice)
    if not any(both_ends):
        return x
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return functional.pad(x, both_ends, mode=mode)


def _zero_rows(module: Any) -> tuple[int, int]:
    """Return how many rows at both ends of the first spatial axis are padding with zeros."""
    if module.padding == "valid" or module.padding_mode != "zeros":
        return 0, 0
    low, high = module._reversed_padding_repeated_twice[-2:]
    return low, high


def _window(module: Any) -> Window:
    return Window(module.kernel_size, module.stride, module.dilation)


def _spread(module: Any, x: Float[Tensor, "N C *S"], output_padding: tuple[int, ...]) -> Float[Tensor, "N C *P"]:
    """Return the input with stride - 1 zeros between its entries, padded so that windows end where the output does."""
    spread = tuple((size - 1) * stride + 1 for size, stride in zip(x.shape[2:], module.stride, strict=True))
    result = x.new_zeros(*x.shape[:2], *spread)
    places = (slice(None, None, stride) for stride in module.stride)
    result[(slice(None), slice(None), *places)] = x
    ends: list[int] = []
    for k, d, p, extra in reversed(
        list(zip(module.kernel_size, module.dilation, module.padding, output_padding, strict=True))
    ):
        ends += [d * (k - 1) - p, d * (k - 1) - p + extra]  # negative numbers cut
    return functional.pad(result, ends)


def _output_padding(module: Any, x: Tensor, size: Any) -> list[int]:
    """Return what PyTorch adds at the ends to reach the size that the call asked for."""
    spatial = len(module.kernel_size)
    return module._output_padding(
        x, list(size), module.stride, module.padding, module.kernel_size, spatial, module.dilation
    )


for _module in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register(_module, ConvolutionRule())
for _transposed in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
    register(_transposed, TransposedConvolutionRule())
