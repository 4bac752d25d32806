"""Chains of lag moments and their sums by brute force, time by time."""

import torch
from operator_cases import Draw
from torch import Tensor


def symmetric_root(F: Tensor) -> Tensor:
    e, Q = torch.linalg.eigh(F)
    return (Q * e.clamp(min=0.0).sqrt()) @ Q.T


def covariance(d: Draw, n: int) -> Tensor:
    """A second moment of condition below about 100."""
    B = d.normal(n, n)
    return B @ B.T / n + 0.1 * torch.eye(n, dtype=d.dtype, device=d.device)


def transition(d: Draw, n: int, norm: float, symmetric: bool = False) -> Tensor:
    """A random whitened transition with this largest singular value, with eigenvalues of both signs if symmetric."""
    B = d.normal(n, n)
    B = (B + B.T) / 2 if symmetric else B
    return norm * B / torch.linalg.matrix_norm(B, 2)


def lag(F0: Tensor, psi: Tensor, steps: int) -> Tensor:
    """F_d = F_0^1/2 Psi^d F_0^1/2, and its transpose for -d."""
    root = symmetric_root(F0)
    F = root @ torch.linalg.matrix_power(psi, abs(steps)) @ root
    return F if steps >= 0 else F.T


def mean_length(lengths: dict[int, float]) -> float:
    return sum(p * T for T, p in lengths.items())


def weights(lengths: dict[int, float], d: Draw) -> Tensor:
    """r_d = E[(T - d)_+] / E[T] for the probabilities of lengths."""
    pairs = [sum(p * max(T - lag, 0) for T, p in lengths.items()) for lag in range(max(lengths))]
    return torch.tensor(pairs, dtype=d.dtype, device=d.device) / pairs[0]


def over_all_pairs(G: tuple[Tensor, Tensor], A: tuple[Tensor, Tensor], lengths: dict[int, float]) -> Tensor:
    """E over sequences of sum_{s, t} of G_{s-t} (x) A_{s-t}, divided by E[T]; G and A are (F_0, Psi)."""
    longest = max(lengths)
    lags = {k: torch.kron(lag(*G, k), lag(*A, k)) for k in range(1 - longest, longest)}
    total = torch.zeros_like(lags[0])
    for T, probability in lengths.items():
        for s in range(T):
            for t in range(T):
                total += probability * lags[s - t]
    return total / mean_length(lengths)


def over_all_lags(G: tuple[Tensor, Tensor], A: tuple[Tensor, Tensor], longest: int) -> Tensor:
    """Sum of G_d (x) A_d over |d| <= longest, one after another."""
    return sum(torch.kron(lag(*G, k), lag(*A, k)) for k in range(-longest, longest + 1))


def zero_padded_moments(series: Tensor) -> tuple[Tensor, Tensor]:
    """F_0 and F_1 of sequences (N, T, d): the mean over all N T positions, with zeros after the last one."""
    N, T, _ = series.shape
    F0 = torch.einsum("nti,ntj->ij", series, series) / (N * T)
    F1 = torch.einsum("nti,ntj->ij", series[:, 1:], series[:, :-1]) / (N * T)
    return F0, F1
