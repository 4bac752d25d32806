"""Preconditioners of trust-region steps: what a rejection restores, checkpoints, and what is refused."""

import copy
from dataclasses import dataclass, field

import pytest
import torch
from optimizer_cases import assert_same, resume, small_network
from preconditioned_cases import ELLIPSOID, TIGHT, WITH_BLOCKS, trust

from curvlib import GGN, Hessian
from curvlib.approximations import KFAC, LBFGS, Dense, Exact
from curvlib.operators import Identity as IdentityOperator
from curvlib.optimizers import (
    CurvatureScaling,
    ModelDescent,
    Preconditioner,
    newton_trust_region,
)
from curvlib.solvers import (
    CG,
    DampedNewton,
    Dogleg,
    MoreSorensen,
    PreconditionerNorm,
    RelativeRadius,
    StartFloor,
    Steihaug,
    TrustRegion,
    TwoDimensionalSubspace,
    damped_inverse,
)

strategies = pytest.mark.parametrize("name", WITH_BLOCKS)


# --- rejections and checkpoints --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rejecting(TrustRegion):
    """Rejects steps on demand."""

    now: list = field(default_factory=list, repr=False, compare=False)

    def accept(self, ratio):
        return not self.now and super().accept(ratio)

    def update(self, state, ratio, **options):
        return super().update(state, -1.0 if self.now else ratio, **options)


@strategies
@pytest.mark.parametrize("curvature", [Exact(Hessian()), KFAC(GGN())], ids=["exact", "averaged"])
def test_a_rejected_step_restores_everything_bit_for_bit(name, curvature):
    objective, batch = small_network(torch.float32)
    now = []
    optimizer = trust(
        objective,
        WITH_BLOCKS[name],
        descent=Steihaug(region=PreconditionerNorm()),
        curvature=curvature,
        radius=Rejecting(initial=0.1, now=now),
        decay=0.0 if isinstance(curvature, Exact) else 0.9,
    )
    for _ in range(3):
        optimizer.step(batch)
    while not optimizer.step(batch).accepted:
        pass
    before = copy.deepcopy({"model": objective.model.state_dict(), **optimizer.state_dict()})
    radius = optimizer.radius
    now.append(True)
    for _ in range(2):
        assert not optimizer.step(batch).accepted
    after = {"model": objective.model.state_dict(), **optimizer.state_dict()}
    assert optimizer.radius < 0.1 * radius
    for state, rejected in ((before, False), (after, True)):
        # These move as they say: the answer to the rejection, what was drawn, and that the inverse is made anew.
        del state["control"], state["generator"]
        assert state["direction"]["preconditioner"].pop("rejected", rejected) == rejected
    assert_same(after, before)


@strategies
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(name):
    def start():
        objective, batch = small_network(torch.float32)
        return newton_trust_region(objective, preconditioner=WITH_BLOCKS[name], curvature_fraction=0.5), batch

    optimizer, batch = start()
    for _ in range(4):
        optimizer.step(batch)
    other, _ = start()
    resume(optimizer, other)
    for _ in range(3):
        assert optimizer.step(batch) == other.step(batch)
    assert torch.equal(optimizer.objective.parameter_vector(), other.objective.parameter_vector())


def test_a_broken_state_changes_nothing():
    objective, batch = small_network()
    optimizer = trust(objective, WITH_BLOCKS["kfac"], curvature=KFAC(GGN()), decay=0.5)
    for _ in range(2):
        optimizer.step(batch)
    good = copy.deepcopy(optimizer.state_dict())
    optimizer.step(batch)
    before = copy.deepcopy(optimizer.state_dict())
    for name in ("average", "preconditioner"):
        broken = copy.deepcopy(good)
        broken["direction"][name] = {}
        with pytest.raises(ValueError, match="lacks"):
            optimizer.load_state_dict(broken)
        assert_same(optimizer.state_dict(), before)


def test_a_checkpoint_of_another_preconditioner_is_refused():
    objective, batch = small_network()
    optimizer = newton_trust_region(objective, preconditioner=WITH_BLOCKS["kfac"])
    optimizer.step(batch)
    for other in (None, WITH_BLOCKS["ekfac"], KFAC(GGN())):
        with pytest.raises(ValueError, match="direction"):
            newton_trust_region(objective, preconditioner=other).load_state_dict(optimizer.state_dict())


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "descent",
    [
        MoreSorensen(),
        DampedNewton(solver=CG()),
        Steihaug(preconditioner=IdentityOperator(26)),
        TwoDimensionalSubspace(steihaug=Steihaug(preconditioner=IdentityOperator(26))),
    ],
    ids=["more-sorensen", "newton", "steihaug", "plane"],
)
def test_descents_that_take_none_are_refused(descent):
    with pytest.raises(ValueError, match="has no use with"):
        ModelDescent(curvature=Exact(GGN()), descent=descent, preconditioner=KFAC(GGN()))


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("norm of a preconditioner and has none", {"descent": ELLIPSOID}),
        ("see another matrix", {"preconditioner": KFAC(GGN()), "scaling": CurvatureScaling()}),
        ("may be indefinite", {"preconditioner": Dense(Hessian())}),
        ("learns from steps", {"preconditioner": LBFGS()}),
        ("has no use with", {"preconditioner": KFAC(GGN()), "descent": Dogleg()}),
    ],
    ids=["missing", "scaling", "indefinite", "steps", "dogleg"],
)
def test_what_does_not_go_together_is_refused(message, options):
    with pytest.raises(ValueError, match=message):
        ModelDescent(**{"curvature": Exact(GGN()), **options})


def test_what_is_no_preconditioner_is_refused():
    objective, _ = small_network()
    for wrong in ("kfac", damped_inverse, IdentityOperator(26)):
        with pytest.raises(TypeError, match="ModelDescent needs preconditioner to be an approximation"):
            newton_trust_region(objective, preconditioner=wrong)
    with pytest.raises(TypeError, match="DampingFloor"):
        Preconditioner(curvature=KFAC(GGN()), floor=0.1)
    with pytest.raises(ValueError, match="no first damping"):
        Preconditioner(curvature=KFAC(GGN()), floor=StartFloor(0.1))
    with pytest.raises(ValueError, match="known along its own steps alone"):
        trust(objective, KFAC(GGN()), radius=TrustRegion(initial=RelativeRadius()))
    trust(objective, KFAC(GGN()), descent=TIGHT, radius=TrustRegion(initial=RelativeRadius()))
