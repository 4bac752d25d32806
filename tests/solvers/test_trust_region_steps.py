"""Trust-region steps against their optimality conditions, brute force and a plain reference, on every operator."""

from dataclasses import dataclass
from math import inf, nan

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_cases import CASES, draw
from trust_regions import cauchy_reduction, reduction, reference_steihaug, with_spectrum

from curvlib.operators import BlockDiagonal, Dense, Diagonal, Identity, Kronecker, LinearOperator, LowRank, MatrixFree
from curvlib.solvers import (
    CG,
    MINRES,
    DampedNewton,
    Dogleg,
    MoreSorensen,
    ResidualTest,
    SolveError,
    Status,
    Steihaug,
    Subproblem,
    TwoDimensionalSubspace,
)
from curvlib.solvers.descents import Descent, coefficients

CPU = torch.device("cpu")
EPS = torch.finfo(torch.float64).eps
seeds = st.integers(0, 2**31)
radii = st.sampled_from([1e-3, 0.1, 1.0, 10.0, 1e4])
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
few = settings(max_examples=5, suppress_health_check=list(HealthCheck))
TIGHT = Steihaug(stop=ResidualTest(relative=1e-10), max_iterations=500)
BOUNDED = [TIGHT, MoreSorensen(), TwoDimensionalSubspace(steihaug=TIGHT), Dogleg()]
bounded = pytest.mark.parametrize("descent", BOUNDED, ids=lambda descent: type(descent).__name__)


def eye_like(M):
    return torch.eye(len(M), dtype=M.dtype, device=M.device)


def check_inside(answer, M, g, radius, eps=EPS):
    """Feasible, with a prediction that is true and at least that of the Cauchy point."""
    d = answer.step
    # Norms and the step to the boundary are sums of D terms, each with a few roundings.
    assert float(d.norm()) <= radius * (1 + 50 * eps)
    if answer.on_boundary:
        assert float(d.norm()) >= radius * (1 - 50 * eps)
    size = float(g.norm()) * float(d.norm()) + float(torch.linalg.matrix_norm(M, 2)) * float(d.norm()) ** 2
    assert abs(answer.predicted_reduction - reduction(M, g, d)) <= 50 * eps * size
    assert answer.predicted_reduction >= cauchy_reduction(M, g, radius) - 200 * eps * size


def check_optimal(answer, M, g, radius, eps=EPS):
    """The conditions of More & Sorensen, which are sufficient; all up to backward errors of C and g."""
    check_inside(answer, M, g, radius, eps)
    d, mu = answer.step, answer.multiplier
    size = float(torch.linalg.matrix_norm(M, 2))
    assert mu >= 0.0
    assert mu == 0.0 or answer.on_boundary
    # Eigenvectors are orthogonal to D eps, and parts of g below 10 D^(1/2) eps |g| are taken for none.
    bound = 200 * len(g) ** 0.5 * eps
    residual = float((M @ d + mu * d + g).norm())
    assert residual <= bound * ((size + mu) * float(d.norm()) + float(g.norm()))
    assert float(torch.linalg.eigvalsh(M).min()) + mu >= -bound * size


# --- every operator --------------------------------------------------------------------------------------------------


@cases
@few
@given(seed=seeds, radius=radii, damping=st.sampled_from([0.0, 0.5]), definite=st.booleans())
def test_more_sorensen_is_optimal(case, device, seed, radius, damping, definite):
    d = draw(seed, device, definite=definite)
    C, M = case(d)
    g = d.normal(C.size)
    answer = MoreSorensen().solve(Subproblem(operator=C, gradient=g, radius=radius, damping=damping))
    assert answer.status is Status.CONVERGED
    check_optimal(answer, M + damping * eye_like(M), g, radius)
    undamped = answer.prediction.undamped
    assert undamped == pytest.approx(answer.prediction.damped - 0.5 * damping * float(answer.step.norm()) ** 2)


