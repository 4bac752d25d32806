"""Preconditioners of conjugate gradients: which statistics, which power of their damped inverse, how often anew.

Symbols: B the approximation, lambda the damping, P (D, D) close to (C + lambda I)^-1, g_n the gradient of one example.
"""

from __future__ import annotations

from dataclasses import dataclass

from curvlib.approximations import Diagonal
from curvlib.matrices import EmpiricalFisher
from curvlib.optimizers.amortised import AmortisedInverse
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

    @classmethod
    def martens(cls, *, power: float = 0.75) -> Preconditioner:
        r"""Return the diagonal preconditioner of Martens (2010), section 4.7.

        .. math:: P = (\mathrm{diag}(\tfrac1N \sum_n g_n \circ g_n) + (\lambda + \eta) I)^{-\alpha}

        eta is the l2 weight. The paper writes the sum over examples, his released code takes the mean, as the objective
        does; the diagonal here is on the scale of the objective, so that lambda compares with it.

        Args:
            power: alpha.
        """
        return cls(curvature=Diagonal(EmpiricalFisher()), solver=DampedPower(power))
