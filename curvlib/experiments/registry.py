"""A table of named things: where problems, methods, curvature matrices and approximations are looked up."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Generic, TypeVar

from curvlib.experiments.errors import ExperimentError

T = TypeVar("T")


class Registry(Generic[T]):
    """Named values of one kind, in the order in which they were registered.

    Example:
        >>> colours = Registry("colour")
        >>> colours.register("red", 0xFF0000)
        >>> colours.get("red")
        16711680
        >>> colours.get("rde")
        Traceback (most recent call last):
        ...
        curvlib.experiments.errors.ExperimentError: Unknown colour 'rde'; did you mean 'red'? Known: red.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._values: dict[str, T] = {}

    def register(self, name: str, value: T) -> None:
        """Add a value under a new name.

        Raises:
            ExperimentError: the name is taken.
        """
        if name in self._values:
            raise ExperimentError(f"A {self.kind} named {name!r} is registered already: choose another name.")
        self._values[name] = value

    def get(self, name: str) -> T:
        """Return the value of a name.

        Raises:
            ExperimentError: nothing has that name; the message lists all names.
        """
        if name in self._values:
            return self._values[name]
        close = difflib.get_close_matches(name, self._values, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ExperimentError(f"Unknown {self.kind} {name!r}{hint} Known: {', '.join(self._values)}.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def items(self) -> Iterator[tuple[str, T]]:
        """Yield (name, value) in order of registration."""
        yield from self._values.items()
