"""Products with the exact Gauss-Newton matrix: curvlib's kept graph against libraries that differentiate anew."""

from __future__ import annotations

import curvlinops
from backpack.hessianfree.ggnvp import ggn_vector_product
from torch.nn.utils.convert_parameters import vector_to_parameters

from benchmarks.subjects import Benchmark, Call, Subject, Target
from benchmarks.workload import AUTOENCODER, SMALL_NETWORK, Problem, Workload
from curvlib import GGN
from curvlib.approximations import Exact

_PRODUCT = "curvlib: product"
_PEER = "curvlinops: product"


def _linearisation(workload: Workload) -> Call:
    """What has to be there before the first product: value, gradient, and the graph of the backward pass."""
    objective = workload.objective
    return lambda: objective.at(workload.batch).gradient()


def _product(workload: Workload) -> Call:
    evaluation = workload.objective.at(workload.batch)
    evaluation.gradient()
    operator = Exact(GGN()).estimate(evaluation)
    vector = workload.vectors(1).squeeze(1)
    return lambda: operator @ vector


def _quadratic_form(workload: Workload) -> Call:
    evaluation = workload.objective.at(workload.batch)
    evaluation.gradient()
    operator = Exact(GGN()).estimate(evaluation)
    vectors = workload.vectors(1)
    return lambda: operator.quadratic_form(vectors)


def _curvlinops_product(workload: Workload) -> Call:
    operator = curvlinops.GGNLinearOperator(
        workload.model, workload.loss, list(workload.model.parameters()), [workload.batch], check_deterministic=False
    )
    vector = workload.vectors(1).squeeze(1)
    return lambda: operator @ vector


def _backpack_product(workload: Workload) -> Call:
    """BackPACK's product with the whole matrix, on a kept forward graph; its GGNMP gives diagonal blocks alone."""
    outputs = workload.model(workload.inputs)
    value = workload.loss(outputs, workload.targets)
    parameters = list(workload.model.parameters())
    parts = [parameter.detach().clone().requires_grad_() for parameter in parameters]
    vector_to_parameters(workload.vectors(1).squeeze(1), parts)
    vectors = [part.detach() for part in parts]
    return lambda: ggn_vector_product(value, outputs, workload.model, vectors)


def _benchmark(name: str, problem: Problem, targets: tuple[Target, ...]) -> Benchmark:
    return Benchmark(
        name=name,
        title=f"Gauss-Newton product, {problem.name}",
        problem=problem,
        subjects=(
            Subject(name="curvlib: value, gradient and linearisation", prepare=_linearisation),
            Subject(name=_PRODUCT, prepare=_product),
            Subject(name="curvlib: quadratic form", prepare=_quadratic_form),
            Subject(name=_PEER, prepare=_curvlinops_product),
            Subject(name="BackPACK: product", prepare=_backpack_product),
        ),
        targets=targets,
    )


GGN_PRODUCTS = (
    _benchmark(
        "ggn-autoencoder",
        AUTOENCODER,
        (Target(subject=_PRODUCT, at_most=1.3), Target(subject=_PRODUCT, at_most=0.6, reference=_PEER)),
    ),
    _benchmark("ggn-small", SMALL_NETWORK, (Target(subject=_PRODUCT, at_most=1.5),)),
)
