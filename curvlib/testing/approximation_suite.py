"""What every approximation keeps: a symmetric matrix on the scale of the objective, without side effects.

Symbols: D parameters, C the estimate, eta the l2 weight, c the factor of the loss's reduction.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace

import torch
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn

from curvlib import GGN, EmpiricalFisher, Fisher, Hessian, StaleEvaluationError
from curvlib.approximations import Approximation, MovingAverage, StatisticalApproximation
from curvlib.testing.exactness import ExactOn
from curvlib.testing.identities import Subject
from curvlib.testing.losses import EVERY_LOSS, LOSSES
from curvlib.testing.networks import ACTIVATIONS, mlp, networks, with_loss
from curvlib.testing.operator_suite import check_operator
from curvlib.testing.oracles import Network
from curvlib.testing.search import search
from curvlib.testing.unchanged import Snapshot

# float64 sums of a few hundred products, with room for eigenvectors and large logits.
_CLOSE = 1e-9
_MATRICES = (GGN(), Fisher(), EmpiricalFisher(), Hessian())


def check_approximation(
    approximation: Approximation,
    *,
    exact_on: ExactOn | None = None,
    semidefinite: bool = True,
    degree: float | None = 1.0,
    averages: bool = True,
    activations: Sequence[type[nn.Module]] = ACTIVATIONS,
    positions: bool = True,
    examples: int = 10,
    draws: int = 200,
) -> None:
    """Check an approximation on drawn networks, and against a dense matrix where it claims to be exact.

    The networks are multi-layer perceptrons with every loss of :mod:`curvlib.testing`, in float64. An approximation
    whose estimates depend on random draws is noticed; what only holds for fixed draws is then left out.

    Args:
        approximation: an instance.
        exact_on: where it is exact, such as ``EVERYWHERE``, ``ON_BLOCKS``, ``ON_DIAGONAL`` or ``ONE_EXAMPLE``; with
            random draws, where it is unbiased. None makes no such claim.
        semidefinite: whether no eigenvalue may be negative.
        degree: multiplying the loss by c multiplies the estimate by c^degree: 1 for a curvature, 1/2 for its root, 0
            for the identity; None makes no claim.
        averages: whether the estimate over batches is that of one large batch.
        activations: between the layers of the networks, for one that does not take all.
        positions: whether it takes layers that are used at several positions.
        examples: how many networks are drawn.
        draws: how many estimates are averaged where they are random.

    Raises:
        IdentityError: an identity breaks, with the smallest network that was found.

    Example:
        >>> from curvlib.approximations import Diagonal
        >>> from curvlib.testing import ON_DIAGONAL
        >>> check_approximation(Diagonal(GGN()), exact_on=ON_DIAGONAL, examples=2)
    """
    subject = Subject(repr(approximation))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        known = _Estimates(approximation, subject, _fixed()[0])
    claims = _Claims(semidefinite, degree, averages and not known.random)

    def check(network: Network) -> None:
        torch.manual_seed(0)
        estimates = _Estimates(approximation, subject, network)
        for part in (_matrix, _scale, _batches, _nothing_else_changes, _follows_the_parameters):
            part(estimates, claims)

    losses = [case for case in LOSSES if case.likelihood] if known.random else LOSSES
    drawn = networks(losses, activations=activations, positions=positions, max_examples=4)
    search(drawn, check, examples)
    if exact_on is not None:
        _exact(approximation, subject, exact_on, known.random, examples, draws)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _one_network(_Estimates(approximation, subject, _fixed()[0]))
        _undefined_matrices(approximation, subject)


@dataclass(frozen=True)
class _Claims:
    semidefinite: bool
    degree: float | None
    averages: bool


class _Estimates:
    """An approximation on one network; estimates from generators with the same seed unless told otherwise."""

    def __init__(self, approximation: Approximation, subject: Subject, network: Network) -> None:
        self.approximation, self.subject, self.network = approximation, subject, network
        self.objective = network.objective()
        self.evaluation = self.objective.at(network.batch)
        self.C = self.dense()
        self.size = max(1.0, float(self.C.abs().max()))
        self.random = not torch.equal(self.C, self.dense(seed=1))

    def dense(self, network: Network | None = None, seed: int = 0) -> Tensor:
        evaluation = self.evaluation if network is None else network.evaluate()
        operator = self.subject.value(
            "estimate(evaluation) is defined",
            lambda: self.approximation.estimate(evaluation, torch.Generator().manual_seed(seed)),
        )
        return self.subject.value("estimate(evaluation).to_dense()", operator.to_dense)

    def equal(self, identity: str, got: Tensor | Callable[[], Tensor], expected: Tensor) -> None:
        self.subject.equal(identity, got, expected, scale=self.size, tolerance=_CLOSE)


def _matrix(one: _Estimates, claims: _Claims) -> None:
    C, D, subject = one.C, len(one.network.theta), one.subject
    subject.holds("C is (D, D)", C.shape == (D, D), f"expected {(D, D)}, got {tuple(C.shape)}")
    subject.holds("C has the parameters' dtype", C.dtype == one.network.theta.dtype, f"got {C.dtype}")
    subject.holds("C is finite", bool(C.isfinite().all()), f"got {C}")
    one.equal("C = C^T", C, C.T)
    if claims.semidefinite:
        lowest = float(torch.linalg.eigvalsh(C).min())
        # an eigenvalue has at most the error of the whole matrix
        subject.holds("no eigenvalue is negative", lowest >= -_CLOSE * one.size * D, f"the smallest is {lowest:.3g}")
    one.subject.same("the same generator gives the same estimate", one.dense, C)


def _scale(one: _Estimates, claims: _Claims) -> None:
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
    one.subject.equal(identity, got, expected, scale=size, tolerance=_CLOSE)


def _batches(one: _Estimates, claims: _Claims) -> None:
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
    if isinstance(approximation, StatisticalApproximation):
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


def _nothing_else_changes(one: _Estimates, claims: _Claims) -> None:
    for parameter in one.network.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = Snapshot(one.network.model)
    one.dense(one.network)
    before.compare(one.subject, "an estimate")
    copied = one.network.copy()
    one.subject.same("a copy of the model has the same estimate", lambda: one.dense(copied), one.C)


def _follows_the_parameters(one: _Estimates, claims: _Claims) -> None:
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
    expected = _Estimates(fresh, one.subject, moved).C
    identity = "after the parameters have moved, the estimate is that at the new ones"
    again = one.approximation.estimate(one.objective.at(one.network.batch), torch.Generator().manual_seed(0))
    one.equal(identity, again.to_dense, expected)


def _exact(
    approximation: Approximation, subject: Subject, claim: ExactOn, random: bool, examples: int, draws: int
) -> None:
    if random:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for network in _fixed(min(claim.examples, 3)):
                _unbiased(approximation, subject, claim, network, draws)
        return
    drawn: SearchStrategy = networks(EVERY_LOSS, positions=claim.positions, max_examples=claim.examples)

    def check(network: Network) -> None:
        estimates = _Estimates(approximation, subject, network)
        expected = subject.value("the dense matrix", lambda: claim.expected(network, approximation))
        estimates.equal("C = the dense matrix that it is exact for", estimates.C, expected)

    search(drawn, check, examples)


def _unbiased(approximation: Approximation, subject: Subject, claim: ExactOn, network: Network, draws: int) -> None:
    """Two-sided z-test of every entry; 5 standard errors leave a false alarm below 1e-4 for 100 entries."""
    evaluation, generator = network.evaluate(), torch.Generator().manual_seed(1)
    samples = torch.stack([approximation.estimate(evaluation, generator).to_dense() for _ in range(draws)])
    expected = claim.expected(network, approximation)
    error = samples.std(0) / draws**0.5
    z = (samples.mean(0) - expected).abs() / error.clamp(min=1e-12 + 1e-9 * float(expected.abs().max()))
    identity = "the mean over random draws = the dense matrix"
    worst = int(z.argmax())
    subject.holds(
        identity,
        float(z.max()) < 5,
        f"expected {expected.flatten()[worst]:.4g} in entry {divmod(worst, len(expected))}, got a mean of "
        f"{samples.mean(0).flatten()[worst]:.4g} with standard error {error.flatten()[worst]:.2g} ({network!r})",
    )


def _fixed(examples: int = 3) -> list[Network]:
    """Small networks with losses in natural parameters, whose labels are drawn without rare ones."""
    made = []
    for case, reduction in ((LOSSES[0], "mean"), (LOSSES[2], "sum"), (LOSSES[6], "mean")):
        model = mlp([2, 2, 3], final=case.ending())
        inputs = torch.randn(examples, 2, dtype=torch.float64)
        made.append(with_loss(model, case, inputs, (reduction,), 0.1))  # type: ignore[arg-type]
    return made


def _one_network(one: _Estimates) -> None:
    C = one.approximation.estimate(one.evaluation, torch.Generator().manual_seed(0))
    check_operator(C, dense=one.C, tolerance=_CLOSE)
    names = [row.parameter for row in one.objective.describe(one.approximation).rows]
    one.subject.holds("describe names every parameter once", names == list(one.objective.layout.names), f"got {names}")
    state = torch.get_rng_state()
    one.dense()
    one.subject.same("with a generator, global random numbers are not used", torch.get_rng_state(), state)


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
            subject.equal(identity, C, C.T, tolerance=_CLOSE)
