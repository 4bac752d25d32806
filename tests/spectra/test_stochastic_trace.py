"""Traces and norms from products: unbiased, calibrated, exact where they can be, and XTrace against its definition."""

import pytest
import torch
from spectra_cases import SPECTRA, D, check_calibrated, check_unbiased, generator, repeat, with_spectrum

from curvlib.operators import Dense, Diagonal, Identity, MatrixFree
from curvlib.spectra import (
    Hutchinson,
    HutchPlusPlus,
    Lanczos,
    Normal,
    Rademacher,
    SpectralDensity,
    Sphere,
    SquaredFrobenius,
    XDiag,
    XTrace,
)
from curvlib.spectra.probes import draw

TRACES = {
    "Hutchinson, signs": Hutchinson(probes=20),
    "Hutchinson, normal": Hutchinson(probes=20, distribution=Normal()),
    "Hutchinson, sphere": Hutchinson(probes=20, distribution=Sphere()),
    "Hutch++": HutchPlusPlus(products=20),
    "XTrace": XTrace(products=20),
}
traces = pytest.mark.parametrize("estimator", TRACES.values(), ids=TRACES.keys())
spectra = pytest.mark.parametrize("name", [name for name in SPECTRA if name != "rank 5"])


@traces
@spectra
def test_traces_are_unbiased_and_know_their_error(estimator, name):
    C = with_spectrum(SPECTRA[name])
    values, errors = repeat(estimator, C, 200)
    check_unbiased(values, C.trace())
    # 0.9 below the 0.95 to 0.99 of a t distribution of 5 to 19 degrees of freedom; XTrace's error is about a fifth low
    check_calibrated(values, errors, C.trace(), 0.9)


@pytest.mark.parametrize("distribution", [Rademacher(), Normal()], ids=["signs", "normal"])
def test_the_squared_norm_is_unbiased_and_knows_its_error(distribution):
    C = with_spectrum(SPECTRA["indefinite"])
    truth = C.frobenius_norm().square()
    values, errors = repeat(SquaredFrobenius(probes=20, distribution=distribution), C, 200)
    check_unbiased(values, truth)
    check_calibrated(values, errors, truth, 0.9)
    assert torch.equal(SquaredFrobenius(probes=D)(C).value, truth)


@pytest.mark.parametrize("name", ["power", "exponential"])
def test_sketches_win_where_the_spectrum_decays(name):
    C = with_spectrum(SPECTRA[name])

    def error(estimator):
        return float((repeat(estimator, C, 100)[0] - C.trace()).square().mean().sqrt())

    plain, sketch, every = (error(TRACES[key]) for key in ("Hutchinson, signs", "Hutch++", "XTrace"))
    assert every < 0.7 * sketch
    assert sketch < 0.5 * plain


def test_hutchinsons_error_is_the_one_of_theory():
    C = with_spectrum(SPECTRA["indefinite"])
    off = C.matrix - torch.diag(C.diagonal())
    for distribution, variance in (
        (Rademacher(), 2 * off.square().sum()),
        (Normal(), 2 * C.matrix.square().sum()),
        # on the sphere 2 D / (D + 2) (|C|^2 - trace^2 / D)
        (Sphere(), 2 * D / (D + 2) * (C.matrix.square().sum() - C.trace() ** 2 / D)),
    ):
        values, errors = repeat(Hutchinson(probes=50, distribution=distribution), C, 100)
        expected = float((variance / 50).sqrt())
        # 100 x 49 degrees of freedom; the variance of a sample variance is at most (kurtosis 15) / 5000 of its square
        assert float(errors.square().mean().sqrt()) == pytest.approx(expected, rel=0.1)
        # 100 values: a standard deviation has a relative error of 1 / sqrt(200)
        assert float(values.std()) == pytest.approx(expected, rel=5 / 200**0.5)


def by_definition(C, Omega):
    """XTrace's values t_i, each with a basis of its own."""
    M, (D, k) = C.to_dense(), Omega.shape
    Y = M @ Omega
    values = []
    for i in range(k):
        Q = torch.linalg.qr(torch.cat([Y[:, :i], Y[:, i + 1 :]], dim=1)).Q
        rest = Omega[:, i] - Q @ (Q.T @ Omega[:, i])
        rest = rest * (D - k + 1) ** 0.5 / rest.norm()
        values.append((Q * (M @ Q)).sum() + rest @ M @ rest)
    return torch.stack(values)


