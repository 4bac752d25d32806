"""Presets: well-tried compositions of the parts. They contain no algorithm."""

from __future__ import annotations

from dataclasses import replace

from curvlib.approximations import KFAC, Approximation, Dense, Exact
from curvlib.matrices import GGN, Fisher, Hessian
from curvlib.objective import Objective
from curvlib.optimizers.directions import PreconditionedGradient, TruncatedNewton
from curvlib.optimizers.layer_damping import SolverForModel
from curvlib.optimizers.model_descent import ModelDescent
from curvlib.optimizers.preconditioner import Preconditioner
from curvlib.optimizers.proposal import Solver
from curvlib.optimizers.scaling import CurvatureScaling, Scaling
from curvlib.optimizers.second_order import SecondOrderOptimizer
from curvlib.optimizers.step_rules import BacktrackingLineSearch, FixedLength, ModelRescaling, StepRule
from curvlib.solvers import (
    ConstantDamping,
    DampedNewton,
    DampingControl,
    Descent,
    EuclideanNorm,
    FactoredTikhonov,
    LevenbergMarquardt,
    MoreSorensen,
    PreconditionerNorm,
    RadiusControl,
    RatioConvention,
    RelativeFloor,
    RelativeRadius,
    RelativeStart,
    SlopeRatio,
    StartFloor,
    Steihaug,
    StoppingRule,
    TighteningTest,
    TrustRegion,
    UndampedRatio,
)


def kfac(
    objective: Objective,
    *,
    curvature: Approximation | None = None,
    damping: float | DampingControl | None = None,
    solver: Solver | SolverForModel | None = None,
    statistics_fraction: float = 1 / 4,
    model_fraction: float = 1 / 4,
    seed: int = 0,
) -> SecondOrderOptimizer:
    """Return K-FAC with factored damping, rescaling and momentum by the exact model, and adaptive damping.

    Martens & Grosse 2015. Departures: the factored damping follows lambda (gamma^2 = lambda + l2) instead of having an
    adaptation of its own; lambda starts on the scale of the curvature instead of at 150, adapts at every step by the
    ratio to the undamped model, and has a floor on the scale of the curvature; statistics take a quarter of the batch
    instead of an eighth, their average forgets with 0.9 instead of 0.95, inverses come every 10 steps instead of 20;
    steps that raise the objective of their batch are undone.

    Args:
        objective: what to minimise.
        curvature: what to invert; ``KFAC(Fisher(samples=1))`` by default.
        damping: the first lambda, or a whole control; by default 0.3 of the curvature along the first gradient. Lambda
            does not fall below 0.03 of the mean curvature trace(C) / D; a whole control sets its own floor.
        solver: (C, lambda) -> inverse; ``FactoredTikhonov()`` by default.
        statistics_fraction: part of the batch for the curvature's statistics (tau_1).
        model_fraction: part of the batch for the quadratic model (tau_2).
        seed: of the optimizer's random generator.
    """
    control = (
        damping
        if isinstance(damping, DampingControl)
        else LevenbergMarquardt(
            initial=damping if damping is not None else RelativeStart(0.3),
            decrease=0.8,
            increase=2.0,
            interval=1,
            floor=RelativeFloor(0.03),
        )
    )
    return SecondOrderOptimizer(
        objective,
        direction=PreconditionedGradient(
            curvature=curvature if curvature is not None else KFAC(Fisher(samples=1)),
            solver=solver if solver is not None else FactoredTikhonov(),
            fraction=statistics_fraction,
            decay=0.9,
            inverse_every=10,
        ),
        step_rule=ModelRescaling(fraction=model_fraction),
        damping=control,
        ratio=UndampedRatio(),
        seed=seed,
    )