@cases
@few
@given(seed=seeds, radius=radii, definite=st.booleans(), check_every=st.sampled_from([1, 4]))
def test_steihaug_follows_the_algorithm(case, device, seed, radius, definite, check_every):
    d = draw(seed, device, definite=definite)
    C, M = case(d)
    g = d.normal(C.size)
    method = Steihaug(stop=ResidualTest(relative=1e-6), max_iterations=500, check_every=check_every)
    answer = method.solve(Subproblem(operator=C, gradient=g, radius=radius))
    check_inside(answer, M, g, radius)
    step, end, count = reference_steihaug(M.cpu().numpy(), g.cpu().numpy(), radius, 1e-6)
    if count <= C.size:  # later, amplified rounding errors decide
        assert answer.on_boundary == (end != "inside")
        assert answer.iterations == count
        torch.testing.assert_close(answer.step.cpu(), torch.from_numpy(step), rtol=1e-5, atol=1e-5 * radius)
        if end == "negative":
            assert answer.status is Status.NEGATIVE_CURVATURE
        else:
            assert answer.status is Status.CONVERGED
        assert answer.multiplier == (0.0 if end == "inside" else None)


@cases
@few
@given(seed=seeds, radius=radii, definite=st.booleans())
def test_the_plane_is_at_least_as_good_as_what_it_holds(case, device, seed, radius, definite):
    d = draw(seed, device, definite=definite)
    C, M = case(d)
    g = d.normal(C.size)
    problem = Subproblem(operator=C, gradient=g, radius=radius)
    answer = TwoDimensionalSubspace(steihaug=TIGHT).solve(problem)
    check_inside(answer, M, g, radius)
    slack = 1e-9 * (1 + abs(answer.predicted_reduction))
    best = MoreSorensen().solve(problem).predicted_reduction
    assert answer.predicted_reduction <= best + slack
    if answer.status is Status.NEGATIVE_CURVATURE:
        assert answer.predicted_reduction >= TIGHT.solve(problem).predicted_reduction - slack
    elif float(torch.linalg.eigvalsh(M).min()) > 1e-3:
        assert (
            answer.predicted_reduction >= Dogleg(solver=CG(stop=TIGHT.stop)).solve(problem).predicted_reduction - slack
        )
    if C.size == 2 and answer.status is Status.CONVERGED:
        assert answer.predicted_reduction >= best - slack


@cases
@few
@given(seed=seeds, radius=radii)
def test_dogleg_is_a_path_and_refuses_indefinite_matrices(case, device, seed, radius):
    d = draw(seed, device)
    C, M = case(d)
    g, damping = d.normal(C.size), 0.3
    A = M + damping * eye_like(M)
    answer = Dogleg().solve(Subproblem(operator=C, gradient=g, radius=radius, damping=damping))
    check_inside(answer, A, g, radius)
    newton, cauchy = -torch.linalg.solve(A, g), -float(g @ g) / float(g @ A @ g) * g
    if float(newton.norm()) <= radius:
        torch.testing.assert_close(answer.step, newton, rtol=1e-7, atol=1e-7)
        assert (answer.on_boundary, answer.multiplier) == (False, 0.0)
    elif float(cauchy.norm()) >= radius:
        torch.testing.assert_close(answer.step, -radius * g / g.norm())
    else:
        leg = newton - cauchy
        tau = float((answer.step - cauchy) @ leg) / float(leg @ leg)
        assert 0.0 <= tau <= 1.0
        torch.testing.assert_close(answer.step, cauchy + tau * leg, rtol=1e-6, atol=1e-7 * radius)
    C, M = case(draw(seed, device, definite=False))
    values, vectors = torch.linalg.eigh(M)
    if float(values.min()) < -0.1:
        g = vectors.sum(1)  # a part along every eigenvector, so that iterative solvers meet the negative one
        with pytest.raises(SolveError, match="Dogleg needs a positive definite"):
            Dogleg().solve(Subproblem(operator=C, gradient=g, radius=radius))


