"""Diagonals from products: unbiased, calibrated, exact where they can be, and XDiag against its definition."""

import pytest
import torch
from spectra_cases import SPECTRA, D, check_calibrated, check_unbiased, generator, repeat, with_spectrum

from curvlib.operators import Dense, Diagonal, Identity, MatrixFree
from curvlib.spectra import BKSDiagonal, Normal, Rademacher, XDiag
from curvlib.spectra.probes import draw

DIAGONALS = {
    "signs": BKSDiagonal(probes=20),
    "normal": BKSDiagonal(probes=20, distribution=Normal()),
    "XDiag": XDiag(products=20),
}
diagonals = pytest.mark.parametrize("estimator", DIAGONALS.values(), ids=DIAGONALS.keys())
spectra = pytest.mark.parametrize("name", [name for name in SPECTRA if name != "rank 5"])


@diagonals
@spectra
def test_diagonals_are_unbiased_and_know_their_error(estimator, name):
    C = with_spectrum(SPECTRA[name])
    values, errors = repeat(estimator, C, 200)
    assert values.shape == (200, D)
    check_unbiased(values, C.diagonal())
    # 200 D values; XDiag's error is up to a third low where the spectrum does not decay
    check_calibrated(values, errors, C.diagonal(), 0.9, (0.65, 1.15))


def test_xdiag_wins_where_the_spectrum_decays():
    for name in ("power", "exponential"):
        C = with_spectrum(SPECTRA[name])
        plain, sketch = (
            float((repeat(DIAGONALS[key], C, 50)[0] - C.diagonal()).square().mean()) for key in ("signs", "XDiag")
        )
        assert sketch < 0.05 * plain


def test_the_error_of_one_entry_is_the_one_of_theory():
    C = with_spectrum(SPECTRA["indefinite"])
    off = C.matrix - torch.diag(C.diagonal())
    _, errors = repeat(BKSDiagonal(probes=50), C, 100)
    expected = (off.square().sum(1) / 50).sqrt()
    # 4900 degrees of freedom: a relative error of 1 / sqrt(9800) of a standard deviation, five times, in D entries
    torch.testing.assert_close(errors.square().mean(0).sqrt(), expected, rtol=5 / 9800**0.5, atol=0)


def test_the_error_is_that_of_the_mean_of_independent_terms():
    C = with_spectrum(SPECTRA["flat"])
    estimate = BKSDiagonal(probes=3)(C, generator(1))
    z = draw(Rademacher(), C, 3, generator(1))
    terms = z * (C.matrix @ z)
    torch.testing.assert_close(estimate.value, terms.mean(1))
    torch.testing.assert_close(estimate.standard_error, terms.std(1) / 3**0.5)


@spectra
def test_xdiag_equals_its_definition(name):
    C = with_spectrum(SPECTRA[name])
    estimate = XDiag(products=17)(C, generator(3))
    Omega, values = draw(Rademacher(), C, 8, generator(3)), []
    Y = C.matrix @ Omega
    for i in range(8):
        Q = torch.linalg.qr(torch.cat([Y[:, :i], Y[:, i + 1 :]], dim=1)).Q
        projected = Q @ (Q.T @ C.matrix)
        values.append(projected.diagonal() + Omega[:, i] * ((C.matrix - projected) @ Omega[:, i]))
    values = torch.stack(values)
    assert estimate.products == 16
    torch.testing.assert_close(estimate.value, values.mean(0), rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(estimate.standard_error, values.std(0) / 8**0.5, rtol=1e-6, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_xdiag_finds_a_low_rank_exactly(dtype):
    for M in (with_spectrum(SPECTRA["rank 5"]).matrix, torch.diag(SPECTRA["rank 5"]), torch.zeros(D, D)):
        C = Dense(M.to(dtype))
        estimate = XDiag(products=24)(C, generator(0))
        assert estimate.value.dtype == estimate.standard_error.dtype == dtype
        bound = 10 * D**0.5 * torch.finfo(dtype).eps * float(C.diagonal().max())
        assert float((estimate.value - C.diagonal()).abs().max()) <= bound
        assert float(estimate.standard_error.max()) <= bound


@diagonals
def test_as_many_products_as_dimensions_give_the_exact_diagonal(estimator):
    for size in (1, 20):
        C = Diagonal(torch.linspace(-1.0, 3.0, size))
        estimate = estimator(C)
        assert torch.equal(estimate.value, C.values)
        assert float(estimate.standard_error.abs().max()) == 0.0
        assert estimate.products == size
    assert estimator(Identity(21)).products == 20


@diagonals
def test_the_generator_decides_and_products_are_counted(estimator, device):
    seen = []
    M = with_spectrum(SPECTRA["flat"], device=device).matrix

    def product(V):
        seen.append(V.shape[1])
        return M @ V

    C = MatrixFree(product, D, torch.float64, device)
    one, same, other = (estimator(C, generator(seed, device)).value for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert sum(seen) == 3 * 20


def test_an_estimate_of_a_diagonal_is_a_sentence():
    text = str(XDiag(products=8)(with_spectrum(SPECTRA["flat"]), generator(0)))
    assert text.startswith("100 values of root mean square 1.")
    assert text.endswith("(8 products)")


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"BKSDiagonal\(probes=...\) must be an integer >= 2"):
        BKSDiagonal(probes=1)
    with pytest.raises(ValueError, match=r"XDiag\(products=...\) must be an integer >= 4"):
        XDiag(products=3)
    with pytest.raises(TypeError, match="ProbeDistribution"):
        BKSDiagonal(distribution=None)
    for estimator in DIAGONALS.values():
        with pytest.raises(TypeError, match="operator must be a LinearOperator"):
            estimator(torch.eye(3))
