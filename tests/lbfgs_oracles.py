"""Quadratics and their pairs of steps and changes, and what L-BFGS makes of pairs, by the textbook."""

import torch

D = 7


def quadratic(seed, definite=True):
    """A Hessian of condition below about 1e3, so that float64 solves leave 1e-12 of their solution."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q
    e = torch.logspace(-1, 1, D, dtype=torch.float64)
    if not definite:
        e[::3] *= -1
    return Q @ torch.diag(e) @ Q.T, generator


def pairs_of(A, generator, count):
    steps = [torch.randn(D, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [(s, A @ s) for s in steps]


def by_updates(pairs, delta):
    """B by the BFGS formula, one rank-two update after another (Nocedal & Wright, eq. 6.19)."""
    B = delta * torch.eye(len(pairs[0][0]), dtype=torch.float64)
    for s, y in pairs:
        Bs = B @ s
        B = B - Bs.outer(Bs) / (s @ Bs) + y.outer(y) / (s @ y)
    return B


def two_loops(pairs, delta, g):
    """H g (Nocedal & Wright, algorithm 7.4)."""
    q, alphas = g.clone(), []
    for s, y in reversed(pairs):
        alphas.append((s @ q) / (s @ y))
        q = q - alphas[-1] * y
    r = q / delta
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        r = r + s * (alpha - (y @ r) / (s @ y))
    return r


def latest_delta(pairs):
    s, y = pairs[-1]
    return (y @ y) / (s @ y)
