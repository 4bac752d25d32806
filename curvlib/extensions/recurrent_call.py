"""One call of ``nn.RNN``, ``nn.LSTM`` or ``nn.GRU``, made again as far as its record does not tell: layer by layer.

Symbols: T time steps, N sequences, L layers times directions, F features of a layer's outputs, R of one direction's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from curvlib.extensions.recurrence import Cell, Elman, GatedUnit, LongShortTerm, ReluElman, Run, Weights
from curvlib.extensions.sequences import Layout
from curvlib.extensions.uses import at_least_float32, tensors_in

CELLS: dict[str, Cell] = {
    "RNN_TANH": Elman(),
    "RNN_RELU": ReluElman(),
    "LSTM": LongShortTerm(),
    "GRU": GatedUnit(),
}
_KERNELS: dict[str, Callable[..., Any]] = {
    "RNN_TANH": torch._VF.rnn_tanh,
    "RNN_RELU": torch._VF.rnn_relu,
    "LSTM": torch._VF.lstm,
    "GRU": torch._VF.gru,
}


@dataclass(frozen=True, eq=False)
class Written:
    """A tensor that a module made: of no use once it has been modified in place."""

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> Written:
        """Note the tensor as it is now."""
        return cls(tensor.detach(), tensor._version)

    def unchanged(self) -> Tensor | None:
        """Return the tensor, or None if it has been modified."""
        return self.tensor if self.tensor._version == self.version else None


@dataclass(frozen=True, eq=False, kw_only=True)
class RecurrentCall:
    """What went through the layers of a module, time first and in float32 at least.

    Attributes:
        module: the module.
        layout: how its tensors lie.
        h_first: initial states.
        c_first: initial cell states of an LSTM.
        inputs: of every layer.
        outputs: of every layer, the directions side by side.
        masks: what dropout multiplied the outputs of the layers but the last with; empty without dropout.
    """

    module: Any
    layout: Layout
    h_first: Float[Tensor, "L N R"]
    c_first: Float[Tensor, "L N H"] | None
    inputs: tuple[Float[Tensor, "T N F"], ...]
    outputs: tuple[Float[Tensor, "T N F"], ...]
    masks: tuple[Float[Tensor, "T N F"], ...]

    @classmethod
    def of(cls, module: Any, sequences: Any, states: Any, written: Written, random: Tensor | None) -> RecurrentCall:
        """Return the call from its arguments, its output and the state of the random numbers before it.

        Raises:
            RuntimeError: dropout could not be drawn again as it was.
        """
        layout = Layout.of(sequences, module.batch_first)
        steps = layout.time_first(sequences if isinstance(sequences, Tensor) else sequences.data)
        h_first, c_first = _initial_states(module, states, steps)
        inputs, outputs, masks = [steps], [], []
        known = None if (tensor := written.unchanged()) is None else layout.time_first(tensor)
        with _random_numbers(random, steps.device):
            for layer in range(module.num_layers):
                last = layer == module.num_layers - 1
                if last and known is not None and random is None:
                    outputs.append(known)
                    break
                outputs.append(_run(module, layout, layer, inputs[-1], h_first, c_first))
                if not last:
                    if random is not None:
                        masks.append(_draw_mask(module.dropout, layout, outputs[-1]))
                    inputs.append(outputs[-1] * masks[-1] if masks else outputs[-1])
        if random is not None and known is not None:
            _check_drawn_again(module, outputs[-1], known)
        return cls(
            module=module,
            layout=layout,
            h_first=h_first,
            c_first=c_first,
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            masks=tuple(masks),
        )

    def zeros(self) -> Float[Tensor, "T N F"]:
        """Return zeros like the outputs of the last layer."""
        return torch.zeros_like(self.outputs[-1])

    def run(self, layer: int, direction: int, to_output: Tensor, to_h: Tensor | None, to_c: Tensor | None) -> Run:
        """Return what went through one layer in one direction, in its own order of time.

        Args:
            layer: its number.
            direction: 0, or 1 for the reverse one.
            to_output: (T, N, R) gradient of its outputs.
            to_h: (L, N, R) gradient of h_n, or None.
            to_c: (L, N, H) gradient of c_n, or None.
        """
        row = layer * directions(self.module) + direction
        x, h = self.inputs[layer], self.outputs[layer].chunk(directions(self.module), dim=2)[direction]
        if direction:
            x, h, to_output = (self.layout.reversed(tensor) for tensor in (x, h, to_output))
        if to_h is not None:
            to_output = to_output + self.layout.at_last(at_least_float32(to_h[row].detach()))
        return Run(
            x=x,
            h=h,
            h_before=torch.cat([self.h_first[row].unsqueeze(0), h[:-1]]),
            c_first=None if self.c_first is None else self.c_first[row],
            h_gradient=to_output,
            c_gradient=None if to_c is None else self.layout.at_last(at_least_float32(to_c[row].detach())),
        )

    def through_dropout(self, layer: int, gradient: Float[Tensor, "T N F"]) -> Float[Tensor, "T N F"]:
        """Return the gradient of a layer's outputs from that of the next one's inputs."""
        return gradient * self.masks[layer] if self.masks and layer >= 0 else gradient


def directions(module: Any) -> int:
    """Return 1, or 2 for a bidirectional module."""
    return 2 if module.bidirectional else 1


def draws(module: Any) -> bool:
    """Return whether a call in the present mode draws random numbers."""
    return bool(module.training and module.dropout > 0 and module.num_layers > 1)


def suffix(layer: int, direction: int) -> str:
    """Return the end of the names of a layer's parameters."""
    return f"_l{layer}{'_reverse' if direction else ''}"


