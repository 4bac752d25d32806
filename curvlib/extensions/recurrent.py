"""The layer rules of ``nn.RNN``, ``nn.LSTM`` and ``nn.GRU``: each weight of each layer and direction is an affine map.

Symbols: T time steps, N sequences, L layers times directions, R outputs of a cell, H units. The module's own kernel
runs the forward and the backward pass. From its outputs, and the gradients that reach them, h_n and c_n, the rule makes
the gradients of all pre-activations (see :mod:`.recurrence`).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from curvlib.extensions.recurrence import Cell, PreActivationGradients, Run
from curvlib.extensions.recurrent_call import CELLS, RecurrentCall, Written, directions, draws, suffix, weights_of
from curvlib.extensions.rule import LayerRule, Part, register
from curvlib.extensions.uses import Gradients, PositionUse, Use, at_least_float32, tensors_in


class RecurrentRule(LayerRule):
    """``nn.RNN``, ``nn.LSTM`` (also with ``proj_size``) and ``nn.GRU``, every option.

    W_ih, W_hh, and an LSTM's W_hr, of each layer and direction is an affine map of its own, with the bias of the same
    name. Steps that a ``PackedSequence`` does not have are no positions.

    Dropout between the layers is drawn again with the random numbers of the call; a kernel that drew them otherwise is
    noticed and refused.
    """

    ordered: ClassVar[bool] = True
    recurrent: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__(("weight_ih_l0",))

    def parts(self, module: Any) -> tuple[Part, ...]:
        """Return the maps of the inputs, of the hidden state and of the projection, layer by layer."""
        kinds = ("ih", "hh", "hr") if module.proj_size else ("ih", "hh")
        return tuple(
            Part(
                name=f"{kind}{suffix(layer, direction)}",
                weight=f"weight_{kind}{suffix(layer, direction)}",
                bias=f"bias_{kind}{suffix(layer, direction)}" if module.bias and kind != "hr" else None,
            )
            for layer in range(module.num_layers)
            for direction in range(directions(module))
            for kind in kinds
        )

    def call_begins(self, module: Any) -> Any:
        """Return the state of the random numbers, where the call draws any."""
        if not draws(module):
            return None
        device = module.weight_hh_l0.device
        return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()

    def call_record(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, begun: Any
    ) -> tuple[Any, ...]:
        """Return inputs, initial states, outputs and the state of the random numbers."""
        given = {**dict(zip(("input", "hx"), args, strict=False)), **kwargs}
        return given["input"], given.get("hx"), Written.of(_data(output[0])), lambda: begun

    def call_outputs(self, output: Any) -> tuple[Tensor, ...]:
        """Return the outputs, h_n and an LSTM's c_n."""
        return (_data(output[0]), *tensors_in(output[1]))

    def examples(self, module: Any, outputs: tuple[Tensor, ...]) -> int:
        """Return N, as h_n (L, N, R) has it; 0 for a single sequence without its dimension."""
        return outputs[1].shape[1] if outputs[1].ndim == 3 else 0

    @torch.no_grad()
    def uses(self, module: Any, x: Any, g: Any) -> tuple[Use, ...]:
        """Return the uses of all weights."""
        sequences, states, written, random = x
        call = RecurrentCall.of(module, sequences, states, written, random())
        to_output, to_h, to_c = (*g, None)[:3]
        outside = call.zeros() if to_output is None else call.layout.time_first(to_output)
        made: dict[str, Use] = {}
        for layer in reversed(range(module.num_layers)):
            below = torch.zeros_like(call.inputs[layer])
            for direction, own in enumerate(outside.chunk(directions(module), dim=2)):
                run = call.run(layer, direction, own, to_h, to_c)
                found = CELLS[module.mode].gradients(weights_of(module, layer, direction, own.dtype), run)
                made.update(_uses(found, run, call, suffix(layer, direction)))
                to_input = found.input @ getattr(module, f"weight_ih{suffix(layer, direction)}").to(own.dtype)
                below += call.layout.reversed(to_input) if direction else to_input
            outside = call.through_dropout(layer - 1, below)
        return tuple(made[part.name] for part in self.parts(module))


