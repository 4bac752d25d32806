r"""The distribution of all eigenvalues, and traces of functions, by stochastic Lanczos quadrature.

Symbols: C (D, D) the operator; z (D,) one of P test vectors; T (m, m) the tridiagonal matrix of m Lanczos steps from z,
alpha its diagonal, beta its off-diagonal; theta its eigenvalues, the nodes; tau the squared first entries of its
eigenvectors, the weights. For every function f, z^T f(C) z / |z|^2 is about sum_j tau_j f(theta_j), exactly for
polynomials of degree 2 m - 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.operators import LinearOperator, full_precision
from curvlib.solvers import SolveError
from curvlib.spectra.measure import Quadrature, SpectralMeasure
from curvlib.spectra.probes import Rademacher, check_count, check_estimation, draw, multiply

# Up to this D the eigenvalues of the whole matrix take about a second.
_LARGEST_EXACT = 2000
# An off-diagonal entry at this many eps beside the others: the Krylov space is exhausted.
_BREAKDOWN_IN_EPS = 10.0
# The fewer steps whose quadrature is compared with that of all of them, to see whether more would change it.
_FEWER = 0.5


@dataclass(frozen=True, kw_only=True)
class SpectralDensity:
    r"""Stochastic Lanczos quadrature: ``SpectralDensity(steps=30, probes=10)(C)`` is a :class:`SpectralMeasure`.

    Golub & Welsch, "Calculation of Gauss quadrature rules" (1969); Ubaru, Chen & Saad, "Fast estimation of tr(f(A)) via
    stochastic Lanczos quadrature" (2017). All probes advance together, so that each step is one product with a (D, P)
    block. There is no reorthogonalisation, which would keep D m P numbers instead of 3 D P: copies of converged nodes
    share the weight of one, and the quadrature stays accurate (Greenbaum 1989; Chen, Trogdon & Ubaru, "Analysis of
    stochastic Lanczos quadrature for spectrum approximation", 2021). The host does not look at the device before the
    end.

    Where steps * probes reaches D, and D is at most 2000, the eigenvalues of the whole matrix are taken instead.

    Args:
        steps: m, at least 2; D where that is less.
        probes: P, at least 2 test vectors of signs.

    Example:
        >>> from curvlib.operators import Diagonal
        >>> C = Diagonal(torch.arange(1.0, 101.0))
        >>> measure = SpectralDensity(steps=10, probes=4)(C, torch.Generator().manual_seed(0))
        >>> round(float(measure.trace_of(torch.square))), measure.products  # signs have no error on a diagonal matrix
        (338350, 40)
    """

    steps: int = 30
    probes: int = 10

    def __post_init__(self) -> None:
        check_count("SpectralDensity", "steps", self.steps, least=2)
        check_count("SpectralDensity", "probes", self.probes, least=2)

    def __call__(self, operator: LinearOperator, generator: torch.Generator | None = None) -> SpectralMeasure:
        """Return nodes and weights of every probe.

        Args:
            operator: C, symmetric, of any definiteness.
            generator: source of the random numbers, on the operator's device; None is PyTorch's global one.

        Raises:
            TypeError: the operator or the generator is of another kind.
            ValueError: the generator is on another device.
            SolveError: a product is not finite.
        """
        check_estimation("SpectralDensity", operator, generator)
        D = operator.size
        with full_precision(operator.device):
            if self.steps * self.probes >= D and D <= _LARGEST_EXACT:
                return _all_eigenvalues(operator)
            m = min(self.steps, D)
            alpha, beta = _recurrence(operator, draw(Rademacher(), operator, self.probes, generator), m)
        fewer = max(1, int(_FEWER * m))
        return SpectralMeasure(
            quadrature=_gauss(alpha, beta, operator),
            coarse=_gauss(alpha[:, :fewer], beta[:, : fewer - 1], operator),
            size=D,
            products=m * self.probes,
            label=repr(operator),
        )


def _recurrence(
    operator: LinearOperator, z: Float[Tensor, "D P"], steps: int
) -> tuple[Float[Tensor, "P m"], Float[Tensor, "P m-1"]]:
    """Return alpha and beta of every column by the three-term recurrence."""
    eps, tiny = torch.finfo(z.dtype).eps, torch.finfo(z.dtype).tiny
    v, before = z / torch.linalg.vector_norm(z, dim=0), torch.zeros_like(z)
    beta = z.new_zeros(z.shape[1])
    scale = torch.full_like(beta, tiny)
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    for step in range(steps):
        w = multiply(operator, v) - beta * before
        alpha = (v * w).sum(0)
        # A column that is exhausted goes on with v = 0 and weight 0. Its node is put where C has eigenvalues: at 0 a
        # function may not be finite.
        alphas.append(alpha if step == 0 else torch.where(beta > 0.0, alpha, alphas[0]))
        w = w - alpha * v
        scale = torch.maximum(scale, torch.maximum(alpha.abs(), beta))
        beta = torch.linalg.vector_norm(w, dim=0)
        beta = torch.where(beta <= _BREAKDOWN_IN_EPS * eps * scale, 0.0, beta)
        betas.append(beta)
        before, v = v, torch.where(beta > 0.0, w / beta, 0.0)
    return torch.stack(alphas, dim=1), torch.stack(betas[:-1], dim=1)


def _gauss(alpha: Float[Tensor, "P m"], beta: Float[Tensor, "P m-1"], operator: LinearOperator) -> Quadrature:
    """Return the eigenvalues of T and the squared first entries of its eigenvectors, in float64."""
    T = torch.diag_embed(alpha.double())
    if beta.shape[1]:
        off = torch.diag_embed(beta.double(), offset=1)
        T = T + off + off.mT
    if not bool(T.isfinite().all()):
        raise SolveError(f"SpectralDensity: a product with {operator!r} is not finite: skip this update.")
    nodes, vectors = torch.linalg.eigh(T)
    return Quadrature(nodes=nodes, weights=vectors[:, 0].square())


def _all_eigenvalues(operator: LinearOperator) -> SpectralMeasure:
    matrix = operator.to_dense().double()
    if not bool(matrix.isfinite().all()):
        raise SolveError(f"SpectralDensity: {operator!r} has entries that are not finite: skip this update.")
    nodes = torch.linalg.eigvalsh((matrix + matrix.T) / 2).unsqueeze(0)
    return SpectralMeasure(
        quadrature=Quadrature(nodes=nodes, weights=torch.full_like(nodes, 1.0 / operator.size)),
        coarse=None,
        size=operator.size,
        products=operator.size,
        label=repr(operator),
    )
