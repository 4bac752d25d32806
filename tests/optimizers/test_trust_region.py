"""Trust regions in the optimizer: exact quadratics, Newton's method on classic problems, rejections, checkpoints."""

import copy
import io
from dataclasses import dataclass, field
from math import inf

import pytest
import torch
from optimizer_cases import (
    assert_same,
    chained_rosenbrock,
    least_squares,
    linear_regression,
    powell_singular,
    rosenbrock,
    small_network,
)

from curvlib import GGN, Fisher, Hessian
from curvlib.approximations import KFAC, Dense, Exact
from curvlib.operators import MatrixFree
from curvlib.optimizers import (
    FixedLength,
    ModelDescent,
    ModelRescaling,
    PreconditionedGradient,
    SecondOrderOptimizer,
    TruncatedNewton,
    hessian_free,
    kfac,
    newton_trust_region,
)
from curvlib.solvers import (
    ConstantDamping,
    DampedNewton,
    Descent,
    Dogleg,
    LevenbergMarquardt,
    LinearDamping,
    MoreSorensen,
    ResidualTest,
    SolveError,
    Steihaug,
    TrustRegion,
    TwoDimensionalSubspace,
    UndampedRatio,
)

EXACT_STEIHAUG = Steihaug(stop=ResidualTest(relative=1e-10), check_every=1)
WITH_RADIUS = {
    "steihaug": EXACT_STEIHAUG,
    "dogleg": Dogleg(),
    "more-sorensen": MoreSorensen(),
    "plane": TwoDimensionalSubspace(steihaug=EXACT_STEIHAUG),
}
descents = pytest.mark.parametrize("descent", WITH_RADIUS.values(), ids=WITH_RADIUS.keys())


# --- exactly quadratic objectives ------------------------------------------------------------------------------------


@descents
def test_on_a_quadratic_the_ratio_is_one_and_the_radius_grows_until_the_minimum_is_inside(descent):
    objective, batch = linear_regression()
    optimizer = SecondOrderOptimizer(
        objective,
        direction=ModelDescent(curvature=Dense(GGN()), descent=descent),
        step_rule=FixedLength(),
        radius=TrustRegion(initial=0.02),
    )
    results = []
    while not results or results[-1].radius == results[0].radius * 2 ** (len(results) - 1):
        results.append(optimizer.step(batch))
        assert len(results) < 20
    assert len(results) > 4
    assert all(result.accepted and abs(result.ratio - 1) < 1e-8 for result in results)
    # The last step but one ended inside the region, at the minimum: it left the radius as it was.
    assert objective.at(batch).gradient().norm() < 1e-9


def test_one_newton_step_without_damping_ends_on_a_quadratic():
    objective, batch = linear_regression()
    optimizer = SecondOrderOptimizer(
        objective,
        direction=ModelDescent(curvature=Dense(Hessian()), descent=DampedNewton()),
        step_rule=FixedLength(),
        damping=LevenbergMarquardt(initial=1e-300, interval=1),
    )
    result = optimizer.step(batch)
    assert abs(result.ratio - 1) < 1e-9
    assert objective.at(batch).gradient().norm() < 1e-12


def test_the_damping_of_newton_steps_falls_monotonically_on_a_quadratic():
    objective, batch = linear_regression()
    optimizer = SecondOrderOptimizer(
        objective,
        direction=ModelDescent(curvature=Exact(GGN()), descent=DampedNewton()),
        step_rule=FixedLength(),
        damping=LevenbergMarquardt(initial=1.0, decrease=0.25, interval=1),
        ratio=UndampedRatio(),
    )
    results = [optimizer.step(batch) for _ in range(5)]
    assert [result.damping for result in results] == [1.0, 0.25, 0.0625, 0.015625, 0.00390625]
    assert all(abs(result.ratio - 1) < 1e-6 for result in results)


def test_a_damping_beside_a_radius_is_part_of_the_model():
    moves = []
    for damping in (0.0, 5.0):
        objective, batch = linear_regression()
        before = objective.parameter_vector()
        newton_trust_region(objective, radius=100.0, damping=damping).step(batch)
        moves.append(objective.parameter_vector() - before)
    objective, batch = linear_regression()
    evaluation = objective.at(batch)
    C = Dense(GGN()).estimate(evaluation).to_dense()
    expected = -torch.linalg.solve(C + 5.0 * torch.eye(len(C), dtype=C.dtype), evaluation.gradient())
    # Steihaug's loose tolerance, 1e-3 of the gradient, over the least eigenvalue 5 and more.
    torch.testing.assert_close(moves[1], expected, rtol=0, atol=1e-3 * float(evaluation.gradient().norm()) / 5)
    assert moves[1].norm() < 0.5 * moves[0].norm()


