"""Options of methods and problems: typed, bounded dataclass fields that the command line can set by name."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator
from typing import Any

from curvlib.experiments.errors import ExperimentError

Value = int | float | str | None

# How a text asks for None, where an option may leave its value to the method.
AUTOMATIC = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """Values that an option may take.

    Args:
        at_least: smallest value, included.
        above: lower end, excluded.
        below: upper end, excluded.
        at_most: largest value, included.
    """

    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    at_most: float | None = None

    def contain(self, value: float) -> bool:
        """Whether a value is finite and inside."""
        return (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )

    def __str__(self) -> str:
        limits = (("at least", self.at_least), ("above", self.above), ("below", self.below), ("at most", self.at_most))
        return " and ".join(f"{word} {limit:g}" for word, limit in limits if limit is not None)


@dataclasses.dataclass(frozen=True)
class Choices:
    """Words that an option may be.

    Args:
        words: all of them.
    """

    words: tuple[str, ...]

    def contain(self, value: str) -> bool:
        """Whether a word is one of them."""
        return value in self.words

    def __str__(self) -> str:
        return "of " + ", ".join(self.words)


_KINDS: dict[type, str] = {int: "an integer", float: "a finite number", str: "one"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """What there is to know about one option.

    Args:
        name: of the field.
        kind: int, float or str.
        default: value when nothing is said.
        explanation: a few words.
        bounds: values that it may take.
        automatic: whether it may be None ("auto"), which leaves the value to the method.
    """

    name: str
    kind: type[int] | type[float] | type[str]
    default: Value
    explanation: str
    bounds: Bounds | Choices
    automatic: bool = False

    def check(self, owner: str, value: Any) -> None:
        """Refuse a value of another type or out of bounds, by name."""
        if self.automatic and value is None:
            return
        right_type = isinstance(value, (int, float) if self.kind is float else self.kind) and not isinstance(
            value, bool
        )
        if not right_type or not self.bounds.contain(value):
            raise ExperimentError(f"{owner}.{self.name} must be {self.expectation}, got {value!r}.")

    def parse(self, owner: str, text: str) -> Value:
        """Return the value that a text means; bounds are checked by the owner itself."""
        if self.automatic and text == AUTOMATIC:
            return None
        try:
            return self.kind(text)
        except ValueError:
            raise ExperimentError(f"{owner}.{self.name} must be {self.expectation}, got {text!r}.") from None

    @property
    def expectation(self) -> str:
        """What the option may be, in words."""
        return f"{_KINDS[self.kind]} {self.bounds}".rstrip() + (f" or {AUTOMATIC}" if self.automatic else "")


def option(default: Value, explanation: str, bounds: Bounds | Choices) -> Any:
    """Declare a dataclass field that is an option.

    Args:
        default: its default.
        explanation: a few words for the listing.
        bounds: values that it may take.
    """
    return dataclasses.field(
        default=default, metadata={"default": default, "explanation": explanation, "bounds": bounds}
    )


def check_options(owner: str, settings: Any) -> None:
    """Refuse options of a dataclass instance that have another type or are out of bounds.

    Args:
        owner: what stands in front of their names in the message.
        settings: the instance.

    Raises:
        ExperimentError: names the first one.
    """
    for entry in options_of(type(settings)):
        entry.check(owner, getattr(settings, entry.name))


def options_of(owner: type) -> Iterator[Option]:
    """Yield the options of a dataclass in order; fields that were not declared with :func:`option` are none."""
    hints = typing.get_type_hints(owner)
    for entry in dataclasses.fields(owner):
        if "bounds" not in entry.metadata:
            continue
        hint = hints[entry.name]
        kinds = typing.get_args(hint) or (hint,)
        yield Option(
            name=entry.name,
            kind=kinds[0],
            automatic=type(None) in kinds,
            default=entry.metadata["default"],
            explanation=entry.metadata["explanation"],
            bounds=entry.metadata["bounds"],
        )