@cases
@few
@given(seed=seeds, solver=st.sampled_from(["direct", "cg", "minres"]))
def test_damped_newton_minimises_the_damped_model(case, device, seed, solver):
    d = draw(seed, device)
    C, M = case(d)
    g, A = d.normal(C.size), M + 0.3 * eye_like(M)
    tight = {"stop": ResidualTest(relative=1e-11), "max_iterations": 500}
    newton = {
        "direct": DampedNewton(),
        "cg": DampedNewton(solver=CG(**tight)),
        "minres": DampedNewton(solver=MINRES(**tight)),
    }
    answer = newton[solver].solve(Subproblem(operator=C, gradient=g, damping=0.3))
    expected = -torch.linalg.solve(A, g)
    torch.testing.assert_close(answer.step, expected, rtol=1e-7, atol=1e-8)
    assert answer.predicted_reduction == pytest.approx(-0.5 * float(g @ expected), rel=1e-7)
    assert (answer.on_boundary, answer.multiplier) == (False, 0.0)
    assert answer.iterations > 0 or solver == "direct"


@cases
@few
@given(seed=seeds)
def test_coefficients_are_those_of_the_eigenvectors(case, device, seed):
    d = draw(seed, device, definite=False)
    C, M = case(d)
    g = d.normal(C.size)
    basis = coefficients(C, g)
    torch.testing.assert_close(basis.back(basis.gradient), g, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(basis.back(basis.eigenvalues * basis.gradient), M @ g, rtol=1e-9, atol=1e-9)


# --- the hard case ---------------------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 3), st.floats(-2, 1), st.sampled_from([0.0, 1e-300, 1e-15, 1e-12, 1e-8, 1e-3]), radii)
@settings(max_examples=80)
def test_the_hard_case_and_its_neighbourhood(seed, multiplicity, lowest, part, radius):
    M, Q, generator = with_spectrum(seed, [lowest] * multiplicity + [1.5, 2.0, 7.0])
    c = torch.randn(len(M), generator=generator, dtype=torch.float64)
    c[:multiplicity] = part
    g = Q @ c
    check_optimal(MoreSorensen().solve(Subproblem(operator=Dense(M), gradient=g, radius=radius)), M, g, radius)


@given(seeds, radii)
@settings(max_examples=30)
def test_more_sorensen_is_the_minimum_of_a_search_over_multipliers(seed, radius):
    M, _, generator = with_spectrum(seed, [-1.0, 0.5, 2.0, 3.0])
    g = torch.randn(4, generator=generator, dtype=torch.float64)
    low, high = 1.0, 1.0 + float(g.norm()) / radius
    for _ in range(200):
        mu = 0.5 * (low + high)
        d = -torch.linalg.solve(M + mu * torch.eye(4, dtype=M.dtype), g)
        low, high = (mu, high) if float(d.norm()) > radius else (low, mu)
    answer = MoreSorensen().solve(Subproblem(operator=Dense(M), gradient=g, radius=radius))
    assert answer.multiplier == pytest.approx(mu, rel=1e-9)
    assert 0 < answer.iterations < 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("radius", [1e-2, 1.0, 1e3])
def test_a_singular_matrix_does_not_send_the_step_to_the_boundary_along_noise(dtype, radius):
    M, Q, generator = with_spectrum(0, [0.0, 0.0, 1.0, 2.0, 5.0], dtype)
    g = (Q[:, 2:] @ torch.randn(3, generator=generator, dtype=torch.float64)).to(dtype)
    answer = MoreSorensen().solve(Subproblem(operator=Dense(M), gradient=g, radius=radius))
    check_optimal(answer, M, g, radius, torch.finfo(dtype).eps)
    if radius > 1e2:
        assert not answer.on_boundary
        expected = -(torch.linalg.pinv(M.double(), rtol=1e-4) @ g.double())
        torch.testing.assert_close(answer.step.double(), expected, rtol=1e-4, atol=1e-4)


def test_zero_gradients():
    zero, indefinite = (
        torch.zeros(3, dtype=torch.float64),
        Diagonal(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)),
    )
    for descent in (Steihaug(), TwoDimensionalSubspace()):  # products alone: nothing tells them of the saddle
        answer = descent.solve(Subproblem(operator=indefinite, gradient=zero, radius=2.0))
        assert (answer.step.tolist(), answer.status) == ([0.0] * 3, Status.CONVERGED)
    answer = MoreSorensen().solve(Subproblem(operator=indefinite, gradient=zero, radius=2.0))
    assert (answer.step.abs().tolist(), answer.multiplier) == ([0.0, 2.0, 0.0], 2.0)
    assert Dogleg().solve(Subproblem(operator=-1.0 * -indefinite, gradient=zero, radius=2.0)).step.tolist() == [0.0] * 3


