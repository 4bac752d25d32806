"""What trust-region steps are held against: plain references and matrices of a given spectrum."""

import numpy as np
import torch


def reduction(M, g, d):
    return -float(g @ d + 0.5 * d @ M @ d)


def cauchy_reduction(M, g, radius):
    norm = float(g.norm())
    if norm == 0.0:
        return 0.0
    curvature = float(g @ M @ g) / norm**2
    length = min(norm / curvature, radius) if curvature > 0 else radius
    return length * norm - 0.5 * length**2 * curvature


def reference_steihaug(M, g, radius, tolerance, most=500):
    """Nocedal & Wright, algorithm 7.2, line by line."""
    d, r = np.zeros_like(g), g.copy()
    p, count = -r, 0
    while np.linalg.norm(r) > tolerance * np.linalg.norm(g) and count < most:
        count += 1
        curvature = p @ M @ p
        alpha = r @ r / curvature if curvature > 0 else np.inf
        if curvature <= 0 or np.linalg.norm(d + alpha * p) >= radius:
            a, b, c = p @ p, 2 * d @ p, d @ d - radius**2
            return d + max(np.roots([a, b, c]).real) * p, "negative" if curvature <= 0 else "boundary", count
        new = r + alpha * M @ p
        d, p, r = d + alpha * p, -new + (new @ new) / (r @ r) * p, new
    return d, "inside", count


def with_spectrum(seed, eigenvalues, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    e = torch.tensor(eigenvalues, dtype=torch.float64)
    Q, _ = torch.linalg.qr(torch.randn(len(e), len(e), generator=generator, dtype=torch.float64))
    M = Q * e @ Q.T
    return (0.5 * (M + M.T)).to(dtype), Q, generator
