"""The search for a smallest input that breaks an identity, by Hypothesis, from a plain function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis.errors import Flaky
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from curvlib.operators import LinearOperator
from curvlib.testing.identities import IdentityError


def search(strategy: SearchStrategy, check: Callable[[Any], None], examples: int) -> None:
    """Run a check on drawn inputs, always the same ones; its error shows the smallest input that breaks an identity.

    PyTorch's global random numbers are afterwards what they were.

    Raises:
        IdentityError: the check's, with the example.
    """
    failed: list[tuple[Any, IdentityError]] = []

    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        derandomize=True,
        report_multiple_bugs=False,
        verbosity=Verbosity.quiet,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(drawn: Any) -> None:
        try:
            check(drawn)
        except IdentityError as error:
            # one identity at a time, or a search for a smaller input would end with another one
            if failed and error.identity != failed[0][1].identity:
                return
            failed.append((drawn, error))
            raise

    error = None
    with torch.random.fork_rng(devices=[]):
        try:
            run()
        except IdentityError:
            # Hypothesis ends with the smallest example
            drawn, error = failed[-1]
            note = ""
        except Flaky:
            if not failed:
                raise
            drawn, error = failed[0]
            note = "\n(not every time: the outcome depends on something outside of this input, such as earlier calls)"
    if error is not None:
        raise IdentityError(error.subject, error.identity, error.problem, shown(drawn) + note) from error.__cause__


def shown(value: Any) -> str:
    """Return a drawn input in words, the tensors of operators included."""
    if isinstance(value, LinearOperator) and is_dataclass(value):
        inside = ", ".join(f"{field.name}={shown(getattr(value, field.name, None))}" for field in fields(value))
        return f"{type(value).__name__}({inside})"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(shown, value)) + ")"
    if isinstance(value, Tensor) and value.numel() > 64:
        return f"tensor{tuple(value.shape)}"
    return repr(value)
