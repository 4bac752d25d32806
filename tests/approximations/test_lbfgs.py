"""L-BFGS: the operator is what the BFGS updates make one after another, its inverse the two-loop recursion."""

import pytest
import torch
from cases import mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from lbfgs_oracles import D, by_updates, latest_delta, pairs_of, quadratic, two_loops
from scipy.optimize import LbfgsInvHessProduct
from torch import nn

from curvlib import Objective
from curvlib.approximations import (
    LBFGS,
    PowellDamping,
    SkipPairs,
)
from curvlib.operators import LowRank
from curvlib.solvers import damped_inverse


def history_of(steps_and_changes, **options):
    history = LBFGS(**options).start()
    used = [history.update(s, y) for s, y in steps_and_changes]
    return history, used


@given(seed=st.integers(0, 1000), count=st.integers(1, 9), memory=st.integers(1, 9))
@settings(max_examples=60)
def test_the_operator_is_that_of_the_updates_and_its_inverse_the_two_loops(seed, count, memory):
    A, generator = quadratic(seed)
    pairs = pairs_of(A, generator, count)
    history, used = history_of(pairs, memory=memory)
    assert used == [True] * count
    kept = pairs[-memory:]
    delta = latest_delta(pairs)
    B = history.operator()
    assert isinstance(B, LowRank)
    expected = by_updates(kept, delta)
    torch.testing.assert_close(B.to_dense(), expected, rtol=1e-8, atol=1e-9)
    s, y = pairs[-1]
    torch.testing.assert_close(B @ s, y, rtol=1e-9, atol=1e-9)  # the secant equation
    g = torch.randn(D, generator=generator, dtype=torch.float64)
    inverse = damped_inverse(B, 0.0)
    # of a rank that covers the space it is made as a matrix's
    assert isinstance(inverse, LowRank) == (2 * len(kept) < D)
    # random pairs make B of condition up to 1e6
    reference = two_loops(kept, delta, g)
    torch.testing.assert_close(inverse @ g, reference, rtol=0, atol=1e-8 * float(reference.abs().max()))


@given(seed=st.integers(0, 1000), count=st.integers(1, 6))
@settings(max_examples=20)
def test_the_inverse_is_that_of_scipy(seed, count):
    A, generator = quadratic(seed)
    pairs = pairs_of(A, generator, count)
    history, _ = history_of(pairs, initial=1.0)
    S, Y = (torch.stack(vectors).numpy() for vectors in zip(*pairs, strict=True))
    reference = torch.from_numpy(LbfgsInvHessProduct(S, Y).todense())
    inverse = damped_inverse(history.operator(), 0.0).to_dense()
    torch.testing.assert_close(inverse, reference, rtol=0, atol=1e-8 * float(reference.abs().max()))


def test_as_many_conjugate_pairs_as_dimensions_give_the_hessian():
    A, generator = quadratic(0)
    e, Q = torch.linalg.eigh(A)
    history, _ = history_of([(Q[:, i], e[i] * Q[:, i]) for i in torch.randperm(D, generator=generator)])
    torch.testing.assert_close(history.operator().to_dense(), A, rtol=1e-9, atol=1e-9)


@given(seed=st.integers(0, 1000))
@settings(max_examples=30)
def test_negative_curvature_is_skipped_or_damped_and_b_stays_positive_definite(seed):
    A, generator = quadratic(seed, definite=False)
    pairs = pairs_of(A, generator, 8)
    history, used = history_of(pairs, memory=20)
    good = [pair for pair in pairs if pair[0] @ pair[1] > 0]
    assert used == [bool(s @ y > 0) for s, y in pairs]
    assert (history.updates, history.skipped) == (len(good), 8 - len(good))
    if good:
        expected = by_updates(good, latest_delta(good))
        scale = float(expected.abs().max())
        torch.testing.assert_close(history.operator().to_dense(), expected, rtol=0, atol=1e-8 * scale)
    damped, used = history_of(pairs, memory=20, pairs=PowellDamping(fraction=0.3), initial=2.0)
    assert used == [True] * 8
    B = 2.0 * torch.eye(D, dtype=torch.float64)
    for s, y in pairs:
        Bs = B @ s
        if s @ y < 0.3 * (s @ Bs):
            t = 0.7 * (s @ Bs) / (s @ Bs - s @ y)
            y = t * y + (1 - t) * Bs
            torch.testing.assert_close(s @ y, 0.3 * (s @ Bs))
        B = B - Bs.outer(Bs) / (s @ Bs) + y.outer(y) / (s @ y)
    assert torch.linalg.eigvalsh(B).min() > 0
    scale = float(B.abs().max())
    torch.testing.assert_close(damped.operator().to_dense(), B, rtol=0, atol=1e-8 * scale)