def hessian_free(
    objective: Objective,
    *,
    curvature: Approximation | None = None,
    damping: float | DampingControl | None = None,
    preconditioner: Approximation | Preconditioner | None = None,
    stop: StoppingRule | None = None,
    structural_damping: Approximation | None = None,
    structural_weight: float = 1 / 30,
    curvature_fraction: float = 1.0,
    max_iterations: int = 250,
    seed: int = 0,
) -> SecondOrderOptimizer:
    """Return Hessian-free optimisation: truncated conjugate gradients, backtracking, a line search, adaptive damping.

    Martens 2010; with structural damping, for recurrent networks, Martens & Sutskever 2011 (damping 0.1 at the start).
    Departures: solves are short, they end when two iterations improve the model by less than a tenth, and by less than
    a hundredth once lambda has fallen to its floor (``TighteningTest``), where Martens looks back over ten for half a
    percent; lambda is halved and doubled in place of 2/3 and 3/2, starts at 0.03 of the curvature along the first
    gradient and does not fall below 1e-4 of its start. With these, networks come to the same loss in a fraction of the
    gradients, unless training is long (benchmarks/README.md). Martens's own rules are ``stop=ProgressTest()`` and
    ``damping=LevenbergMarquardt.martens(initial=...)``.

    Gradient, line search and ratio are of the batch; the curvature is of ``curvature_fraction`` of it, or of
    ``step(batch, curvature_batch=...)``.

    Args:
        objective: what to minimise.
        curvature: ``Exact(GGN())`` by default.
        damping: the first lambda, or a whole control, which sets its own floor.
        preconditioner: of the solver: an approximation, whose damped inverse is made anew at each step; or a
            ``Preconditioner(...)``, which says how often, with which solver and from which average; or None.
        stop: the rule that ends the conjugate gradients of a step, ``TighteningTest()`` by default.
        structural_damping: S of C + lambda (I + mu S), such as ``StructuralDamping()``, or None.
        structural_weight: mu.
        curvature_fraction: part of the batch for the curvature's products.
        max_iterations: of the conjugate gradients of a step.
        seed: of the optimizer's random generator.
    """
    control = (
        damping
        if isinstance(damping, DampingControl)
        else replace(
            LevenbergMarquardt.martens(initial=damping if damping is not None else RelativeStart(0.03)),
            decrease=0.5,
            increase=2.0,
            floor=StartFloor(1e-4),
        )
    )
    return SecondOrderOptimizer(
        objective,
        direction=TruncatedNewton(
            curvature=curvature if curvature is not None else Exact(GGN()),
            cg=replace(
                TruncatedNewton().cg,
                max_iterations=max_iterations,
                stop=stop if stop is not None else TighteningTest(),
            ),
            preconditioner=preconditioner,
            fraction=curvature_fraction,
            regularizer=structural_damping,
            regularizer_weight=structural_weight,
        ),
        step_rule=BacktrackingLineSearch(),
        damping=control,
        ratio=UndampedRatio(),
        seed=seed,
    )


def newton_trust_region(
    objective: Objective,
    *,
    curvature: Approximation | None = None,
    descent: Descent | None = None,
    radius: float | RadiusControl = 1.0,
    damping: float = 0.0,
    preconditioner: Approximation | Preconditioner | None = None,
    curvature_fraction: float = 1.0,
    seed: int = 0,
) -> SecondOrderOptimizer:
    """Return Newton's method in a trust region, which uses directions of negative curvature.

    Steihaug 1983; Nocedal & Wright, algorithm 4.1. For batches so large that the objective hardly depends on them.

    Args:
        objective: what to minimise.
        curvature: ``Exact(Hessian())`` by default; ``Dense(Hessian())`` goes with ``MoreSorensen()``, for small models.
        descent: ``Steihaug()`` by default, with a preconditioner ``Steihaug(region=PreconditionerNorm())``.
        radius: the first radius, or a whole control: in the units of the parameters, in the norm of a preconditioner in
            those of the root of the objective.
        damping: a constant lambda, added to the curvature.
        preconditioner: of the conjugate gradients: an approximation, whose damped inverse is made anew at each step; or
            a ``Preconditioner(...)``, which says how often, with which solver and from which average; or None.
        curvature_fraction: part of the batch for the curvature's products.
        seed: of the optimizer's random generator.
    """
    region = EuclideanNorm() if preconditioner is None else PreconditionerNorm()
    return SecondOrderOptimizer(
        objective,
        direction=ModelDescent(
            curvature=curvature if curvature is not None else Exact(Hessian()),
            descent=descent if descent is not None else Steihaug(region=region),
            fraction=curvature_fraction,
            preconditioner=preconditioner,
        ),
        step_rule=FixedLength(),
        damping=ConstantDamping(damping),
        radius=radius if isinstance(radius, RadiusControl) else TrustRegion(initial=radius),
        seed=seed,
    )