# --- classic problems ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "start", "minimum"),
    [
        (rosenbrock, [-1.2, 1.0], [1.0, 1.0]),
        (rosenbrock, [-12.0, 10.0], [1.0, 1.0]),
        (chained_rosenbrock, [0.2, -0.3, 0.4, 0.1, 0.3, -0.2], [1.0] * 6),
        (powell_singular, [3.0, -1.0, 0.0, 1.0], None),
    ],
    ids=["rosenbrock", "rosenbrock, far", "chained rosenbrock", "powell"],
)
@pytest.mark.parametrize(
    ("curvature", "descent"),
    [
        (Exact(Hessian()), Steihaug()),
        (Dense(Hessian()), MoreSorensen()),
        (Exact(Hessian()), TwoDimensionalSubspace()),
        (Dense(GGN()), MoreSorensen()),
        (Dense(GGN()), Dogleg()),
    ],
    ids=["steihaug", "more-sorensen", "plane", "more-sorensen, GGN", "dogleg, GGN"],
)
def test_newton_s_method_converges(function, start, minimum, curvature, descent):
    objective, batch = least_squares(function, start)
    damping = 1e-10 if isinstance(descent, Dogleg) else 0.0  # the GGN of Powell's function is singular at the end
    optimizer = newton_trust_region(objective, curvature=curvature, descent=descent, damping=damping)
    losses = []
    for _ in range(120):
        result = optimizer.step(batch)
        losses.append(result.loss)
        assert result.accepted == (float(objective.value(batch)) < result.loss) or result.loss < 1e-20
        if result.loss < 1e-14:
            break
    assert losses[-1] < 1e-14, losses[-1]
    assert losses == sorted(losses, reverse=True)
    if minimum is not None:
        torch.testing.assert_close(objective.parameter_vector(), torch.tensor(minimum).double(), rtol=0, atol=1e-6)


def test_negative_curvature_leads_away_from_a_saddle():
    def residuals(x):  # h = (x^2 - 1)^2 + y^2: a saddle at 0
        return torch.stack([x[0] ** 2 - 1, x[1]])

    for descent, curvature in ((Steihaug(), Exact(Hessian())), (MoreSorensen(), Dense(Hessian()))):
        objective, batch = least_squares(residuals, [1e-8, 0.5])
        optimizer = newton_trust_region(objective, curvature=curvature, descent=descent, radius=0.5)
        for _ in range(20):
            optimizer.step(batch)
        assert float(objective.value(batch)) < 1e-12


# --- rejections ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rejecting(LevenbergMarquardt):
    """Rejects steps on demand."""

    now: list = field(default_factory=list, repr=False, compare=False)

    def accept(self, ratio):
        return not self.now and super().accept(ratio)


@dataclass(frozen=True, kw_only=True)
class RejectingRegion(TrustRegion):
    now: list = field(default_factory=list, repr=False, compare=False)

    def accept(self, ratio):
        return not self.now and super().accept(ratio)

    def update(self, state, ratio, **options):
        return super().update(state, -1.0 if self.now else ratio, **options)


