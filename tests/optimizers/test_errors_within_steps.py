"""An error at any place of a step leaves no trace: the step that is tried again is the one that would have been."""

import copy
import inspect
import os
import sys
from contextlib import contextmanager

import pytest
from optimizer_cases import assert_same, small_network
from torch import nn

import curvlib
from curvlib import GGN, Fisher, Hessian
from curvlib.approximations import EKFAC, KFAC, LBFGS, Dense, Diagonal, Exact, StructuralDamping
from curvlib.optimizers import (
    BacktrackingLineSearch,
    CurvatureScaling,
    FixedLength,
    ModelDescent,
    ModelRescaling,
    NormConstraint,
    PreconditionedGradient,
    Preconditioner,
    SecondOrderOptimizer,
    StrongWolfe,
    hessian_free,
    kfac,
    levenberg_marquardt,
    newton_trust_region,
)
from curvlib.solvers import (
    ConstantDamping,
    DampedNewton,
    LevenbergMarquardt,
    MoreSorensen,
    PreconditionerNorm,
    RelativeRadius,
    SolveError,
    Steihaug,
    TrustRegion,
    damped_inverse,
)

PACKAGE = os.path.dirname(curvlib.__file__) + os.sep


def composed(direction, rule=None, **control):
    control = control or {"damping": LevenbergMarquardt(initial=0.3, interval=1)}
    return lambda objective: SecondOrderOptimizer(
        objective, direction=direction, step_rule=rule or FixedLength(), **control
    )


OPTIMIZERS = {
    "kfac": kfac,
    "kfac, rare statistics": composed(
        PreconditionedGradient(curvature=KFAC(Fisher()), statistics_every=2, inverse_every=3), ModelRescaling()
    ),
    "ekfac": composed(PreconditionedGradient(curvature=EKFAC(Fisher(), basis_every=2)), FixedLength(momentum=0.2)),
    "l-bfgs": composed(
        PreconditionedGradient(curvature=0.5 * LBFGS() + 0.5 * Diagonal(GGN())),
        StrongWolfe(),
        damping=ConstantDamping(0.1),
    ),
    "anew": composed(PreconditionedGradient(curvature=Exact(GGN()), fraction=0.5), NormConstraint()),
    "hessian-free": hessian_free,
    "hessian-free, preconditioned": lambda objective: hessian_free(
        objective,
        curvature_fraction=0.5,
        preconditioner=Preconditioner(curvature=KFAC(Fisher()), fraction=0.5, decay=0.5, inverse_every=3),
        structural_damping=StructuralDamping(modules=(nn.Tanh,)),
    ),
    "newton": newton_trust_region,
    "levenberg-marquardt": lambda objective: levenberg_marquardt(
        objective, control=TrustRegion(initial=RelativeRadius(1.0))
    ),
    "averaged newton": composed(
        ModelDescent(curvature=KFAC(Fisher()), descent=DampedNewton(), decay=0.9), BacktrackingLineSearch()
    ),
    "scaled region": composed(
        ModelDescent(curvature=Dense(Fisher()), descent=MoreSorensen(), decay=0.9, scaling=CurvatureScaling()),
        radius=TrustRegion(initial=RelativeRadius(0.3)),
    ),
    "preconditioned region": composed(
        ModelDescent(
            curvature=Exact(Hessian()),
            preconditioner=Preconditioner(curvature=KFAC(Fisher()), decay=0.5, inverse_every=3),
        ),
        radius=TrustRegion(initial=0.3),
    ),
    "l-bfgs in a region": composed(
        ModelDescent(curvature=LBFGS(), descent=MoreSorensen()), radius=TrustRegion(initial=0.2)
    ),
    "region of a preconditioner": composed(
        ModelDescent(
            curvature=Dense(Fisher()),
            descent=Steihaug(region=PreconditionerNorm()),
            decay=0.5,
            preconditioner=Preconditioner(curvature=KFAC(Fisher()), fraction=0.5, decay=0.5, inverse_every=3),
        ),
        radius=TrustRegion(initial=0.05),
    ),
}


class Interruption(KeyboardInterrupt):
    """One that no other code raises."""


