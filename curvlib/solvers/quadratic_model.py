"""The quadratic model of the objective, and the best combination of proposed steps under it.

Symbols:
    h                              the objective at the current parameters, a number
    g           (D,)               its gradient
    C           (D, D)             the curvature matrix, with the l2 term where the objective has one
    lambda                         the damping
    d           (D,)               a step
    M(d) = h + g^T d + 1/2 d^T (C + lambda (I + R)) d
    R           (D, D)             structure of the damping, positive semi-definite, or none
    V           (D, K)             proposed steps, such as [Delta, d_prev] of K-FAC with momentum
    b = V^T g   (K,)               linear terms
    A = V^T C V + lambda V^T (I + R) V     (K, K) quadratic form; w (K,) the coefficients of the proposals, d = V w
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.operators.base import LinearOperator
from curvlib.operators.precision import full_precision
from curvlib.solvers.damping_scale import checked_damping
from curvlib.solvers.errors import SolveError
from curvlib.solvers.reduction import Prediction
from curvlib.solvers.solution import Status


@dataclass(frozen=True, kw_only=True, eq=False)
class Rescaling:
    """The best combination of proposals, with the small matrices it was found from (float64, on the host).

    Attributes:
        coefficients: w, one a proposal; 0 for a proposal that is zero.
        step: d = V w, on the device of the model.
        status: ``CONVERGED``, or ``NEGATIVE_CURVATURE`` where the model has no minimum over the span of V: then it is
            minimised over the directions of positive curvature alone (so too where a flat direction has a slope).
        linear_terms: b.
        curvature_form: V^T C V, without the damping.
        gram: V^T (I + R) V.
        damping: lambda.
    """

    coefficients: Float[Tensor, " K"]
    step: Float[Tensor, " D"]
    status: Status
    linear_terms: Float[Tensor, " K"]
    curvature_form: Float[Tensor, "K K"]
    gram: Float[Tensor, "K K"]
    damping: float

    @property
    def prediction(self) -> Prediction:
        """M(d) - M(0) of the step; where all coefficients were free and converged, that is 1/2 g^T d."""
        return self.prediction_at(self.coefficients)

    @property
    def predicted_change(self) -> float:
        """M(d) - M(0), damped."""
        return self.prediction.damped

    def prediction_at(self, coefficients: Float[Tensor, " K"]) -> Prediction:
        """Return M(V w) - M(0) for other coefficients w at no further cost, say those of a shortened step."""
        w = coefficients.to(self.linear_terms)
        undamped = float(self.linear_terms @ w + 0.5 * w @ self.curvature_form @ w)
        return Prediction(damped=undamped + 0.5 * self.damping * float(w @ self.gram @ w), undamped=undamped)


@dataclass(frozen=True, kw_only=True, eq=False)
class QuadraticModel:
    r"""Quadratic model of the objective around the current parameters.

    .. math:: M(d) = h + g^T d + \tfrac12 d^T (C + \lambda (I + R)) d

    Martens & Grosse (2015), section 6.4. Give it the exact GGN or Fisher, as a rule, not the approximation that
    proposed the step. C may include the objective's l2 term, as curvlib's operators do: the damping is lambda alone.

    Args:
        value: h.
        gradient: g (D,).
        curvature: C; only its quadratic forms are used, for which exact operators need no backward pass.
        damping: lambda >= 0.
        regularizer: R, which makes some directions dearer than others (structural damping); None for R = 0.

    Raises:
        ValueError, TypeError: value is no scalar, gradient or R do not fit C, or the damping is no number >= 0.

    Example:
        >>> from curvlib.operators import Diagonal
        >>> C = Diagonal(torch.tensor([1.0, 3.0]))
        >>> model = QuadraticModel(value=torch.tensor(5.0), gradient=torch.tensor([2.0, 4.0]), curvature=C, damping=1.0)
        >>> best = model.minimise_over(torch.tensor([[-2.0], [-2.0]]))
        >>> best.coefficients, best.step, best.predicted_change
        (tensor([0.5000]), tensor([-1., -1.]), -3.0)
    """

    value: Float[Tensor, ""]
    gradient: Float[Tensor, " D"]
    curvature: LinearOperator
    damping: float = 0.0
    regularizer: LinearOperator | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "damping", checked_damping(self.damping, "QuadraticModel(damping=...)"))
        if self.value.ndim != 0:
            raise ValueError(f"QuadraticModel(value=...) must be a scalar tensor, got shape {tuple(self.value.shape)}.")
        C = self.curvature
        if self.gradient.shape != (C.size,) or self.gradient.dtype != C.dtype:
            raise ValueError(
                f"QuadraticModel(gradient=...) must have shape ({C.size},) and dtype {C.dtype} to fit {C!r}, "
                f"got {tuple(self.gradient.shape)} of {self.gradient.dtype}."
            )
        R = self.regularizer
        if R is not None and (R.size, R.dtype) != (C.size, C.dtype):
            raise ValueError(f"QuadraticModel(regularizer=...) must fit {C!r} in size and dtype, got {R!r}.")

    def __call__(self, step: Float[Tensor, " D"]) -> Float[Tensor, ""]:
        """Return M(d)."""
        return self.value + self.change(step)

    def change(self, step: Float[Tensor, " D"]) -> Float[Tensor, ""]:
        """Return M(d) - M(0), a tensor on the device: nothing is synchronised."""
        undamped, square = self._terms(step)
        return undamped + 0.5 * self.damping * square

    def predict(self, step: Float[Tensor, " D"]) -> Prediction:
        """Return M(d) - M(0) with and without the damping, on the host."""
        undamped, square = torch.stack(self._terms(step)).tolist()
        return Prediction(damped=undamped + 0.5 * self.damping * square, undamped=undamped)

    def with_damping(self, damping: float) -> QuadraticModel:
        """Return the same model with another damping."""
        return replace(self, damping=damping)

    def minimise_over(self, proposals: Float[Tensor, "D K"], *, fixed: Mapping[int, float] | None = None) -> Rescaling:
        r"""Return the coefficients w that minimise M(V w), and what comes with them.

        .. math:: w = -A^{-1} b, \qquad M(V w) - M(0) = \tfrac12 b^T w

        and for free coefficients f given fixed ones x, w_f = -A_ff^{-1} (b_f + A_fx w_x). Martens & Grosse (2015),
        sections 6.4 and 7, where w holds the learning rate and the momentum. One product with V and one transfer to
        the host, where the K by K system is solved in float64. Departures: columns are brought to size 1 first; a
        zero column gets 0; along directions in which A vanishes to rounding (collinear proposals) w is the shortest;
        directions of negative curvature, and flat ones with a slope, are left out and reported.

        Args:
            proposals: V, one proposed step a column.
            fixed: coefficients that are given, by column number.

        Raises:
            SolveError: the gradient, the proposals or their products with C are not finite.
            ValueError: shapes do not match, or fixed names a column that does not exist or a value not finite.
        """
        given = self._checked_fixed(proposals, fixed or {})
        lengths = proposals.abs().amax(0)
        unit = proposals / torch.where(lengths > 0, lengths, 1.0)
        # One transfer instead of four.
        with full_precision(proposals.device):
            b, curvature_form, gram, lengths = _to_host(
                unit.T @ self.gradient, self.curvature.quadratic_form(unit), self._damping_form(unit), lengths
            )
        for name, part in (("proposals", gram), ("gradient", b), ("curvature", curvature_form)):
            if not bool(part.isfinite().all()):
                raise SolveError(
                    f"The quadratic model cannot be minimised: the {name} gave NaN or infinity. Check the batch and "
                    "the parameters, or skip the step."
                )
        A = 0.5 * (curvature_form + curvature_form.T) + self.damping * gram
        scaled = torch.zeros_like(b)
        for column, coefficient in given.items():
            scaled[column] = coefficient * lengths[column]
        free = [k for k in range(len(b)) if k not in given]
        rounding = max(len(b), 1) * torch.finfo(proposals.dtype).eps
        scaled[free], status = _minimum(A[free][:, free], b[free] + A[free] @ scaled, rounding)
        w = torch.where(lengths > 0, scaled / lengths, 0.0)
        for column, coefficient in given.items():
            w[column] = coefficient
        coefficients = w.to(proposals)
        outer = lengths.outer(lengths)
        with full_precision(proposals.device):
            combined = proposals @ coefficients
        return Rescaling(
            coefficients=coefficients,
            step=combined,
            status=status,
            linear_terms=b * lengths,
            curvature_form=curvature_form * outer,
            gram=gram * outer,
            damping=self.damping,
        )

    def _terms(self, step: Float[Tensor, " D"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Return g^T d + 1/2 d^T C d and d^T (I + R) d."""
        if step.shape != self.gradient.shape:
            raise ValueError(f"A step must have shape {tuple(self.gradient.shape)}, got {tuple(step.shape)}.")
        with full_precision(step.device):
            column = step.unsqueeze(1)
            quadratic = self.curvature.quadratic_form(column).squeeze()
            return self.gradient @ step + 0.5 * quadratic, self._damping_form(column).squeeze()

    def _damping_form(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "K K"]:
        """Return V^T (I + R) V."""
        gram = V.T @ V
        return gram if self.regularizer is None else gram + self.regularizer.quadratic_form(V)

    def _checked_fixed(self, proposals: Float[Tensor, "D K"], fixed: Mapping[int, float]) -> dict[int, float]:
        if proposals.ndim != 2 or proposals.shape[0] != self.curvature.size or proposals.shape[1] == 0:
            raise ValueError(
                f"minimise_over(proposals) needs shape ({self.curvature.size}, K), K >= 1, got "
                f"{tuple(proposals.shape)}: one proposed step a column."
            )
        for column, value in fixed.items():
            if column not in range(proposals.shape[1]):
                raise ValueError(f"minimise_over(fixed=...) names column {column} of {proposals.shape[1]} proposals.")
            if not abs(value) < float("inf"):
                raise ValueError(f"minimise_over(fixed=...) needs finite values, got {value!r} for column {column}.")
        return {column: float(value) for column, value in fixed.items()}


