"""A damping that differs by layer, by the names of parameters.

Symbols: f (D,) the factor of each parameter's coordinates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from curvlib.objective import Objective
from curvlib.optimizers.proposal import Solver
from curvlib.solvers import BlockwiseDamping, KrylovMethod, damped_inverse
from curvlib.solvers.damping_scale import checked_damping
from curvlib.solvers.definiteness import gives_descent, takes_indefinite


class SolverForModel(ABC):
    """A solver that has to know where the parameters lie. Directions bind it when they start."""

    @abstractmethod
    def bind(self, objective: Objective) -> Solver:
        """Return the solver for the parameters of an objective."""


@dataclass(frozen=True)
class LayerDamping(SolverForModel):
    r"""Another damping for each layer: a factor times lambda.

    .. math:: (C + \lambda \, \mathrm{diag}(f))^{-1}

    f is the factor of the first pattern that fits the name of the parameter, or that of its module. See
    :class:`BlockwiseDamping`: where all parameters of a block have one factor, the structure of the solver is kept.

    Args:
        factors: patterns with ``*`` and ``?``, and a number >= 0 for each.
        otherwise: the factor of parameters that no pattern fits.
        solver: (C, lambda) -> inverse, such as ``damped_inverse`` or ``FactoredTikhonov()``.

    Raises:
        TypeError, ValueError: a factor is no such number, or the solver cannot be called.

    Example:
        >>> import curvlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Linear(1, 1))
        >>> LayerDamping({"1": 10.0}).bind(curvlib.Objective(model, torch.nn.MSELoss())).factors
        tensor([ 1.,  1.,  1., 10., 10.])
    """

    factors: Mapping[str, float]
    otherwise: float = 1.0
    solver: Solver = damped_inverse

    def __post_init__(self) -> None:
        if not isinstance(self.factors, Mapping) or not all(isinstance(pattern, str) for pattern in self.factors):
            raise TypeError(
                f"LayerDamping needs factors to be a mapping from name patterns to numbers, got {self.factors!r}."
            )
        values = {pattern: checked_damping(f, f"LayerDamping[{pattern!r}]") for pattern, f in self.factors.items()}
        object.__setattr__(self, "factors", values)
        object.__setattr__(self, "otherwise", checked_damping(self.otherwise, "LayerDamping(otherwise=...)"))
        if not callable(self.solver):
            raise TypeError(
                "LayerDamping needs a solver (C, damping) -> inverse such as damped_inverse or FactoredTikhonov(), got "
                f"{self.solver!r}."
            )

    @property
    def takes_indefinite(self) -> bool:
        """Whether the solver inside does."""
        return takes_indefinite(self.solver)

    @property
    def gives_descent(self) -> bool:
        """Whether the solver inside does."""
        return gives_descent(self.solver)

    def bind(self, objective: Objective) -> Solver:
        """Return the solver for the parameters of an objective.

        Raises:
            ValueError: a pattern fits no parameter.
        """
        layout = objective.layout
        for pattern in self.factors:
            if not any(_fits(name, pattern) for name in layout.names):
                raise ValueError(
                    f"LayerDamping: the pattern {pattern!r} fits no parameter. Known: {', '.join(layout.names)}."
                )
        f = torch.full((layout.size,), self.otherwise, dtype=layout.dtype, device=layout.device)
        for name in layout.names:
            f[layout.slices[name]] = next(
                (factor for pattern, factor in self.factors.items() if _fits(name, pattern)), self.otherwise
            )
        return BlockwiseDamping(factors=f, solver=self.solver)


def bound(solver: Solver | SolverForModel, objective: Objective) -> Solver:
    """Return the solver, bound to the objective if it asks for that.

    Raises:
        ValueError: it does not fit the objective.
    """
    if isinstance(solver, KrylovMethod):
        solver.check(objective.layout.size)
    return solver.bind(objective) if isinstance(solver, SolverForModel) else solver


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)
