"""Operators through torch.save and torch.load(weights_only=True)."""

import io
from dataclasses import dataclass

import pytest
import torch
from operator_cases import CASES, close, draw
from torch import Tensor

from curvlib.operators import (
    BlockDiagonal,
    Diagonal,
    Identity,
    LinearOperator,
    MatrixFree,
    OperatorError,
    Scaled,
    operator_from_state_dict,
)

UNSAVED = {"matrix_free", "matrix_free_with_form", "scaled_matrix_free", "block_diagonal", "kronecker_of_any"}


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", sorted(CASES.keys() - UNSAVED))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip(name, dtype, device):
    C, _ = CASES[name](draw(1, device, dtype=dtype))
    again = operator_from_state_dict(through_a_file(C.state_dict()))
    assert type(again) is type(C)
    assert repr(again) == repr(C)
    assert torch.equal(again.to_dense(), C.to_dense())


@pytest.mark.parametrize("name", sorted(UNSAVED))
def test_functions_are_refused_by_name(name):
    C, _ = CASES[name](draw(1, torch.device("cpu")))
    with pytest.raises(OperatorError, match="state_dict is not available for MatrixFree: it holds a function"):
        C.state_dict()


def test_the_state_can_move_to_another_device(device):
    C = Scaled(2.0, BlockDiagonal((Identity(2),), (torch.tensor([2, 0]),), 3))
    moved = operator_from_state_dict(C.state_dict(), device=device)
    assert moved.device.type == device.type
    close(moved.to_dense().cpu(), C.to_dense())


@dataclass(frozen=True, eq=False)
class Reflected(LinearOperator):
    """A third party's operator: I - 2 u u^T, with every kind of field."""

    u: Tensor
    parts: tuple[LinearOperator, ...]
    dtype: torch.dtype
    device: torch.device
    label: str = "reflection"
    exact: bool = True
    limit: int | None = None

    @property
    def size(self):
        return len(self.u)

    def matmat(self, V):
        return V - 2.0 * self.u.unsqueeze(1) * (self.u @ V)


def test_third_party_dataclasses_work(device):
    u = torch.tensor([0.6, 0.8], device=device)
    C = Reflected(u, (Diagonal(u), Scaled(2.0, Diagonal(u))), torch.float32, device, exact=False)
    again = operator_from_state_dict(through_a_file(C.state_dict()))
    assert (again.label, again.exact, again.limit, again.dtype) == ("reflection", False, None, torch.float32)
    assert torch.equal(again.parts[1].to_dense(), C.parts[1].to_dense())
    close(again.to_dense(), C.to_dense())


class Plain(LinearOperator):
    size = 2

    def matmat(self, V):
        return V


@dataclass(frozen=True, eq=False)
class Unsavable(LinearOperator):
    thing: object
    size: int = 2

    def matmat(self, V):
        return V


def test_what_has_no_saved_form_is_named():
    with pytest.raises(OperatorError, match="Plain: it is not a dataclass"):
        Plain().state_dict()
    with pytest.raises(OperatorError, match=r"Unsavable.thing\[1\] is a set"):
        Unsavable((1, {2})).state_dict()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"matrix": 1}, r"keys 'operator' and 'fields'\), got \['matrix'\]"),
        (3, "got int"),
        ({"operator": "Nothing", "fields": {}}, "class 'Nothing', which is not defined here.*Diagonal"),
    ],
)
def test_states_of_something_else_are_refused(state, message):
    with pytest.raises(ValueError, match=message):
        operator_from_state_dict(state)


def test_a_function_alone_is_no_state():
    with pytest.raises(OperatorError, match="MatrixFree"):
        (MatrixFree(lambda V: V, 2) + Identity(2)).state_dict()
