"""Lanczos against dense eigenvalues: all ends, repeated and clustered eigenvalues, and every status."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import CASES, draw
from scipy.sparse.linalg import eigsh
from spectra_cases import SPECTRA, D, generator, with_spectrum

from curvlib.operators import Dense, Diagonal, Identity, MatrixFree
from curvlib.solvers import SolveError, Status
from curvlib.spectra import BothEnds, Lanczos, Largest, LargestMagnitude, Smallest

ENDS = {"largest": Largest(), "smallest": Smallest(), "magnitude": LargestMagnitude(), "both": BothEnds()}
ends = pytest.mark.parametrize("which", ENDS.values(), ids=ENDS.keys())
blocks = pytest.mark.parametrize("block", [1, 3])


def wanted(e, which, count):
    """The wanted eigenvalues by sorting in Python."""
    if isinstance(which, BothEnds):
        decreasing = sorted(e.tolist(), reverse=True)
        top, bottom = (count + 1) // 2, count // 2
        return decreasing[:top] + decreasing[len(decreasing) - bottom :]
    key = {Largest: lambda x: -x, Smallest: lambda x: x, LargestMagnitude: lambda x: -abs(x)}[type(which)]
    return sorted(sorted(e.tolist(), key=key)[:count], reverse=True)


def check(C, pairs):
    """Assert what holds for every outcome: orthonormal vectors, true residuals, eigenvalues within them."""
    V, M = pairs.vectors, C.to_dense()
    rounding = 100 * torch.finfo(C.dtype).eps
    size = float(torch.linalg.matrix_norm(M, 2))
    assert float((V.T @ V - torch.eye(V.shape[1], dtype=V.dtype, device=V.device)).abs().max()) <= rounding
    residuals = torch.linalg.vector_norm(M @ V - V * pairs.values, dim=0)
    torch.testing.assert_close(pairs.residual_norms, residuals, rtol=1e-3, atol=rounding * size)
    distance = (torch.linalg.eigvalsh(M).unsqueeze(1) - pairs.values).abs().amin(0)
    assert bool((distance <= residuals + rounding * size).all())
    assert bool((pairs.values.diff() <= 0).all())


@ends
@blocks
@pytest.mark.parametrize("name", SPECTRA)
def test_eigenvalues_at_every_end(name, which, block, device):
    C = with_spectrum(SPECTRA[name], device=device)
    # These decay to eigenvalues whose distances are far below any tolerance.
    dense_end = name in {"power", "exponential"} and isinstance(which, (Smallest, BothEnds))
    tolerance = 1e-4 if dense_end else 1e-8
    pairs = Lanczos(count=5, which=which, block=block, tolerance=tolerance)(C, generator(1, device))
    check(C, pairs)
    assert pairs.status is Status.CONVERGED
    expected = torch.tensor(wanted(SPECTRA[name], which, 5), dtype=torch.float64, device=device)
    # apart from the dense ends the error is about the square of the residual over a gap of 0.01
    torch.testing.assert_close(pairs.values, expected, rtol=0, atol=10 * tolerance if dense_end else 1e-12)


@ends
@settings(max_examples=10)
@given(data=st.data())
def test_small_operators_of_every_kind(which, data):
    case = data.draw(st.sampled_from(list(CASES.values())))
    C, M = case(draw(data.draw(st.integers(0, 1000)), torch.device("cpu"), definite=False))
    count = data.draw(st.integers(1, C.size))
    pairs = Lanczos(count=count, which=which)(C)
    # of the operator's own matrix: some structures have lost a few digits of the dense one's before
    expected = wanted(torch.linalg.eigvalsh(C.to_dense()), which, count)
    assert pairs.values.tolist() == pytest.approx(expected, abs=1e-12 * max(1.0, float(M.abs().max()) * C.size))
    assert pairs.products == C.size + count
    assert pairs.solved


def test_restarts_agree_with_arpack():
    C = with_spectrum(SPECTRA["flat"])
    pairs = Lanczos(count=4, basis=12, tolerance=1e-8)(C, generator(0))
    check(C, pairs)
    assert pairs.restarts > 0
    assert pairs.products < 130  # 160 where only the wanted vectors are kept
    expected = eigsh(C.to_scipy(), 4, which="LA", tol=1e-10, v0=torch.ones(D).double().numpy())[0]
    assert pairs.values.tolist() == pytest.approx(sorted(expected, reverse=True), abs=1e-12)


def test_a_block_finds_the_copies_of_a_repeated_eigenvalue():
    e = torch.cat([torch.tensor([5.0, 5.0, 5.0, 4.0, 4.0, 3.0], dtype=torch.float64), SPECTRA["flat"][6:]])
    C = with_spectrum(e)
    pairs = Lanczos(count=6, block=3, tolerance=1e-8)(C, generator(0))
    check(C, pairs)
    assert pairs.values.tolist() == pytest.approx([5, 5, 5, 4, 4, 3], abs=1e-8)
    # fewer vectors than copies: what is returned are eigenvalues all the same
    check(C, Lanczos(count=6, tolerance=1e-2)(C, generator(0)))


def test_clusters():
    e = torch.cat([5.0 + 1e-6 * torch.arange(5, dtype=torch.float64), SPECTRA["flat"][5:]])
    C = with_spectrum(e)
    pairs = Lanczos(count=5, tolerance=1e-9, block=5)(C, generator(0))
    check(C, pairs)
    assert pairs.values.tolist() == pytest.approx(sorted(e[:5].tolist(), reverse=True), abs=1e-9)
    # single vectors tell the cluster apart once the tolerance is below its width
    narrow = Lanczos(count=5, tolerance=1e-9)(C, generator(0))
    assert narrow.values.tolist() == pytest.approx(sorted(e[:5].tolist(), reverse=True), abs=1e-9)


@blocks
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_invariant_subspaces_go_on_with_random_directions(block, dtype):
    three = torch.zeros(D, dtype=dtype)
    three[:3] = torch.tensor([3.0, 2.0, -1.0])
    for C in (Identity(D, dtype), Diagonal(torch.zeros(D, dtype=dtype)), Diagonal(three)):
        pairs = Lanczos(count=5, block=block)(C, generator(0))
        check(C, pairs)
        assert pairs.status is Status.CONVERGED
        expected = C.spectrum().sort(descending=True).values[:5].tolist()
        assert pairs.values.tolist() == pytest.approx(expected, abs=20 * torch.finfo(dtype).eps)


def test_float32_says_where_its_digits_end():
    C = Dense(with_spectrum(SPECTRA["flat"]).matrix.float())
    good = Lanczos(count=3)(C, generator(0))
    assert good.status is Status.CONVERGED
    assert good.values.dtype == good.vectors.dtype == torch.float32
    too_much = Lanczos(count=3, tolerance=1e-12)(C, generator(0))
    check(C, too_much)
    assert too_much.status is Status.ROUNDING_FLOOR
    assert too_much.solved
    assert "reached the rounding errors of torch.float32" in str(too_much)


def test_the_limit_is_a_status():
    C = with_spectrum(SPECTRA["flat"])
    pairs = Lanczos(count=5, max_restarts=0)(C, generator(0))
    check(C, pairs)
    assert pairs.status is Status.ITERATION_LIMIT
    assert pairs.restarts == 0
    assert not pairs.solved
    assert "stopped at the limit of 0 restarts; raise max_restarts" in str(pairs)
    with pytest.raises(SolveError, match="stopped at the limit") as caught:
        pairs.raise_if_failed()
    assert caught.value.solution is pairs
    Lanczos(count=2)(Identity(5)).raise_if_failed()


@blocks
def test_products_that_are_not_finite(block):
    calls = []

    def product(V):
        calls.append(V.shape[1])
        return V * (float("nan") if len(calls) > 3 else 1.0)

    pairs = Lanczos(count=3, block=block)(MatrixFree(product, D), generator(0))
    assert pairs.status is Status.NOT_FINITE
    assert bool(pairs.values.isnan().all())
    assert "met NaN or infinity" in str(pairs)
    assert pairs.restarts == 0


def test_orthogonality_survives_hundreds_of_restarts():
    C = with_spectrum(SPECTRA["exponential"])
    pairs = Lanczos(count=5, which=BothEnds(), basis=12, tolerance=1e-14, max_restarts=300)(C, generator(0))
    assert pairs.restarts == 300
    check(C, pairs)


def test_a_map_that_is_not_symmetric_breaks_down():
    M = torch.diag(torch.arange(1.0, D + 1)).double()
    M[0, 1:] = 50.0
    pairs = Lanczos(count=3, max_restarts=5)(MatrixFree(lambda V: M @ V, D, torch.float64), generator(0))
    assert pairs.status is Status.BREAKDOWN
    assert "check that the operator is symmetric" in str(pairs)


def test_the_host_waits_once_a_restart():
    """Products come in blocks, and their number and the generator decide everything."""
    seen = []
    M = with_spectrum(SPECTRA["flat"]).matrix

    def product(V):
        seen.append(V.shape[1])
        return M @ V

    C = MatrixFree(product, D, torch.float64)
    one = Lanczos(count=4, block=4, basis=24)(C, generator(5))
    assert set(seen) == {4}
    assert sum(seen) == one.products
    same, other = Lanczos(count=4, block=4, basis=24)(C, generator(5)), Lanczos(count=4, block=4)(C, generator(6))
    assert torch.equal(one.vectors, same.vectors)
    assert not torch.equal(one.vectors, other.vectors)


def test_bad_arguments():
    C = Identity(5)
    with pytest.raises(ValueError, match=r"Lanczos\(count=6\) asks for more eigenpairs than D = 5"):
        Lanczos(count=6)(C)
    with pytest.raises(ValueError, match=r"Lanczos\(count=...\) must be an integer >= 1, got 0"):
        Lanczos(count=0)
    with pytest.raises(ValueError, match=r"Lanczos\(block=...\) must be"):
        Lanczos(block=0)
    with pytest.raises(ValueError, match=r"Lanczos\(basis=...\) must be an integer >= 12, got 11"):
        Lanczos(count=10, basis=11)
    with pytest.raises(ValueError, match=r"Lanczos\(max_restarts=...\) must be"):
        Lanczos(max_restarts=-1)
    with pytest.raises(ValueError, match=r"Lanczos\(tolerance=...\) must be a finite float > 0"):
        Lanczos(tolerance=0.0)
    with pytest.raises(TypeError, match=r"must be a SpectrumEnd such as Largest\(\), got 'LA'"):
        Lanczos(which="LA")
    with pytest.raises(TypeError, match="operator must be a LinearOperator"):
        Lanczos()(torch.eye(3))
    with pytest.raises(TypeError, match="generator must be"):
        Lanczos()(C, 1)