@spectra
def test_xtrace_equals_its_definition(name):
    C = with_spectrum(SPECTRA[name])
    estimate = XTrace(products=17)(C, generator(3))
    values = by_definition(C, draw(Sphere(), C, 8, generator(3)))
    assert estimate.products == 16
    torch.testing.assert_close(estimate.value, values.mean(), rtol=1e-10, atol=0)
    torch.testing.assert_close(estimate.standard_error, values.std() / 8**0.5, rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("estimator", [HutchPlusPlus(products=24), XTrace(products=24)], ids=["Hutch++", "XTrace"])
def test_a_low_rank_is_found_exactly(estimator, dtype):
    eps = torch.finfo(dtype).eps
    # in random coordinates, and along the axes, where the factor R of the sketch has exact zeros
    for M in (with_spectrum(SPECTRA["rank 5"]).matrix, torch.diag(SPECTRA["rank 5"]), torch.zeros(D, D)):
        C = Dense(M.to(dtype))
        estimate = estimator(C, generator(0))
        assert estimate.value.dtype == dtype
        # D products summed up: rounding of sqrt(D) eps for terms of random sign, with room for the factorisation
        bound = 10 * D**0.5 * eps * float(C.trace())
        assert abs(float(estimate) - float(C.trace())) <= bound
        assert float(estimate.standard_error) <= bound


@traces
def test_as_many_products_as_dimensions_give_the_exact_trace(estimator):
    for size in (1, 2, 20):
        C = Diagonal(torch.linspace(-1.0, 3.0, size))
        estimate = estimator(C)
        assert torch.equal(estimate.value, C.trace())
        assert float(estimate.standard_error) == 0.0
        assert estimate.products == size
    assert estimator(Identity(21)).products < 21


@traces
def test_the_generator_decides(estimator, device):
    C = with_spectrum(SPECTRA["flat"], device=device)
    one, same, other = (estimator(C, generator(seed, device)).value for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.device.type == device.type


@traces
def test_products_come_in_blocks_and_are_counted(estimator):
    seen = []
    M = with_spectrum(SPECTRA["flat"]).matrix

    def product(V):
        seen.append(V.shape[1])
        return M @ V

    estimate = estimator(MatrixFree(product, D, torch.float64), generator(0))
    assert sum(seen) == estimate.products == 20
    expected = {Hutchinson: [16, 4], HutchPlusPlus: [6, 6, 8], XTrace: [10, 10]}
    assert seen == expected[type(estimator)]


def test_exact_operators_take_quadratic_forms_alone():
    M = with_spectrum(SPECTRA["flat"]).matrix

    def refuse(V):
        raise AssertionError("a product")

    C = MatrixFree(refuse, D, torch.float64, quadratic_form=lambda V: V.T @ M @ V)
    estimator = Hutchinson(probes=40)
    torch.testing.assert_close(estimator(C, generator(0)).value, estimator(Dense(M), generator(0)).value)


def test_half_precision_operators_are_estimated_in_float32():
    M = with_spectrum(SPECTRA["exponential"]).matrix.bfloat16()
    C = Dense(M)
    for estimator in TRACES.values():
        estimate = estimator(C, generator(0))
        assert estimate.value.dtype == torch.bfloat16
        assert float(estimate) == pytest.approx(float(C.trace()), abs=0.2 + 5 * float(estimate.standard_error))


def test_an_estimate_is_a_sentence_and_a_number():
    estimate = Hutchinson(probes=4)(with_spectrum(SPECTRA["flat"]), generator(0))
    assert str(estimate) == f"{float(estimate.value):.6g} +- {float(estimate.standard_error):.2g} (4 products)"
    assert float(estimate) == float(estimate.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Hutchinson(probes=1), r"Hutchinson\(probes=...\) must be an integer >= 2, got 1"),
        (lambda: SquaredFrobenius(probes=2.0), r"SquaredFrobenius\(probes=...\) must be an integer"),
        (lambda: HutchPlusPlus(products=5), r"HutchPlusPlus\(products=...\) must be an integer >= 6, got 5"),
        (lambda: XTrace(products=True), r"XTrace\(products=...\) must be an integer >= 4"),
    ],
)
def test_bad_numbers_of_products(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_arguments():
    for kind in (Hutchinson, SquaredFrobenius, HutchPlusPlus):
        with pytest.raises(TypeError, match=r"must be a ProbeDistribution such as Rademacher\(\), got 'normal'"):
            kind(distribution="normal")
    for estimator in TRACES.values():
        with pytest.raises(TypeError, match="operator must be a LinearOperator, got Tensor"):
            estimator(torch.eye(3))
        with pytest.raises(TypeError, match=r"generator must be a torch.Generator or None, got int"):
            estimator(Identity(3), 0)


@pytest.mark.parametrize("distribution", [Rademacher(), Normal(), Sphere()], ids=["signs", "normal", "sphere"])
def test_probes_have_unit_covariance(distribution):
    z = distribution.draw(5, 40_000, torch.float64, torch.device("cpu"), generator(0))
    covariance = z @ z.T / 40_000
    # Var(z_i z_j) is at most 2
    assert float((covariance - torch.eye(5, dtype=torch.float64)).abs().max()) <= 5 * (2 / 40_000) ** 0.5
    lengths = z.square().sum(0)
    if not isinstance(distribution, Normal):
        torch.testing.assert_close(lengths, torch.full_like(lengths, 5.0))


def test_autocast_changes_nothing():
    C = with_spectrum(SPECTRA["flat"])
    C = Dense(C.matrix.float())
    for method in (*TRACES.values(), XDiag(products=20), SpectralDensity(steps=5, probes=4), Lanczos(count=2)):
        plain = method(C, generator(0))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = method(C, generator(0))
        for name in ("value", "values", "nodes"):
            if hasattr(plain, name):
                assert torch.equal(getattr(plain, name), getattr(mixed, name))