# --- structure -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class NeverDense(LinearOperator):
    """Products of a factor that must not be written out."""

    inner: LinearOperator
    size = property(lambda self: self.inner.size)
    dtype = property(lambda self: self.inner.dtype)

    def matmat(self, V):
        return self.inner.matmat(V)

    def to_dense(self):
        raise AssertionError("made dense")


def large(d):
    """Operators far above the size that is made dense."""
    G, A = d.symmetric(150), d.symmetric(160)
    kronecker = Kronecker((G, A))
    U = d.normal(kronecker.size, 3)
    low_rank = LowRank(U / 100, d.normal(3), torch.full_like(U[:, 0], 0.5))
    halves = (Kronecker((G, A)), Diagonal(d.normal(1000)))
    order = d.permutation(kronecker.size + 1000)
    blocks = BlockDiagonal(halves, (order[:24_000], order[24_000:]), 25_000)
    return [kronecker, low_rank, blocks]


@pytest.mark.parametrize("number", range(3))
def test_structured_operators_are_not_made_dense(number):
    d = draw(0, CPU, definite=False)
    C = large(d)[number]
    g = d.normal(C.size)
    answer = MoreSorensen().solve(Subproblem(operator=C, gradient=g, radius=3.0))
    assert answer.on_boundary
    residual = C @ answer.step + answer.multiplier * answer.step + g
    assert float(residual.norm()) <= 1e-10 * float(g.norm())
    # The multiplier of an indefinite C exceeds minus the least eigenvalue, which a Rayleigh quotient bounds.
    v = answer.step / answer.step.norm()
    assert answer.multiplier >= -float(v @ (C @ v))


def test_a_low_rank_operator_whose_complement_is_the_hard_case():
    d = draw(3, CPU)
    U = d.normal(8, 2)
    C, g = LowRank(U, torch.tensor([3.0, 4.0]).double(), torch.full((8,), -1.0).double()), U @ d.normal(2)
    answer = MoreSorensen().solve(Subproblem(operator=C, gradient=g, radius=5.0))
    check_optimal(answer, C.to_dense(), g, 5.0)
    assert answer.multiplier == pytest.approx(1.0)


def test_an_operator_without_structure_is_refused_where_it_is_too_large():
    C = NeverDense(Diagonal(torch.ones(20_001)))
    with pytest.raises(SolveError, match="would need the whole matrix"):
        MoreSorensen().solve(Subproblem(operator=C, gradient=torch.ones(20_001), radius=1.0))


# --- preconditioners, scale, limits ----------------------------------------------------------------------------------


@given(seeds, radii, st.booleans())
@settings(max_examples=40)
def test_a_preconditioned_path_keeps_the_guarantees(seed, radius, definite):
    M, _, generator = with_spectrum(seed, [0.01 if definite else -0.5, 0.5, 2.0, 3.0, 100.0])
    g = torch.randn(5, generator=generator, dtype=torch.float64)
    P = Diagonal(torch.rand(5, generator=generator, dtype=torch.float64) * 10 + 1e-3)
    answer = Steihaug(stop=TIGHT.stop, preconditioner=P).solve(Subproblem(operator=Dense(M), gradient=g, radius=radius))
    check_inside(answer, M, g, radius)
    if definite and not answer.on_boundary:
        torch.testing.assert_close(answer.step, -torch.linalg.solve(M, g), rtol=1e-6, atol=1e-6)


