"""Every exported operator, loss, solver and layer rule with one fault is caught by its suite."""

import copy
from dataclasses import replace

import pytest
import torch
from conformance_cases import LAYERS, SOLVERS
from operator_cases import CASES

from curvlib.extensions.rule import _RULES
from curvlib.operators import Scaled
from curvlib.output_losses import output_loss
from curvlib.testing import EVERY_LOSS, IdentityError, check_layer, check_loss, check_operator, check_solver, draws


def larger(own, V):
    return 1.05 * own(V)


def negated(own, V):
    return -own(V)


def mirrored(own, V):
    """A matrix with its rows in the opposite order, which is not symmetric."""
    return own(V).flip(0)


def without_the_complement(own, V):
    """The part of each product along the first coordinate is missing."""
    product = own(V)
    return torch.cat([torch.zeros_like(product[:1]), product[1:]])


def changes_its_input(own, V):
    return own(V.mul_(1.01))


def variant(make, product):
    """Return a maker of (C, M) whose C multiplies in a wrong way and is otherwise the class that it was."""

    def made(d):
        C, M = make(d)
        wrong = copy.copy(C)
        cls = type(C)
        twin = type(f"Broken{cls.__name__}", (cls,), {"matmat": lambda self, V: product(super(twin, self).matmat, V)})
        object.__setattr__(wrong, "__class__", twin)
        return wrong, M

    return made


@pytest.mark.parametrize(
    "product", [larger, negated, mirrored, without_the_complement, changes_its_input], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_a_wrong_product_is_caught(make, product):
    with pytest.raises(IdentityError):
        check_operator(draws(definite=None).map(variant(make, product)), tolerance=1e-8, examples=10)


def faulty(loss, name, fault):
    """Return the loss with one method that does what ``fault`` makes of it."""
    own = output_loss(loss)
    wrong = copy.copy(own)
    cls = type(own)

    def method(self, *given, **named):
        return fault(getattr(super(twin, self), name), *given, **named)

    twin = type(f"Broken{cls.__name__}", (cls,), {name: method})
    object.__setattr__(wrong, "__class__", twin)
    return wrong


LOSS_FAULTS = {
    "gradient of another sign": ("gradient", lambda own, z, y: -own(z, y)),
    "products too large": ("linearize", lambda own, z, y: lambda V: 1.05 * own(z, y)(V)),
    "root too large": ("hessian_sqrt", lambda own, z, y: (1.05 * v for v in own(z, y))),
    "one vector of the root alone": ("hessian_sqrt", lambda own, z, y: list(own(z, y))[-1:] * 2),
    "draws too large": ("sample_gradient", lambda own, z, y, generator=None: 1.2 * own(z, y, generator)),
    "scale of the other reduction": ("value", lambda own, z, y: len(z) * own(z, y)),
}


@pytest.mark.parametrize("name", LOSS_FAULTS)
@pytest.mark.parametrize("case", EVERY_LOSS, ids=lambda case: case.name)
def test_a_fault_of_a_loss_is_caught(case, name):
    method, fault = LOSS_FAULTS[name]
    if method == "sample_gradient" and not (case.likelihood and case.natural):
        pytest.skip("the Hessian is not the moment of its draws")
    wrong = replace(case, make=lambda z, reduction: faulty(case.make(z, reduction), method, fault))
    with pytest.raises(IdentityError):
        check_loss(wrong, examples=6, draws=1000)


SOLVER_FAULTS = {
    "no damping": lambda own, C, damping: own(C, 0.0 * damping),
    "damping twice": lambda own, C, damping: own(C, 2.0 * damping),
    "too large": lambda own, C, damping: Scaled(1.05, own(C, damping)),
    "another sign": lambda own, C, damping: Scaled(-1.0, own(C, damping)),
}


@pytest.mark.parametrize("name", SOLVER_FAULTS)
@pytest.mark.parametrize("case", SOLVERS, ids=str)
def test_a_fault_of_a_solver_is_caught(case, name):
    def wrong(C, damping):
        return SOLVER_FAULTS[name](case.tested, C, damping)

    with pytest.raises(IdentityError):
        check_solver(wrong, **case.claims, examples=15)


LAYER_FAULTS = {
    "another sign": torch.neg,
    "too small": lambda g: 0.9 * g,
    "of other examples": lambda g: g.roll(1, 0),
}


@pytest.mark.parametrize("name", LAYER_FAULTS)
@pytest.mark.parametrize("module", LAYERS, ids=lambda module: module.__name__)
def test_a_fault_of_a_layer_rule_is_caught(module, name, monkeypatch):
    rule, fault = _RULES[module], LAYER_FAULTS[name]
    own = rule.uses

    def uses(called, x, g):
        gradients = (
            fault(g) if isinstance(g, torch.Tensor) else tuple(part if part is None else fault(part) for part in g)
        )
        return own(called, x, gradients)

    monkeypatch.setattr(rule, "uses", uses)
    with pytest.raises(IdentityError):
        check_layer(LAYERS[module], examples=10)