def levenberg_marquardt(
    objective: Objective,
    *,
    curvature: Approximation | None = None,
    control: RadiusControl | DampingControl | None = None,
    scaling: Scaling | None = None,
    ratio: RatioConvention | None = None,
    seed: int = 0,
) -> SecondOrderOptimizer:
    """Return the Levenberg-Marquardt method for nonlinear least squares: few parameters, one batch, float64.

    More 1978, as in MINPACK: the Gauss-Newton model is minimised exactly in a trust region of scaled parameters, so
    that steps do not depend on the units. Departures: the radius follows Nocedal & Wright's algorithm 4.1; near the
    minimum the ratio comes from slopes, which gives the last digits; the normal equations in place of a QR
    decomposition, since in scaled parameters they gave the same digits of all nonlinear regression problems of NIST.

    The loss is ``MSELoss(reduction="sum")`` for a sum of squares, or any other: the method is that of the GGN. See
    ``minimize`` for the loop.

    Args:
        objective: what to minimise.
        curvature: ``Dense(GGN())`` by default.
        control: ``TrustRegion(...)``, by default from ``RelativeRadius(10.0)``; or a damping control such as
            ``LevenbergMarquardt(...)`` for Marquardt's (1963) steps with C + lambda diag(s)^2, without a region.
        scaling: of the parameters, ``CurvatureScaling()`` by default.
        ratio: ``SlopeRatio()`` of the undamped model by default.
        seed: of the optimizer's random generator.
    """
    if control is None:
        control = TrustRegion(initial=RelativeRadius(10.0), floor=1e-300, ceiling=1e300, reject_below=1e-4)
    damping, radius = (control, None) if isinstance(control, DampingControl) else (None, control)
    return SecondOrderOptimizer(
        objective,
        direction=ModelDescent(
            curvature=curvature if curvature is not None else Dense(GGN()),
            descent=MoreSorensen() if damping is None else DampedNewton(),
            scaling=scaling if scaling is not None else CurvatureScaling(),
        ),
        step_rule=FixedLength(),
        damping=damping,
        radius=radius,
        ratio=ratio if ratio is not None else SlopeRatio(),
        seed=seed,
    )


def gauss_newton(
    objective: Objective,
    *,
    curvature: Approximation | None = None,
    step_rule: StepRule | None = None,
    scaling: Scaling | None = None,
    seed: int = 0,
) -> SecondOrderOptimizer:
    """Return the Gauss-Newton method with a line search, for nonlinear least squares with few parameters.

    Nocedal & Wright 2006, section 10.3. It needs a Jacobian of full column rank; where that fails it raises SolveError,
    and ``levenberg_marquardt`` is the remedy.

    Args:
        objective: what to minimise.
        curvature: ``Dense(GGN())`` by default.
        step_rule: ``BacktrackingLineSearch(shrink=0.5)`` by default; ``FixedLength()`` for the undamped method.
        scaling: of the parameters, ``CurvatureScaling()`` by default: it brings the normal equations to one scale.
        seed: of the optimizer's random generator.
    """
    return SecondOrderOptimizer(
        objective,
        direction=ModelDescent(
            curvature=curvature if curvature is not None else Dense(GGN()),
            descent=DampedNewton(),
            scaling=scaling if scaling is not None else CurvatureScaling(),
        ),
        step_rule=step_rule if step_rule is not None else BacktrackingLineSearch(shrink=0.5),
        damping=ConstantDamping(0.0),
        ratio=UndampedRatio(),
        seed=seed,
    )
