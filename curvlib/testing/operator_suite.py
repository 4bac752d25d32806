"""What every operator keeps: its methods are those of one symmetric matrix.

Symbols: C the operator, M (D, D) its matrix, K columns, e eigenvalues, lambda a damping.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from jaxtyping import Float
from torch import Tensor

from curvlib.operators import Diagonal, Identity, LinearOperator, OperatorError, operator_from_state_dict
from curvlib.solvers import SolveError, damped_inverse, eigendecompose
from curvlib.testing.identities import Subject, described, rounding
from curvlib.testing.numbers import Draw, draw
from curvlib.testing.search import search

Operators = LinearOperator | SearchStrategy
# Numbers of columns beside the drawn ones: implementations change their way at some width, such as a power of two.
_WIDE = (5, 8, 17, 33, 257)
# For one operator the vectors alone are drawn.
_EXAMPLES_OF_ONE = 3


def check_operator(
    operator: Operators,
    *,
    dense: Float[Tensor, "D D"] | None = None,
    semidefinite: bool = False,
    tolerance: float | None = None,
    examples: int = 20,
) -> None:
    """Check that every method of an operator is that of one symmetric matrix, in products, entries and inverses.

    It costs D products and factorisations of (D, D) matrices: give small operators.

    Args:
        operator: an operator, or a Hypothesis strategy of operators or of pairs (operator, its dense matrix), such as
            ``draws(definite=None).map(make)`` with a function ``make`` of a :class:`Draw`: matrices of any sign, so
            that an inverse that should be refused is asked for as well.
        dense: the matrix that one operator must equal; without it, the matrix is what its products with unit vectors
            are.
        semidefinite: whether no eigenvalue may be negative.
        tolerance: largest difference relative to the numbers that are added up; by default that of rounding. Operators
            that iterate need more.
        examples: how many operators are drawn.

    Raises:
        TypeError: this is no operator.
        IdentityError: an identity breaks, with the smallest input that was found.

    Example:
        >>> from curvlib.operators import Dense
        >>> check_operator(Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]])), semidefinite=True)
    """
    if not isinstance(operator, (LinearOperator, SearchStrategy)):
        raise TypeError(
            "check_operator needs an operator or a strategy of operators, such as Dense(torch.eye(3)) or "
            f"draws().map(make), got {described(operator)}."
        )
    if isinstance(operator, LinearOperator):
        pairs, examples = st.just((operator, dense)), min(examples, _EXAMPLES_OF_ONE)
    else:
        pairs = operator.map(lambda drawn: drawn if isinstance(drawn, tuple) else (drawn, None))

    def check(drawn: tuple[LinearOperator, Tensor | None, int, int]) -> None:
        C, M, columns, seed = drawn
        one = _Matrix(C, M, draw(seed, C.device, dtype=C.dtype), columns, tolerance)
        for part in _PARTS:
            part(one)
        if semidefinite:
            _semidefinite(one)

    inputs = st.builds(lambda pair, K, seed: (*pair, K, seed), pairs, st.integers(0, 3), st.integers(0, 2**16))
    search(inputs, check, examples)


class _Matrix(Subject):
    """An operator beside its matrix, with random vectors to multiply."""

    def __init__(self, C: LinearOperator, M: Tensor | None, d: Draw, columns: int, tolerance: float | None) -> None:
        super().__init__(type(C).__name__)
        self.C = C
        size = self.value("C.size is D", lambda: C.size)
        self.holds("C.size is D", isinstance(size, int) and size >= 1, f"expected an integer >= 1, got {size!r}")
        self.tolerance = rounding(C.dtype) if tolerance is None else tolerance
        self.v, self.V, self.W = d.normal(size), d.normal(size, columns), d.normal(size, columns)
        self.wide = d.normal(size, max(_WIDE))
        self.given = M is not None
        self.M = self.value("C @ e_i = column i of C", self._columns) if M is None else M
        self.scale = size * max(float(self.M.abs().max()), torch.finfo(C.dtype).tiny)
        self.lowest = float(torch.linalg.eigvalsh(self.M.double()).min()) if bool(self.M.isfinite().all()) else math.nan

    def _columns(self) -> Tensor:
        return torch.stack([self.C @ e for e in torch.eye(self.C.size, dtype=self.C.dtype, device=self.C.device)], 1)

    def near(self, identity: str, got: Callable[[], Tensor], expected: Tensor, times: float = 1.0) -> None:
        """Compare beside the size of the products that are added up, |M| |v|."""
        self.equal(identity, got, expected, scale=self.scale, tolerance=times * self.tolerance)


def _products(one: _Matrix) -> None:
    C, M, v, V, W = one.C, one.M, one.v, one.V, one.W
    one.holds("C.shape = (D, D)", C.shape == tuple(M.shape), f"expected {tuple(M.shape)}, got {C.shape}")
    before, of_vector = V.clone(), v.clone()
    one.near("C @ v = the matrix times v", lambda: C @ v, M @ v, 3)
    one.near("C @ V = the matrix times V", lambda: C @ V, M @ V, 3)
    one.holds(
        "C @ V leaves V as it is", torch.equal(V, before) and torch.equal(v, of_vector), f"expected {before}, got {V}"
    )
    both = torch.cat([v.unsqueeze(1), V], dim=1)
    one.near("C @ v = first column of C @ (v, V)", lambda: (C @ both)[:, 0], M @ v, 3)
    one.near("C @ V does not depend on strides", lambda: C @ V.T.contiguous().T, M @ V, 3)
    one.near("C (2 V - W) = 2 C V - C W", lambda: C @ (2.0 * V - W), 2.0 * (M @ V) - M @ W, 10)
    for K in _WIDE:
        columns = one.wide[:, :K].contiguous()
        one.near(f"C @ V of {K} columns = the matrix times V", partial(C.__matmul__, columns), M @ columns, 3)


def _frozen(one: _Matrix) -> None:
    """Products are tensors of their own, and C is afterwards what it was."""
    C, both = one.C, torch.cat([one.v.unsqueeze(1), one.V], dim=1)
    product = one.value("C @ V", lambda: C @ both)
    one.same("repeated products are the same: C is a frozen value", lambda: C @ both, product)
    one.holds("C @ V carries no graph", not product.requires_grad, "its result requires a gradient")
    shared = product.untyped_storage().data_ptr() == both.untyped_storage().data_ptr()
    one.holds("C @ V is no view of V", not shared, "writing into the result would change V")
    expected = product.clone()
    one.value("C @ V", lambda: C @ (2.0 * both))
    one.same("a later product leaves an earlier one as it is", product, expected)
    one.value("C @ V", lambda: C @ both).mul_(2.0)
    one.same("writing into C @ V leaves C as it is", lambda: C @ both, expected)
    with torch.autocast(C.device.type, dtype=torch.bfloat16):
        inside = one.value("C @ V inside autocast", lambda: C @ both)
    one.same("C @ V inside autocast = C @ V", inside, expected)


def _symmetric(one: _Matrix) -> None:
    columns = one.value("C @ e_i = column i of C", one._columns)
    one.near("C = C^T", lambda: columns, columns.T)
    one.near("C @ e_i = column i of C", lambda: columns, one.M)
    one.near("C.to_dense() = the matrix of the products", one.C.to_dense, one.M)
    zero = torch.zeros_like(one.v)
    one.near("C @ 0 = 0", lambda: one.C @ zero, zero)


def _entries(one: _Matrix) -> None:
    C, M, v, V = one.C, one.M, one.v, one.V
    one.near("C.diagonal() = diagonal of the matrix", C.diagonal, M.diagonal())
    one.near("C.trace() = sum of the diagonal", C.trace, M.trace())
    # a structure may take it from differences of squares, which keep half of the digits
    norm = torch.linalg.vector_norm(M)
    one.equal("C.frobenius_norm() = |C|_F", C.frobenius_norm, norm, tolerance=10 * torch.finfo(C.dtype).eps ** 0.5)
    form = {"scale": one.scale * max(1.0, float(v @ v), float(V.square().sum())), "tolerance": 3 * one.tolerance}
    one.equal("C.quadratic_form(v) = v^T C v", lambda: C.quadratic_form(v), v @ (M @ v), **form)
    one.equal("C.quadratic_form(V) = V^T C V", lambda: C.quadratic_form(V), V.T @ (M @ V), **form)
    X = torch.stack([V, one.W], dim=0)  # (2, D, K)
    along = torch.einsum("ij,ajk->aik", M, X)
    one.near("C.apply_along(X, 1) = C on dimension 1 of X", lambda: C.apply_along(X, 1), along, 3)
    one.near("C.apply_along(X, -1) = C on the last one", lambda: C.apply_along(X.mT.contiguous(), -1), along.mT, 3)
    first = along.movedim(1, 0)
    one.near("C.apply_along(X, 0) = C on the first one", lambda: C.apply_along(X.movedim(1, 0), 0), first, 3)
    scipy = one.value("C.to_scipy() @ v = C @ v", lambda: torch.as_tensor(C.to_scipy() @ v.cpu().numpy()))
    one.near("C.to_scipy() @ v = C @ v", lambda: scipy.to(v), M @ v, 3)
    columns = one.value("C.to_scipy() @ V = C @ V", lambda: torch.as_tensor(C.to_scipy() @ V.cpu().numpy()))
    one.near("C.to_scipy() @ V = C @ V", lambda: columns.to(v), M @ V, 3)


def _arguments(one: _Matrix) -> None:
    C, D = one.C, one.C.size
    kinds = (TypeError, ValueError)
    for wrong in (one.v.new_zeros(D + 1), one.v.new_zeros(D, 1, 1), one.v.new_zeros(D + 1, 2)):
        identity = f"C @ x refuses x of shape {tuple(wrong.shape)}, naming D"
        one.refuses(identity, partial(C.__matmul__, wrong), kinds, str(D))
    other = torch.float32 if C.dtype == torch.float64 else torch.float64
    one.refuses("C @ x refuses x of another dtype, naming it", lambda: C @ one.v.to(other), kinds, str(other))
    numbers: Any = one.v.tolist()
    one.refuses("C @ x refuses what is no tensor", lambda: C @ numbers, kinds, "list")


def _arithmetic(one: _Matrix) -> None:
    C, M = one.C, one.M
    d, eye = one.v.square(), Identity(C.size, C.dtype, C.device)
    unit = eye.to_dense()
    for identity, made, expected in (
        ("2 C", lambda: 2.0 * C, 2.0 * M),
        ("-C", lambda: -C, -M),
        ("C - 0.5 C", lambda: C - 0.5 * C, 0.5 * M),
        ("C + 2 I + diag(d)", lambda: C + 2.0 * eye + Diagonal(d), M + 2.0 * unit + torch.diag(d)),
    ):
        S = one.value(identity, made)
        close = {"scale": one.scale + float(expected.abs().max()), "tolerance": 10 * one.tolerance}
        one.equal(f"matrix of {identity}", S.to_dense, expected, **close)
        one.equal(f"diagonal of {identity}", S.diagonal, expected.diagonal(), **close)
        one.equal(f"({identity}) @ v", partial(S.__matmul__, one.v), expected @ one.v, **close)
        solved = f"damped_inverse({identity}, lambda) undoes it"
        _undoes(one, solved, S, expected)


def _undoes(one: _Matrix, identity: str, C: LinearOperator, M: Tensor) -> None:
    """Hold (C + lambda I)^-1 against its equation, with a lambda that makes C + lambda I well conditioned."""
    lowest, size = float(torch.linalg.eigvalsh(M.double()).min()), float(M.abs().max())
    # conjugate gradients, the default rule, are asked for 1e-10 in float64 and 1e-5 in float32
    tolerance = max(1e-8 if C.dtype == torch.float64 else 1e-3, 100 * one.tolerance)
    for share in (0.1, 2.0):
        damping = max(0.0, -lowest) + share * (size or 1.0)
        A = M + damping * torch.eye(len(M), dtype=M.dtype, device=M.device)
        X = one.value(identity, partial(damped_inverse, C, damping))
        for b in (one.v, one.W):
            one.equal(identity, partial(_after, A, X, b), b, scale=1.0, tolerance=tolerance)


def _after(A: Tensor, X: LinearOperator, b: Tensor) -> Tensor:
    return A @ (X @ b)


def _inverses(one: _Matrix) -> None:
    C, M = one.C, one.M
    _undoes(one, "damped_inverse(C, lambda) @ (C + lambda I) v = v", C, M)
    for damping in _indefinite(one):
        identity = "damped_inverse(C, lambda) refuses a C + lambda I with a negative eigenvalue"
        one.refuses(identity, lambda: damped_inverse(C, damping) @ one.v, (SolveError,))  # noqa: B023
    E = one.value("eigendecompose(C) = C", lambda: eigendecompose(C))
    one.near("eigendecompose(C) = C", E.to_dense, M, 10)
    _undoes(one, "damped_inverse(eigendecompose(C), lambda) @ (C + lambda I) v = v", E, M)
    eigenvalues = torch.linalg.eigvalsh(M)
    try:
        spectrum = C.spectrum()
    except OperatorError:
        spectrum = None
    if spectrum is not None:
        one.near("C.spectrum() = eigenvalues of the matrix", lambda: spectrum.sort().values, eigenvalues, 10)
    _determinant(one, eigenvalues)


def _determinant(one: _Matrix, eigenvalues: Tensor) -> None:
    """Where there is a determinant, it is that of C + lambda I, which has to be positive definite."""
    C, size = one.C, float(one.M.abs().max()) or 1.0
    try:
        C.logdet(max(0.0, -one.lowest) + size)
    except OperatorError:
        return  # the structure does not give it
    for share in (1.0, 0.1):
        damping = max(0.0, -one.lowest) + share * size
        logarithms = (eigenvalues + damping).log()
        # eigenvalues have the error of the largest one, at most D / share times lambda
        one.equal(
            "C.logdet(lambda) = sum of log(e + lambda)",
            partial(C.logdet, damping),
            logarithms.sum(),
            scale=C.size * (1.0 + float(logarithms.abs().max())),
            tolerance=10 * C.size / share * one.tolerance,
        )
    # one, half and all of the eigenvalues negative: an even number of them leaves the determinant positive
    for count in {1, (C.size + 1) // 2, C.size}:
        damping = -float(eigenvalues[count - 1]) - 0.1 * size
        one.refuses(
            "C.logdet(lambda) refuses a C + lambda I with a negative eigenvalue",
            partial(C.logdet, damping),
            (ArithmeticError, OperatorError, ValueError),
        )


def _indefinite(one: _Matrix) -> tuple[float, ...]:
    """Return dampings that leave a negative eigenvalue clear of rounding, if there are such."""
    clear = one.lowest < -0.1 * float(one.M.abs().max())
    return (0.0, -0.5 * one.lowest) if clear else ()


def _state(one: _Matrix) -> None:
    if not is_dataclass(one.C):
        return
    frozen = type(one.C).__dataclass_params__.frozen
    one.holds("an operator is a frozen value", frozen, "expected @dataclass(frozen=True)")
    try:
        state = one.C.state_dict()
    except OperatorError as error:
        one.holds("state_dict says that there is none", "state_dict" in str(error), f"got {error}")
        return

    def reloaded() -> Tensor:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        return operator_from_state_dict(torch.load(file, weights_only=True)).to_dense()

    one.same("operator_from_state_dict(C.state_dict()) = C", reloaded, one.C.to_dense())


def _semidefinite(one: _Matrix) -> None:
    # an eigenvalue of a matrix with errors delta has an error of at most |delta|
    bound = -10 * one.tolerance * one.scale
    one.holds("no eigenvalue is negative", one.lowest >= bound, f"expected at least 0, got {one.lowest:.3g}")


_PARTS = (_products, _frozen, _symmetric, _entries, _arguments, _inverses, _arithmetic, _state)
