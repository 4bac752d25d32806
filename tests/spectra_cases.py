"""Matrices with known spectra, and what many seeds say about an estimator."""

import torch

from curvlib.operators import Dense

D = 100
_arange = torch.arange(D, dtype=torch.float64)
SPECTRA = {
    "power": (_arange + 1) ** -2.0,
    "exponential": 0.7**_arange,
    "flat": 1.0 + _arange / D,
    "indefinite": torch.linspace(-1.0, 2.0, D, dtype=torch.float64),
    "rank 5": torch.where(_arange < 5, 2.0 + _arange, 0.0),
}


def with_spectrum(e, seed=0, device="cpu"):
    """Return Q diag(e) Q^T in random orthogonal coordinates."""
    Q = torch.linalg.qr(torch.randn(len(e), len(e), dtype=e.dtype, generator=torch.Generator().manual_seed(seed))).Q
    M = Q @ torch.diag(e) @ Q.T
    return Dense(((M + M.T) / 2).to(device))


def generator(seed, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def repeat(estimator, operator, seeds):
    """Return the values and the standard errors (seeds, ...) of many calls."""
    estimates = [estimator(operator, generator(seed, operator.device)) for seed in range(seeds)]
    return tuple(torch.stack([getattr(e, name) for e in estimates]) for name in ("value", "standard_error"))


def check_unbiased(values, truth):
    """Assert that the mean over the seeds is the truth, within five of its own standard errors in every entry."""
    error = values.std(0) / len(values) ** 0.5
    assert bool(((values.mean(0) - truth).abs() <= 5 * error + 1e-13 * truth.abs().max()).all())


def check_calibrated(values, errors, truth, fraction, spread=(0.7, 1.3)):
    """Assert that the error is mostly within three estimated ones, and that these are of the right size on average."""
    missed = (values - truth).abs()
    assert float((missed <= 3 * errors).double().mean()) >= fraction
    ratio = errors.square().mean().sqrt() / missed.square().mean().sqrt()
    assert spread[0] <= float(ratio) <= spread[1]
