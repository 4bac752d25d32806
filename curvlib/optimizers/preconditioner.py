"""Preconditioners of conjugate gradients: which statistics, which power of their damped inverse, how often anew.

Symbols: B the approximation, lambda the damping, P (D, D) close to (C + lambda I)^-1, g_n the gradient of one example.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from curvlib.approximations import Approximation, Diagonal
from curvlib.matrices import EmpiricalFisher
from curvlib.objective import Objective
from curvlib.optimizers.amortised import AmortisedInverse, InverseState
from curvlib.optimizers.proposal import check_approximation, refuse_indefinite, refuse_what_follows_steps
from curvlib.optimizers.situation import Situation
from curvlib.solvers import DampingFloor, damped_inverse
from curvlib.solvers.definiteness import gives_descent
from curvlib.spectra import DampedPower


@dataclass(frozen=True, kw_only=True)
class Preconditioner(AmortisedInverse):
    r"""P = (B + lambda I)^-1, or what another solver makes of B and lambda, with amortised statistics and inverses.

    P is made of the statistics of the step's curvature batch, or else of a part of its batch. It changes how many
    iterations a solve takes, not what it converges to. A rejected step restores the averages bit for bit.

    Args:
        curvature: B, any approximation; one with a ``running_average`` is averaged over steps.
        solver: (B, lambda) -> P: ``damped_inverse``, ``FactoredTikhonov()``, ``DampedPower(0.75)``, ...
        fraction: part of the batch that statistics are made of, where the step has no curvature batch. Equal to the
            fraction of the products, it is the same examples, and no forward pass of its own.
        decay: of the moving average of statistics, for each step; 0, the default, keeps the last ones alone.
        statistics_every: steps from one statistic to the next.
        inverse_every: steps from one P to the next. The first three steps, a damping that has moved by a factor of two
            and a rejected step refresh it as well.
        floor: the least damping of P, where that of the step is lower: ``RelativeFloor(0.01)``, a part of trace(B) / D,
            or ``AbsoluteFloor(...)``. None leaves it to the direction: no floor in ``TruncatedNewton``, and
            ``RelativeFloor(0.01)`` in ``ModelDescent``, since a trust region as a rule has a damping of 0, and B alone
            may be singular.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: a number is out of range, the floor needs the first damping, as ``StartFloor`` does, or B may be
            indefinite, and the solver makes no P that is positive definite all the same: one that does, as with the
            absolute values of the eigenvalues, has the attributes ``takes_indefinite`` and ``gives_descent``.

    Example:
        >>> import curvlib, torch
        >>> from curvlib.approximations import KFAC
        >>> P = Preconditioner(curvature=KFAC(curvlib.Fisher()), decay=0.9, inverse_every=5)
        >>> objective = curvlib.Objective(torch.nn.Linear(3, 2), torch.nn.MSELoss())
        >>> optimizer = curvlib.optimizers.hessian_free(objective, preconditioner=P)
    """

    fraction: float = 1.0
    decay: float = 0.0
    inverse_every: int = 1
    floor: DampingFloor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.curvature.may_be_indefinite and not gives_descent(self.solver):
            raise ValueError(
                f"Preconditioner needs a positive definite P, and {self.solver!r} gives the inverse of an indefinite "
                f"matrix where curvature={self.curvature!r} is one: use a curvature of GGN() or Fisher(), or "
                "RootMeanSquareDiagonal(...)."
            )
        if self.floor is None:
            return
        if not isinstance(self.floor, DampingFloor):
            raise TypeError(
                f"Preconditioner needs floor to be None or a DampingFloor such as RelativeFloor(0.01), got "
                f"{self.floor!r}."
            )
        try:
            self.floor.least(1.0, None)
        except ValueError as error:
            raise ValueError(
                f"Preconditioner knows no first damping, and {self.floor!r} needs one: use another floor."
            ) from error

    def damping_of_inverse(self, situation: Situation, mean_curvature: Callable[[], float]) -> float:
        """Return the damping of the step, or the floor if that is more."""
        if self.floor is None:
            return situation.damping
        mean = mean_curvature() if self.floor.needs_mean_curvature else None
        return max(situation.damping, self.floor.least(mean, None))

    @classmethod
    def martens(cls, *, power: float = 0.75) -> Preconditioner:
        r"""Return the diagonal preconditioner of Martens (2010), section 4.7.

        .. math:: P = (\mathrm{diag}(\tfrac1N \sum_n g_n \circ g_n) + (\lambda + \eta) I)^{-\alpha}

        eta is the l2 weight. The paper writes the sum over examples, his released code takes the mean, as the objective
        does; the diagonal here is that of ``EmpiricalFisher()``, on the scale of the objective, so that lambda compares
        with it. So it is C times the above for ``MSELoss()``, which is a mean over C outputs as well.

        Args:
            power: alpha.
        """
        return cls(curvature=Diagonal(EmpiricalFisher()), solver=DampedPower(power))


def check_preconditioner(owner: str, preconditioner: object) -> None:
    """Refuse what is neither a preconditioner nor an approximation whose damped inverse is made anew at each step.

    Raises:
        TypeError: it is of another kind.
        ValueError: it learns from steps, or may be indefinite.
    """
    if isinstance(preconditioner, Preconditioner):
        return
    check_approximation(owner, "preconditioner", preconditioner)
    assert isinstance(preconditioner, Approximation)
    refuse_what_follows_steps(owner, "preconditioner", preconditioner)
    refuse_indefinite(owner, "preconditioner", preconditioner, damped_inverse)


def start_preconditioner(
    preconditioner: Approximation | Preconditioner | None,
    objective: Objective,
    *,
    fraction: float,
    floor: DampingFloor | None = None,
) -> InverseState | None:
    """Return the state of a preconditioner in one optimizer, None where there is none.

    Args:
        preconditioner: what :func:`check_preconditioner` has let pass, or None.
        objective: what is minimised.
        fraction: part of the batch that a bare approximation is estimated on.
        floor: of its damping, where it has none of its own.
    """
    if preconditioner is None:
        return None
    if isinstance(preconditioner, Preconditioner):
        own = preconditioner.floor if preconditioner.floor is not None else floor
        return replace(preconditioner, floor=own).start_inverse(objective)
    return Preconditioner(curvature=preconditioner, fraction=fraction, floor=floor).start_anew(objective)
