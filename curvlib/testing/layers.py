"""Strategies: every layer that has a rule, with all of its options, and inputs for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = ("batch", "instance", "group", "layer", "rms")
PADDING_MODES = ("zeros", "circular", "reflect", "replicate")


@dataclass(frozen=True)
class LayerCase:
    """A module in float64 with inputs (N, ...): what the module is called with."""

    module: nn.Module
    inputs: Any


def seeds() -> SearchStrategy:
    """Return a strategy that seeds PyTorch's global random numbers, from which modules and inputs are made."""
    return st.integers(0, 2**16).map(torch.manual_seed)


def _numbers(draw: DrawFn, dimensions: int, low: int, high: int) -> tuple[int, ...]:
    return tuple(draw(st.integers(low, high)) for _ in range(dimensions))


@st.composite
def convolutions(draw: DrawFn, kinds: tuple[Any, ...] = CONVOLUTIONS, groups: tuple[int, ...] = (1, 2, 3)) -> LayerCase:
    """Every stride, padding (numbers and names), padding mode, dilation and number of groups."""
    draw(seeds())
    kind = draw(st.sampled_from(kinds))
    dimensions = CONVOLUTIONS.index(kind) + 1
    group = draw(st.sampled_from(groups))
    kernel, dilation = _numbers(draw, dimensions, 1, 3), _numbers(draw, dimensions, 1, 2)
    padding: Any = draw(st.sampled_from(("numbers", "same", "valid")))
    stride = (1,) * dimensions if padding == "same" else _numbers(draw, dimensions, 1, 3)
    sizes = _numbers(draw, dimensions, 3, 5 if dimensions < 3 else 4)
    if padding == "numbers":
        padding = tuple(min(size - 1, draw(st.integers(0, 2))) for size in sizes)
    extents = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    if padding != "same":
        pads = (0,) * dimensions if padding == "valid" else padding
        assume(all(size + 2 * p >= extent for size, p, extent in zip(sizes, pads, extents, strict=True)))
    else:  # reflection needs an input longer than its padding
        assume(all(extent - 1 <= size for size, extent in zip(sizes, extents, strict=True)))
    module = kind(
        group * draw(st.integers(1, 2)),
        group * draw(st.integers(1, 2)),
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=group,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(PADDING_MODES)),
    )
    return LayerCase(module.double(), torch.randn(2, module.in_channels, *sizes, dtype=torch.float64))


@st.composite
def transposed_convolutions(draw: DrawFn, kinds: tuple[Any, ...] = TRANSPOSED) -> LayerCase:
    """Every stride, padding, output padding, dilation and number of groups."""
    draw(seeds())
    kind = draw(st.sampled_from(kinds))
    dimensions = TRANSPOSED.index(kind) + 1
    group = draw(st.sampled_from((1, 2)))
    kernel, dilation, stride = (_numbers(draw, dimensions, 1, 3) for _ in range(3))
    output_padding = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    padding = _numbers(draw, dimensions, 0, 2)
    sizes = _numbers(draw, dimensions, 1, 3)
    shape = zip(sizes, stride, padding, dilation, kernel, output_padding, strict=True)
    assume(all((n - 1) * s - 2 * p + d * (k - 1) + e + 1 >= 1 for n, s, p, d, k, e in shape))
    module = kind(
        group * draw(st.integers(1, 2)),
        group * draw(st.integers(1, 2)),
        kernel,
        stride=stride,
        padding=padding,
        output_padding=output_padding,
        dilation=dilation,
        groups=group,
        bias=draw(st.booleans()),
    )
    return LayerCase(module.double(), torch.randn(2, module.in_channels, *sizes, dtype=torch.float64))


@st.composite
def norms(draw: DrawFn, names: tuple[str, ...] = NORMS, all_dimensions: tuple[int, ...] = (1, 2, 3)) -> LayerCase:
    """Every normalisation layer, batch norm in evaluation mode with statistics of its own."""
    draw(seeds())
    name, dimensions = draw(st.sampled_from(names)), draw(st.sampled_from(all_dimensions))
    sizes = _numbers(draw, dimensions, 2, 3)
    channels = draw(st.sampled_from((2, 4)))
    x = torch.randn(3, channels, *sizes, dtype=torch.float64)
    module: Any
    if name == "batch":
        module = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1](channels)
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2.0)
    elif name == "instance":
        kinds = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
        module = kinds[dimensions - 1](channels, affine=True, track_running_stats=draw(st.booleans()))
        if module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    elif name == "group":
        module = nn.GroupNorm(draw(st.sampled_from((1, 2))), channels)
    else:
        last = x.shape[-draw(st.integers(1, dimensions)) :]
        eps = draw(st.sampled_from((1e-5, 0.5)))
        module = nn.LayerNorm(last, eps, bias=draw(st.booleans())) if name == "layer" else nn.RMSNorm(last, eps)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    training = name != "batch" and draw(st.booleans())
    return LayerCase(module.double().train(training), x)


