"""Every class that curvlib exports passes the suite of its kind; a class without a case makes a test fail by name."""

import inspect

import pytest
import torch
from conformance_cases import APPROXIMATIONS, ITERATIVE, LAYERS, SOLVERS
from exported import exported_solvers
from operator_cases import CASES

import curvlib
from curvlib.approximations import LowRank, LowRankMethod
from curvlib.extensions.rule import _RULES
from curvlib.operators import Dense, LinearOperator
from curvlib.output_losses import OutputLoss, output_loss
from curvlib.testing import (
    EVERY_LOSS,
    check_approximation,
    check_layer,
    check_loss,
    check_operator,
    check_solver,
    draw,
    draws,
)

# PyTorch's own words on its speed, not on its results
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

PARTS = ("approximations", "extensions", "operators", "optimizers", "output_losses", "solvers", "spectra")


def exported():
    """The classes and functions that the parts of curvlib export."""
    for part in PARTS:
        module = getattr(curvlib, part)
        yield from (getattr(module, name) for name in module.__all__)


def concrete(base):
    return {x for x in exported() if inspect.isclass(x) and issubclass(x, base) and not inspect.isabstract(x)} - {base}


def iterative(method):
    def make(d):
        M = d.symmetric(d.integer(1, 5))
        return method(Dense(M), 0.5), torch.linalg.inv(M + 0.5 * torch.eye(len(M), dtype=M.dtype))

    return make


def uncovered(classes, remedy):
    """Fail by the names of the classes that have no case."""
    assert not classes, f"no case for {', '.join(sorted(x.__qualname__ for x in classes))}: {remedy}"


def test_every_operator_has_a_case():
    covered = {type(make(draw(0))[0]) for make in [*CASES.values(), *map(iterative, ITERATIVE)]}
    uncovered(concrete(LinearOperator) - covered, "add a case to operator_cases.CASES")


# The transition F_0^-1/2 F_1 F_0^-1/2 has the errors of F_1 times the condition number of F_0, up to 1e5.
TOLERANCES = {"symmetric_kronecker_chain": 1e-8, "general_kronecker_chain": 1e-8}


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_operator(make):
    tolerance = TOLERANCES.get(make.__name__)
    check_operator(draws(definite=None).map(make), tolerance=tolerance, examples=4)
    check_operator(draws().map(make), semidefinite=True, tolerance=tolerance, examples=1)


@pytest.mark.parametrize("method", ITERATIVE, ids=lambda method: type(method).__name__)
def test_iterative_inverse(method):
    check_operator(draws().map(iterative(method)), semidefinite=True, tolerance=1e-8, examples=2)


def test_every_approximation_has_a_case():
    covered = {type(case.tested) for case in APPROXIMATIONS}
    uncovered(concrete(curvlib.approximations.Approximation) - covered, "add a line to APPROXIMATIONS")


@pytest.mark.parametrize("case", APPROXIMATIONS, ids=str)
def test_approximation(case):
    check_approximation(case.tested, **case.claims, examples=3, draws=80)


def test_every_method_of_low_rank_has_a_case():
    methods = {type(case.tested.method) for case in APPROXIMATIONS if isinstance(case.tested, LowRank)}
    uncovered(concrete(LowRankMethod) - methods, "add a line to APPROXIMATIONS")


def test_every_layer_has_a_case():
    known = {module for module in _RULES if module.__module__.startswith("torch.nn")}  # tests have rules of their own
    uncovered(known - LAYERS.keys(), "add a line to LAYERS")


@pytest.mark.parametrize("module", LAYERS, ids=lambda module: module.__name__)
def test_layer(module):
    check_layer(LAYERS[module], examples=2)


def test_every_loss_has_a_case():
    made = {case: case.make(torch.zeros(2, 2), "mean") for case in EVERY_LOSS}
    covered = {type(loss) for loss in made.values()}
    known = {loss for loss in output_loss.registry if loss.__module__.startswith("torch.nn")}
    uncovered(known - covered, "add a case to curvlib.testing.losses")
    covered |= {type(output_loss(loss)) for loss in made.values()}
    uncovered(concrete(OutputLoss) - covered, "add a case to curvlib.testing.losses")


@pytest.mark.parametrize("case", EVERY_LOSS, ids=lambda case: case.name)
def test_loss(case):
    check_loss(case, examples=6, draws=1000)


def test_every_solver_has_a_case():
    known = exported_solvers()
    assert len(known) >= 3
    covered = {case.tested if inspect.isfunction(case.tested) else type(case.tested) for case in SOLVERS}
    uncovered(known - covered, "add a line to SOLVERS")


@pytest.mark.parametrize("case", SOLVERS, ids=str)
def test_solver(case):
    check_solver(case.tested, **case.claims, examples=15)
