"""ParameterLayout: named parameters to flat vectors and back."""

import pytest
import torch
from torch import nn

from curvlib import ParameterLayout


def test_flatten_and_unflatten_are_inverse():
    layout = ParameterLayout.of(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4, bias=False)))
    vector = torch.randn(layout.size)
    assert torch.equal(layout.flatten(layout.unflatten(vector)), vector)
    assert torch.equal(layout.flatten(layout.to_dict(vector)), vector)
    assert torch.equal(vector[layout.coordinates("1.weight")].view(4, 2), layout.to_dict(vector)["1.weight"])


def test_missing_gradients_count_as_zero():
    layout = ParameterLayout.of(nn.Linear(3, 2))
    assert torch.equal(layout.flatten([None, torch.ones(2)]), torch.tensor([0.0] * 6 + [1.0] * 2))


def test_half_precision_parameters_have_float32_vectors():
    layout = ParameterLayout.of(nn.Linear(3, 2).half())
    assert layout.dtype == torch.float32
    assert layout.flatten([torch.ones(2, 3).half(), torch.ones(2).half()]).dtype == torch.float32
    assert layout.unflatten(torch.ones(8))[0].dtype == torch.float16


def test_write_copies_into_the_parameters():
    model = nn.Linear(3, 2)
    layout = ParameterLayout.of(model)
    layout.write(model.parameters(), torch.arange(8.0))
    assert torch.equal(model.bias, torch.tensor([6.0, 7.0]))


@pytest.mark.parametrize(
    ("error", "pattern", "call"),
    [
        (ValueError, r"shape \(8,\), got \(7,\)", lambda layout: layout.unflatten(torch.ones(7))),
        (ValueError, "needs 2 tensors", lambda layout: layout.flatten([torch.ones(2, 3)])),
        (ValueError, r"'bias' must have shape \(2,\)", lambda layout: layout.flatten([None, torch.ones(3)])),
        (ValueError, "missing or unknown: bias", lambda layout: layout.flatten({"weight": torch.ones(2, 3)})),
        (KeyError, "known: weight, bias", lambda layout: layout.coordinates("w")),
    ],
)
def test_errors_name_what_is_wrong(error, pattern, call):
    with pytest.raises(error, match=pattern):
        call(ParameterLayout.of(nn.Linear(3, 2)))


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_complex_parameters_are_refused():
    model = nn.Linear(3, 2).to(torch.complex64)
    with pytest.raises(ValueError, match="real floating point"):
        ParameterLayout.of(model)
