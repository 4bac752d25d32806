"""Operators to and from dictionaries that ``torch.load(..., weights_only=True)`` reads.

An operator that is a dataclass is its fields: tensors, numbers, strings, None, dtypes, devices, operators, and tuples
of those. A dtype or a device is kept as a tagged string, an operator as its own dictionary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

_OPERATOR, _FIELDS, _DTYPE, _DEVICE = "operator", "fields", "dtype", "device"
_HOME = __name__.partition(".")[0]
_CLASSES: dict[str, type] = {}


class OperatorError(RuntimeError):
    """An operation that the structure of an operator does not give."""


def class_name(cls: type) -> str:
    """Return the name under which a class is saved: curvlib's by class name, which survives a move, others' in full."""
    own = cls.__module__.partition(".")[0] == _HOME
    return cls.__name__ if own else f"{cls.__module__}.{cls.__qualname__}"


def register_class(cls: type) -> None:
    """Make a class known to :func:`operator_from_state_dict`; defining a subclass of LinearOperator does this."""
    _CLASSES[class_name(cls)] = cls


def check_entries(owner: str, state: object, entries: Iterable[str]) -> None:
    """Refuse a state dictionary that lacks one of the entries, before anything of it is used.

    Raises:
        ValueError: names what the state is of and what it lacks.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"the state of {owner} must be a dictionary, got {type(state).__name__}: it is incomplete.")
    missing = sorted(set(entries) - state.keys())
    if missing:
        raise ValueError(f"the state of {owner} is incomplete: it lacks {', '.join(missing)}. Nothing was changed.")


def state_from_operator(operator: object) -> dict[str, Any]:
    """Return the dictionary of a dataclass operator.

    Raises:
        OperatorError: the operator is no dataclass, or a field holds something that has no saved form.
    """
    if not is_dataclass(operator):
        raise OperatorError(
            f"state_dict is not available for {type(operator).__name__}: it is not a dataclass. Make it a frozen "
            "dataclass whose fields are tensors, numbers and operators."
        )
    names = _saved_fields(type(operator))
    where = type(operator).__name__
    return {
        _OPERATOR: class_name(type(operator)),
        _FIELDS: {name: _encode(getattr(operator, name), f"{where}.{name}") for name in names},
    }


def operator_from_state_dict(state: Mapping[str, Any], *, device: torch.device | str | None = None) -> Any:
    """Return the operator that :meth:`LinearOperator.state_dict` described.

    Args:
        state: the dictionary, for example from ``torch.load(path, weights_only=True)``.
        device: where the tensors go; None leaves them where they are.

    Returns:
        An operator of the saved class with equal fields.

    Raises:
        ValueError: the dictionary does not describe an operator or lacks a field of it, or its class is not defined in
            this process.

    Example:
        >>> from curvlib.operators import Diagonal
        >>> operator_from_state_dict(Diagonal(torch.ones(2)).state_dict()).to_dense()
        tensor([[1., 0.],
                [0., 1.]])
    """
    if not isinstance(state, Mapping) or set(state) != {_OPERATOR, _FIELDS}:
        keys = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"state must come from an operator's state_dict() (keys 'operator' and 'fields'), got {keys}.")
    cls = _CLASSES.get(state[_OPERATOR])
    if cls is None:
        raise ValueError(
            f"state names the operator class {state[_OPERATOR]!r}, which is not defined here: import the module that "
            f"defines it. Known classes: {', '.join(sorted(_CLASSES))}."
        )
    check_entries(f"the operator {state[_OPERATOR]}", state[_FIELDS], _saved_fields(cls))
    return cls(**{name: _decode(value, device) for name, value in state[_FIELDS].items()})


def _saved_fields(cls: Any) -> list[str]:
    return [field.name for field in fields(cls) if field.init]


def _encode(value: Any, where: str) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.dtype):
        return {_DTYPE: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {_DEVICE: str(value)}
    if isinstance(value, (tuple, list)):
        return tuple(_encode(item, f"{where}[{i}]") for i, item in enumerate(value))
    if class_name(type(value)) in _CLASSES:
        return value.state_dict()
    raise OperatorError(
        f"state_dict is not available: {where} is a {type(value).__name__}, which has no saved form. Convert the "
        "operator first, for example Dense(C.to_dense())."
    )


def _decode(value: Any, device: torch.device | str | None) -> Any:
    if isinstance(value, Tensor):
        return value if device is None else value.to(device)
    if isinstance(value, (tuple, list)):
        return tuple(_decode(item, device) for item in value)
    if isinstance(value, Mapping):
        return _decode_mapping(value, device)
    return value


def _decode_mapping(value: Mapping[str, Any], device: torch.device | str | None) -> Any:
    if set(value) == {_DTYPE}:
        return getattr(torch, value[_DTYPE])
    if set(value) == {_DEVICE}:
        return torch.device(value[_DEVICE]) if device is None else torch.device(device)
    return operator_from_state_dict(value, device=device)
