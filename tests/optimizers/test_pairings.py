"""Every direction with every step rule and every control: a pair trains, or is refused with its reason."""

import pytest
import torch
from optimizer_cases import small_network

from curvlib import GGN, Fisher, Hessian
from curvlib.approximations import KFAC, Dense, Exact, HutchinsonDiagonal, LowRank, RandomizedSketch
from curvlib.optimizers import (
    BacktrackingLineSearch,
    Choice,
    Direction,
    FixedLength,
    ModelDescent,
    ModelRescaling,
    NormConstraint,
    PreconditionedGradient,
    SecondOrderOptimizer,
    StepRule,
    StrongWolfe,
    TruncatedNewton,
)
from curvlib.solvers import (
    CG,
    MINRES,
    ConstantDamping,
    CustomDamping,
    DampedNewton,
    DampingControl,
    Descent,
    Dogleg,
    ExponentialDamping,
    LevenbergMarquardt,
    LinearDamping,
    MoreSorensen,
    PreconditionerNorm,
    RadiusControl,
    RelativeStart,
    SlopeRatio,
    Steihaug,
    TrustRegion,
    TwoDimensionalSubspace,
    UndampedRatio,
)

WITHOUT_RADIUS = {
    "kfac": PreconditionedGradient(curvature=KFAC(GGN()), fraction=1.0),
    "exact, by conjugate gradients": PreconditionedGradient(curvature=Exact(GGN()), solver=CG(), fraction=1.0),
    "truncated newton": TruncatedNewton(),
    "damped newton": ModelDescent(curvature=Dense(GGN()), descent=DampedNewton()),
    "damped newton, indefinite": ModelDescent(curvature=Exact(Hessian()), descent=DampedNewton(solver=MINRES())),
    "damped newton, made definite": ModelDescent(curvature=Dense(Hessian()), descent=DampedNewton()),
    "minres": PreconditionedGradient(curvature=Dense(Hessian()), solver=MINRES(), fraction=1.0),
}
INDEFINITE = ["damped newton, indefinite", "damped newton, made definite", "minres"]
WITH_RADIUS = {
    "steihaug": ModelDescent(curvature=Exact(Hessian()), descent=Steihaug()),
    "dogleg": ModelDescent(curvature=Dense(GGN()), descent=Dogleg()),
    "dogleg, kfac": ModelDescent(curvature=KFAC(Fisher()), descent=Dogleg(), decay=0.5),
    "more-sorensen": ModelDescent(curvature=Dense(Hessian()), descent=MoreSorensen()),
    "more-sorensen, kfac": ModelDescent(curvature=KFAC(GGN()), descent=MoreSorensen()),
    "plane": ModelDescent(curvature=Exact(Hessian()), descent=TwoDimensionalSubspace()),
    "steihaug, preconditioned": ModelDescent(curvature=Exact(Hessian()), preconditioner=KFAC(GGN())),
    "steihaug, norm of the preconditioner": ModelDescent(
        curvature=Exact(GGN()), descent=Steihaug(region=PreconditionerNorm()), preconditioner=KFAC(GGN())
    ),
}
KEEPS_LENGTH = {"whole": FixedLength(), "half": FixedLength(learning_rate=0.5)}
CHOOSES_LENGTH = {
    "twice": FixedLength(learning_rate=2.0),
    "momentum": FixedLength(learning_rate=0.5, momentum=0.3),
    "rescaling": ModelRescaling(fraction=1.0),
    "backtracking": BacktrackingLineSearch(),
    "wolfe": StrongWolfe(),
    "norm": NormConstraint(constraint=0.1),
}
DAMPINGS = {
    "constant": ConstantDamping(0.5),
    "exponential": ExponentialDamping(initial=1.0, final=0.2, steps=3),
    "linear": LinearDamping(initial=1.0, final=0.2, steps=3),
    "custom": CustomDamping(lambda k: 1.0 / (1 + k)),
}
ADAPTIVE = {
    "marquardt": LevenbergMarquardt(initial=1.0),
    "marquardt, relative": LevenbergMarquardt.martens(initial=RelativeStart(0.3)),
}
RADIUS = TrustRegion(initial=0.3)
CONTROLS = {
    **{name: {"damping": control} for name, control in {**DAMPINGS, **ADAPTIVE}.items()},
    "radius": {"radius": RADIUS},
    **{f"radius and {name}": {"radius": RADIUS, "damping": control} for name, control in DAMPINGS.items()},
    **{f"radius and {name}": {"radius": RADIUS, "damping": control} for name, control in ADAPTIVE.items()},
}
RULES = {**KEEPS_LENGTH, **CHOOSES_LENGTH}
DIRECTIONS = {**WITHOUT_RADIUS, **WITH_RADIUS}
REASONS = {
    "twice": "lengthen the step, which then leaves the region",
    "momentum": "lengthen the step, which then leaves the region",
    "rescaling": "rescaled and gets momentum leaves the region",
    "backtracking": "line search and a trust region both",
    "wolfe": "line search and a trust region both",
    "norm": r"reads g\^T C\^-1 g off a proposal",
}


