"""Models with recurrent layers, padded data for them, and the blocks of their layers."""

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class Labelled(nn.Module):
    """Logits (N, C, T) of every step of a layer's outputs (N, T, F)."""

    def __init__(self, layer, classes, features=3):
        super().__init__()
        self.layer, self.readout = layer, nn.Linear(features, classes)

    def forward(self, x):
        return self.readout(self.layer(x)[0]).transpose(1, 2)


class Unpacked(nn.Module):
    """A recurrent layer on packed sequences, where ``lengths`` are set, and its outputs with the examples first."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.lengths = layer, None

    def forward(self, x):
        if self.lengths is None:
            out, state = self.layer(x.transpose(0, 1))
            return out.transpose(0, 1), state
        packed = pack_padded_sequence(x, self.lengths, batch_first=True, enforce_sorted=False)
        out, state = self.layer(packed)
        return pad_packed_sequence(out, batch_first=True)[0], state


def data(lengths, features=2, classes=3, seed=0):
    """Padded inputs, whose padding is large, and labels that are ignored there."""
    generator = torch.Generator().manual_seed(seed)
    N, T = len(lengths), max(lengths)
    x = torch.randn(N, T, features, generator=generator, dtype=torch.float64)
    y = torch.randint(classes, (N, T), generator=generator)
    padded = torch.arange(T) >= torch.tensor(lengths).unsqueeze(1)
    return x.masked_fill(padded.unsqueeze(2), 7.0), y.masked_fill(padded, -100)


def blocks(objective, batches, approximation):
    """The dense block of each layer over all batches."""
    C = approximation.estimate_over(objective, batches, progress=False)
    return {layer.name: C.to_dense()[layer.coordinates][:, layer.coordinates] for layer in objective.plan.layers}
