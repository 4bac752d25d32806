"""Strategies: recurrent layers and cells with all of their options, and what a model reads of them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from curvlib.testing.layers import LayerCase, seeds

KINDS = ("tanh", "relu", "lstm", "gru")


class Recurrent(nn.Module):
    """What a model may read of a recurrent layer: its outputs, h_n, c_n, or several of them.

    The input has the examples first. ``lengths`` packs the sequences. Initial states, if there are any, are an affine
    map of ``context``, so that gradients pass through them. Dropout is the same at each call.
    """

    def __init__(self, layer: nn.RNNBase, reads: list[str], context: int = 0) -> None:
        super().__init__()
        self.layer, self.reads = layer, reads
        directions = 2 if layer.bidirectional else 1
        self.shapes = [(directions * layer.num_layers, layer.proj_size or layer.hidden_size)]
        if layer.mode == "LSTM":
            self.shapes.append((directions * layer.num_layers, layer.hidden_size))
        sizes = [rows * width for rows, width in self.shapes]
        self.initial = nn.ModuleList([nn.Linear(context, size) for size in sizes] if context else [])
        self.lengths: Tensor | None = None
        self.sorted = False

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return what is read, one after another, (N, features)."""
        states = [
            made(context).unflatten(1, shape).transpose(0, 1).contiguous()
            for made, shape in zip(self.initial, self.shapes, strict=False)
        ]
        hx = tuple(states) if len(states) > 1 else states[0] if states else None
        given: Any = x if self.layer.batch_first else x.transpose(0, 1)
        if self.lengths is not None:
            given = pack_padded_sequence(
                given, self.lengths, batch_first=self.layer.batch_first, enforce_sorted=self.sorted
            )
        with torch.random.fork_rng():
            torch.manual_seed(3)
            out, last = self.layer(given, hx)
        if self.lengths is not None:
            out, _ = pad_packed_sequence(out, batch_first=self.layer.batch_first)
        out = out if self.layer.batch_first else out.transpose(0, 1)
        last = last if isinstance(last, tuple) else (last,)
        parts = {"output": out, "h": last[0].transpose(0, 1), "c": last[-1].transpose(0, 1)}
        return torch.cat([parts[name].flatten(1) for name in self.reads], dim=1)


def build(kind: str, sizes: tuple[int, int], **options: Any) -> nn.RNNBase:
    """Return the recurrent layer of a kind."""
    if kind in ("tanh", "relu"):
        return nn.RNN(*sizes, nonlinearity=kind, **options)
    return {"lstm": nn.LSTM, "gru": nn.GRU}[kind](*sizes, **options)


@st.composite
def recurrent_layers(draw: DrawFn, kinds: tuple[str, ...] = KINDS) -> LayerCase:
    """Layers, directions, biases, projections, initial states, dropout, packed sequences, and what is read."""
    draw(seeds())
    kind = draw(st.sampled_from(kinds))
    features, H = draw(st.integers(1, 3)), draw(st.integers(2, 3))
    layers = draw(st.integers(1, 3))
    projection = draw(st.sampled_from((0, 1))) if kind == "lstm" else 0
    layer = build(
        kind,
        (features, H),
        num_layers=layers,
        bias=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        dropout=draw(st.sampled_from((0.0, 0.4))) if layers > 1 else 0.0,
        bidirectional=draw(st.booleans()),
        **({"proj_size": projection} if projection else {}),
    )
    for parameter in layer.parameters():  # recurrences neither vanish nor explode
        nn.init.normal_(parameter, std=0.7)
    readable = ("output", "h", "c") if kind == "lstm" else ("output", "h")
    reads = draw(st.lists(st.sampled_from(readable), min_size=1, unique=True))
    context = draw(st.sampled_from((0, 2)))
    model = Recurrent(layer, sorted(reads), context).double().train(draw(st.booleans()))
    N, T = draw(st.integers(2, 3)), draw(st.integers(1, 4))
    x = torch.randn(N, T, features, dtype=torch.float64)
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(1, T), min_size=N - 1, max_size=N - 1))
        model.sorted = draw(st.booleans())
        order = draw(st.permutations([T, *lengths]))
        model.lengths = torch.tensor(sorted(order, reverse=True) if model.sorted else order)
    return LayerCase(model, (x, torch.randn(N, context, dtype=torch.float64)) if context else x)


class Unrolled(nn.Module):
    """A cell called in a loop, the way that networks are unrolled by hand; reads every h, or the last h and c."""

    def __init__(self, cell: nn.RNNCellBase, read_all: bool, given: bool) -> None:
        super().__init__()
        self.cell, self.read_all, self.given = cell, read_all, given

    def forward(self, x: Tensor) -> Tensor:
        """Return what is read, one after another, (N, features)."""
        state: Any = None
        outputs: list[Tensor] = []
        if self.given:
            start = x[:, 0, :1].expand(-1, self.cell.hidden_size)
            state = (start, start.sin()) if isinstance(self.cell, nn.LSTMCell) else start
        for step in x.unbind(1):
            state = self.cell(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        if self.read_all:
            return torch.cat(outputs, dim=1)
        return torch.cat(state, dim=1) if isinstance(state, tuple) else state


@st.composite
def recurrent_cells(draw: DrawFn, kinds: tuple[str, ...] = KINDS) -> LayerCase:
    """Every cell, unrolled, with and without biases and an initial state."""
    draw(seeds())
    kind = draw(st.sampled_from(kinds))
    features, H, bias = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.booleans())
    if kind in ("tanh", "relu"):
        cell: nn.RNNCellBase = nn.RNNCell(features, H, bias=bias, nonlinearity=kind)
    else:
        cell = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}[kind](features, H, bias=bias)
    model = Unrolled(cell.double(), draw(st.booleans()), draw(st.booleans()))
    return LayerCase(model, torch.randn(2, draw(st.integers(1, 3)), features, dtype=torch.float64))
