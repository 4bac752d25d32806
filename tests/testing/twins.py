"""What the tests of broken twins share."""

import re

import pytest

from curvlib.testing import IdentityError


def broken(identity):
    """The error names this identity, and where inputs are drawn it shows the smallest."""
    return pytest.raises(IdentityError, match=re.escape(identity))


def name(value):
    """The name of a class or function, for the ids of tests."""
    return getattr(value, "__name__", None)
