"""Makes an inspection."""

from __future__ import annotations

import torch

import curvlib
from curvlib.approximations import Exact
from curvlib.experiments.clock import TrainingClock
from curvlib.experiments.curvatures import INSPECTED_MATRICES
from curvlib.experiments.inspection import Inspected, Inspection, Preparation, prepare
from curvlib.experiments.inspection_dense import DenseWork
from curvlib.experiments.inspection_estimate import EstimateWork, most_products
from curvlib.experiments.inspection_memory import exact_products
from curvlib.experiments.inspection_work import Report, exact_matrix_can_be_made


def inspect_evaluation(
    evaluation: curvlib.Evaluation, inspection: Inspection, report: Report = lambda what, part: None
) -> Inspected:
    """Return the exact matrix beside its approximations on a batch.

    Args:
        evaluation: the objective on the batch.
        inspection: what to look at.
        report: told what is done, and the part of it that is done (nobody by default); may raise
            :class:`~curvlib.experiments.StopInspection`, and the approximations that are done by then are returned.

    Raises:
        ExperimentError: the layers are unknown or too large, no approximation applies, or the exact matrix cannot be
            made of this model.
        StopInspection: ``report`` raised it before any approximation was done.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> at = curvlib.Objective(model, nn.MSELoss()).at((torch.randn(9, 3), torch.zeros(9, 2)))
        >>> seen = inspect_evaluation(at, Inspection(approximations=("block-diagonal",), layers=("2",)))
        >>> seen.selection.size, seen.rows[0].error < 1e-5
        (10, True)
    """
    work = EstimateWork if inspection.estimate else DenseWork
    return work(evaluation, inspection, prepare(evaluation, inspection), report).run()


def product_seconds(evaluation: curvlib.Evaluation, inspection: Inspection) -> float:
    """Return how long a product with the exact matrix takes, so that one can be told before all of them are made.

    Raises:
        ExperimentError: the exact matrix cannot be made of this model.
    """
    layout = evaluation.layout
    vector = torch.ones(layout.size, dtype=layout.dtype, device=layout.device)
    draws = torch.Generator(layout.device).manual_seed(inspection.seed)
    with exact_matrix_can_be_made():
        operator = Exact(INSPECTED_MATRICES.get(inspection.matrix)).estimate(evaluation, draws)
        operator @ vector  # the first one prepares the others
        clock = TrainingClock(layout.device)
        with clock.running():
            operator @ vector
    return clock.seconds


def products_of(inspection: Inspection, preparation: Preparation, evaluation: curvlib.Evaluation) -> int:
    """Return the most products with the exact matrix that an inspection makes.

    Args:
        inspection: what to look at.
        preparation: what is known of it.
        evaluation: the objective on a batch.
    """
    density, selection = inspection.density, preparation.selection
    made = [choice.approximation for choice in preparation.choices if choice.approximation is not None]
    own = sum(exact_products(approximation, evaluation) for approximation in made)
    spectrum = 0 if density is None else density.steps * density.probes
    if inspection.estimate:
        return own + most_products(selection.size, len(made)) + spectrum
    return own + selection.size + (0 if selection.is_whole else spectrum)
