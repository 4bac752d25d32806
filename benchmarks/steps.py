"""What solvers and whole optimizer steps cost on the auto-encoder; for information, without targets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.subjects import Benchmark, Call, Subject
from benchmarks.workload import AUTOENCODER, Workload
from curvlib import Fisher
from curvlib.approximations import KFAC
from curvlib.operators import LinearOperator
from curvlib.optimizers import hessian_free, kfac
from curvlib.solvers import FactoredTikhonov, damped_inverse, eigendecompose

_DAMPING = 1.0
# One period of the K-FAC preset: the inverse is made anew every 20 steps.
_KFAC_STEPS = 20


def _operator(workload: Workload) -> LinearOperator:
    return KFAC(Fisher()).estimate(workload.objective.at(workload.batch, linearize=False))


def _factored(workload: Workload) -> Call:
    operator, solver = _operator(workload), FactoredTikhonov()
    return lambda: solver(operator, _DAMPING)


def _eigendecomposition(workload: Workload) -> Call:
    operator = _operator(workload)
    return lambda: eigendecompose(operator)


def _new_damping(workload: Workload) -> Call:
    operator = eigendecompose(_operator(workload))
    return lambda: damped_inverse(operator, _DAMPING)


def _apply_factored(workload: Workload) -> Call:
    inverse, vector = FactoredTikhonov()(_operator(workload), _DAMPING), workload.vectors(1).squeeze(1)
    return lambda: inverse @ vector


def _apply_exact(workload: Workload) -> Call:
    inverse, vector = damped_inverse(eigendecompose(_operator(workload)), _DAMPING), workload.vectors(1).squeeze(1)
    return lambda: inverse @ vector


def _kfac_steps(workload: Workload) -> Call:
    optimizer = kfac(workload.objective)
    for _ in range(3):  # the first three steps make a new inverse each
        optimizer.step(workload.batch)
    return lambda: [optimizer.step(workload.batch) for _ in range(_KFAC_STEPS)]


def _hessian_free_step(workload: Workload) -> Call:
    objective = workload.objective
    start: list[Tensor] = [parameter.detach().clone() for parameter in workload.model.parameters()]

    def first_step() -> Any:
        with torch.no_grad():
            for parameter, value in zip(workload.model.parameters(), start, strict=True):
                parameter.copy_(value)
        return hessian_free(objective).step(workload.batch)

    return first_step


def _iterations(result: Any) -> str:
    return f"{result.iterations} iterations of conjugate gradients, {result.gradient_evaluations:.1f} gradients counted"


def _mean_work(results: list[Any]) -> str:
    work = sum(result.gradient_evaluations for result in results) / len(results)
    return f"mean of {len(results)} steps with one new inverse, {work:.2f} gradients counted without solving"


STEPS = Benchmark(
    name="steps",
    title="Solvers and optimizer steps, auto-encoder (for information)",
    problem=AUTOENCODER,
    subjects=(
        Subject(name="curvlib: FactoredTikhonov inverse of K-FAC", prepare=_factored, most_repeats=8),
        Subject(name="curvlib: eigendecomposition of K-FAC", prepare=_eigendecomposition, most_repeats=4),
        Subject(name="curvlib: damped_inverse after it, new damping", prepare=_new_damping),
        Subject(name="curvlib: factored inverse @ vector", prepare=_apply_factored),
        Subject(name="curvlib: exact damped inverse @ vector", prepare=_apply_exact),
        Subject(
            name="curvlib: K-FAC step (preset)",
            prepare=_kfac_steps,
            units=_KFAC_STEPS,
            most_repeats=2,
            note=_mean_work,
        ),
        Subject(
            name="curvlib: first Hessian-free step (preset)",
            prepare=_hessian_free_step,
            most_repeats=2,
            note=_iterations,
        ),
    ),
)
