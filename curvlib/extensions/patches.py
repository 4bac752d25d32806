"""Patches of images, and their second moment without the patches.

Symbols: N examples, C channels, P* the sizes of the padded input, k* of the kernel, d* its dilation, O* of the output;
t output locations, q positions in the kernel; the patch at t is a_t[c, q] = x[c, s t + d q] for the stride s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from math import prod
from operator import add

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


def slides(window: Window) -> bool:
    """Return whether :func:`sliding_moments` applies: patches that overlap along the first axis."""
    return window.stride[0] == 1 and window.kernel[0] > 1


def sliding_moments(x: Float[Tensor, "N C *P"], window: Window, zeros: tuple[int, int]) -> InputMoments:
    r"""Return sum_{n,t} a a^T and sum a for stride 1 along the first axis, from products of rows with shifted rows.

    With u_r the patches along all axes but the first, in row r of the input, the block of the kernel rows p and p' is

    .. math:: \sum_{r = d p}^{d p + O - 1} u_r^T u_{r + d (p' - p)} ,

    which depends on p by the first and last few rows alone: for each difference p' - p there is one large product over
    the rows that all p share, and a small one for every other row. For k rows that is k products in place of
    k (k + 1) / 2.

    Args:
        x: the padded input.
        window: what moves over it.
        zeros: how many rows at both ends are padding with zeros, which no product needs.
    """
    rows = _by_row(x, window)  # (P, M, width), width = C*k of the other axes
    k, d = window.kernel[0], window.dilation[0]
    C, width, locations = x.shape[1], rows.shape[2], window.locations(tuple(x.shape[2:]))
    outer = rows.new_empty(1, k * width, k * width)
    blocks = outer.view(C, k, width // C, C, k, width // C)
    products = _ShiftedProducts(rows, d, locations[0], zeros)
    for difference in range(k):
        for p, block in enumerate(products.sums(difference, k - difference)):
            entries = block.view(C, width // C, C, width // C)
            blocks[:, p, :, :, p + difference, :] = entries
            if difference:
                blocks[:, p + difference, :, :, p, :] = entries.permute(2, 3, 0, 1)
    sums = rows.sum(1)
    totals = torch.stack([sums[d * p : d * p + locations[0]].sum(0) for p in range(k)])
    total = totals.view(k, C, -1).transpose(0, 1).reshape(1, -1)
    return InputMoments(outer, total, x.shape[0] * prod(locations))


def _by_row(x: Float[Tensor, "N C *P"], window: Window) -> Float[Tensor, "P M width"]:
    """Return the patches along all axes but the first, for each row of the first: rows are contiguous."""
    inner = Window(window.kernel[1:], window.stride[1:], window.dilation[1:])
    by_row = x.movedim(2, 0)  # (P, N, C, ...)
    patches = inner.patches(by_row.flatten(0, 1))  # (P N, T of the other axes, C*k)
    return patches.reshape(by_row.shape[0], -1, patches.shape[2])


@dataclass(frozen=True, eq=False)
class _ShiftedProducts:
    """Sums of u_r^T u_{r + shift} over ranges of rows.

    Attributes:
        rows: u, by row.
        dilation: d.
        height: O, the rows of one sum.
        zeros: rows at both ends that are zero.
    """

    rows: Float[Tensor, "P M width"]
    dilation: int
    height: int
    zeros: tuple[int, int]

    def sums(self, difference: int, count: int) -> Iterator[Float[Tensor, "width width"]]:
        """Yield the sums over the rows from d p to d p + O, for the shift d * difference and p = 0 ... count - 1.

        They are put together from ranges that do not overlap, without differences, so that nothing cancels.
        """
        d, height = self.dilation, self.height
        ends = sorted({d * p for p in range(count)} | {d * p + height for p in range(count)})
        parts = {(start, stop): self._product(start, stop, d * difference) for start, stop in pairwise(ends)}
        for p in range(count):
            inside = [part for (start, stop), part in parts.items() if d * p <= start and stop <= d * p + height]
            found = [part for part in inside if part is not None]
            yield reduce(add, found) if found else self.rows.new_zeros(self.rows.shape[2], self.rows.shape[2])

    def _product(self, start: int, stop: int, shift: int) -> Float[Tensor, "width width"] | None:
        """Return the sum over a range of rows, or None where one of the two rows is always zero."""
        start, stop = max(start, self.zeros[0]), min(stop, self.rows.shape[0] - self.zeros[1] - shift)
        if start >= stop:
            return None
        left = self.rows[start:stop].flatten(0, 1)
        return gram(left) if shift == 0 else left.T @ self.rows[start + shift : stop + shift].flatten(0, 1)
