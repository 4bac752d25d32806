"""K-FAC's statistics with one label drawn from the model for each example, together with the gradient."""

from __future__ import annotations

import curvlinops
import torch
from backpack import backpack, extend, extensions
from torch import Tensor, nn

from benchmarks.subjects import Benchmark, Call, Subject, Target
from benchmarks.workload import AUTOENCODER, Workload
from curvlib import Fisher
from curvlib.approximations import KFAC
from curvlib.approximations.base import Statistics

_WHOLE = "curvlib: gradient and statistics, whole batch"
_EIGHTH = "curvlib: gradient, statistics on one eighth"


def _whole(workload: Workload) -> Call:
    objective, approximation = workload.objective, KFAC(Fisher())

    def both() -> tuple[Tensor, Statistics]:
        evaluation = objective.at(workload.batch)
        return evaluation.gradient(), approximation.statistics(evaluation)

    return both


def _whole_unlinearised(workload: Workload) -> Call:
    objective, approximation = workload.objective, KFAC(Fisher())

    def both() -> tuple[Tensor, Statistics]:
        # Without exact products to come, the backward pass need not keep a graph of its own.
        evaluation = objective.at(workload.batch, linearize=False)
        return evaluation.gradient(), approximation.statistics(evaluation)

    return both


def _eighth(workload: Workload) -> Call:
    objective, approximation = workload.objective, KFAC(Fisher())
    part = workload.first(max(1, workload.inputs.shape[0] // 8))

    def both() -> tuple[Tensor, Statistics]:
        gradient = objective.at(workload.batch).gradient()
        return gradient, approximation.statistics(objective.at(part, linearize=False))

    return both


def _statistics_alone(workload: Workload) -> Call:
    objective, approximation = workload.objective, KFAC(Fisher())
    return lambda: approximation.statistics(objective.at(workload.batch, linearize=False))


def by_backpack(workload: Workload) -> Call:
    """BackPACK's gradient and factors, with one drawn label for each example."""
    model, loss = extend(workload.model), extend(workload.loss)

    def both() -> list[tuple[Tensor, list[Tensor]]]:
        model.zero_grad(set_to_none=True)
        value = loss(model(workload.inputs), workload.targets)
        with backpack(extensions.KFAC(mc_samples=1)):
            value.backward()
        return [(parameter.grad, parameter.kfac) for parameter in model.parameters()]

    return both


def by_curvlinops(workload: Workload) -> Call:
    """Curvlinops' factors of convolutions and linear layers: batch norms have none there."""
    affine = [module for module in workload.model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    operator = curvlinops.KFACLinearOperator(
        workload.model,
        workload.loss,
        [parameter for module in affine for parameter in module.parameters()],
        [workload.batch],
        fisher_type="mc",
        mc_samples=1,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    return operator.compute_kronecker_factors


def _factor_products(workload: Workload) -> Call:
    """The matrix products A^T A and G^T G of all layers alone, as general products: a bound to compare with."""
    widths = [workload.inputs.shape[1]]
    widths += [module.out_features for module in workload.model.children() if isinstance(module, nn.Linear)]
    examples, device = workload.inputs.shape[0], workload.inputs.device
    values = [torch.rand(examples, width, device=device) for width in widths]
    return lambda: [X.T @ X for X in (*values[:-1], *values[1:])]


KFAC_STATISTICS = Benchmark(
    name="kfac-statistics",
    title="K-FAC statistics with the gradient, auto-encoder",
    problem=AUTOENCODER,
    subjects=(
        Subject(name=_WHOLE, prepare=_whole),
        Subject(name="curvlib: the same without linearisation", prepare=_whole_unlinearised),
        Subject(name=_EIGHTH, prepare=_eighth),
        Subject(name="curvlib: statistics alone", prepare=_statistics_alone),
        Subject(name="BackPACK: gradient and statistics, whole batch", prepare=by_backpack),
        Subject(name="curvlinops: statistics alone", prepare=by_curvlinops),
        Subject(name="PyTorch: the products X^T X alone", prepare=_factor_products),
    ),
    targets=(Target(subject=_WHOLE, at_most=2.1), Target(subject=_EIGHTH, at_most=1.3)),
)
