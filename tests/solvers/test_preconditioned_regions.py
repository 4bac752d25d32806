"""Steihaug's steps in the norm of the preconditioner against plain ones in preconditioned variables."""

from itertools import pairwise
from math import nan

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import CASES, draw
from trust_regions import cauchy_reduction, reduction, reference_steihaug, with_spectrum

from curvlib.operators import Dense, Diagonal, Identity
from curvlib.solvers import (
    CG,
    DampedNewton,
    Dogleg,
    EuclideanNorm,
    MoreSorensen,
    PreconditionerNorm,
    RegionNorm,
    ResidualTest,
    Status,
    Steihaug,
    Subproblem,
    TwoDimensionalSubspace,
    damped_inverse,
)

D = 6
EPS = torch.finfo(torch.float64).eps
seeds = st.integers(0, 2**31)
radii = st.sampled_from([1e-3, 0.1, 1.0, 10.0, 1e4])
lowest = st.sampled_from([0.05, -0.5, -20.0])


def problem(seed, least, radius, damping=0.0):
    """A subproblem, and A, P, L with P = L L^T and M = P^-1, all dense; conditions up to 100."""
    C, _, generator = with_spectrum(seed, [least, 0.1, 0.5, 2.0, 3.0, 5.0])
    P, _, _ = with_spectrum(seed + 1, torch.logspace(-1, 1, D).tolist())
    g = torch.randn(D, generator=generator, dtype=torch.float64)
    A = C + damping * torch.eye(D, dtype=torch.float64)
    sub = Subproblem(operator=Dense(C), gradient=g, radius=radius, damping=damping)
    return sub, A, P, torch.linalg.cholesky(P), torch.linalg.inv(P)


def method(P, **options):
    return Steihaug(**{"stop": ResidualTest(relative=1e-13), "region": PreconditionerNorm(), **options}).preconditioned(
        Dense(P)
    )


def length_in(M, d):
    return float(d @ M @ d) ** 0.5


# --- the algorithm ---------------------------------------------------------------------------------------------------


@given(
    seed=seeds,
    radius=radii,
    least=lowest,
    damping=st.sampled_from([0.0, 0.3]),
    most=st.integers(1, D - 1),
    check_every=st.sampled_from([1, 4]),
)
@settings(max_examples=150)
def test_it_is_steihaug_in_the_preconditioned_variables(seed, radius, least, damping, most, check_every):
    """d = L y, y by Nocedal & Wright, algorithm 7.2, on L^T A L; until residuals are noise, after D iterations."""
    sub, A, P, L, M = problem(seed, least, radius, damping)
    answer = method(P, max_iterations=most, check_every=check_every).solve(sub)
    y, end, count = reference_steihaug((L.T @ A @ L).numpy(), (L.T @ sub.gradient).numpy(), radius, 0.0, most)
    expected = L @ torch.from_numpy(y)
    # Each iteration multiplies the errors of the one before by at most the condition of L^T A L.
    torch.testing.assert_close(answer.step, expected, rtol=0, atol=1e-8 * float(expected.norm()))
    assert answer.on_boundary == (end != "inside")
    assert answer.iterations == count
    statuses = {"negative": Status.NEGATIVE_CURVATURE, "boundary": Status.CONVERGED, "inside": Status.ITERATION_LIMIT}
    assert answer.status is statuses[end]
    assert answer.multiplier == (0.0 if end == "inside" else None)
    assert answer.length == pytest.approx(length_in(M, answer.step), rel=1e-8)
    if answer.on_boundary:
        assert answer.length == pytest.approx(radius, rel=1e-12)
    assert answer.predicted_reduction == pytest.approx(reduction(A, sub.gradient, expected), rel=1e-7, abs=1e-15)


@given(seed=seeds, radius=radii, least=lowest)
@settings(max_examples=60)
def test_the_length_grows_and_the_model_falls_along_the_path(seed, radius, least):
    sub, A, P, L, M = problem(seed, least, radius)
    answers = [method(P, max_iterations=most).solve(sub) for most in range(1, D + 1)]
    for one, other in pairwise(answers):
        assert other.length >= one.length
        assert other.predicted_reduction >= one.predicted_reduction * (1 - 1e-12)
    # The first point is at least the Cauchy point of the preconditioned variables.
    cauchy = cauchy_reduction(L.T @ A @ L, L.T @ sub.gradient, radius)
    assert answers[0].predicted_reduction == pytest.approx(cauchy, rel=1e-9)
    for answer in answers:
        assert length_in(M, answer.step) <= radius * (1 + 1e-8)


