"""Records of a comparison: one evaluation each, one line of JSON each."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, NoReturn


class Status(str, Enum):
    """Where a run stands after a record."""

    RUNNING = "running"
    FINISHED = "finished"
    DIVERGED = "diverged"
    FAILED = "failed"

    @property
    def is_healthy(self) -> bool:
        """Whether the method has reached, or can still reach, the end of its budget."""
        return self in (Status.RUNNING, Status.FINISHED)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One evaluation of one run.

    Args:
        method: name of the method.
        step: parameter updates so far.
        epoch: passes over the training data so far.
        seconds: of training alone, so far.
        gradients: work so far, in gradients of one batch.
        loss: the objective, l2 included, on the evaluated training examples; None where it is not finite.
        train_metric: the problem's metric on the evaluated training examples.
        test_metric: the same on the evaluated test examples.
        batch_loss: objective of the last batch before its step, as the method itself saw it.
        damping: of the last step, where the method has one.
        ratio: actual over predicted reduction of the last step, where the method knows it.
        accepted: whether the last step was taken, where the method can refuse one.
        solver_iterations: of all steps so far, where the method has an iterative solver such as conjugate gradients.
        radius: of the trust region at the last step, where the method has one.
        status: where the run stands.
        note: why the method did not reach the end of its budget.
    """

    method: str
    step: int
    epoch: float
    seconds: float
    gradients: float
    loss: float | None
    train_metric: float | None
    test_metric: float | None
    batch_loss: float | None = None
    damping: float | None = None
    ratio: float | None = None
    accepted: bool | None = None
    solver_iterations: int | None = None
    radius: float | None = None
    status: Status = Status.RUNNING
    note: str | None = None

    def to_json(self) -> str:
        """Return one line of standard JSON; numbers that are not finite become null."""
        values = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in dataclasses.asdict(self).items()
        }
        return json.dumps({**values, "status": self.status.value}, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Return the record that a line of JSON holds.

        Raises:
            ValueError: the line is no record.
        """
        try:
            values = json.loads(line, parse_constant=_refuse_constant)
        except ValueError as error:
            raise ValueError(f"no record: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"no record: expected an object of JSON, got {values!r}")
        _check_fields(values)
        return cls(**{**values, "status": Status(values["status"])})


# What JSON holds where a field has a type, and how a message calls it.
_JSON_TYPES: Mapping[type, tuple[tuple[type, ...], str]] = {
    int: ((int,), "an integer"),
    float: ((float, int), "a number"),
    str: ((str,), "a text"),
    bool: ((bool,), "true or false"),
    Status: ((str,), "one of " + ", ".join(status.value for status in Status)),
    types.NoneType: ((types.NoneType,), "null"),
}


def _check_fields(values: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the first field which is unknown, missing, or of another type."""
    hints = typing.get_type_hints(Record)
    needed = {entry.name for entry in dataclasses.fields(Record) if entry.default is dataclasses.MISSING} | {"status"}
    for name in values:
        if name not in hints:
            raise ValueError(f"no record: {name!r} is no field, the fields are {', '.join(hints)}")
    for name, hint in hints.items():
        if name not in values:
            if name in needed:
                raise ValueError(f"no record: the field {name!r} is missing")
            continue
        kinds = [_JSON_TYPES[kind] for kind in typing.get_args(hint) or (hint,)]
        if not any(_is_instance(values[name], accepted) for accepted, _ in kinds) or (
            hint is Status and values[name] not in [status.value for status in Status]
        ):
            expected = " or ".join(words for _, words in kinds)
            raise ValueError(f"no record: the field {name!r} must be {expected}, got {values[name]!r}")


def _is_instance(value: object, accepted: tuple[type, ...]) -> bool:
    # In Python, but not in JSON, true is an integer.
    return isinstance(value, accepted) and (bool in accepted or not isinstance(value, bool))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not standard JSON")