def refusal(direction, rule, control):
    """The reason why the three do not go together, None where they do."""
    radius = "radius" in control
    if radius and control.removeprefix("radius and ") in ADAPTIVE:
        return "would both answer to the reduction ratio"
    if radius and direction in WITHOUT_RADIUS:
        return "would control nothing: the steps of .* have no radius"
    if not radius and direction in WITH_RADIUS:
        return r"needs a radius, which .* does not give"
    if direction in INDEFINITE and control not in ADAPTIVE:
        return r"C \+ damping I of .* may be indefinite, and .* does not raise the damping"
    if direction in INDEFINITE and rule == "norm" and "made definite" not in direction:
        return r"does not go with .* C is no metric then"
    return REASONS[rule] if radius and rule in CHOOSES_LENGTH else None


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_pair_trains_or_is_refused_with_its_reason(direction, rule, control):
    objective, batch = small_network()
    parts = {"direction": DIRECTIONS[direction], "step_rule": RULES[rule], **CONTROLS[control]}
    reason = refusal(direction, rule, control)
    if reason is not None:
        with pytest.raises(ValueError, match=reason):
            SecondOrderOptimizer(objective, **parts)
        return
    optimizer = SecondOrderOptimizer(objective, **parts)
    results = [optimizer.step(batch) for _ in range(8 if direction in INDEFINITE else 3)]
    assert float(objective.value(batch)) < results[0].loss
    assert (results[0].radius == 0.3) if "radius" in control else (results[0].radius is optimizer.radius is None)
    for result in results:
        assert result.damping >= 0
        if result.radius is not None:
            assert result.ratio is not None


@pytest.mark.parametrize("direction", [name for name in WITH_RADIUS if WITH_RADIUS[name].knows_lengths])
def test_no_step_leaves_the_region(direction):
    objective, batch = small_network()
    optimizer = SecondOrderOptimizer(
        objective, direction=DIRECTIONS[direction], step_rule=FixedLength(), radius=TrustRegion(initial=0.05)
    )
    for _ in range(6):
        before = objective.parameter_vector()
        result = optimizer.step(batch)
        assert float((objective.parameter_vector() - before).norm()) <= result.radius * (1 + 1e-12)


@pytest.mark.parametrize(
    "curvature",
    [
        Exact(Hessian()),
        Dense(Hessian()),
        HutchinsonDiagonal(GGN()),
        LowRank(Hessian(), method=RandomizedSketch(2)),
        0.5 * Dense(GGN()) + 0.5 * Dense(Hessian()),
        Dense(GGN()) + -0.1 * Dense(Fisher()),
    ],
    ids=str,
)
def test_the_dogleg_refuses_what_may_be_indefinite(curvature):
    assert curvature.may_be_indefinite
    with pytest.raises(ValueError, match=r"Dogleg needs a positive definite .* may be indefinite"):
        ModelDescent(curvature=curvature, descent=Dogleg())
    ModelDescent(curvature=curvature, descent=Steihaug())


@pytest.mark.parametrize("curvature", [Exact(GGN()), KFAC(Fisher()), Dense(GGN()) + 0.1 * KFAC(GGN())], ids=str)
def test_the_dogleg_takes_what_is_positive_semi_definite(curvature):
    assert not curvature.may_be_indefinite
    ModelDescent(curvature=curvature, descent=Dogleg())


class OwnRule(StepRule):
    def choose(self, situation, proposal, previous):
        return Choice(step=proposal.step, prediction=proposal.prediction, learning_rate=1.0)