def weights_of(module: Any, layer: int | None, direction: int, dtype: torch.dtype) -> Weights:
    """Return the parameters of one layer and direction, or of a cell (layer None)."""
    end = "" if layer is None else suffix(layer, direction)

    def get(name: str) -> Any:
        parameter = getattr(module, name + end, None)
        return None if parameter is None else parameter.detach().to(dtype)

    return Weights(
        input=get("weight_ih"),
        hidden=get("weight_hh"),
        input_bias=get("bias_ih"),
        hidden_bias=get("bias_hh"),
        projection=get("weight_hr"),
    )


def _initial_states(module: Any, states: Any, steps: Tensor) -> tuple[Tensor, Tensor | None]:
    rows, N = module.num_layers * directions(module), steps.shape[1]
    given = [tensor.detach().to(steps.dtype) for tensor in tensors_in(states)]
    h = given[0] if given else steps.new_zeros(rows, N, module.proj_size or module.hidden_size)
    if module.mode != "LSTM":
        return h, None
    return h, given[1] if given else steps.new_zeros(rows, N, module.hidden_size)


def _run(
    module: Any, layout: Layout, layer: int, steps: Tensor, h_first: Tensor, c_first: Tensor | None
) -> Float[Tensor, "T N F"]:
    """Run one layer in all directions by PyTorch's own kernel."""
    rows = slice(layer * directions(module), (layer + 1) * directions(module))
    parts = (weights_of(module, layer, direction, steps.dtype) for direction in range(directions(module)))
    flat = [
        tensor
        for part in parts
        for tensor in (part.input, part.hidden, part.input_bias, part.hidden_bias, part.projection)
        if tensor is not None
    ]
    h, *c = (layout.sorted(state[rows]).contiguous() for state in (h_first, c_first) if state is not None)
    state = (h, *c) if c else h
    options = (flat, module.bias, 1, 0.0, False, module.bidirectional)
    kernel = _KERNELS[module.mode]
    if layout.packed is None:
        return kernel(steps.contiguous(), state, *options, False)[0]
    data = layout.in_packed_order(steps)
    return layout.time_first(kernel(data, layout.packed.batch_sizes, state, *options)[0])


def _draw_mask(dropout: float, layout: Layout, output: Float[Tensor, "T N F"]) -> Float[Tensor, "T N F"]:
    """Draw as the kernel does: for the tensor that goes from layer to layer."""
    if layout.packed is None:
        return functional.dropout(torch.ones_like(output, memory_format=torch.contiguous_format), dropout)
    ones = output.new_ones(len(layout.packed.data), output.shape[2])
    return layout.time_first(functional.dropout(ones, dropout))


def _check_drawn_again(module: Any, output: Tensor, known: Tensor) -> None:
    # another draw differs by far more than the rounding of any precision
    if float((output - known).abs().max()) > 0.05 * float(known.abs().max()):
        raise RuntimeError(
            f"{type(module).__name__} with dropout={module.dropout} drew random numbers that could not be drawn again, "
            "so its statistics would be wrong. Use dropout=0 there, model.eval(), or one nn.Dropout between layers "
            "that are modules of their own."
        )


@contextmanager
def _random_numbers(state: Tensor | None, device: torch.device) -> Iterator[None]:
    if state is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
        yield
