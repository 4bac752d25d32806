"""Trust-region steps where the radius is far larger or smaller than the gradient, beyond the squares of the dtype."""

import pytest
import torch

from curvlib.operators import Diagonal
from curvlib.solvers import (
    MoreSorensen,
    PreconditionerNorm,
    Steihaug,
    Subproblem,
    TwoDimensionalSubspace,
)
from curvlib.solvers.solution import Status


def _ids(descent):
    return type(descent).__name__ + type(getattr(descent, "region", None)).__name__.removeprefix("NoneType")


def _length(step):
    """The Euclidean length, without squares that underflow."""
    largest = step.abs().amax()
    return float(torch.linalg.vector_norm(step / largest) * largest)


def _descents(dtype):
    P, one = Diagonal(torch.tensor([1.0, 0.5, 0.3], dtype=dtype)), Diagonal(torch.ones(3, dtype=dtype))
    return Steihaug(), Steihaug(preconditioner=P), Steihaug(preconditioner=one, region=PreconditionerNorm())


@pytest.mark.parametrize("index", range(3), ids=["plain", "preconditioned", "norm of the preconditioner"])
@pytest.mark.parametrize("lowest", [-1.0, 1.0])
@pytest.mark.parametrize(
    ("dtype", "size", "radius"),
    [
        (torch.float64, 1e-160, 1.0),
        (torch.float64, 1e-300, 1e-10),
        (torch.float64, 1.0, 1e300),
        (torch.float64, 1e160, 1e-10),
        (torch.float64, 1e300, 1.0),
        (torch.float32, 1e-30, 1e10),
        (torch.float32, 1e-30, 1e30),
        (torch.float32, 1e30, 1e-10),
        (torch.float32, 1e30, 1e-30),
    ],
)
def test_conjugate_gradients_to_a_far_boundary(index, lowest, dtype, size, radius):
    C = Diagonal(torch.tensor([lowest, 2.0, 3.0], dtype=dtype))
    problem = Subproblem(operator=C, gradient=size * torch.ones(3, dtype=dtype), radius=radius)
    answer = _descents(dtype)[index].solve(problem)
    if radius < size or lowest < 0:
        assert answer.on_boundary
        # to a thousandth: at 1e-300 and below float64 has that many digits
        assert _length(answer.step.double()) == pytest.approx(radius, rel=1e-3, abs=0.0)
    else:
        assert not answer.on_boundary
        expected = torch.tensor([-1.0, -1 / 2, -1 / 3], dtype=dtype)
        torch.testing.assert_close(answer.step / size, expected, rtol=2e-3, atol=0.0)
    assert answer.status in (Status.CONVERGED, Status.NEGATIVE_CURVATURE)


@pytest.mark.parametrize("descent", [Steihaug(), TwoDimensionalSubspace(), MoreSorensen()], ids=_ids)
@pytest.mark.parametrize("lowest", [-1.0, 1.0])
@pytest.mark.parametrize("size", [1e-160, 1e-300, 1.0, 1e300])
@pytest.mark.parametrize("radius", [1e-300, 1e-160, 1.0, 1e160, 1e300])
def test_no_step_that_is_not_finite_is_returned(descent, lowest, size, radius):
    C = Diagonal(torch.tensor([lowest, 2.0, 3.0], dtype=torch.float64))
    answer = descent.solve(Subproblem(operator=C, gradient=size * torch.ones(3, dtype=torch.float64), radius=radius))
    assert bool(answer.step.isfinite().all())
