"""A table of named things: where problems, methods, curvature matrices and approximations are looked up."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Generic, TypeVar

from curvlib.experiments.errors import ExperimentError

T = TypeVar("T")


class Registry(Generic[T]):
    """Named values of one kind, in the order in which they were registered.

    Args:
        kind: what they are, for messages.
        base: a registry whose names, also later ones, come first.

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

    def __init__(self, kind: str, base: Registry[T] | None = None) -> None:
        self.kind = kind
        self._base = base
        self._values: dict[str, T] = {}

    def register(self, name: str, value: T) -> None:
        """Add a value under a new name.

        Raises:
            ExperimentError: the name is taken.
        """
        if name in self:
            raise ExperimentError(f"A {self.kind} named {name!r} is registered already: choose another name.")
        self._values[name] = value

    def get(self, name: str) -> T:
        """Return the value of a name.

        Raises:
            ExperimentError: nothing has that name; the message lists all names.
        """
        known = dict(self.items())
        if name in known:
            return known[name]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ExperimentError(f"Unknown {self.kind} {name!r}{hint} Known: {', '.join(known)}.")

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.items())

    def __contains__(self, name: object) -> bool:
        return name in set(self)

    def items(self) -> Iterator[tuple[str, T]]:
        """Yield (name, value) in order of registration, those of the base first."""
        if self._base is not None:
            yield from self._base.items()
        yield from self._values.items()