@given(seed=seeds, radius=radii)
@settings(max_examples=60)
def test_half_of_the_best_reduction_of_a_convex_model(seed, radius):
    """Yuan, "On the truncated conjugate gradient method" (2000), theorem 2."""
    sub, A, P, L, _ = problem(seed, 0.05, radius)
    answer = method(P).solve(sub)
    scaled = Subproblem(operator=Dense(L.T @ A @ L), gradient=L.T @ sub.gradient, radius=radius)
    best = MoreSorensen().solve(scaled).predicted_reduction
    assert 0.5 * best <= answer.predicted_reduction <= best * (1 + 1e-9)
    if not answer.on_boundary:
        torch.testing.assert_close(answer.step, -torch.linalg.solve(A, sub.gradient), rtol=1e-9, atol=1e-9)
        assert answer.multiplier == 0.0


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_operator_is_its_own_best_preconditioner(case, device):
    """P = A^-1 brings every A to the identity: one iteration, and the length is the root of d^T A d."""
    d = draw(1, device)
    C, M = case(d)
    g, damping = d.normal(C.size), 0.2
    A = M + damping * torch.eye(len(M), dtype=M.dtype, device=M.device)
    P = Dense(torch.linalg.inv(A))
    newton = -torch.linalg.solve(A, g)
    whole = length_in(A, newton)
    for share in (0.3, 2.0):
        sub = Subproblem(operator=C, gradient=g, radius=share * whole, damping=damping)
        answer = Steihaug(preconditioner=P, region=PreconditionerNorm(), stop=ResidualTest(relative=1e-8)).solve(sub)
        torch.testing.assert_close(answer.step, min(share, 1.0) * newton, rtol=1e-8, atol=1e-9)
        assert answer.iterations == 1
        assert answer.on_boundary == (share < 1)
        assert answer.length == pytest.approx(min(share, 1.0) * whole, rel=1e-8)


def test_without_scaling_both_norms_are_one():
    sub, *_ = problem(3, -0.5, 0.7)
    euclidean = Steihaug(preconditioner=Identity(D, torch.float64))
    answers = [
        answer.solve(sub)
        for answer in (
            Steihaug(),
            euclidean,
            Steihaug(preconditioner=Identity(D, torch.float64), region=PreconditionerNorm()),
        )
    ]
    for answer in answers[1:]:
        torch.testing.assert_close(answer.step, answers[0].step, rtol=1e-12, atol=1e-14)
    assert [answer.length for answer in answers] == [None, None, pytest.approx(0.7)]


def test_the_norms_give_other_steps():
    sub, _, P, _, M = problem(5, 0.05, 0.3)
    by = {
        region: Steihaug(preconditioner=Dense(P), region=region).solve(sub)
        for region in (EuclideanNorm(), PreconditionerNorm())
    }
    ball, ellipsoid = by[EuclideanNorm()], by[PreconditionerNorm()]
    assert float(ball.step.norm()) == pytest.approx(0.3)
    assert length_in(M, ellipsoid.step) == pytest.approx(0.3)
    assert float(ellipsoid.step.norm()) != pytest.approx(0.3, rel=0.05)


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-6)])
@pytest.mark.parametrize("condition", [2, 4, 6])
def test_the_length_survives_the_loss_of_orthogonality(dtype, tolerance, condition):
    C, Q, generator = with_spectrum(0, torch.logspace(0, -condition, 200).tolist())
    e = torch.logspace(0, -condition, 200, dtype=torch.float64) + 10.0 ** (1 - condition)
    P = ((Q / e) @ Q.T).to(dtype)
    M = torch.linalg.inv(P.double())
    g = torch.randn(200, generator=generator, dtype=torch.float64).to(dtype)
    for most in (5, 50, 300):
        steihaug = Steihaug(
            max_iterations=most,
            stop=ResidualTest(relative=1e-12),
            preconditioner=Dense(0.5 * (P + P.T)),
            region=PreconditionerNorm(),
        )
        answer = steihaug.solve(Subproblem(operator=Dense(C.to(dtype)), gradient=g, radius=1e9))
        assert not answer.on_boundary
        assert answer.length == pytest.approx(length_in(M, answer.step.double()), rel=tolerance)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
