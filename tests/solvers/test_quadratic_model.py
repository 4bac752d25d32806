"""The quadratic model and the minimisation over proposals, against dense float64 algebra."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curvlib.operators import Dense, Diagonal, LinearOperator
from curvlib.solvers.errors import SolveError
from curvlib.solvers.quadratic_model import QuadraticModel
from curvlib.solvers.reduction import DampedRatio, UndampedRatio
from curvlib.solvers.solution import Status

seeds = st.integers(0, 2**31)
sizes = st.integers(3, 12)
dampings = st.sampled_from([0.0, 0.1, 3.0])


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def semidefinite(seed, size, rank=None):
    root = normal(seed, size, rank or size)
    return root @ root.T / size


def model_of(seed, size, damping, rank=None):
    C = semidefinite(seed, size, rank)
    model = QuadraticModel(
        value=torch.tensor(2.0, dtype=torch.float64),
        gradient=normal(seed + 1, size),
        curvature=Dense(C),
        damping=damping,
    )
    return model, C + damping * torch.eye(size, dtype=C.dtype)


def change_of(model, matrix, step):
    return float(model.gradient @ step + 0.5 * step @ matrix @ step)


@given(seeds, sizes, dampings)
@settings(max_examples=30)
def test_value_change_and_prediction(seed, size, damping):
    model, matrix = model_of(seed, size, damping)
    step = normal(seed + 2, size)
    expected = change_of(model, matrix, step)
    undamped = expected - 0.5 * damping * float(step @ step)
    assert float(model.change(step)) == pytest.approx(expected, rel=1e-10, abs=1e-12)
    assert float(model(step)) == pytest.approx(2.0 + expected, rel=1e-10, abs=1e-12)
    assert model.predict(step).damped == pytest.approx(expected, rel=1e-10, abs=1e-12)
    assert model.predict(step).undamped == pytest.approx(undamped, rel=1e-10, abs=1e-12)
    assert float(model.with_damping(0.0).change(step)) == pytest.approx(undamped, rel=1e-10, abs=1e-12)


@given(seeds, sizes, st.integers(1, 3), dampings, st.lists(st.floats(-12, 12), min_size=3, max_size=3))
@settings(max_examples=60)
def test_the_minimum_over_proposals(seed, size, columns, damping, exponents):
    model, matrix = model_of(seed, size, damping)
    scales = torch.tensor([10.0**e for e in exponents[:columns]], dtype=torch.float64)
    V = normal(seed + 2, size, columns)
    w = -torch.linalg.solve(V.T @ matrix @ V, V.T @ model.gradient)
    best = model.minimise_over(V * scales)
    assert best.status is Status.CONVERGED
    torch.testing.assert_close(best.coefficients * scales, w, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(best.step, V @ w, rtol=1e-6, atol=1e-8)
    assert best.predicted_change == pytest.approx(0.5 * float(model.gradient @ best.step), rel=1e-6, abs=1e-10)
    assert best.predicted_change == pytest.approx(change_of(model, matrix, best.step), rel=1e-6, abs=1e-10)
    assert best.prediction.undamped == pytest.approx(model.predict(best.step).undamped, rel=1e-6, abs=1e-10)


@given(seeds, sizes, dampings)
@settings(max_examples=20)
def test_the_small_matrices_come_back_in_the_proposals_units(seed, size, damping):
    model, matrix = model_of(seed, size, damping)
    V = normal(seed + 2, size, 2) * torch.tensor([1e-3, 7.0], dtype=torch.float64)
    best = model.minimise_over(V)
    torch.testing.assert_close(best.gram, V.T @ V)
    torch.testing.assert_close(best.linear_terms, V.T @ model.gradient)
    torch.testing.assert_close(best.curvature_form + damping * best.gram, V.T @ matrix @ V)
    w = normal(seed + 3, 2)
    there, expected = best.prediction_at(w), model.predict(V @ w)
    assert there.damped == pytest.approx(expected.damped, rel=1e-8)
    assert there.undamped == pytest.approx(expected.undamped, rel=1e-8)


@given(seeds, sizes, dampings, st.integers(0, 1), st.floats(-3, 3))
@settings(max_examples=30)
def test_one_free_coefficient_given_the_other(seed, size, damping, fixed, value):
    model, matrix = model_of(seed, size, damping)
    V = normal(seed + 2, size, 2)
    A, b, free = V.T @ matrix @ V, V.T @ model.gradient, 1 - fixed
    best = model.minimise_over(V, fixed={fixed: value})
    assert float(best.coefficients[fixed]) == value
    assert float(best.coefficients[free]) == pytest.approx(float(-(b[free] + A[free, fixed] * value) / A[free, free]))
    assert best.predicted_change == pytest.approx(change_of(model, matrix, best.step), rel=1e-8, abs=1e-10)


def test_all_coefficients_fixed_only_evaluates():
    model, matrix = model_of(0, 5, 0.1)
    V = normal(2, 5, 2)
    best = model.minimise_over(V, fixed={0: 0.5, 1: -1.0})
    assert best.coefficients.tolist() == [0.5, -1.0]
    assert best.predicted_change == pytest.approx(change_of(model, matrix, V @ best.coefficients))


def test_no_better_combination_exists():
    model, matrix = model_of(4, 8, 0.1)
    V = normal(5, 8, 3)
    best = model.minimise_over(V)
    for seed in range(20):
        other = best.coefficients + 1e-3 * normal(seed, 3)
        assert change_of(model, matrix, V @ other) > best.predicted_change


# --- degenerate proposals --------------------------------------------------------------------------------------------


@given(seeds, sizes)
@settings(max_examples=15)
def test_a_zero_proposal_is_dropped(seed, size):
    model, _ = model_of(seed, size, 0.1)
    v = normal(seed + 2, size, 1)
    alone = model.minimise_over(v)
    both = model.minimise_over(torch.cat([v, torch.zeros_like(v)], dim=1))
    torch.testing.assert_close(both.coefficients, torch.cat([alone.coefficients, torch.zeros(1, dtype=torch.float64)]))
    assert both.predicted_change == pytest.approx(alone.predicted_change)
    nothing = model.minimise_over(torch.zeros(size, 2, dtype=torch.float64))
    assert (nothing.coefficients.tolist(), nothing.predicted_change) == ([0.0, 0.0], 0.0)
    assert nothing.status is Status.CONVERGED


@given(seeds, sizes, st.floats(-5, 5), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=40)
def test_collinear_proposals_give_the_step_of_one_of_them(seed, size, exponent, dtype):
    C, gradient, v = semidefinite(seed, size).to(dtype), normal(seed + 1, size).to(dtype), normal(seed + 2, size, 1)
    model = QuadraticModel(value=torch.tensor(0.0), gradient=gradient, curvature=Dense(0.5 * (C + C.T)), damping=0.1)
    v = v.to(dtype)
    alone = model.minimise_over(v)
    both = model.minimise_over(torch.cat([v, -(10.0**exponent) * v], dim=1))
    tolerance = 1e-3 if dtype is torch.float32 else 1e-9
    torch.testing.assert_close(both.step, alone.step, rtol=tolerance, atol=tolerance)
    # The shortest coefficients, not a difference of two huge ones.
    assert float(both.coefficients[0].abs()) <= 1.01 * float(alone.coefficients[0].abs()) + 1e-12


def test_negative_curvature_is_left_out_and_reported():
    C = Diagonal(torch.tensor([2.0, -1.0, 1.0], dtype=torch.float64))
    gradient = torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64)
    model = QuadraticModel(value=torch.tensor(0.0), gradient=gradient, curvature=C, damping=0.0)
    best = model.minimise_over(torch.eye(3, dtype=torch.float64)[:, :2])
    assert best.status is Status.NEGATIVE_CURVATURE
    assert best.coefficients.tolist() == [-1.0, 0.0]
    assert best.predicted_change == -1.0
    assert model.with_damping(1.5).minimise_over(torch.eye(3, dtype=torch.float64)).status is Status.CONVERGED


def test_a_flat_direction_with_a_slope_is_left_out_and_reported():
    V = torch.eye(2, dtype=torch.float64)
    for slope, status in ((1.0, Status.NEGATIVE_CURVATURE), (0.0, Status.CONVERGED)):
        C, gradient = Diagonal(V @ torch.tensor([1.0, 0.0]).double()), torch.tensor([1.0, slope], dtype=torch.float64)
        best = QuadraticModel(value=torch.tensor(0.0), gradient=gradient, curvature=C).minimise_over(V)
        assert (best.status, best.coefficients.tolist()) == (status, [-1.0, 0.0])


def test_very_different_curvatures_are_no_collinearity_in_float32():
    C, V = Diagonal(torch.tensor([1e6, 1e-6])), torch.eye(2)
    best = QuadraticModel(value=torch.tensor(0.0), gradient=torch.tensor([1e6, 1e-6]), curvature=C).minimise_over(V)
    torch.testing.assert_close(best.coefficients, torch.tensor([-1.0, -1.0]))


@pytest.mark.parametrize("place", ["gradient", "proposals", "curvature"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_named(place, bad):
    parts = {
        "gradient": torch.ones(3, dtype=torch.float64),
        "proposals": torch.ones(3, 2, dtype=torch.float64),
        "curvature": torch.ones(3, dtype=torch.float64),
    }
    parts[place].view(-1)[0] = bad
    model = QuadraticModel(
        value=torch.tensor(0.0), gradient=parts["gradient"], curvature=Diagonal(parts["curvature"]), damping=0.0
    )
    with pytest.raises(SolveError, match=f"the {place} gave NaN or infinity"):
        model.minimise_over(parts["proposals"])


# --- cost, precision, devices ----------------------------------------------------------------------------------------


class QuadraticFormsOnly(LinearOperator):
    """Counts its quadratic forms and has no products."""

    size = 4
    dtype = torch.float64

    def __init__(self):
        self.forms = 0

    def matmat(self, V):
        raise AssertionError("a product was asked for")

    def quadratic_form(self, V):
        self.forms += 1
        return 2.0 * V.T @ V


def test_one_quadratic_form_and_no_product():
    C = QuadraticFormsOnly()
    model = QuadraticModel(value=torch.tensor(1.0), gradient=normal(0, 4), curvature=C, damping=1.0)
    best = model.minimise_over(normal(1, 4, 2))
    assert best.prediction
    assert best.predicted_change < 0
    assert C.forms == 1
    model.change(best.step)
    assert C.forms == 2


@pytest.mark.parametrize("scale", [1e-25, 1e15])
def test_float32_proposals_of_extreme_length(scale):
    C = Diagonal(torch.tensor([1.0, 3.0]))
    model = QuadraticModel(value=torch.tensor(5.0), gradient=torch.tensor([2.0, 4.0]), curvature=C, damping=1.0)
    best = model.minimise_over(scale * torch.tensor([[-2.0], [-2.0]]))
    torch.testing.assert_close(best.step, torch.tensor([-1.0, -1.0]))
    assert best.predicted_change == pytest.approx(-3.0, rel=1e-5)


def test_on_the_device(device):
    C = Diagonal(torch.tensor([1.0, 3.0], device=device))
    model = QuadraticModel(
        value=torch.tensor(5.0, device=device),
        gradient=torch.tensor([2.0, 4.0], device=device),
        curvature=C,
        damping=1.0,
    )
    best = model.minimise_over(torch.tensor([[-2.0], [-2.0]], device=device))
    assert best.step.device.type == best.coefficients.device.type == device.type
    torch.testing.assert_close(best.step.cpu(), torch.tensor([-1.0, -1.0]))
    assert float(model.change(best.step)) == pytest.approx(-3.0)


# --- conventions of the ratio, arguments -----------------------------------------------------------------------------


def test_the_two_conventions_differ_by_the_damping_term():
    model, _ = model_of(0, 5, 0.7)
    best = model.minimise_over(normal(2, 5, 2))
    actual = best.prediction.undamped
    assert UndampedRatio().ratio(actual, best.prediction) == 1.0
    expected = actual / (actual + 0.35 * float(best.step @ best.step))
    assert DampedRatio().ratio(actual, best.prediction) == pytest.approx(expected)
    assert abs(expected - 1.0) > 1e-3


@pytest.mark.parametrize("damping", [-1.0, torch.nan, torch.inf])
def test_bad_damping_is_refused(damping):
    with pytest.raises(ValueError, match="QuadraticModel\\(damping"):
        QuadraticModel(
            value=torch.tensor(0.0), gradient=torch.ones(2), curvature=Diagonal(torch.ones(2)), damping=damping
        )


@pytest.mark.parametrize(
    "make",
    [
        lambda C: QuadraticModel(value=torch.zeros(1), gradient=torch.ones(2), curvature=C),
        lambda C: QuadraticModel(value=torch.tensor(0.0), gradient=torch.ones(3), curvature=C),
        lambda C: QuadraticModel(value=torch.tensor(0.0), gradient=torch.ones(2).double(), curvature=C),
        lambda C: model_2(C).change(torch.ones(3)),
        lambda C: model_2(C).minimise_over(torch.ones(2)),
        lambda C: model_2(C).minimise_over(torch.ones(3, 1)),
        lambda C: model_2(C).minimise_over(torch.ones(2, 0)),
        lambda C: model_2(C).minimise_over(torch.ones(2, 1), fixed={1: 0.0}),
        lambda C: model_2(C).minimise_over(torch.ones(2, 1), fixed={0: torch.nan}),
    ],
)
def test_bad_values_are_refused(make):
    with pytest.raises(ValueError, match=r"got|names"):
        make(Diagonal(torch.ones(2)))


def model_2(C):
    return QuadraticModel(value=torch.tensor(0.0), gradient=torch.ones(2), curvature=C)
