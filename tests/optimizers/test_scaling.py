"""Scaled parameters: the operator S^-1 C S^-1 by structure against dense matrices, and the scales."""

import pytest
import torch

from curvlib.operators import Dense, Diagonal, LinearOperator, LowRank, MatrixFree, Shifted
from curvlib.optimizers import CurvatureScaling, FixedScaling, in_scaled_parameters

torch.manual_seed(0)
_U, _d = torch.randn(4, 2).double(), torch.rand(4).double()
_C = _U @ _U.T + _d.diag()
OPERATORS = {
    "dense": Dense(_C),
    "diagonal": Diagonal(_d),
    "low-rank": LowRank(_U, torch.ones(2).double(), _d),
    "products": MatrixFree(lambda V: _C @ V, 4, torch.float64, torch.device("cpu")),
    "shifted": Shifted(Dense(_C), 0.7),
    "shifted-low-rank": Shifted(LowRank(_U, torch.ones(2).double(), _d), 0.7),
}


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())
def test_the_operator_in_scaled_parameters(operator):
    s = torch.tensor([1e-3, 0.5, 2.0, 1e4]).double()
    scaled = in_scaled_parameters(operator, s)
    expected = operator.to_dense() / s / s.unsqueeze(1)
    torch.testing.assert_close(scaled.to_dense(), expected, rtol=1e-12, atol=0.0)
    v = torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(scaled @ v, expected @ v, rtol=1e-11, atol=0.0)
    torch.testing.assert_close(scaled.quadratic_form(v.unsqueeze(1)).squeeze(), v @ expected @ v, rtol=1e-11, atol=0.0)


def test_structure_is_kept():
    s = torch.full((4,), 2.0).double()
    for name, kind in (("dense", Dense), ("diagonal", Diagonal), ("low-rank", LowRank)):
        assert isinstance(in_scaled_parameters(OPERATORS[name], s), kind)
    assert isinstance(in_scaled_parameters(OPERATORS["shifted"], s), LinearOperator)


def test_scales_of_the_curvature_are_the_largest_roots_so_far():
    scaling = CurvatureScaling()
    first = scaling.scales(Diagonal(torch.tensor([4.0, 0.0, 9.0])), None)
    assert first.tolist() == [2.0, 1.0, 3.0]  # 1 stands in where there is no curvature
    assert scaling.scales(Diagonal(torch.tensor([1.0, 0.25, 16.0])), first).tolist() == [2.0, 1.0, 4.0]
    with pytest.raises(ValueError, match="not negative"):
        scaling.scales(Diagonal(torch.tensor([1.0, -1.0])), None)


def test_fixed_scales_are_those_given():
    values = torch.tensor([4.0, 0.1])
    assert FixedScaling(values).scales(Diagonal(torch.tensor([1.0, 2.0])), None).tolist() == values.tolist()