def test_an_exact_preconditioner_takes_one_iteration():
    M, _, generator = with_spectrum(0, [0.01, 0.5, 2.0, 3.0, 100.0])
    g = torch.randn(5, generator=generator, dtype=torch.float64)
    exact = Steihaug(stop=ResidualTest(relative=1e-8), preconditioner=Dense(torch.linalg.inv(M)))
    assert exact.solve(Subproblem(operator=Dense(M), gradient=g, radius=1e6)).iterations == 1


@bounded
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
def test_float32_at_any_scale(descent, scale):
    M, _, generator = with_spectrum(0, [0.1, 0.5, 2.0, 3.0])
    g = torch.randn(4, generator=generator)
    for radius in (0.3, 1e3):
        expected = descent.solve(Subproblem(operator=Dense(M), gradient=g.double(), radius=radius)).step
        problem = Subproblem(operator=Dense(M.float()), gradient=g * scale, radius=radius * scale)
        torch.testing.assert_close(descent.solve(problem).step.double() / scale, expected, rtol=1e-4, atol=1e-5)
    far = descent.solve(Subproblem(operator=Dense(M.float()), gradient=g * 1e-12, radius=1e9))
    assert not far.on_boundary
    assert float(far.step.norm()) > 0


def test_limit_and_stopping_rule():
    M, _, generator = with_spectrum(0, [0.001 * 2**i for i in range(12)])
    problem = Subproblem(
        operator=Dense(M), gradient=torch.randn(12, generator=generator, dtype=torch.float64), radius=1e9
    )
    answer = Steihaug(max_iterations=3).solve(problem)
    assert (answer.status, answer.iterations) == (Status.ITERATION_LIMIT, 3)
    loose, tight = (Steihaug(stop=ResidualTest(relative=r)).solve(problem).iterations for r in (0.5, 1e-8))
    assert loose < tight
    plane = TwoDimensionalSubspace(steihaug=Steihaug(max_iterations=3)).solve(problem)
    assert (plane.status, plane.iterations) == (Status.ITERATION_LIMIT, 3)
    assert plane.predicted_reduction >= answer.predicted_reduction * (1 - 1e-9)


@given(seeds, st.sampled_from([1e1, 1e4, 1e8, 1e12]), radii)
@settings(max_examples=30)
def test_ill_conditioned_matrices(seed, condition, radius):
    M, _, generator = with_spectrum(seed, np.logspace(0, -np.log10(condition), 8).tolist())
    g = torch.randn(8, generator=generator, dtype=torch.float64)
    problem = Subproblem(operator=Dense(M), gradient=g, radius=radius)
    check_optimal(MoreSorensen().solve(problem), M, g, radius)
    for descent in (TIGHT, TwoDimensionalSubspace(steihaug=TIGHT)):
        check_inside(descent.solve(problem), M, g, radius)


# --- failures --------------------------------------------------------------------------------------------------------


@bounded
@pytest.mark.parametrize("bad", [nan, inf])
def test_gradients_that_are_not_finite(descent, bad):
    answer = descent.solve(
        Subproblem(operator=Diagonal(torch.ones(3)), gradient=torch.tensor([1.0, bad, 0.0]), radius=1.0)
    )
    assert (answer.step.tolist(), answer.status) == ([0.0] * 3, Status.NOT_FINITE)
    newton = DampedNewton().solve(Subproblem(operator=Diagonal(torch.ones(3)), gradient=torch.tensor([1.0, bad, 0.0])))
    assert newton.status is Status.NOT_FINITE


@pytest.mark.parametrize(
    "descent", [Steihaug(), TwoDimensionalSubspace(), MoreSorensen()], ids=lambda d: type(d).__name__
)
def test_curvature_that_is_not_finite(descent):
    problem = Subproblem(operator=Diagonal(torch.tensor([1.0, nan])), gradient=torch.ones(2), radius=1.0)
    answer = descent.solve(problem)
    assert (answer.step.tolist(), answer.status) == ([0.0] * 2, Status.NOT_FINITE)