REJECTED = {
    "kfac": (PreconditionedGradient(curvature=KFAC(Fisher())), ModelRescaling()),
    "kfac, rare statistics": (
        PreconditionedGradient(curvature=KFAC(Fisher()), statistics_every=2, inverse_every=3),
        ModelRescaling(),
    ),
    "averaged newton": (
        ModelDescent(curvature=Dense(GGN()), descent=DampedNewton(), decay=0.9),
        ModelRescaling(),
    ),
    "averaged more-sorensen": (ModelDescent(curvature=KFAC(Fisher()), descent=MoreSorensen(), decay=0.9), None),
    "steihaug": (ModelDescent(curvature=Exact(Hessian())), None),
}


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize(("direction", "rule"), REJECTED.values(), ids=REJECTED.keys())
def test_a_rejected_step_restores_everything_bit_for_bit(direction, rule, steps):
    objective, batch = small_network(torch.float32)
    now = []
    if rule is not None:
        control = {"damping": Rejecting(initial=1.0, interval=1, increase=2.0, decrease=0.5, now=now)}
    else:
        schedule = LinearDamping(initial=1.0, final=0.0, steps=9)
        control = {"radius": RejectingRegion(initial=0.5, now=now), "damping": schedule}
    optimizer = SecondOrderOptimizer(objective, direction=direction, step_rule=rule or FixedLength(), **control)
    for _ in range(steps):
        assert optimizer.step(batch).accepted
    before = copy.deepcopy({"model": objective.model.state_dict(), **optimizer.state_dict()})
    damping, radius = optimizer.damping, optimizer.radius
    now.append(True)
    for _ in range(2):  # also twice in a row
        result = optimizer.step(batch)
        assert not result.accepted
    after = {"model": objective.model.state_dict(), **optimizer.state_dict()}
    if rule is not None:
        assert optimizer.damping == 4 * damping
        if steps:
            assert after["previous"] is not None
    else:
        assert optimizer.damping == damping  # the radius has answered, and the schedule has not moved
        assert optimizer.radius < 0.1 * radius
    for state in (before, after):
        # These move as they say: the answer to the rejection, what was drawn, and that the inverse is made anew.
        del state["control"], state["generator"]
        state["direction"].pop("rejected", None)
    assert_same(after, before)


def test_a_step_after_a_rejected_one_is_that_of_a_run_without_it():
    """Besides the control, which is made the same, and with nothing random."""
    ends = []
    for rejections in (0, 2):
        objective, batch = small_network()
        now = []
        control = Rejecting(initial=1.0, interval=1, increase=1.0, now=now)
        direction = PreconditionedGradient(curvature=KFAC(GGN()), fraction=1.0, inverse_every=1)
        optimizer = SecondOrderOptimizer(
            objective, direction=direction, step_rule=ModelRescaling(fraction=1.0), damping=control
        )
        optimizer.step(batch)
        now.append(True)
        for _ in range(rejections):
            assert not optimizer.step(batch).accepted
        now.clear()
        optimizer.step(batch)
        optimizer.step(batch)
        ends.append(objective.parameter_vector())
    assert torch.equal(*ends)


def test_fixed_momentum_is_dropped_after_a_rejection():
    objective, batch = small_network()
    now = []
    optimizer = SecondOrderOptimizer(
        objective,
        direction=PreconditionedGradient(curvature=Dense(GGN()), fraction=1.0),
        step_rule=FixedLength(learning_rate=0.1, momentum=0.9),
        damping=Rejecting(initial=1.0, now=now),
    )
    optimizer.step(batch)
    now.append(True)
    optimizer.step(batch)
    assert optimizer.state_dict()["previous"] is None


@dataclass(frozen=True)
class Fails(Descent):
    calls: list = field(default_factory=list)

    def solve(self, problem):
        if len(self.calls) == 2:
            raise SolveError("no step today")
        self.calls.append(problem.radius)
        return MoreSorensen().solve(problem)


def test_an_error_leaves_everything_as_it_was():
    objective, batch = small_network()
    optimizer = SecondOrderOptimizer(
        objective,
        direction=ModelDescent(curvature=KFAC(GGN()), descent=Fails(), decay=0.9),
        step_rule=FixedLength(),
        radius=TrustRegion(),
    )
    for _ in range(2):
        optimizer.step(batch)
    before = copy.deepcopy({"model": objective.model.state_dict(), **optimizer.state_dict()})
    with pytest.raises(SolveError, match="no step today"):
        optimizer.step(batch)
    assert_same({"model": objective.model.state_dict(), **optimizer.state_dict()}, before)


def test_products_that_are_not_finite_are_an_error_and_no_step():
    class Broken(Dense):
        def operator(self, objective, statistics):
            size = objective.layout.size
            return MatrixFree(lambda V: inf * V, size, objective.layout.dtype, objective.layout.device)

    objective, batch = small_network()
    before = objective.parameter_vector()
    with pytest.raises(SolveError, match="Steihaug met products"):
        newton_trust_region(objective, curvature=Broken(GGN())).step(batch)
    assert torch.equal(before, objective.parameter_vector())


def test_a_step_to_where_the_objective_is_not_finite_is_undone_and_the_radius_shrinks():
    # h = (sqrt(x) - 0.1)^2 is NaN for negative x, and the Newton step at 1 is -18.
    objective, batch = least_squares(lambda x: x.sqrt() - 0.1, [1.0])
    optimizer = newton_trust_region(objective, curvature=Dense(Hessian()), descent=MoreSorensen(), radius=100.0)
    losses = []
    for _ in range(40):
        result = optimizer.step(batch)
        losses.append((result.loss, result.accepted))
    assert not losses[0][1]
    torch.testing.assert_close(objective.parameter_vector(), torch.tensor([0.01]).double(), rtol=1e-6, atol=0)