def test_the_threshold_decides_what_is_skipped():
    s = torch.tensor([1.0, 0.0])
    y = torch.tensor([0.1, 1.0])  # s^T y = 0.0995 |s| |y|
    for threshold, expected in ((0.0, True), (0.09, True), (0.11, False)):
        assert LBFGS(pairs=SkipPairs(threshold=threshold)).start().update(s, y) is expected


@pytest.mark.parametrize("distance", [0.0, 1e-9, 1e-4])
def test_pairs_that_are_nearly_the_same(distance):
    """Columns of W are parallel then; relative to the largest entry of B the result keeps half of the digits."""
    A, generator = quadratic(3)
    (s, _), (other, _) = pairs_of(A, generator, 2)
    pairs = [(x, A @ x) for x in (s, s + distance * other, 2.0 * s)]
    history, _ = history_of(pairs)
    expected = by_updates(pairs, latest_delta(pairs))
    torch.testing.assert_close(history.operator().to_dense(), expected, rtol=0, atol=1e-8 * float(expected.abs().max()))


def test_before_any_pair_it_is_a_multiple_of_the_identity():
    objective = Objective(mlp([2, 2]), nn.MSELoss())
    eye = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(LBFGS().start().operator(objective).to_dense(), eye)
    torch.testing.assert_close(LBFGS(initial=3.0).start().operator(objective).to_dense(), 3 * eye)
    with pytest.raises(RuntimeError, match="no pair yet"):
        LBFGS().start().operator()


def test_training_with_it_reaches_the_minimum():
    """Gradient differences of the objective, its l2 term included: on a quadratic it converges like BFGS."""
    torch.manual_seed(0)
    model, x, y = mlp([4, 2]), torch.randn(30, 4).double(), torch.randn(30, 2).double()
    objective = Objective(model, nn.MSELoss(), l2=0.1)
    history, gradient = LBFGS(memory=10).start(), objective.at((x, y)).gradient()
    for _ in range(60):
        step = -(damped_inverse(history.operator(objective), 0.0) @ gradient)
        objective.layout.write(objective.parameters, objective.parameter_vector() + step)
        new = objective.at((x, y)).gradient()
        history.update(step, new - gradient)
        gradient = new
    assert gradient.norm() < 1e-8


def test_state_round_trip_and_the_callers_tensors():
    A, generator = quadratic(1)
    pairs = pairs_of(A, generator, 6)
    first, _ = history_of(pairs[:4], memory=3)
    second = LBFGS(memory=3).start()
    second.load_state_dict(first.state_dict())
    for history in (first, second):
        history.update(*pairs[4])
    assert torch.equal(first.operator().to_dense(), second.operator().to_dense())
    assert (second.updates, second.skipped) == (5, 0)
    before = first.operator().to_dense()
    pairs[4][0].zero_(), pairs[4][1].zero_()
    assert torch.equal(first.operator().to_dense(), before)
    with pytest.raises(ValueError, match=r"not of LBFGS\(memory=10"):
        LBFGS().start().load_state_dict(first.state_dict())


def test_single_precision():
    A, generator = quadratic(2)
    pairs = pairs_of(A, generator, 5)
    history, _ = history_of([(s.float(), y.float()) for s, y in pairs])
    B = history.operator()
    assert B.dtype == torch.float32
    expected = by_updates(pairs, latest_delta(pairs)).float()
    # pairs rounded to 6e-8, times the condition of the Gram matrix of five random pairs
    torch.testing.assert_close(B.to_dense(), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_bad_pairs_and_arguments():
    history = LBFGS(pairs=PowellDamping()).start()
    v = torch.ones(3)
    assert not history.update(v, v * float("nan"))
    assert not history.update(0 * v, v)
    assert history.skipped == 2
    assert history.update(v, v)
    with pytest.raises(ValueError, match=r"must have shape \(3,\), got \(4,\)"):
        history.update(torch.ones(4), torch.ones(4))
    with pytest.raises(ValueError, match=r"must have shape"):
        LBFGS().start().update(torch.ones(4), torch.ones(3))
    for make, error in (
        (lambda: LBFGS(memory=0), ValueError),
        (lambda: LBFGS(initial=-1.0), ValueError),
        (lambda: LBFGS(pairs="skip"), TypeError),
        (lambda: SkipPairs(threshold=-0.1), ValueError),
        (lambda: PowellDamping(fraction=1.0), ValueError),
    ):
        with pytest.raises(error):
            make()
