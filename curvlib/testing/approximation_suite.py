"""What every approximation keeps: a symmetric matrix on the scale of the objective, without side effects.

Symbols: D parameters, C the estimate, eta the l2 weight, c the factor of the loss's reduction.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace

import torch
from torch import Tensor, nn

from curvlib import GGN, EmpiricalFisher, Fisher, Hessian, StaleEvaluationError
from curvlib.approximations import Approximation, MovingAverage, StatisticalApproximation
from curvlib.testing.estimates import CLOSE, Estimates
from curvlib.testing.exact_cases import check_exact, check_sphere, fixed_networks
from curvlib.testing.exactness import ExactOn, itself
from curvlib.testing.identities import Outcome, Subject, UntestedWarning, described
from curvlib.testing.losses import LOSSES
from curvlib.testing.networks import ACTIVATIONS, networks
from curvlib.testing.operator_suite import check_operator
from curvlib.testing.oracles import Network
from curvlib.testing.search import search
from curvlib.testing.statistic_identities import (
    draws_are_of_the_generator,
    of_the_sum_alone,
    single_precision,
    twice_the_batch,
)
from curvlib.testing.unchanged import Snapshot

_NO_EXACTNESS = (
    "exactness: no number was compared with the exact one, but where each layer's curvature is a multiple of the "
    "identity, so that a wrong layout or index stays unseen. Say exact_on=ON_BLOCKS, ON_DIAGONAL, ON_TRACE, "
    "ONE_EXAMPLE or another ExactOn where it is exact; exact_on=NOWHERE if it is nowhere."
)
_MATRICES = (GGN(), Fisher(), EmpiricalFisher(), Hessian())


def check_approximation(
    approximation: Approximation,
    *,
    exact_on: ExactOn | Sequence[ExactOn] | None = None,
    semidefinite: bool = True,
    degree: float | None = 1.0,
    averages: bool = True,
    activations: Sequence[type[nn.Module]] = ACTIVATIONS,
    positions: bool = True,
    examples: int = 10,
    draws: int = 200,
) -> Outcome:
    """Check an approximation on drawn networks, and against a dense matrix where it claims to be exact.

    The networks are multi-layer perceptrons with every loss of :mod:`curvlib.testing`, in float64. An approximation
    whose estimates depend on random draws is noticed; what only holds for fixed draws is then left out.

    Args:
        approximation: an instance.
        exact_on: where it is exact, such as ``EVERYWHERE``, ``ON_BLOCKS``, ``ON_DIAGONAL``, ``ON_TRACE`` or
            ``ONE_EXAMPLE``, or several of these; with random draws, where it is unbiased. ``NOWHERE`` makes no such
            claim: then no number of it is compared with an exact one but where each layer's curvature is a multiple
            of the identity. None does the same, with a warning.
        semidefinite: whether no eigenvalue may be negative.
        degree: multiplying the loss by c multiplies the estimate by c^degree: 1 for a curvature, 1/2 for its root, 0
            for the identity; None makes no claim.
        averages: whether the estimate over batches is that of one large batch.
        activations: between the layers of the networks, for one that does not take all.
        positions: whether it takes layers that are used at several positions.
        examples: how many networks are drawn.
        draws: how many estimates are averaged where they are random.

    Returns:
        What was tested, and what was not; ``print`` it.

    Raises:
        TypeError: this is no approximation.
        IdentityError: an identity breaks, with the smallest network that was found.

    Warns:
        UntestedWarning: ``exact_on`` is None.

    Example:
        >>> from curvlib.approximations import Diagonal
        >>> from curvlib.testing import ON_DIAGONAL
        >>> outcome = check_approximation(Diagonal(GGN()), exact_on=ON_DIAGONAL, examples=2)
        >>> outcome.untested
        ()
    """
    if not isinstance(approximation, Approximation):
        raise TypeError(
            f"check_approximation needs an approximation, such as Diagonal(GGN()), got {described(approximation)}."
        )
    subject = Subject(repr(approximation))
    exact = _claimed(exact_on)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        known = Estimates(approximation, subject, fixed_networks()[0])
        _finite(known)  # NaN would differ from itself, and break the first comparison
        draws_are_of_the_generator(known)
    claims = _Claims(semidefinite, degree, averages and not known.random, known.random)

    def check(network: Network) -> None:
        torch.manual_seed(0)
        estimates = Estimates(approximation, subject, network)
        for part in (_matrix, _scale, _statistic, _batches, _nothing_else_changes, _follows_the_parameters):
            part(estimates, claims)

    losses = [case for case in LOSSES if case.likelihood] if known.random else LOSSES
    drawn = networks(losses, activations=activations, positions=positions, max_examples=4)
    search(drawn, check, examples)
    for claim in exact:
        check_exact(approximation, subject, claim, known.random, activations, examples, draws)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for claim in exact[:1]:
            check_sphere(approximation, subject, claim, known.random, 1.0, draws)
        # what a claim does not compare has to be right there as well
        whole = any(claim.compared is itself for claim in exact[:1])
        if not whole and degree is not None and (degree == 1.0 or not known.random):
            check_sphere(approximation, subject, None, known.random, degree, draws)
        _one_network(Estimates(approximation, subject, fixed_networks()[0]))
        _undefined_matrices(approximation, subject)
    return _outcome(subject, exact, claims, positions)


def _claimed(exact_on: ExactOn | Sequence[ExactOn] | None) -> tuple[ExactOn, ...]:
    if exact_on is None:
        warnings.warn(f"check_approximation without exact_on: {_NO_EXACTNESS}", UntestedWarning, stacklevel=3)
    return (exact_on,) if isinstance(exact_on, ExactOn) else tuple(exact_on or ())


def _outcome(subject: Subject, exact: tuple[ExactOn, ...], claims: _Claims, positions: bool) -> Outcome:
    untested = []
    if not exact:
        untested.append(_NO_EXACTNESS)
    elif all(claim.examples == 1 for claim in exact):
        untested.append("several examples: exactness was tested with one example alone")
    if exact and positions and not any(claim.positions for claim in exact):
        untested.append("positions: exactness was tested with one position alone")
    if claims.degree is None:
        untested.append("scale: with degree=None, what a multiple of the loss or twice a batch does")
    if not claims.averages:
        untested.append("batches: whether an estimate over several is that of one large batch")
    return Outcome(subject.name, tuple(subject.kept), tuple(untested))


@dataclass(frozen=True)
class _Claims:
    semidefinite: bool
    degree: float | None
    averages: bool
    random: bool


def _matrix(one: Estimates, claims: _Claims) -> None:
    C, D, subject = one.C, len(one.network.theta), one.subject
    subject.holds("C is (D, D)", C.shape == (D, D), f"expected {(D, D)}, got {tuple(C.shape)}")
    subject.holds("C has the parameters' dtype", C.dtype == one.network.theta.dtype, f"got {C.dtype}")
    _finite(one)
    one.equal("C = C^T", C, C.T)
    if claims.semidefinite:
        lowest = float(torch.linalg.eigvalsh(C).min())
        # an eigenvalue has at most the error of the whole matrix
        subject.holds("no eigenvalue is negative", lowest >= -CLOSE * one.size * D, f"the smallest is {lowest:.3g}")
    one.subject.same("the same generator gives the same estimate", one.dense, C)


def _finite(one: Estimates) -> None:
    one.subject.holds("C is finite", bool(one.C.isfinite().all()), f"got {one.C}")


def _scale(one: Estimates, claims: _Claims) -> None:
    network, includes = one.network, one.approximation.includes_l2
    eye = torch.eye(len(one.C), dtype=one.C.dtype)
    shift = 0.7 * eye if includes else 0.0 * eye
    more = one.dense(network.copy(l2=network.l2 + 0.7))
    one.equal("C with l2 + 0.7 = C + 0.7 I" if includes else "C has no l2 term", more, one.C + shift)
    if claims.degree is None or network.other is None:
        return
    own = network.l2 * eye if includes else 0.0 * eye
    changed = network.copy(reduction_changed=True)
    z, y = one.evaluation.outputs, network.targets
    ratio = changed.objective().loss.scale(z, y) / one.objective.loss.scale(z, y)
    identity = "C follows the reduction: C of c' L = (c'/c)^degree C of c L, the l2 term apart"
    expected = ratio**claims.degree * (one.C - own)
    got = one.dense(changed) - own
    size = max(float(ratio), 1.0) * one.size
    one.subject.equal(identity, got, expected, scale=size, tolerance=CLOSE)


def _statistic(one: Estimates, claims: _Claims) -> None:
    if claims.degree is None:
        return  # what has no degree may be any function, such as one of a few directions
    of_the_sum_alone(one)
    if not claims.random:
        twice_the_batch(one, claims.degree)


def _batches(one: Estimates, claims: _Claims) -> None:
    network, approximation, subject = one.network, one.approximation, one.subject
    batches = split(network)
    identity = "estimate_over(batches) is defined"
    generator = torch.Generator().manual_seed(0)
    over = subject.value(
        identity,
        lambda: approximation.estimate_over(one.objective, batches, generator, progress=False).to_dense(),
    )
    one.equal("estimate_over(batches) = its transpose", over, over.T)
    if claims.averages:
        one.equal("estimate_over(batches) = estimate of all of them at once", over, one.C)
    if isinstance(approximation, StatisticalApproximation) and approximation.averages:
        average = MovingAverage(approximation, decay=0.9)
        for _ in range(3):
            subject.value(
                "MovingAverage.update", lambda: average.update(one.evaluation, torch.Generator().manual_seed(0))
            )
        averaged = average.operator(one.objective).to_dense
        one.equal("MovingAverage of equal batches = estimate", averaged, one.C)


def split(network: Network) -> list[tuple[Tensor, Tensor | tuple[Tensor, ...]]]:
    """Return the batch in two, or as it is where there is one example."""
    inputs, targets = network.batch
    N = len(inputs)
    sizes = [N // 2, N - N // 2] if N > 1 else [N]
    if isinstance(targets, tuple):
        parts = list(zip(*(target.split(sizes) for target in targets), strict=True))
    else:
        parts = list(targets.split(sizes))
    return list(zip(inputs.split(sizes), parts, strict=True))


def _nothing_else_changes(one: Estimates, claims: _Claims) -> None:
    one.before.compare(one.subject, "an estimate")
    for parameter in one.network.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = Snapshot(one.network.model)
    one.dense(one.network)
    before.compare(one.subject, "an estimate")
    copied = one.network.copy()
    one.subject.same("a copy of the model has the same estimate", lambda: one.dense(copied), one.C)


def _follows_the_parameters(one: Estimates, claims: _Claims) -> None:
    """The objects that were used at the old parameters are used again at new ones, beside objects never used before."""
    fresh = copy.deepcopy(one.approximation)
    with torch.no_grad():
        for parameter in one.network.model.parameters():
            parameter.mul_(1.5).add_(0.1)
    one.subject.refuses(
        "an evaluation of other parameters is refused",
        lambda: one.approximation.estimate(one.evaluation, torch.Generator().manual_seed(0)) @ one.network.theta,
        (StaleEvaluationError,),
    )
    moved = one.network.copy()
    expected = Estimates(fresh, one.subject, moved).C
    identity = "after the parameters have moved, the estimate is that at the new ones"
    again = one.approximation.estimate(one.objective.at(one.network.batch), torch.Generator().manual_seed(0))
    one.equal(identity, again.to_dense, expected)


def _one_network(one: Estimates) -> None:
    C = one.approximation.estimate(one.evaluation, torch.Generator().manual_seed(0))
    check_operator(C, dense=one.C, tolerance=CLOSE)
    names = [row.parameter for row in one.objective.describe(one.approximation).rows]
    one.subject.holds("describe names every parameter once", names == list(one.objective.layout.names), f"got {names}")
    single_precision(one)


def _undefined_matrices(approximation: Approximation, subject: Subject) -> None:
    """With each matrix it gives a symmetric estimate, or it is refused by the matrix's name."""
    if not is_dataclass(approximation) or "matrix" not in {field.name for field in fields(approximation)}:
        return
    model, x, y = nn.Linear(2, 3).double(), torch.randn(3, 2).double(), torch.tensor([0, 1, 2])
    network = Network(model, nn.CrossEntropyLoss(), x, y)
    for matrix in _MATRICES:
        name = type(matrix).__name__
        identity = f"{name}() gives a symmetric estimate or is refused by name"
        try:
            other = replace(approximation, matrix=matrix)
            C = other.estimate(network.evaluate()).to_dense()
        except (TypeError, ValueError, NotImplementedError) as error:
            subject.holds(identity, name in str(error), f"expected a message with {name}, got {error}")
        except Exception as error:
            subject.fail(identity, f"raised {type(error).__name__}: {error}")
        else:
            subject.equal(identity, C, C.T, tolerance=CLOSE)
