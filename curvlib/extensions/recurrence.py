"""What the cells of recurrent layers compute, and the gradients of their pre-activations, for all time steps at once.

Symbols: T steps in the order of processing, N sequences, I inputs, H units, R = H outputs of a cell (or the projection
of an LSTM), K gates; x (T, N, I), h (T, N, R), c (T, N, H). A cell applies one affine map to x_t and one to h_{t-1}.

All that has no step waiting for another is computed for all steps together: the gates from the outputs, which the
layer's own kernel has computed, and the derivatives. What is left for the steps one after another is a product with
the recurrent weight and a few elementwise operations, without autograd's records.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, eq=False, kw_only=True)
class Weights:
    """The parameters of one layer and direction, detached; ``projection`` and the biases may be missing."""

    input: Float[Tensor, "KH I"]
    hidden: Float[Tensor, "KH R"]
    input_bias: Float[Tensor, " KH"] | None = None
    hidden_bias: Float[Tensor, " KH"] | None = None
    projection: Float[Tensor, "R H"] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Run:
    """What went through one layer in one direction, and the gradients that reach it from outside.

    Attributes:
        x: inputs.
        h: outputs.
        h_before: outputs of the step before, the initial state first.
        c_first: an LSTM's initial cell state.
        h_gradient: gradients of the outputs.
        c_gradient: gradients of the cell states, or None for zeros.
        c_gradient_is_total: whether they hold what reaches the cell states through the outputs of the same step.
    """

    x: Float[Tensor, "T N I"]
    h: Float[Tensor, "T N R"]
    h_before: Float[Tensor, "T N R"]
    c_first: Float[Tensor, "N H"] | None
    h_gradient: Float[Tensor, "T N R"]
    c_gradient: Float[Tensor, "T N H"] | None = None
    c_gradient_is_total: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class PreActivationGradients:
    """Gradients of the outputs of the affine maps.

    Attributes:
        input: of W_ih x_t + b_ih.
        hidden: of W_hh h_{t-1} + b_hh; the same tensor where only the sum of the two counts.
        projected: what an LSTM's projection is applied to, or None.
        projection: gradients of its outputs, or None.
    """

    input: Float[Tensor, "T N KH"]
    hidden: Float[Tensor, "T N KH"]
    projected: Float[Tensor, "T N H"] | None = None
    projection: Float[Tensor, "T N R"] | None = None


class Cell(ABC):
    """One kind of cell.

    Attributes:
        gates: K.
    """

    gates: ClassVar[int]

    @abstractmethod
    def gradients(self, weights: Weights, run: Run) -> PreActivationGradients:
        """Return the gradients of all pre-activations, by one sweep from the last step to the first."""


@dataclass(frozen=True)
class Elman(Cell):
    """h_t = phi(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), phi = tanh."""

    gates: ClassVar[int] = 1

    def slope(self, h: Float[Tensor, "T N R"]) -> Float[Tensor, "T N R"]:
        """Return phi' from phi."""
        return 1 - h.square()

    def gradients(self, weights: Weights, run: Run) -> PreActivationGradients:
        """Return delta_t = phi'_t (dh_t + W_hh^T delta_{t+1})."""
        slope = self.slope(run.h)
        g, total = torch.empty_like(slope), torch.empty_like(slope[0])
        for t in reversed(range(len(g))):
            _total(run.h_gradient[t], g, t, weights.hidden, total)
            torch.mul(total, slope[t], out=g[t])
        return PreActivationGradients(input=g, hidden=g)


@dataclass(frozen=True)
class ReluElman(Elman):
    """The same with phi = max(0, .)."""

    def slope(self, h: Float[Tensor, "T N R"]) -> Float[Tensor, "T N R"]:
        """Return 1 where the unit is active."""
        return (h > 0).to(h.dtype)