@pytest.mark.parametrize("radius", [0.3, 1e3])
def test_float32_at_any_scale(scale, radius):
    sub, _, P, _, _ = problem(0, 0.05, radius)
    expected = method(P, max_iterations=4).solve(sub)
    single = Subproblem(
        operator=Dense(sub.operator.to_dense().float()), gradient=(scale * sub.gradient).float(), radius=radius * scale
    )
    answer = method(P.float(), max_iterations=4).solve(single)
    torch.testing.assert_close(answer.step.double() / scale, expected.step, rtol=1e-3, atol=1e-4)
    assert answer.length == pytest.approx(expected.length * scale, rel=1e-3)


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_preconditioner_that_is_not_definite_or_not_finite_ends_the_path():
    sub, *_ = problem(0, 0.05, 1.0)
    negative = Steihaug(preconditioner=Diagonal(-torch.ones(D, dtype=torch.float64)), region=PreconditionerNorm())
    answer = negative.solve(sub)
    assert (answer.status, answer.length, answer.on_boundary) == (Status.BREAKDOWN, 0.0, False)
    broken = Steihaug(preconditioner=Diagonal(torch.full((D,), nan, dtype=torch.float64)), region=PreconditionerNorm())
    answer = broken.solve(sub)
    assert (answer.status, answer.step.tolist()) == (Status.NOT_FINITE, [0.0] * D)


def test_a_product_that_is_not_finite_leaves_the_last_step_and_its_length():
    C = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    calls = []

    class Breaks(Dense):
        def matmat(self, V):
            calls.append(V)
            return super().matmat(V) * (nan if len(calls) == 2 else 1.0)

    P = torch.diag(torch.tensor([1.0, 0.3, 0.6], dtype=torch.float64))
    sub = Subproblem(operator=Breaks(C), gradient=torch.ones(3, dtype=torch.float64), radius=1e3)
    answer = Steihaug(preconditioner=Dense(P), region=PreconditionerNorm()).solve(sub)
    assert answer.status is Status.NOT_FINITE
    assert answer.iterations == 1
    assert answer.length == pytest.approx(length_in(torch.linalg.inv(P), answer.step), rel=1e-12)


def test_a_norm_without_its_preconditioner_is_refused():
    sub, _, P, *_ = problem(0, 0.05, 1.0)
    without = Steihaug(region=PreconditionerNorm())
    assert (without.needs_preconditioner, without.takes_preconditioner, without.euclidean_radius) == (True, True, False)
    with pytest.raises(ValueError, match="norm of a preconditioner, and this Steihaug has none"):
        without.solve(sub)
    with_one = without.preconditioned(Dense(P))
    assert (with_one.needs_preconditioner, with_one.takes_preconditioner) == (False, False)
    assert with_one.solve(sub).length is not None
    with pytest.raises(TypeError, match="RegionNorm"):
        Steihaug(region="preconditioner")
    with pytest.raises(ValueError, match="Euclidean ball"):
        TwoDimensionalSubspace(steihaug=without)


def test_who_takes_a_preconditioner():
    sub, _, P, *_ = problem(0, 0.05, 1.0)
    for descent in (MoreSorensen(), Dogleg(), DampedNewton(solver=CG()), DampedNewton(solver=damped_inverse)):
        facts = descent.takes_preconditioner, descent.needs_preconditioner, descent.euclidean_radius
        assert facts == (False, False, True)
        with pytest.raises(TypeError, match="takes no preconditioner"):
            descent.preconditioned(Dense(P))
    plane = TwoDimensionalSubspace(steihaug=Steihaug(max_iterations=2))
    assert plane.takes_preconditioner
    preconditioned = plane.preconditioned(Dense(P))
    assert not preconditioned.takes_preconditioner
    assert not torch.equal(preconditioned.solve(sub).step, plane.solve(sub).step)


def test_a_norm_of_one_s_own():
    class Half(RegionNorm):
        """The Euclidean norm in other words."""

        def start(self, like):
            return EuclideanNorm().start(like)

    sub, *_ = problem(0, -0.5, 1.0)
    assert torch.equal(Steihaug(region=Half()).solve(sub).step, Steihaug().solve(sub).step)
