"""Stochastic Lanczos quadrature against all eigenvalues."""

import pytest
import torch
from spectra_cases import SPECTRA, D, generator, with_spectrum

from curvlib.operators import Dense, Diagonal, Identity, MatrixFree
from curvlib.solvers import SolveError
from curvlib.spectra import Rademacher, SpectralDensity, density
from curvlib.spectra.probes import draw

METHOD = SpectralDensity(steps=12, probes=6)  # 72 products, fewer than D
FUNCTIONS = {"square": torch.square, "exp": torch.exp, "cube": lambda e: e**3}


def functions_of(name):
    positive = float(SPECTRA[name].min()) > 0.0
    return FUNCTIONS | ({"log": lambda e: (e + 0.1).log(), "inverse": lambda e: 1 / (e + 0.1)} if positive else {})


def combined(estimate):
    """Five standard errors and the truncation error, with rounding of sums of D terms."""
    return 5 * estimate.standard_error + estimate.truncation_error + 1e-11 * estimate.value.abs()


@pytest.mark.parametrize("name", SPECTRA)
def test_traces_of_functions_within_their_errors(name):
    e = SPECTRA[name]
    C = with_spectrum(e)
    measures = [METHOD(C, generator(seed)) for seed in range(60)]
    for f in functions_of(name).values():
        truth = f(e).sum()
        estimates = [measure.trace_of(f) for measure in measures]
        values = torch.stack([estimate.value for estimate in estimates])
        errors = torch.stack([estimate.standard_error for estimate in estimates])
        within = [abs(float(x.value - truth)) <= float(combined(x)) for x in estimates]
        # t of 5 degrees of freedom has 0.4 % beyond 5, more where one eigenvalue makes the distribution skew
        assert sum(within) >= 55
        truncation = max(float(estimate.truncation_error) for estimate in estimates)
        mean_error = values.std() / 60**0.5
        assert abs(float(values.mean() - truth)) <= 5 * float(mean_error) + truncation + 1e-10
        # 60 x 5 degrees of freedom beside 59
        ratio = errors.square().mean().sqrt() / values.std()
        assert 0.6 < float(ratio) < 1.5