# --- checkpoints and results -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda o: newton_trust_region(o, radius=0.3),
        lambda o: newton_trust_region(o, curvature=Dense(Hessian()), descent=MoreSorensen(), curvature_fraction=0.5),
        lambda o: SecondOrderOptimizer(
            o,
            direction=ModelDescent(curvature=KFAC(Fisher()), descent=Dogleg(), fraction=0.5, decay=0.8),
            step_rule=FixedLength(),
            radius=TrustRegion(initial=0.2),
            damping=LinearDamping(initial=1.0, final=0.1, steps=6),
        ),
    ],
    ids=["steihaug", "more-sorensen", "averaged dogleg"],
)
def test_a_resumed_run_continues_bit_for_bit(make):
    objective, batch = small_network(torch.float32)
    optimizer = make(objective)
    for _ in range(3):
        optimizer.step(batch)
    file = io.BytesIO()
    torch.save({"model": objective.model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    results = [optimizer.step(batch) for _ in range(4)]

    resumed, _ = small_network(torch.float32)
    state = torch.load(file, weights_only=True)
    resumed.model.load_state_dict(state["model"])
    second = make(resumed)
    second.load_state_dict(state["optimizer"])
    assert [second.step(batch) for _ in range(4)] == results
    assert torch.equal(objective.parameter_vector(), resumed.parameter_vector())
    assert optimizer.radius == second.radius


def test_a_checkpoint_of_another_composition_is_refused():
    objective, batch = small_network()
    optimizer = newton_trust_region(objective)
    optimizer.step(batch)
    state = optimizer.state_dict()
    for other, what in (
        (newton_trust_region(objective, radius=2.0), "radius control"),
        (newton_trust_region(objective, damping=0.1), "damping control"),
        (newton_trust_region(objective, descent=TwoDimensionalSubspace()), "direction"),
        (newton_trust_region(objective, curvature=Exact(GGN())), "direction"),
    ):
        with pytest.raises(ValueError, match=what):
            other.load_state_dict(state)


def test_descriptions_tell_solvers_inside_descents_apart():
    def described(solver):
        return ModelDescent(curvature=Dense(GGN()), descent=DampedNewton(solver=solver)).description()

    from_function, other = described(DampedNewton().solver), described(lambda C, damping: C)
    assert "solver=damped_inverse" in from_function
    assert " at 0x" not in from_function + other
    assert from_function != other


def test_the_radius_is_reported_and_the_prediction_costs_no_product():
    objective, batch = small_network()
    optimizer = newton_trust_region(objective, radius=0.01, descent=Steihaug(max_iterations=1))
    result = optimizer.step(batch)
    assert (result.radius, optimizer.radius) == (0.01, 0.02)
    assert result.iterations == 1
    assert result.predicted < 0
    direction = ModelDescent(curvature=Exact(Hessian()), descent=Steihaug(max_iterations=1))
    half = SecondOrderOptimizer(
        small_network()[0], direction=direction, step_rule=FixedLength(learning_rate=0.5), radius=TrustRegion()
    )
    whole = SecondOrderOptimizer(small_network()[0], direction=direction, step_rule=FixedLength(), radius=TrustRegion())
    for made in (half, whole):
        made.step(batch)  # checks that are made once
    assert half.step(batch).gradient_evaluations > whole.step(batch).gradient_evaluations + 1


def test_presets_have_no_radius():
    for preset in (kfac, hessian_free):
        objective, batch = small_network()
        optimizer = preset(objective)
        assert optimizer.step(batch).radius is None
        assert optimizer.radius is None
    assert not TruncatedNewton().has_radius
    with pytest.raises(ValueError, match="finite"):
        newton_trust_region(small_network()[0], radius=inf)


def test_a_constant_damping_is_the_default_beside_a_radius():
    optimizer = newton_trust_region(small_network()[0])
    assert optimizer.control.damping == ConstantDamping(0.0)


def test_the_preset_trains_on_the_device(device):
    objective, batch = small_network(torch.float32, device)
    optimizer = newton_trust_region(objective)
    losses = [optimizer.step(batch).loss for _ in range(15)]
    assert losses[-1] < 0.5 * losses[0]