@contextmanager
def interrupted(at=None):
    """Raise at one of the places where Python looks for signals, counted from 0; give the files of those so far.

    These are the beginnings of the package's functions, and the ends of built-in functions that they call. Generators
    are left out, whose ends look like beginnings.
    """
    files = []

    def look(frame, event, _):
        code = frame.f_code
        begins = event == "call" and not code.co_flags & inspect.CO_GENERATOR
        if (begins or event == "c_return") and code.co_filename.startswith(PACKAGE):
            files.append(code.co_filename[len(PACKAGE) :])
            if len(files) - 1 == at:
                raise Interruption

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        yield files
    finally:
        sys.setprofile(before)


def everything(optimizer):
    model = optimizer.objective.model
    hooks = [len(hooks) for module in model.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks)]
    return {"model": model.state_dict(), "hooks": hooks, **optimizer.state_dict()}


def started(name, steps):
    objective, batch = small_network()
    theta = objective.parameter_vector()
    OPTIMIZERS[name](objective).step(batch)  # the checks that are made once for an objective
    objective.layout.write(objective.parameters, theta)
    optimizer = OPTIMIZERS[name](objective)
    for _ in range(steps):
        optimizer.step(batch)
    return optimizer, batch


class Spoilt:
    """The control of another optimizer, which takes no step."""

    def __init__(self, control):
        self._control = control

    def __getattr__(self, name):
        return getattr(self._control, name)

    def accept(self, ratio):
        return False


def no_longer_taken(optimizer):
    """Let every further step be rejected, those of line searches as well."""
    own = type(optimizer.step_rule).choose

    def choose(*arguments):
        choice = own(optimizer.step_rule, *arguments)
        object.__setattr__(choice, "value", None)
        return choice

    object.__setattr__(optimizer.step_rule, "choose", choose)
    optimizer.control = Spoilt(optimizer.control)


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "taken"), [(0, True), (4, True), (4, False)], ids=["first", "taken", "rejected"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_is_interrupted_anywhere_leaves_all_as_it_was(name, steps, taken):
    optimizer, batch = started(name, steps)
    undisturbed, _ = started(name, steps)
    for each in (optimizer, undisturbed):
        if not taken:
            no_longer_taken(each)
    before = copy.deepcopy(everything(optimizer))
    with interrupted() as files:
        expected = undisturbed.step(batch)
    assert expected.accepted == taken
    after = everything(undisturbed)
    for at in places(files):
        with pytest.raises(Interruption), interrupted(at):
            optimizer.step(batch)
        assert_same(everything(optimizer), before, f"after place {at} of {len(files)}, in {files[at]}")
    assert optimizer.step(batch) == expected
    assert_same(everything(optimizer), after)


def places(files):
    """All within the step itself and its writing of parameters, and some within what it calls."""
    own = [at for at, name in enumerate(files) if name.endswith("second_order.py")]
    written = [at for at, name in enumerate(files) if name == "parameters.py"][-20:]
    # what follows are PyTorch's hooks for finished steps
    end = max(own + written)
    return sorted({*own, *written, *range(0, end, max(1, end // 25))})


def test_a_refresh_that_fails_in_a_rejected_step_counts_and_one_in_a_step_that_fails_does_not():
    fails = []

    def solver(operator, damping):
        if fails:
            raise SolveError("no inverse today")
        return damped_inverse(operator, damping)

    objective, batch = small_network()
    direction = PreconditionedGradient(curvature=KFAC(GGN()), solver=solver, inverse_every=1)
    optimizer = composed(direction)(objective)
    for _ in range(4):
        assert optimizer.step(batch).accepted
    fails.append(True)
    before = copy.deepcopy(everything(optimizer))
    with pytest.raises(RuntimeWarning, match="kept the last inverse"):  # warnings are errors here
        optimizer.step(batch)
    assert_same(everything(optimizer), before)
    no_longer_taken(optimizer)
    for number in range(1, 6):
        with pytest.warns(RuntimeWarning, match=rf"kept the last inverse \({number} failures"):
            result = optimizer.step(batch)
        assert not result.accepted
    before = copy.deepcopy(everything(optimizer))
    assert before["direction"]["failures"] == 5
    with pytest.raises(SolveError, match="no inverse today"):
        optimizer.step(batch)
    assert_same(everything(optimizer), before)