@bounded
def test_a_radius_is_needed(descent):
    problem = Subproblem(operator=Diagonal(torch.ones(3)), gradient=torch.ones(3))
    with pytest.raises(ValueError, match=f"{type(descent).__name__} needs a finite radius"):
        descent.solve(problem)
    assert descent.has_radius


def test_damped_newton_has_none():
    assert not DampedNewton().has_radius
    with pytest.raises(ValueError, match="DampedNewton has no radius"):
        DampedNewton().solve(Subproblem(operator=Diagonal(torch.ones(3)), gradient=torch.ones(3), radius=1.0))


@pytest.mark.parametrize(
    "change",
    [
        {"radius": 0.0},
        {"radius": -1.0},
        {"radius": nan},
        {"damping": -1.0},
        {"damping": inf},
        {"gradient": torch.ones(4)},
        {"gradient": torch.ones(3).double()},
        {"gradient": [1.0, 1.0, 1.0]},
    ],
    ids=str,
)
def test_bad_problems_are_refused(change):
    with pytest.raises(ValueError, match="got"):
        Subproblem(**{"operator": Diagonal(torch.ones(3)), "gradient": torch.ones(3), "radius": 1.0, **change})


@pytest.mark.parametrize(
    "make",
    [
        lambda: Subproblem(operator=torch.eye(3), gradient=torch.ones(3)),
        lambda: Subproblem(operator=Diagonal(torch.ones(3)), gradient=torch.ones(3), radius=True),
        lambda: Steihaug(stop=1e-3),
        lambda: Steihaug(preconditioner=torch.eye(3)),
        lambda: TwoDimensionalSubspace(steihaug=CG()),
        lambda: Dogleg(solver=None),
        lambda: DampedNewton(solver="cg"),
    ],
    ids=["operator", "radius", "stop", "preconditioner", "steihaug", "dogleg", "newton"],
)
def test_bad_types_are_refused(make):
    with pytest.raises(TypeError, match="must be"):
        make()


def test_dogleg_with_an_iterative_solver_refuses_what_that_meets():
    C = MatrixFree(lambda V: torch.tensor([[1.0], [-1.0]]) * V, 2)
    with pytest.raises(SolveError, match=r"Dogleg needs a positive definite.*NEGATIVE_CURVATURE"):
        Dogleg(solver=CG()).solve(Subproblem(operator=C, gradient=torch.ones(2), radius=1.0))


def test_dogleg_notices_negative_curvature_that_its_solver_does_not_look_for():
    C = Diagonal(torch.tensor([1.0, -3.0]))
    with pytest.raises(SolveError, match="has curvature -1 along the gradient"):
        Dogleg(solver=lambda C, damping: Identity(C.size)).solve(
            Subproblem(operator=C, gradient=torch.ones(2), radius=1.0)
        )


def test_a_third_partys_descent_needs_one_method():
    class Gradient(Descent):
        def solve(self, problem):
            step = -problem.radius * problem.gradient / problem.gradient.norm()
            return problem.answer(step, on_boundary=True, multiplier=None)

    answer = Gradient().solve(
        Subproblem(operator=Diagonal(torch.ones(2)), gradient=torch.tensor([3.0, 4.0]), radius=1.0)
    )
    assert answer.predicted_reduction == pytest.approx(5.0 - 0.5)
    assert Gradient().has_radius


def test_an_eigenvalue_that_rounding_made_negative_is_no_negative_curvature():
    C = Diagonal(torch.tensor([1.0, 0.5, -1e-17], dtype=torch.float64))
    gradient = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    answer = MoreSorensen().solve(Subproblem(operator=C, gradient=gradient, radius=10.0))
    assert not answer.on_boundary
    torch.testing.assert_close(answer.step, torch.tensor([-1.0, -2.0, 0.0], dtype=torch.float64))
    # beyond rounding it is
    C = Diagonal(torch.tensor([1.0, 0.5, -1e-12], dtype=torch.float64))
    assert MoreSorensen().solve(Subproblem(operator=C, gradient=gradient, radius=10.0)).on_boundary
