"""The CURVES images: smooth curves through three random points, generated.

Symbols: N images, P = 60 points on a curve, 28 x 28 pixels.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

SIDE = 28
_LOWEST, _HIGHEST = 5.4, 21.6
_POINTS = 60
_INK = 0.6
_BLUR = 0.15
# Images drawn at once: 60 points x 4 neighbours x 2000 images is about 10 MB of indices and weights.
_CHUNK = 2000


def generate_curves(count: int, generator: torch.Generator) -> Float[Tensor, "N 784"]:
    r"""Draw images of quadratic Bezier curves with random control points.

    p0, p1, p2 ~ U[5.4, 21.6]^2; c(t) = (1-t)^2 p0 + 2 t (1-t) p1 + t^2 p2 at 60 equally spaced t in [0, 1]; each c(t)
    drops ink 0.6, shared bilinearly by its four neighbour pixels; the image is convolved with the separable kernel
    [0.15, 1, 0.15] and clipped at 1. The intrinsic dimension is 6.

    Args:
        count: number of images N.
        generator: source of all randomness, on the CPU.

    Returns:
        Pixels in [0, 1], shape (N, 784), row after row.

    The data set was introduced by Hinton and Salakhutdinov (2006) and used by Martens (2010), whose generator is
    unpublished: this one matches the published error of an 18-component PCA (5.90 against 5.86 here), so
    reconstruction errors compare methods with each other here and not with published ones.
    """
    control = _LOWEST + (_HIGHEST - _LOWEST) * torch.rand(count, 3, 2, generator=generator)
    return torch.cat([torch.empty(0, SIDE * SIDE), *(_draw(points) for points in control.split(_CHUNK) if len(points))])


def _draw(control: Float[Tensor, "N 3 2"]) -> Float[Tensor, "N 784"]:
    t = torch.linspace(0, 1, _POINTS)
    bernstein = torch.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2], dim=1)
    points = bernstein @ control
    corner = points.floor()
    fraction = points - corner
    row, column = corner.long().unbind(-1)
    lower, right = fraction.unbind(-1)
    images = torch.zeros(len(control), SIDE * SIDE)
    for down, row_share in ((0, 1 - lower), (1, lower)):
        for across, column_share in ((0, 1 - right), (1, right)):
            pixel = (row + down) * SIDE + column + across
            images.scatter_add_(1, pixel, _INK * row_share * column_share)
    return _blur(images).clamp(max=1.0)


def _blur(images: Float[Tensor, "N 784"]) -> Float[Tensor, "N 784"]:
    line = torch.tensor([_BLUR, 1.0, _BLUR])
    kernel = torch.outer(line, line)[None, None]
    return functional.conv2d(images.view(-1, 1, SIDE, SIDE), kernel, padding=1).flatten(1)
