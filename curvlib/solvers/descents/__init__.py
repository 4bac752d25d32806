"""Descents: how a gradient, a curvature, a damping and a radius give a step.

==============================  ===============================================================================
:class:`DampedNewton`           -(C + damping I)^-1 g by any solver; no radius
:class:`Steihaug`               conjugate gradients up to the boundary; products alone, any definiteness
:class:`Dogleg`                 gradient step, then towards the Newton step; positive definite C + damping I
:class:`MoreSorensen`           exact, hard case included; operators whose structure gives eigenvectors
:class:`TwoDimensionalSubspace` exact in the plane of gradient and truncated Newton step; products alone
==============================  ===============================================================================
"""

from curvlib.solvers.descents.dogleg import Dogleg
from curvlib.solvers.descents.eigenbasis import Coefficients, coefficients
from curvlib.solvers.descents.more_sorensen import MoreSorensen
from curvlib.solvers.descents.newton import DampedNewton
from curvlib.solvers.descents.problem import Descent, DescentStep, Subproblem
from curvlib.solvers.descents.region import EuclideanNorm, PreconditionerNorm, RegionNorm
from curvlib.solvers.descents.steihaug import Steihaug
from curvlib.solvers.descents.subspace import TwoDimensionalSubspace

__all__ = [
    "Coefficients",
    "DampedNewton",
    "Descent",
    "DescentStep",
    "Dogleg",
    "EuclideanNorm",
    "MoreSorensen",
    "PreconditionerNorm",
    "RegionNorm",
    "Steihaug",
    "Subproblem",
    "TwoDimensionalSubspace",
    "coefficients",
]
