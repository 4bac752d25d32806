"""Patches of images, and their second moment without the patches.

Symbols: N examples, C channels, P* the sizes of the padded input, k* of the kernel, d* its dilation, O* of the output;
t output locations, q positions in the kernel; the patch at t is a_t[c, q] = x[c, s t + d q] for the stride s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.extensions.uses import InputMoments, gram


@dataclass(frozen=True)
class Window:
    """The window that a convolution moves over its padded input.

    Attributes:
        kernel: k*.
        stride: s*.
        dilation: d*.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]

    def locations(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Return O* for an input of sizes P*."""
        return tuple(
            (size - d * (k - 1) - 1) // s + 1
            for size, k, s, d in zip(sizes, self.kernel, self.stride, self.dilation, strict=True)
        )

    def patches(self, x: Float[Tensor, "N C *P"]) -> Float[Tensor, "N T C*k"]:
        """Return the patches of all output locations, channel by channel, each row by row of the kernel."""
        n = len(self.kernel)
        for axis, (k, s, d) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True), start=2):
            # appends a dimension of the window's extent, of which dilation takes every d-th entry
            x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
        ordered = x.permute(0, *range(2, 2 + n), 1, *range(2 + n, 2 + 2 * n))
        return ordered.flatten(1 + n).flatten(1, n) if n else ordered.unsqueeze(1)


def slides(window: Window, sizes: tuple[int, ...]) -> bool:
    """Return whether :func:`sliding_moments` is the cheaper way: patches that overlap along the first axis."""
    k, s, d = window.kernel[0], window.stride[0], window.dilation[0]
    return s == 1 and k > 1 and window.locations(sizes)[0] >= d * (k - 1)


def sliding_moments(x: Float[Tensor, "N C *P"], window: Window) -> InputMoments:
    r"""Return sum_{n,t} a a^T and sum a for stride 1 along the first axis, from products of rows with shifted rows.

    With u_r the patches along all axes but the first, in row r of the input, the block of the kernel rows p and p' is

    .. math:: \sum_{r = d p}^{d p + O - 1} u_r^T u_{r + d (p' - p)} ,

    which depends on p by the first and last few rows alone: for each difference p' - p there is one large product over
    the rows that all p share, and a small one for every other row. For k rows that is k products of the size of
    k (k + 1) / 2.
    """
    rows = _by_row(x, window)  # (P, M, C*k of the other axes)
    k, d = window.kernel[0], window.dilation[0]
    locations = window.locations(tuple(x.shape[2:]))
    width = rows.shape[2]
    blocks = rows.new_empty(k, k, width, width)
    for difference in range(k):
        for p, block in enumerate(_shifted_products(rows, difference * d, k - difference, d, locations[0])):
            blocks[p, p + difference] = block
            if difference:
                blocks[p + difference, p] = block.T
    sums = rows.sum(1)
    totals = torch.stack([sums[d * p : d * p + locations[0]].sum(0) for p in range(k)])
    C = x.shape[1]
    outer = blocks.view(k, k, C, -1, C, width // C).permute(2, 0, 3, 4, 1, 5).reshape(1, k * width, k * width)
    total = totals.view(k, C, -1).transpose(0, 1).reshape(1, -1)
    return InputMoments(outer, total, x.shape[0] * prod(locations))


def _by_row(x: Float[Tensor, "N C *P"], window: Window) -> Float[Tensor, "P M width"]:
    """Return the patches along all axes but the first, for each row of the first: rows are contiguous."""
    inner = Window(window.kernel[1:], window.stride[1:], window.dilation[1:])
    by_row = x.movedim(2, 0)  # (P, N, C, ...)
    patches = inner.patches(by_row.flatten(0, 1))  # (P N, T of the other axes, C*k)
    return patches.reshape(by_row.shape[0], -1, patches.shape[2])


def _shifted_products(
    rows: Float[Tensor, "P M width"], shift: int, count: int, d: int, height: int
) -> Iterator[Float[Tensor, "width width"]]:
    """Yield sum_r u_r^T u_{r + shift} over the rows from d p to d p + height, for p = 0 ... count - 1."""

    def product(start: int, stop: int) -> Tensor:
        left = rows[start:stop].flatten(0, 1)
        return gram(left) if shift == 0 else left.T @ rows[start + shift : stop + shift].flatten(0, 1)

    last = d * (count - 1)
    shared = product(last, height) if last < height else torch.zeros_like(product(0, 1))
    before = [product(d * j, d * (j + 1)) for j in range(count - 1)]
    after = [product(height + d * j, height + d * (j + 1)) for j in range(count - 1)]
    for p in range(count):
        # sums alone, no differences: nothing cancels
        yield sum([*before[p:], *after[:p]], start=shared)