class RecurrentCellRule(LayerRule):
    """``nn.RNNCell``, ``nn.LSTMCell`` and ``nn.GRUCell``: the calls in a loop over time are one position each."""

    ordered: ClassVar[bool] = True
    recurrent: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__(("weight_ih",))

    def parts(self, module: Any) -> tuple[Part, ...]:
        """Return the maps of the input and of the hidden state."""
        return tuple(
            Part(name=kind, weight=f"weight_{kind}", bias=f"bias_{kind}" if module.bias else None)
            for kind in ("ih", "hh")
        )

    def call_record(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, begun: Any
    ) -> tuple[Any, ...]:
        """Return input, states, output, and whether an LSTM's h' was computed from the c' that it gave out.

        Then the gradient at c' holds what comes through h'; a fused kernel gives out both from one node.
        """
        given = {**dict(zip(("input", "hx"), args, strict=False)), **kwargs}
        h, *c = tensors_in(output)
        return given["input"], given.get("hx"), Written.of(h), any(h.grad_fn is not state.grad_fn for state in c)

    def call_outputs(self, output: Any) -> tuple[Tensor, ...]:
        """Return h, and an LSTM's c."""
        return tuple(tensors_in(output))

    def examples(self, module: Any, outputs: tuple[Tensor, ...]) -> int:
        """Return N; 0 for a single example without its dimension."""
        return outputs[0].shape[0] if outputs[0].ndim == 2 else 0

    @torch.no_grad()
    def uses(self, module: Any, x: Any, g: Any) -> tuple[Use, ...]:
        """Return the uses of both weights."""
        inputs, states, written, total = x
        steps = at_least_float32(inputs.detach())
        zeros = steps.new_zeros(len(steps), module.hidden_size)
        h_first, c_first = ([at_least_float32(state.detach()) for state in tensors_in(states)] + [zeros, zeros])[:2]
        to_h, to_c = (*(g if isinstance(g, tuple) else (g,)), None)[:2]
        h = written.unchanged()
        if h is None:
            h = tensors_in(module(inputs.detach(), states))[0]
        run = Run(
            x=steps.unsqueeze(0),
            h=at_least_float32(h.detach()).unsqueeze(0),
            h_before=h_first.unsqueeze(0),
            c_first=c_first,
            h_gradient=(zeros if to_h is None else at_least_float32(to_h)).unsqueeze(0),
            c_gradient=None if to_c is None else at_least_float32(to_c).unsqueeze(0),
            c_gradient_is_total=total,
        )
        found = _cell_of(module).gradients(weights_of(module, None, 0, steps.dtype), run)
        return tuple(PositionUse(*pair) for pair in _pairs(found, run))


def _uses(found: PreActivationGradients, run: Run, call: RecurrentCall, name: str) -> dict[str, Use]:
    """Return the uses of the weights of one layer and direction by the names of their parts."""
    valid = call.layout.valid()
    uses: dict[str, Use] = {}
    for kind, (a, g) in zip(("ih", "hh", "hr"), _pairs(found, run), strict=False):
        uses[f"{kind}{name}"] = PositionUse(a if valid is None else a * valid.unsqueeze(2), g, valid)
    return uses


def _pairs(found: PreActivationGradients, run: Run) -> list[tuple[Tensor, Tensor | Gradients]]:
    """Return inputs and output gradients (N, T, ...) of W_ih, W_hh and W_hr."""
    of_input = Gradients(found.input.transpose(0, 1))
    # one object where both maps have the same gradients, so that their moment is made once
    of_hidden = of_input if found.hidden is found.input else Gradients(found.hidden.transpose(0, 1))
    pairs: list[tuple[Tensor, Tensor | Gradients]] = [
        (run.x.transpose(0, 1), of_input),
        (run.h_before.transpose(0, 1), of_hidden),
    ]
    if found.projected is not None and found.projection is not None:
        pairs.append((found.projected.transpose(0, 1), found.projection.transpose(0, 1)))
    return pairs


def _cell_of(module: Any) -> Cell:
    if isinstance(module, nn.RNNCell):
        return CELLS[f"RNN_{module.nonlinearity.upper()}"]
    return CELLS["LSTM" if isinstance(module, nn.LSTMCell) else "GRU"]


def _data(sequences: Any) -> Tensor:
    """Return the tensor of sequences, also of packed ones."""
    return sequences if isinstance(sequences, Tensor) else sequences.data


for _layer in (nn.RNN, nn.LSTM, nn.GRU):
    register(_layer, RecurrentRule())
for _cell in (nn.RNNCell, nn.LSTMCell, nn.GRUCell):
    register(_cell, RecurrentCellRule())
