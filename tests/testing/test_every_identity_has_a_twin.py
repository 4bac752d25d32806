"""Each identity that a good class keeps is named where a broken twin of that suite breaks it, or is listed here."""

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from curvlib import GGN, Fisher
from curvlib.approximations import Dense, LowRank
from curvlib.operators import Dense as DenseOperator
from curvlib.operators import Diagonal as DiagonalOperator
from curvlib.solvers import CG, ResidualTest
from curvlib.testing import (
    EVERYWHERE,
    LOSSES,
    check_approximation,
    check_layer,
    check_loss,
    check_operator,
    check_solver,
    draws,
)
from curvlib.testing.identities import Subject

HERE = Path(__file__).parent


def approximations():
    check_approximation(Dense(GGN()), exact_on=EVERYWHERE, examples=2)
    check_approximation(Dense(Fisher()), exact_on=EVERYWHERE, examples=1, draws=30)
    check_approximation(LowRank(GGN()), exact_on=EVERYWHERE, examples=1)


def operators():
    check_operator(draws(definite=None).map(lambda d: DenseOperator(d.symmetric(d.integer(1, 3)))), examples=5)
    check_operator(DiagonalOperator(torch.ones(3)), semidefinite=True)


def losses():
    for case in (*LOSSES[:3], next(case for case in LOSSES if not case.likelihood)):
        check_loss(case, examples=3, draws=300)


def layers():
    check_layer(nn.Linear(3, 2), torch.randn(4, 3))


def solvers():
    check_solver(CG(stop=ResidualTest(relative=1e-12)), examples=5)


# Without a twin so far: what a suite asks for on the way to others, or what no class is known to break alone.
WITHOUT = {
    approximations: {
        "C has the parameters' dtype",
        "EmpiricalFisher() gives a symmetric estimate or is refused by name",
        "Fisher() gives a symmetric estimate or is refused by name",
        "GGN() gives a symmetric estimate or is refused by name",
        "a copy of the model has the same estimate",
        "an estimate leaves parameter",
        "an estimate leaves requires_grad",
        "an estimate leaves the global",
        "without a generator, torch.manual_seed decides",
    },
    operators: {
        "(-C) @ v",
        "(2 C) @ v",
        "(C + 2 I + diag(d)) @ v",
        "(C - 0.5 C) @ v",
        "C (2 V - W) = 2 C V - C W",
        "C @ 0 = 0",
        "C @ V = the matrix times V",
        "C @ e_i = column i of C",
        "C @ v = first column of C @ (v, V)",
        "C @ x refuses what is no tensor",
        "C.apply_along(X, -1) = C on the last one",
        "C.shape = (D, D)",
        "C.size is D",
        "C.to_scipy() @ V = C @ V",
        "damped_inverse(-C, lambda) undoes it",
        "damped_inverse(2 C, lambda) undoes it",
        "damped_inverse(C + 2 I + diag(d), lambda) undoes it",
        "damped_inverse(C - 0.5 C, lambda) undoes it",
        "damped_inverse(eigendecompose(C), lambda) @ (C + lambda I) v = v",
        "diagonal of -C",
        "diagonal of 2 C",
        "diagonal of C + 2 I + diag(d)",
        "diagonal of C - 0.5 C",
        "matrix of -C",
        "matrix of 2 C",
        "matrix of C + 2 I + diag(d)",
        "matrix of C - 0.5 C",
    },
    losses: {
        "additive says whether it is a sum",
        "batch_weight = 1 / scale",
        "empirical_gradient = sqrt(c) dl_n/dz_n",
        "examples that do not count have no gradient",
        "half precision is computed in float32",
        "hessian_sqrt gives at most O vectors",
        "hessian_sqrt gives vectors of z's shape",
        "sample_gradient has z's shape",
        "sample_gradient is refused without a likelihood, naming GGN()",
        "the sum has weight 1",
        "value = the module's own number",
        "value is a scalar",
        "with a generator, global random numbers are not used",
    },
    layers: {
        "a is (N, T, groups, columns) and g (N, T, groups, d_out)",
        "an estimate leaves parameter",
        "an estimate leaves requires_grad",
        "an estimate leaves the attributes",
        "an estimate leaves the global",
        "an estimate leaves the gradient",
        "an estimate leaves the hooks",
        "an estimate leaves the mode",
        "an evaluation leaves parameter",
        "an evaluation leaves requires_grad",
        "an evaluation leaves the attributes",
        "an evaluation leaves the global",
        "an evaluation leaves the gradient",
        "an evaluation leaves the hooks",
        "an evaluation leaves the mode",
        "block of layer * = block of 2 J^T J",
        "diagonal = diagonal of 2 J^T J",
        "moments().outer = sum of a a^T",
        "moments().total = sum of a",
        "squared_gradients = sum of squares of the per-example gradients",
        "the outputs are those without curvlib",
    },
    solvers: {
        "X @ (s b) = s X @ b",
        "X @ 0 = 0",
        "X @ B of as many columns as there are",
        "X @ b leaves b as it is",
        "a right-hand side that is not finite is refused, or shows in the result",
        "and the old one again",
        "solve(b, x0).residual_norm = |b - (C + lambda I) x| / |b|",
        "solve(b, x0).solved says whether it is",
        "solver(C, lambda) is an operator of C's shape",
        "solver(s C, s lambda) @ b = solver(C, lambda) @ b / s for s = 1e+08",
        "the damping inf is refused by name",
        "the damping nan is refused by name",
    },
}


def named(suite):
    """Strings in the tests of a suite's twins, those of several words."""
    paths = [HERE / f"test_broken_{suite}.py"]
    if suite == "approximations":
        paths.append(HERE / "test_broken_classes.py")
    found = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
                found.add(node.value)
    return {text for text in found if "\n" not in text}


def general(identity):
    """The identity without names of parameters, modules and layers, and without sizes."""
    identity = re.sub(r", (with \w+ frozen|called twice|at other outputs than before)$", "", identity)
    identity = re.sub(r"( leaves (the )?\w+).* as it was$", r"\1", identity)
    identity = re.sub(r"( leaves the \w+) of( the model)?$", r"\1", identity)
    identity = re.sub(r"of shape \(.*?\)", "of shape *", identity)
    identity = re.sub(r"\b\d+ columns", "* columns", identity)
    return re.sub(r"layer '.*?'", "layer *", re.sub(r" \((mean|sum|layers .*)\)$", "", identity))


@pytest.mark.parametrize("run", WITHOUT, ids=lambda run: run.__name__)
def test_every_identity_has_a_twin(run, monkeypatch):
    subjects, begin = [], Subject.__init__

    def noted(self, name):
        begin(self, name)
        subjects.append(self)

    monkeypatch.setattr(Subject, "__init__", noted)
    run()
    texts = {general(text) for text in named(run.__name__)} - {""}
    # an approximation hands its operator to the suite of operators, which has a test of its own
    own = [subject for subject in subjects if type(subject) is Subject or run is operators]
    kept = {general(identity) for subject in own for identity in subject.kept}
    missing = {identity for identity in kept if not any(text in identity for text in texts)}
    assert len(kept) > 8
    assert missing - WITHOUT[run] == set(), "no broken twin names these identities: write one"
    assert WITHOUT[run] - missing == set(), "these have a twin, or are gone: take them from the list"