@st.composite
def embeddings(draw: DrawFn) -> LayerCase:
    """Embeddings at no, one or two dimensions of positions, with and without padding."""
    draw(seeds())
    rows = draw(st.integers(1, 4))
    module = nn.Embedding(rows, draw(st.integers(1, 3)), padding_idx=draw(st.sampled_from((None, 0))))
    shape = draw(st.sampled_from(((), (1,), (4,), (2, 2))))
    return LayerCase(module.double(), torch.randint(rows, (3, *shape)))


@st.composite
def embedding_bags(draw: DrawFn) -> LayerCase:
    """Bags by rows or by offsets, sums and means, with padding and with weights of the samples."""
    draw(seeds())
    rows, mode = draw(st.integers(2, 4)), draw(st.sampled_from(("sum", "mean")))
    last = draw(st.booleans())
    padding = draw(st.sampled_from((None, 1)))
    module = nn.EmbeddingBag(rows, 2, mode=mode, include_last_offset=last, padding_idx=padding).double()
    weighted = mode == "sum" and draw(st.booleans())
    if draw(st.booleans()):
        indices, offsets = torch.randint(rows, (3, 4)), None
    else:
        indices = torch.randint(rows, (7,))
        offsets = torch.tensor([0, 2, 2, 7] if last else [0, 2, 2])
    given = {"input": indices, "offsets": offsets}
    if weighted:
        given["per_sample_weights"] = torch.randn(indices.shape, dtype=torch.float64)
    return LayerCase(module, {name: value for name, value in given.items() if value is not None})


class Attention(nn.Module):
    """The attention's output of query, key and value, the examples first."""

    def __init__(self, attention: nn.MultiheadAttention, options: dict[str, Any]) -> None:
        super().__init__()
        self.attention, self.options = attention, options

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the output, (N, L, E)."""
        if not self.attention.batch_first:
            query, key, value = (stream.transpose(0, 1) for stream in (query, key, value))
        out = self.attention(query, key, value, **self.options)[0]
        return out if self.attention.batch_first else out.transpose(0, 1)


@st.composite
def attentions(draw: DrawFn) -> LayerCase:
    """Self- and cross-attention, joint and separate projections, masks, both orders of dimensions."""
    draw(seeds())
    heads = draw(st.integers(1, 2))
    E, L, S = 2 * heads, draw(st.integers(1, 3)), draw(st.integers(2, 3))
    separate = draw(st.booleans())
    kdim, vdim = (3, 5) if separate else (None, None)
    module = nn.MultiheadAttention(
        E,
        heads,
        bias=draw(st.booleans()),
        kdim=kdim,
        vdim=vdim,
        batch_first=draw(st.booleans()),
        add_zero_attn=draw(st.booleans()),
        add_bias_kv=draw(st.booleans()),
    ).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    for bias in (module.bias_k, module.bias_v):
        if bias is not None:
            bias.requires_grad_(False)  # they belong to no affine map
    query = torch.randn(2, L, E, dtype=torch.float64)
    self_attention = not separate and draw(st.booleans())
    key = query if self_attention else torch.randn(2, S, kdim or E, dtype=torch.float64)
    value = query if self_attention else torch.randn(2, S, vdim or E, dtype=torch.float64)
    options: dict[str, Any] = {"need_weights": draw(st.booleans())}
    if draw(st.booleans()):
        options["attn_mask"] = torch.rand(L, key.shape[1]).gt(0.7) & (torch.arange(key.shape[1]) > 0)
        if "key_padding_mask" not in options and draw(st.booleans()):
            options["attn_mask"] = torch.randn(L, key.shape[1], dtype=torch.float64)
    if draw(st.booleans()):
        options["key_padding_mask"] = torch.tensor([[False] * key.shape[1], [False] + [True] * (key.shape[1] - 1)])
        if "attn_mask" in options and options["attn_mask"].is_floating_point():
            padding = torch.zeros(2, key.shape[1], dtype=torch.float64)
            options["key_padding_mask"] = padding.masked_fill(options["key_padding_mask"], float("-inf"))
    return LayerCase(Attention(module, options), (query, key, value))


def every_layer() -> SearchStrategy[LayerCase]:
    """Return a strategy of all layers but the recurrent ones."""
    return st.one_of(convolutions(), transposed_convolutions(), norms(), embeddings(), embedding_bags(), attentions())
