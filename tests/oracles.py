"""The brute-force oracles of curvlib.testing under their short names."""

from curvlib.testing import Network
from curvlib.testing.oracles import hessian

__all__ = ["Network", "hessian"]
