"""Tests for classes of your own: strategies to draw inputs from, and suites of identities that every class keeps.

=============================  ==================================================================
:func:`check_operator`         products, entries, inverses and arithmetic of one symmetric matrix
:func:`check_approximation`    scale, batches, side effects, and where it is exact or unbiased
:func:`check_layer`            the per-example gradients of a layer rule, and its blocks
:func:`check_solver`           the inverse over condition numbers, and what has none
:func:`check_loss`             derivatives, the Hessian's root, drawn gradients, reductions
=============================  ==================================================================

Each is one line in a test or script, and raises :class:`IdentityError`, an ``AssertionError`` that names the identity
and shows the smallest input that was found to break it.

It needs the optional dependency of ``pip install "curvlib[testing]"``.
"""

from __future__ import annotations

try:
    import hypothesis  # noqa: F401
except ImportError as error:
    raise ImportError('curvlib.testing needs Hypothesis, which is missing: pip install "curvlib[testing]"') from error

from curvlib.testing.approximation_suite import check_approximation
from curvlib.testing.exactness import EVERYWHERE, NOWHERE, ON_BLOCKS, ON_DIAGONAL, ON_TRACE, ONE_EXAMPLE, ExactOn
from curvlib.testing.identities import IdentityError, Outcome, Subject, UntestedWarning
from curvlib.testing.layer_suite import check_layer
from curvlib.testing.layers import (
    LayerCase,
    attentions,
    convolutions,
    embedding_bags,
    embeddings,
    norms,
    transposed_convolutions,
)
from curvlib.testing.loss_suite import check_loss
from curvlib.testing.losses import EVERY_LOSS, LOSSES, LossCase
from curvlib.testing.networks import mlp, networks
from curvlib.testing.numbers import Draw, draw, draws, kronecker_factors, lag_moments, semidefinite_matrices
from curvlib.testing.operator_suite import check_operator
from curvlib.testing.oracles import Network
from curvlib.testing.recurrent import recurrent_cells, recurrent_layers
from curvlib.testing.solver_suite import check_solver

__all__ = [
    "EVERYWHERE",
    "EVERY_LOSS",
    "LOSSES",
    "NOWHERE",
    "ONE_EXAMPLE",
    "ON_BLOCKS",
    "ON_DIAGONAL",
    "ON_TRACE",
    "Draw",
    "ExactOn",
    "IdentityError",
    "LayerCase",
    "LossCase",
    "Network",
    "Outcome",
    "Subject",
    "UntestedWarning",
    "attentions",
    "check_approximation",
    "check_layer",
    "check_loss",
    "check_operator",
    "check_solver",
    "convolutions",
    "draw",
    "draws",
    "embedding_bags",
    "embeddings",
    "kronecker_factors",
    "lag_moments",
    "mlp",
    "networks",
    "norms",
    "recurrent_cells",
    "recurrent_layers",
    "semidefinite_matrices",
    "transposed_convolutions",
]