class OwnDescent(Descent):
    """The gradient, cut off."""

    def solve(self, problem):
        g = problem.gradient
        length = min(1.0, problem.radius / float(g.norm()))
        return problem.answer(-length * g, on_boundary=length < 1, multiplier=None)


def test_a_rule_of_one_s_own_is_refused_until_it_says_that_it_keeps_to_the_radius():
    objective, batch = small_network()
    direction = ModelDescent(curvature=Exact(GGN()), descent=OwnDescent())
    with pytest.raises(ValueError, match="chooses a length itself"):
        SecondOrderOptimizer(objective, direction=direction, step_rule=OwnRule(), radius=TrustRegion())

    class Keeps(OwnRule):
        def against_radius(self):
            return None

    optimizer = SecondOrderOptimizer(objective, direction=direction, step_rule=Keeps(), radius=TrustRegion())
    assert optimizer.step(batch).accepted


def compose(**parts):
    defaults = {"direction": DIRECTIONS["steihaug"], "step_rule": FixedLength()}
    return SecondOrderOptimizer(small_network()[0], **{**defaults, **parts})


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("control of the step", lambda: compose()),
        ("DampingControl", lambda: compose(damping=0.1)),
        ("DampingControl", lambda: compose(damping=TrustRegion())),
        ("RadiusControl", lambda: compose(radius=1.0)),
        ("RadiusControl", lambda: compose(radius=ConstantDamping(1.0))),
        ("Direction", lambda: compose(direction=Steihaug(), radius=TrustRegion())),
        ("StepRule", lambda: compose(step_rule=0.1, radius=TrustRegion())),
        ("Descent", lambda: ModelDescent(curvature=Exact(GGN()), descent=CG())),
        ("approximation", lambda: ModelDescent(curvature=GGN())),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_parts_of_another_kind_are_refused(message, call):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("fraction", {"fraction": 0.0}),
        ("decay", {"decay": 1.0}),
        ("none: use decay=0", {"decay": 0.5}),
    ],
    ids=["fraction", "decay", "no statistics"],
)
def test_bad_options_of_the_direction_are_refused(message, options):
    with pytest.raises(ValueError, match=message):
        ModelDescent(curvature=Exact(GGN()), **options)


def test_the_controls_are_all_there():
    def concrete(kind):
        below = [*kind.__subclasses__(), *(found for sub in kind.__subclasses__() for found in concrete(sub))]
        return {cls for cls in below if not cls.__abstractmethods__ and cls.__module__.startswith("curvlib.")}

    assert concrete(DampingControl) == {type(control) for control in {**DAMPINGS, **ADAPTIVE}.values()}
    assert concrete(RadiusControl) == {TrustRegion}
    assert concrete(StepRule) == {type(rule) for rule in RULES.values()}
    assert concrete(Direction) == {type(direction) for direction in DIRECTIONS.values()}
    descents = {type(d.descent) for d in DIRECTIONS.values() if isinstance(d, ModelDescent)}
    assert concrete(Descent) == descents


def test_a_loss_that_is_a_sum_refuses_parts_of_batches():
    objective, _ = small_network(loss=torch.nn.CrossEntropyLoss(reduction="sum"))
    with pytest.raises(ValueError, match="reduction='sum'"):
        SecondOrderOptimizer(
            objective,
            direction=ModelDescent(curvature=Exact(GGN()), fraction=0.5),
            step_rule=FixedLength(),
            radius=TrustRegion(),
        )


@pytest.mark.parametrize("rule", [BacktrackingLineSearch(), StrongWolfe()], ids=lambda rule: type(rule).__name__)
def test_slopes_are_refused_where_a_line_search_brings_the_values(rule):
    parts = {"direction": WITHOUT_RADIUS["damped newton"], "damping": ConstantDamping(1e-3)}
    objective, batch = small_network()
    with pytest.raises(ValueError, match="would take no slopes"):
        SecondOrderOptimizer(objective, step_rule=rule, ratio=SlopeRatio(), **parts)
    SecondOrderOptimizer(objective, step_rule=rule, ratio=UndampedRatio(), **parts)
    assert SecondOrderOptimizer(objective, step_rule=FixedLength(), ratio=SlopeRatio(), **parts).step(batch).accepted
    with pytest.raises(TypeError, match="RatioConvention"):
        SecondOrderOptimizer(objective, step_rule=FixedLength(), ratio=0.5, **parts)
