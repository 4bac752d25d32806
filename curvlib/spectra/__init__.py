r"""Functions of operators, and what products alone tell about a spectrum, each estimate with its error.

By structure:

==========================  ==================================================================================
:func:`matrix_power`        (C + damping I)^p for real p; :func:`matrix_sqrt` for p = 1/2
:class:`DampedPower`        (C + damping I)^-alpha as a solver, for preconditioners
:func:`matrix_function`     f(C) for any function of the eigenvalues
:func:`sample`              draws of N(0, C + damping I)
:func:`sample_inverse`      draws of N(0, (C + damping I)^-1)
==========================  ==================================================================================

From products, for every operator; call a strategy with the operator and, if need be, a generator:

===========================  =================================================================================
:class:`Hutchinson`          the trace, an error that falls as 1 / sqrt(products) whatever the spectrum
:class:`HutchPlusPlus`       the trace, for spectra that decay
:class:`XTrace`              the trace, for spectra that decay: the most accurate of the three
:class:`SquaredFrobenius`    \|C\|_F^2
:class:`BKSDiagonal`         the diagonal
:class:`XDiag`               the diagonal, for spectra that decay
:class:`Lanczos`             eigenpairs at the ends of the spectrum
:class:`SpectralDensity`     the distribution of all eigenvalues, log det, traces of functions
===========================  =================================================================================
"""

from curvlib.spectra.density import SpectralDensity
from curvlib.spectra.diagonal import BKSDiagonal, DiagonalEstimator, XDiag
from curvlib.spectra.ends import BothEnds, Largest, LargestMagnitude, Smallest, SpectrumEnd
from curvlib.spectra.estimate import Estimate
from curvlib.spectra.function import NoStructureError, matrix_function
from curvlib.spectra.lanczos import Eigenpairs, Lanczos
from curvlib.spectra.measure import Quadrature, SpectralMeasure
from curvlib.spectra.power import DampedPower, matrix_power, matrix_sqrt
from curvlib.spectra.probes import Normal, ProbeDistribution, Rademacher, Sphere
from curvlib.spectra.sampling import sample, sample_inverse
from curvlib.spectra.trace import Hutchinson, HutchPlusPlus, SquaredFrobenius, TraceEstimator, XTrace

__all__ = [
    "BKSDiagonal",
    "BothEnds",
    "DampedPower",
    "DiagonalEstimator",
    "Eigenpairs",
    "Estimate",
    "HutchPlusPlus",
    "Hutchinson",
    "Lanczos",
    "Largest",
    "LargestMagnitude",
    "NoStructureError",
    "Normal",
    "ProbeDistribution",
    "Quadrature",
    "Rademacher",
    "Smallest",
    "SpectralDensity",
    "SpectralMeasure",
    "SpectrumEnd",
    "Sphere",
    "SquaredFrobenius",
    "TraceEstimator",
    "XDiag",
    "XTrace",
    "matrix_function",
    "matrix_power",
    "matrix_sqrt",
    "sample",
    "sample_inverse",
]
