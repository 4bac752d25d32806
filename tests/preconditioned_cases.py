"""Preconditioners that follow the curvature, and trust regions with them."""

from curvlib import GGN, Fisher
from curvlib.approximations import EKFAC, KFAC, BlockDiagonal, Exact
from curvlib.optimizers import FixedLength, ModelDescent, Preconditioner, SecondOrderOptimizer
from curvlib.solvers import FactoredTikhonov, PreconditionerNorm, ResidualTest, Steihaug, TrustRegion

TIGHT = Steihaug(max_iterations=500, stop=ResidualTest(relative=1e-12))
ELLIPSOID = Steihaug(max_iterations=500, stop=ResidualTest(relative=1e-12), region=PreconditionerNorm())
STRATEGIES = {
    "martens": Preconditioner.martens(),
    "kfac": Preconditioner(curvature=KFAC(GGN()), decay=0.9, inverse_every=3),
    "drawn kfac": Preconditioner(curvature=KFAC(Fisher()), decay=0.9, inverse_every=3, fraction=0.5),
    "factored": Preconditioner(curvature=KFAC(GGN()), solver=FactoredTikhonov()),
    "ekfac": Preconditioner(curvature=EKFAC(GGN(), basis_every=2), decay=0.9),
    "anew": KFAC(GGN()),
}
WITH_BLOCKS = {**STRATEGIES, "blocks": Preconditioner(curvature=BlockDiagonal(GGN()), statistics_every=2)}


def length_in(M, d):
    return float(d @ M @ d) ** 0.5


def trust(objective, preconditioner, *, descent=ELLIPSOID, curvature=None, radius=None, damping=None, **options):
    direction = ModelDescent(
        curvature=curvature or Exact(GGN()), descent=descent, preconditioner=preconditioner, **options
    )
    return SecondOrderOptimizer(
        objective,
        direction=direction,
        step_rule=FixedLength(),
        radius=radius or TrustRegion(initial=0.3),
        damping=damping,
    )
