"""Identities that a class is held to, and the error that names the one that broke.

A :class:`Subject` evaluates each identity by itself, so that an error of the class under test is reported as a broken
identity as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

# Sums of a few hundred products lose a few hundred eps at worst: 1e-12 in float64, 6e-4 in float32.
_ROUNDINGS = 5e3


class IdentityError(AssertionError):
    """An identity that a class does not keep.

    Attributes:
        subject: what was tested, in words.
        identity: the identity that broke.
        problem: what was expected and what came.
        example: the smallest input that was found to break it, in words; "" where there is no choice of inputs.
    """

    def __init__(self, subject: str, identity: str, problem: str, example: str = "") -> None:
        self.subject, self.identity, self.problem, self.example = subject, identity, problem, example
        where = f"\n\nsmallest input that was found:\n{example}" if example else ""
        super().__init__(f"{subject} breaks the identity: {identity}\n\n{problem}{where}")


class UntestedWarning(UserWarning):
    """A suite was not told what it needs to test an important property."""


@dataclass(frozen=True)
class Outcome:
    """What a suite has found, where nothing broke; ``str(outcome)`` says in words what was not tested.

    Attributes:
        subject: what was tested.
        kept: the identities that held.
        untested: the properties that nothing was said of, so that errors there stay unseen.
    """

    subject: str
    kept: tuple[str, ...]
    untested: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.subject} keeps {len(self.kept)} identities"]
        return "\n".join([*lines, *(f"  NOT TESTED: {line}" for line in self.untested)])


def rounding(dtype: torch.dtype) -> float:
    """Return the relative difference that rounding may make: 1e-12 in float64, 6e-4 in float32."""
    return _ROUNDINGS * torch.finfo(dtype).eps


class Subject:
    """What is under test, by name; each method is one identity, and raises :class:`IdentityError` where it breaks.

    A value may be given as a function, so that an error of the class under test names the identity too.

    Example:
        >>> Subject("Half").equal("2 f(x) = x", lambda: 2 * torch.tensor(0.6), torch.tensor(1.0))
        Traceback (most recent call last):
        ...
        curvlib.testing.identities.IdentityError: Half breaks the identity: 2 f(x) = x
        ...
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.kept: dict[str, None] = {}  # in the order of the first time

    def value(self, identity: str, given: Any) -> Any:
        """Return what ``given`` is, or gives when it is called."""
        try:
            return given() if callable(given) else given
        except IdentityError:
            raise
        except Exception as error:
            raise IdentityError(self.name, identity, f"raised {type(error).__name__}: {error}") from error

    def equal(
        self,
        identity: str,
        got: Tensor | Callable[[], Tensor],
        expected: Tensor | Callable[[], Tensor],
        *,
        scale: Tensor | float = 0.0,
        tolerance: float | None = None,
    ) -> None:
        """Check that two tensors agree in shape, type and device, and in values up to rounding.

        Args:
            identity: the equation in words.
            got: what the class under test gives.
            expected: what it should be.
            scale: the size of the numbers that were added up, where these may cancel; differences count relative to it
                or to the largest expected entry, whichever is more.
            tolerance: the largest relative difference; by default that of rounding.
        """
        actual, wanted = self.value(identity, got), self.value(identity, expected)
        if not isinstance(actual, Tensor):
            self.fail(identity, f"expected a tensor {tuple(wanted.shape)}, got {actual!r}")
        for name, have, want in (
            ("shape", tuple(actual.shape), tuple(wanted.shape)),
            ("dtype", actual.dtype, wanted.dtype),
            ("device", actual.device.type, wanted.device.type),
        ):
            if have != want:
                self.fail(identity, f"expected the {name} {want}, got {have}")
        if not wanted.numel():
            self.kept[identity] = None
            return
        actual, wanted = actual.detach(), wanted.detach()
        tolerance = rounding(wanted.dtype) if tolerance is None else tolerance
        bound = tolerance * max(float(scale), float(wanted.abs().max()))
        difference = float((actual - wanted).abs().max())
        if not difference <= bound:  # true for NaN
            self.fail(
                identity,
                f"expected {_shown(wanted)}\ngot      {_shown(actual)}\nlargest difference {difference:.3g}, allowed "
                f"{bound:.3g}",
            )
        self.kept[identity] = None

    def same(self, identity: str, got: Tensor | Callable[[], Tensor], expected: Tensor) -> None:
        """Check that two tensors are equal bit for bit."""
        actual = self.value(identity, got)
        if actual.shape != expected.shape or actual.dtype != expected.dtype or not torch.equal(actual, expected):
            self.fail(identity, f"expected, bit for bit, {_shown(expected)}\ngot {_shown(actual)}")
        self.kept[identity] = None

    def holds(self, identity: str, condition: bool, problem: str) -> None:
        """Check that a condition is true; ``problem`` says what was expected and what came."""
        if not condition:
            self.fail(identity, problem)
        self.kept[identity] = None

    def refuses(
        self, identity: str, call: Callable[[], Any], errors: tuple[type[Exception], ...], *words: str
    ) -> Exception:
        """Check that a call raises one of the errors, with a message that has all of the words; return it."""
        kinds = " or ".join(error.__name__ for error in errors)
        try:
            result = call()
        except errors as error:
            missing = [word for word in words if word not in str(error)]
            if missing:
                self.fail(identity, f"expected a message that names {', '.join(missing)}, got {str(error)!r}")
            self.kept[identity] = None
            return error
        except Exception as error:
            raise IdentityError(
                self.name, identity, f"expected {kinds}, got {type(error).__name__}: {error}"
            ) from error
        self.fail(identity, f"expected {kinds}, got {result!r}")

    def fail(self, identity: str, problem: str) -> NoReturn:
        """Raise the error of a broken identity."""
        raise IdentityError(self.name, identity, problem)


def described(given: object) -> str:
    """Return in words what was given in place of an instance."""
    return f"the class {given.__name__}: give an instance" if isinstance(given, type) else f"{given!r}"


def _shown(x: Tensor) -> str:
    """Return a tensor in words, of a large one its corner alone."""
    if x.numel() <= 64:
        return repr(x.cpu())
    corner = x[tuple(slice(3) for _ in x.shape)]
    return f"a tensor {tuple(x.shape)} that begins {corner.cpu()!r}"