def test_few_steps_are_exact_for_polynomials_of_twice_the_degree():
    C = with_spectrum(SPECTRA["indefinite"])
    z = draw(Rademacher(), C, 5, generator(2))
    measure = SpectralDensity(steps=3, probes=5)(C, generator(2))
    for degree in range(6):
        forms = (z * (torch.linalg.matrix_power(C.matrix, degree) @ z)).sum(0)
        estimate = measure.trace_of(lambda e, degree=degree: e**degree)
        torch.testing.assert_close(estimate.value, forms.mean(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(estimate.standard_error, forms.std() / 5**0.5, rtol=1e-8, atol=1e-10)
    sixth = (z * (torch.linalg.matrix_power(C.matrix, 6) @ z)).sum(0).mean()
    assert abs(float(measure.trace_of(lambda e: e**6).value - sixth)) > 1e-3 * float(sixth)


def test_too_few_steps_show_in_the_truncation_error():
    e = torch.logspace(-6, 0, D, dtype=torch.float64)
    C, truth = with_spectrum(e), float(e.log().sum())
    errors = []
    for steps in (4, 10, 16):
        estimate = SpectralDensity(steps=steps, probes=6)(C, generator(0)).logdet()
        missed = abs(float(estimate) - truth)
        assert missed <= 5 * float(estimate.standard_error) + 4 * float(estimate.truncation_error)
        errors.append(float(estimate.truncation_error))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 10 * abs(truth) / 100


def test_log_determinants_equal_the_dense_one():
    C = with_spectrum(SPECTRA["flat"])
    for damping in (0.0, 0.5):
        estimate = METHOD(C, generator(0)).logdet(damping)
        assert abs(float(estimate) - float(C.logdet(damping))) <= float(combined(estimate))
        assert float(estimate.standard_error) < 3.0
    indefinite = METHOD(with_spectrum(SPECTRA["indefinite"]), generator(0))
    with pytest.raises(ArithmeticError, match=r"positive definite, but with damping = 0.1 .*use a damping above 0.99"):
        indefinite.logdet(0.1)
    indefinite.logdet(1.1)


def test_the_cumulative_spectrum():
    size = 1000
    e = torch.linspace(-1.0, 1.0, size, dtype=torch.float64) ** 3  # dense around 0
    points = torch.linspace(-1.1, 1.1, 23, dtype=torch.float64)
    measure = SpectralDensity(steps=40, probes=20)(with_spectrum(e), generator(0))
    estimate = measure.cumulative(points)
    truth = (e.unsqueeze(1) <= points).double().mean(0)
    assert measure.nodes.shape == (20, 40)
    # nodes of a Gauss rule with 40 points lie about pi / 40 of the half range apart at the centre, and each stands for
    # what lies between its neighbours: less than 0.05 of these eigenvalues but at 0, where the density is infinite
    away = points.abs() > 0.05
    assert float((estimate.value - truth)[away].abs().max()) < 0.05
    assert float(estimate.value[0]) == 0.0
    assert float(estimate.value[-1]) == pytest.approx(1.0)
    assert bool((estimate.value.diff() >= -1e-15).all())


def test_the_smoothed_density():
    e = SPECTRA["indefinite"]
    measure = METHOD(with_spectrum(e), generator(0))
    points, width = measure.grid(400), 0.3
    estimate = measure.density(points, width)
    wide = torch.linspace(-4.0, 5.0, 2000, dtype=torch.float64)
    assert float(torch.trapezoid(measure.density(wide, width).value, wide)) == pytest.approx(1.0, abs=1e-6)
    distance = (points.unsqueeze(1) - e) / width
    truth = ((-0.5 * distance.square()).exp() / (width * (2 * torch.pi) ** 0.5)).mean(1)
    bound = 5 * estimate.standard_error + estimate.truncation_error + 0.01 * truth.max()
    assert bool(((estimate.value - truth).abs() <= bound).all())
    assert float(estimate.standard_error.max()) < 0.15 * float(truth.max())
    default = measure.density(points)
    assert float(default.value.max()) > float(estimate.value.max())
    assert float(torch.trapezoid(default.value, points)) == pytest.approx(1.0, abs=1e-2)


def test_weights_and_nodes(device):
    C = with_spectrum(SPECTRA["power"], device=device)
    measure = METHOD(C, generator(0, device))
    assert measure.nodes.shape == measure.weights.shape == (6, 12)
    assert measure.nodes.dtype == torch.float64
    assert measure.nodes.device.type == device.type
    torch.testing.assert_close(measure.weights.sum(1), torch.ones(6, dtype=torch.float64, device=device))
    assert float(measure.nodes.min()) >= -1e-12
    assert float(measure.nodes.max()) <= 1 + 1e-12
    assert str(measure).endswith("6 probes of 12 steps (72 products)")
    same, other = METHOD(C, generator(0, device)), METHOD(C, generator(1, device))
    assert torch.equal(measure.nodes, same.nodes)
    assert not torch.equal(measure.nodes, other.nodes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_exhausted_krylov_spaces(dtype):
    """More steps than distinct eigenvalues: nodes without weight do not count, wherever they are."""
    three = 1.0 + torch.arange(D, dtype=dtype) % 3
    for C in (Identity(D, dtype), Diagonal(torch.zeros(D, dtype=dtype)), Diagonal(three)):
        shift = 0.0 if float(C.trace()) else 1.0
        estimate = METHOD(C, generator(0)).logdet(shift)
        assert float(estimate) == pytest.approx(float(C.logdet(shift)), abs=100 * torch.finfo(dtype).eps * D)
        points = torch.linspace(-0.5, 3.5, 5)
        truth = (C.spectrum().unsqueeze(1) <= points).double().mean(0)
        torch.testing.assert_close(METHOD(C, generator(0)).cumulative(points).value, truth, rtol=0, atol=1e-4)
    # steps that lose orthogonality: no copies with weight of their own
    e = torch.cat([torch.tensor([100.0], dtype=dtype), SPECTRA["flat"][1:].to(dtype)])
    measure = SpectralDensity(steps=49, probes=2)(Dense(with_spectrum(e.double()).matrix.to(dtype)), generator(0))
    top = measure.weights * (measure.nodes > 50)
    z = draw(Rademacher(), Dense(with_spectrum(e.double()).matrix.to(dtype)), 2, generator(0)).double()
    first = torch.linalg.eigh(with_spectrum(e.double()).matrix).eigenvectors[:, -1]
    torch.testing.assert_close(top.sum(1), (first @ z).square() / D, rtol=1e-4, atol=1e-6)


def test_nothing_follows_the_last_direction():
    """Columns that are exhausted have beta 0 and nodes where the operator has eigenvalues."""
    for dtype in (torch.float64, torch.float32):
        z = Rademacher().draw(D, 4, dtype, torch.device("cpu"), generator(0))
        alpha, beta = density._recurrence(Identity(D, dtype), z, 5)
        torch.testing.assert_close(alpha, torch.ones(4, 5, dtype=dtype))
        assert beta.tolist() == 4 * [4 * [0.0]]
        three = Diagonal(1.0 + torch.arange(D, dtype=dtype) % 3)
        alpha, beta = density._recurrence(three, z, 9)
        assert bool((beta[:, :2] > 0.1).all())
        assert beta[:, 2:].abs().max() == 0.0
        assert bool(((alpha >= 1.0) & (alpha <= 3.0)).all())


def test_as_many_products_as_dimensions_give_all_eigenvalues():
    for size in (1, 2, 50):
        C = Diagonal(torch.linspace(1.0, 2.0, size, dtype=torch.float64))
        measure = SpectralDensity(steps=10, probes=5)(C)
        assert measure.products == size
        estimate = measure.logdet()
        assert float(estimate) == pytest.approx(float(C.logdet()))
        assert float(estimate.standard_error) == 0.0
        assert estimate.truncation_error is None
        assert "all eigenvalues" in str(measure)
        assert float(measure.density(measure.grid(5)).value.min()) >= 0.0


def test_large_matrices_are_not_decomposed_whatever_the_number_of_products(monkeypatch):
    monkeypatch.setattr(density, "_LARGEST_EXACT", 50)
    assert SpectralDensity(steps=30, probes=3)(Identity(51)).nodes.shape == (3, 30)
    assert SpectralDensity(steps=30, probes=3)(Identity(50)).nodes.shape == (1, 50)
    assert SpectralDensity(steps=60, probes=3)(Identity(51)).nodes.shape == (3, 51)


def test_all_probes_advance_in_one_block():
    seen = []
    M = with_spectrum(SPECTRA["flat"]).matrix

    def product(V):
        seen.append(V.shape[1])
        return M @ V

    measure = METHOD(MatrixFree(product, D, torch.float64), generator(0))
    assert seen == 12 * [6]
    assert measure.products == 72


def test_bad_arguments():
    measure = METHOD(with_spectrum(SPECTRA["indefinite"]), generator(0))
    with pytest.raises(ValueError, match=r"SpectralDensity\(steps=...\) must be an integer >= 2, got 1"):
        SpectralDensity(steps=1)
    with pytest.raises(ValueError, match=r"SpectralDensity\(probes=...\) must be"):
        SpectralDensity(probes=1)
    with pytest.raises(TypeError, match="operator must be a LinearOperator"):
        METHOD(torch.eye(3))
    with pytest.raises(ValueError, match="must return shape"):
        measure.trace_of(torch.sum)
    with pytest.raises(ArithmeticError, match="the function is not finite at -"):
        measure.trace_of(torch.sqrt)
    with pytest.raises(TypeError, match="density: points must be a floating-point tensor of one dimension"):
        measure.density([0.0])
    with pytest.raises(TypeError, match="cumulative: points must be"):
        measure.cumulative(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="width must be > 0"):
        measure.density(torch.zeros(2), 0.0)
    with pytest.raises(ValueError, match=r"grid\(count=...\) must be"):
        measure.grid(1)
    nan = MatrixFree(lambda V: V * float("nan"), D)
    with pytest.raises(SolveError, match="is not finite: skip this update"):
        METHOD(nan)
    with pytest.raises(SolveError, match="entries that are not finite"):
        SpectralDensity()(nan)
