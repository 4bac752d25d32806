"""Small recurrent networks in float64, and the dense Jacobian of their hidden states by brute force."""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class Recurrent(nn.Module):
    """A recurrent layer and a head that is applied at all times; outputs (N, T, C)."""

    def __init__(self, kind, batch_first=True, **options):
        super().__init__()
        self.batch_first = batch_first
        self.rnn = kind(2, 3, batch_first=batch_first, **options)
        directions = 2 if options.get("bidirectional") else 1
        self.head = nn.Linear(directions * (options.get("proj_size") or 3), 2)

    def forward(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        h = self.rnn(x)[0]
        return self.head(h if self.batch_first else h.transpose(0, 1))

    def states(self, outputs):
        return outputs[0]


class Cells(nn.Module):
    """A cell that is called at every time; its last state is changed in place where that is allowed. Outputs (N, C)."""

    def __init__(self, kind):
        super().__init__()
        self.cell, self.head = kind(2, 3), nn.Linear(3, 2)

    def forward(self, x):
        state = None
        for x_t in x.unbind(1):
            state = self.cell(x_t, state)
            h = state[0] if isinstance(state, tuple) else state
        # tanh needs its own output for its backward pass
        return self.head(h if isinstance(self.cell, nn.RNNCell) else h.mul_(0.5))

    def states(self, outputs):
        return outputs[0] if isinstance(outputs, tuple) else outputs


class Packed(Recurrent):
    """Sequences of several lengths, packed; outputs (N, T, C)."""

    def forward(self, x):
        lengths = torch.tensor([max(1, x.shape[1] - n) for n in range(len(x))])
        h, _ = self.rnn(pack_padded_sequence(x, lengths, batch_first=True))
        return self.head(pad_packed_sequence(h, batch_first=True)[0])

    def states(self, outputs):
        return outputs[0].data


NETWORKS = {
    "rnn": lambda: Recurrent(nn.RNN),
    "relu": lambda: Recurrent(nn.RNN, nonlinearity="relu"),
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "time first": lambda: Recurrent(nn.LSTM, batch_first=False),
    "two layers": lambda: Recurrent(nn.GRU, num_layers=2),
    "both directions": lambda: Recurrent(nn.RNN, bidirectional=True),
    "projection": lambda: Recurrent(nn.LSTM, proj_size=2),
    "rnn cells": lambda: Cells(nn.RNNCell),
    "lstm cells": lambda: Cells(nn.LSTMCell),
    "gru cells": lambda: Cells(nn.GRUCell),
    "packed": lambda: Packed(nn.GRU),
}


def network(name, seed=0):
    torch.manual_seed(seed)
    return NETWORKS[name]().double()


def sequences(examples=3, times=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(examples, times, 2, dtype=torch.float64, generator=generator)


def states_at(model, inputs, theta):
    """All outputs of recurrent modules at the parameters theta, as one vector."""
    parameters, start = {}, 0
    for name, parameter in model.named_parameters():
        parameters[name] = theta[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    calls = []

    def note(_module, _inputs, outputs):
        calls.append(model.states(outputs).flatten() + 0)

    handles = [
        module.register_forward_hook(note)
        for module in model.modules()
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase))
    ]
    functional_call(model, parameters, (inputs,))
    for handle in handles:
        handle.remove()
    return torch.cat(calls)


def parameter_vector(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def jacobian_of_states(model, inputs):
    """h, and J_h (number of states, D)."""
    theta = parameter_vector(model)
    return states_at(model, inputs, theta), torch.autograd.functional.jacobian(
        lambda theta: states_at(model, inputs, theta), theta
    )