def _to_host(*tensors: Float[Tensor, " ..."]) -> list[Float[Tensor, " ..."]]:
    """Return the tensors in float64 on the CPU, in one transfer."""
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).to("cpu").to(torch.float64)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _minimum(A: Float[Tensor, "F F"], b: Float[Tensor, " F"], rounding: float) -> tuple[Float[Tensor, " F"], Status]:
    """Return the shortest w that minimises b^T w + 1/2 w^T A w over the directions of positive curvature.

    Each variable is scaled by the root of its own curvature: entries of A are exact relative to that.
    """
    diagonal = A.diagonal().abs()
    scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    eigenvalues, U = torch.linalg.eigh(A * scale.outer(scale))
    slopes = U.T @ (b * scale)
    # A is only as exact as the dtype of the proposals: smaller eigenvalues carry no information.
    noise = rounding * eigenvalues.abs().amax() if len(b) else 0.0
    keep = eigenvalues > noise
    flat = eigenvalues.abs() <= noise
    # Collinear proposals make A flat and leave no slope; a flat direction with a slope has no minimum.
    endless = (eigenvalues < -noise) | (flat & (slopes.abs() > rounding**0.5 * slopes.norm()))
    w = -scale * (U @ torch.where(keep, slopes / torch.where(keep, eigenvalues, 1.0), 0.0))
    return w, Status.NEGATIVE_CURVATURE if bool(endless.any()) else Status.CONVERGED
