"""What conjugate gradients say of systems that have no solution, or none that the dtype can tell."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_systems import normal, spd

from curvlib.operators import Dense, Diagonal, MatrixFree
from curvlib.solvers import CG, MINRES, Dogleg, SolveError, Steihaug, Subproblem, TwoDimensionalSubspace
from curvlib.solvers.solution import ResidualTest, Status

seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([torch.float32, torch.float64])
SIZE = 40


def _semidefinite(seed, rank, condition, dtype):
    """A matrix of that rank, a vector of its range of size 1, and one of its null space."""
    Q, _ = torch.linalg.qr(normal(seed, SIZE, SIZE))
    e = torch.zeros(SIZE, dtype=torch.float64)
    e[:rank] = torch.logspace(0, -float(torch.tensor(condition).log10()), rank, dtype=torch.float64)
    inside = Q[:, :rank] @ normal(seed + 1, rank)
    return (Q * e @ Q.T).to(dtype), (inside / inside.norm()).to(dtype), Q[:, -1].to(dtype)


@given(
    seeds,
    dtypes,
    st.sampled_from([1, 5, 20, SIZE - 1]),
    st.sampled_from([1.0, 1e-1, 1e-2]),
    st.sampled_from([1e1, 1e3]),
    st.sampled_from([None, 0]),
    st.booleans(),
    st.sampled_from([1e-12, 1.0, 1e12]),
)
@settings(max_examples=80)
def test_a_singular_system_without_a_solution(seed, dtype, rank, outside, condition, kept, precondition, scale):
    A, inside, null = _semidefinite(seed, rank, condition, dtype)
    P = Diagonal(1.0 + normal(seed, SIZE, dtype=dtype).abs()) if precondition else None
    method = CG(reorthogonalize=kept, preconditioner=P, stop=ResidualTest(relative=1e-4))
    solution = method(Dense(scale * A), 0.0).solve(inside + outside * null)
    assert solution.status is Status.SINGULAR
    assert bool(solution.x.isfinite().all())
    # no x is better than outside / |b|, up to what rounding makes of a matrix that is singular
    assert float(solution.residual_norm) > 0.5 * outside
    with pytest.raises(SolveError, match=r"singular in float.*raise the damping, or use MINRES"):
        method(Dense(scale * A), 0.0) @ (inside + outside * null)


@given(seeds, dtypes, st.sampled_from([1, 5, 20, SIZE - 1]), st.sampled_from([1e1, 1e3]), st.booleans())
@settings(max_examples=60)
def test_a_singular_system_with_a_solution_is_solved(seed, dtype, rank, condition, precondition):
    A, inside, _ = _semidefinite(seed, rank, condition, dtype)
    P = Diagonal(1.0 + normal(seed, SIZE, dtype=dtype).abs()) if precondition else None
    solution = CG(preconditioner=P, stop=ResidualTest(relative=1e-4))(Dense(A), 0.0).solve(inside)
    assert solution.status is Status.CONVERGED
    tight = CG(preconditioner=P, stop=ResidualTest(relative=1e-14))(Dense(A), 0.0).solve(inside)

    assert tight.solved
    eps = torch.finfo(dtype).eps
    assert float(tight.residual_norm) < 50 * eps * condition  # eps |A| |x| / |b|


@given(seeds, dtypes, st.integers(1, SIZE - 1), st.sampled_from([1e-2, 1.0, 1e2]))
@settings(max_examples=60)
def test_an_indefinite_matrix_is_not_called_singular(seed, dtype, positive, size):
    Q, _ = torch.linalg.qr(normal(seed, SIZE, SIZE))
    e = torch.ones(SIZE, dtype=torch.float64)
    e[positive:] = -size
    A = (Q * e @ Q.T).to(dtype)
    assert CG()(Dense(A), 0.0).solve(normal(seed, SIZE, dtype=dtype)).status is Status.NEGATIVE_CURVATURE


def test_no_curvature_along_a_vector_that_is_not_of_the_null_space_is_negative_curvature_elsewhere():
    C = MatrixFree(lambda V: torch.tensor([[1.0], [-1.0]]) * V, 2)
    assert CG()(C, 0.0).solve(torch.ones(2)).status is Status.NEGATIVE_CURVATURE


@pytest.mark.parametrize(("dtype", "condition"), [(torch.float64, 1e14), (torch.float32, 5e5)])
def test_a_regular_system_is_not_called_singular(dtype, condition):
    """Down to eigenvalues of twice the limit, also where b lies along the last one."""
    A = spd(0, SIZE, condition, dtype=torch.float64)
    smallest = torch.linalg.eigh(A)[1][:, 0]
    for b in (normal(0, SIZE), smallest, smallest + A @ normal(1, SIZE)):
        status = CG(max_iterations=2000)(Dense(A.to(dtype)), 0.0).solve(b.to(dtype)).status
        assert status in (Status.CONVERGED, Status.ROUNDING_FLOOR, Status.ILL_CONDITIONED)


def test_descents_where_the_curvature_is_singular():
    C = Diagonal(torch.tensor([2.0, 1.0, 0.0, 0.0]).double())
    problem = Subproblem(operator=C, gradient=torch.tensor([1.0, 1.0, 0.1, 0.0]).double(), radius=50.0)
    for descent in (Steihaug(), TwoDimensionalSubspace()):
        answer = descent.solve(problem)
        assert answer.on_boundary
        torch.testing.assert_close(answer.step.norm(), torch.tensor(50.0).double())
        # the Cauchy point gives less than 1, the way along the null space 0.1 a unit of length
        assert answer.predicted_reduction > 4.0
    with pytest.raises(SolveError, match=r"Dogleg needs a positive definite .* SINGULAR"):
        Dogleg(solver=CG()).solve(problem)


SCALES = {torch.float64: [1e-300, 1e-160, 1.0, 1e160, 1e300], torch.float32: [1e-36, 1e-20, 1.0, 1e20, 1e36]}


@pytest.mark.parametrize("method", [CG, MINRES])
@pytest.mark.parametrize(("dtype", "matrix_scale"), [(dtype, scale) for dtype in SCALES for scale in SCALES[dtype]])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_the_scale_of_matrix_and_right_hand_side_changes_nothing(method, dtype, matrix_scale, preconditioned):
    A, b = spd(0, 20, 10.0), normal(0, 20)
    P = Diagonal((1 / (A * matrix_scale).diagonal()).to(dtype)) if preconditioned else None
    solver = method(stop=ResidualTest(relative=1e-5), preconditioner=P)
    for scale in SCALES[dtype]:
        size = scale / matrix_scale
        if not 1e-30 * torch.finfo(dtype).max < size < 1e-1 * torch.finfo(dtype).max:
            continue
        expected = torch.linalg.solve(A, b)
        start = torch.zeros_like(b) if scale == 1.0 else None
        solution = solver(Dense((A * matrix_scale).to(dtype)), 0.0).solve(
            (b * scale).to(dtype), x0=None if start is None else start.to(dtype)
        )
        assert solution.status is Status.CONVERGED
        # |x - A^-1 b| <= |A^-1| |r|, so the condition number times the tolerance
        error = (solution.x.double() / size - expected).norm() / expected.norm()
        assert float(error) < 10.0 * 1e-5


@pytest.mark.parametrize("method", [CG, MINRES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_solution_beyond_the_largest_number_is_not_finite(method, dtype):
    small, large = 1e4 * torch.finfo(dtype).tiny, 1e-4 * torch.finfo(dtype).max
    b = torch.tensor([[1.0, large]], dtype=dtype).expand(5, 2)
    solution = method()(Diagonal(torch.full((5,), small, dtype=dtype)), 0.0).solve(b)
    assert solution.statuses == (Status.CONVERGED, Status.NOT_FINITE)
    torch.testing.assert_close(solution.x[:, 0] * small, b[:, 0])
    assert torch.equal(solution.x[:, 1], torch.zeros(5, dtype=dtype))
    assert solution.residual_norm.tolist()[1] == 1.0