@dataclass(frozen=True)
class LongShortTerm(Cell):
    """i, f, o = sigmoid(.), u = tanh(.), c_t = f c_{t-1} + i u, m_t = o tanh(c_t); h_t = m_t or W_hr m_t.

    PyTorch's order of gates is i, f, u, o.
    """

    gates: ClassVar[int] = 4

    def gradients(self, weights: Weights, run: Run) -> PreActivationGradients:
        """Return the gradients of the sum of both maps, and those of the projection."""
        i, f, u, o = _gates(weights, run)
        assert run.c_first is not None
        c = _cell_states(f, i * u, run.c_first)
        squashed = c.tanh()
        # d gate / d pre-activation, with what multiplies the gate
        slope = torch.stack(
            [
                u.mul(i).mul_(1 - i),
                torch.cat([run.c_first.unsqueeze(0), c[:-1]]).mul_(f).mul_(1 - f),
                i * (1 - u.square()),
                squashed.mul(o).mul_(1 - o),
            ],
            dim=2,
        )
        to_cell = o * (1 - squashed.square())
        g = torch.empty_like(slope)  # (T, N, K, H)
        hidden = g.flatten(2)
        totals = torch.empty_like(run.h_gradient)
        d_c = torch.zeros_like(run.c_first)
        for t in reversed(range(len(g))):
            _total(run.h_gradient[t], hidden, t, weights.hidden, totals[t])
            d_m = totals[t] if weights.projection is None else totals[t] @ weights.projection
            if run.c_gradient is not None:
                d_c.add_(run.c_gradient[t])
            if not run.c_gradient_is_total:
                d_c.addcmul_(d_m, to_cell[t])
            torch.mul(d_c.unsqueeze(1), slope[t, :, :3], out=g[t, :, :3])
            torch.mul(d_m, slope[t, :, 3], out=g[t, :, 3])
            d_c.mul_(f[t])
        if weights.projection is None:
            return PreActivationGradients(input=hidden, hidden=hidden)
        return PreActivationGradients(input=hidden, hidden=hidden, projected=o * squashed, projection=totals)


@dataclass(frozen=True)
class GatedUnit(Cell):
    """r, z = sigmoid(.), n = tanh(x part + r * h part), h_t = (1 - z) n + z h_{t-1}.

    The new gate n adds its two affine maps with different weights, so that their gradients differ.
    """

    gates: ClassVar[int] = 3

    def gradients(self, weights: Weights, run: Run) -> PreActivationGradients:
        """Return the gradients of both maps."""
        from_x = functional.linear(run.x, weights.input, weights.input_bias).unflatten(-1, (3, -1))
        from_h = functional.linear(run.h_before, weights.hidden, weights.hidden_bias).unflatten(-1, (3, -1))
        r, z = (from_x[:, :, :2] + from_h[:, :, :2]).sigmoid_().unbind(2)
        n = torch.tanh(from_x[:, :, 2] + r * from_h[:, :, 2])
        to_new = (1 - z).mul_(1 - n.square())
        slope = torch.stack(
            [
                (to_new * from_h[:, :, 2]).mul_(r).mul_(1 - r),
                (run.h_before - n).mul_(z).mul_(1 - z),
                to_new * r,
            ],
            dim=2,
        )
        g = torch.empty_like(slope)
        hidden = g.flatten(2)
        totals = torch.empty_like(run.h_gradient)
        through = torch.zeros_like(run.h_gradient[0])  # along h_{t-1}, past the gates
        for t in reversed(range(len(g))):
            torch.add(run.h_gradient[t], through, out=totals[t])
            if t + 1 < len(g):
                totals[t].addmm_(hidden[t + 1], weights.hidden)
            torch.mul(totals[t].unsqueeze(1), slope[t], out=g[t])
            torch.mul(totals[t], z[t], out=through)
        inputs = torch.cat([g[:, :, :2], (totals * to_new).unsqueeze(2)], dim=2)
        return PreActivationGradients(input=inputs.flatten(2), hidden=hidden)


def _total(outside: Tensor, g: Tensor, t: int, W: Tensor, out: Tensor) -> None:
    """Write dh_t + W_hh^T g_{t+1} into ``out``."""
    if t + 1 < len(g):
        torch.addmm(outside, g[t + 1], W, out=out)
    else:
        out.copy_(outside)


def _gates(weights: Weights, run: Run) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return i, f, u, o, (T, N, H) each."""
    z = functional.linear(run.x, weights.input, weights.input_bias)
    bias = weights.hidden_bias if weights.hidden_bias is not None else z.new_zeros(())
    z.add_(bias).flatten(0, 1).addmm_(run.h_before.flatten(0, 1), weights.hidden.T)
    i, f, u, o = z.chunk(4, dim=-1)
    return i.sigmoid(), f.sigmoid(), u.tanh(), o.sigmoid()


def _cell_states(f: Tensor, new: Tensor, c_first: Tensor) -> Float[Tensor, "T N H"]:
    c, before = torch.empty_like(new), c_first
    for t in range(len(new)):
        torch.addcmul(new[t], f[t], before, out=c[t])
        before = c[t]
    return c
