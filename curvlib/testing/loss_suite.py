"""What every loss keeps in output space: derivatives, the root of its Hessian, draws, and the reduction.

Symbols: N examples, O outputs of one, z (N, O) outputs, y targets, L = c sum_n l_n the loss, H (N, O, N, O) the
Hessian.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from jaxtyping import Float
from torch import Tensor, nn

from curvlib import OutputLoss
from curvlib.output_losses import output_loss
from curvlib.testing.identities import Subject, described
from curvlib.testing.losses import LossCase
from curvlib.testing.search import search

_SHAPES = ((2,), (3,), (2, 2), (3, 1, 2))
# double backward through exponentials: some digits above rounding
_CLOSE = 1e-10


def check_loss(case: LossCase, *, examples: int = 20, draws: int = 3000) -> None:
    """Check a loss against automatic differentiation through its value, and its draws against its Hessian.

    Outputs are float64 tensors of shape (N, C), (N, C, T) and (N, C, T, S) with small entries.

    Args:
        case: the loss for a reduction, targets for given outputs, and what it claims: ``likelihood`` that labels can be
            drawn, ``natural`` that the second moment of their gradients is the Hessian.
        examples: how many batches are drawn.
        draws: how many gradients at drawn labels are averaged.

    Raises:
        IdentityError: an identity breaks, with the smallest batch that was found.

    Example:
        >>> from curvlib.testing import LossCase
        >>> case = LossCase("squares", lambda z, reduction: nn.MSELoss(reduction=reduction), torch.randn_like)
        >>> check_loss(case, examples=5)
    """
    if not isinstance(case, LossCase):
        raise TypeError(f"check_loss needs a LossCase, a loss with its targets, got {described(case)}.")
    subject = Subject(f"the loss {case.name!r}")

    def check(given: tuple[tuple[int, ...], int]) -> None:
        batch = _batch(subject, case, *given)
        before = _clones(batch)
        for part in (_values, _derivatives, _reduction, _empirical, _root, _precision):
            part(batch)
            _same_inputs(batch, before)
        _draws(batch, case)
        _same_inputs(batch, before)
        # the same objects at other outputs
        moved = replace(batch, z=0.5 * batch.z + 0.1)
        _derivatives(moved, ", at other outputs than before")
        _root(moved, ", at other outputs than before")

    shapes = st.tuples(st.integers(1, 3), st.sampled_from(_SHAPES)).map(lambda drawn: (drawn[0], *drawn[1]))
    search(st.tuples(shapes, st.integers(0, 2**16)), check, examples)
    if case.likelihood:
        with torch.random.fork_rng(devices=[]):
            _moments(_batch(subject, case, (2, 3), 0), case, draws)


@dataclass(frozen=True)
class _Batch:
    """A loss with both reductions, outputs and targets."""

    subject: Subject
    modules: dict[str, nn.Module | OutputLoss]
    losses: dict[str, OutputLoss]
    z: Tensor
    y: Any

    def hessian(self, reduction: str) -> Float[Tensor, "N o N o"]:
        """Double backward through the value."""
        loss, N = self.losses[reduction], len(self.z)
        H = torch.autograd.functional.hessian(lambda z: loss.value(z, self.y), self.z)
        return H.reshape(N, -1, N, self.z[0].numel())

    def blocks(self, reduction: str) -> Float[Tensor, "N o o"]:
        return torch.einsum("nonp->nop", self.hessian(reduction))

    def equal(self, identity: str, got: Any, expected: Tensor, scale: float = 1.0) -> None:
        self.subject.equal(identity, got, expected, scale=scale, tolerance=_CLOSE)


def _batch(subject: Subject, case: LossCase, shape: tuple[int, ...], seed: int) -> _Batch:
    torch.manual_seed(seed)
    z = 0.7 * torch.randn(shape, dtype=torch.float64)
    ending = nn.Sequential(*case.ending()) if case.final else nn.Identity()
    z = ending(z if case.classes_first else z.movedim(1, -1)).detach()
    modules = {}
    for reduction in ("mean", "sum"):
        with torch.random.fork_rng(devices=[]):  # the same weights for both
            modules[reduction] = case.make(z, reduction)
    torch.rand(1)  # targets are other numbers than the weights
    y = case.targets(z)
    losses = {
        reduction: subject.value("output_loss(loss) is defined", partial(output_loss, module))
        for reduction, module in modules.items()
    }
    for loss in losses.values():
        subject.value("check(outputs, targets) accepts what fits", partial(loss.check, z, y))
    return _Batch(subject, modules, losses, z, y)


def _values(batch: _Batch) -> None:
    for reduction, loss in batch.losses.items():
        module, y = batch.modules[reduction], batch.y
        value = batch.subject.value("value(z, y)", partial(loss.value, batch.z, batch.y))
        batch.subject.holds("value is a scalar", value.ndim == 0, f"got {tuple(value.shape)}")
        if isinstance(module, nn.Module):
            number = module(batch.z, *y) if isinstance(y, tuple) else module(batch.z, y)
            batch.equal("value = the module's own number", value, number)
        additive = reduction == "sum"
        batch.subject.holds("additive says whether it is a sum", loss.additive == additive, f"got {loss.additive}")


def _clones(batch: _Batch) -> list[Tensor]:
    y = batch.y if isinstance(batch.y, tuple) else (batch.y,)
    return [x.clone() for x in (batch.z, *y) if isinstance(x, Tensor)]


def _same_inputs(batch: _Batch, given: list[Tensor]) -> None:
    for now, then in zip(_clones(batch), given, strict=True):
        changed = (now != then) & ~(now.isnan() & then.isnan())
        identity = "a loss leaves outputs and targets as they were"
        batch.subject.holds(identity, not bool(changed.any()), f"expected {then}, got {now}")


def _derivatives(batch: _Batch, note: str = "") -> None:
    z, y = batch.z, batch.y
    for reduction, loss in batch.losses.items():
        leaf = z.clone().requires_grad_()
        expected = torch.autograd.grad(loss.value(leaf, y), leaf)[0]
        batch.equal(f"gradient = dL/dz{note}", partial(loss.gradient, z, y), expected)
        H = batch.hessian(reduction)
        between = H.clone()
        for n in range(len(z)):
            between[n, :, n] = 0
        batch.subject.holds("examples do not meet: H is block diagonal", not between.any(), f"got {between}")
        columns = batch.subject.value(f"linearize(z, y)(V) = H V{note}", partial(_columns, loss, z, y))
        batch.equal(f"linearize(z, y)(V) = H V{note}", columns, H.reshape(z.numel(), z.numel()))
        V = torch.randn_like(z)
        HV = (H.reshape(z.numel(), -1) @ V.flatten()).view_as(z)
        batch.equal(f"hessian_product(z, y, V) = H V{note}", partial(loss.hessian_product, z, y, V), HV, z.numel())


def _columns(loss: OutputLoss, z: Tensor, y: Any) -> Tensor:
    product, units = loss.linearize(z, y), torch.eye(z.numel(), dtype=z.dtype)
    return torch.stack([product(unit.view_as(z)).flatten() for unit in units], dim=1)


def _empirical(batch: _Batch) -> None:
    z, y = batch.z, batch.y
    for reduction, loss in batch.losses.items():
        single = batch.losses["sum"]
        # the gradient of a sum is, example by example, that of l_n
        expected = single.gradient(z, y) * loss.scale(z, y).sqrt()
        identity = f"empirical_gradient = sqrt(c) dl_n/dz_n ({reduction})"
        batch.equal(identity, partial(loss.empirical_gradient, z, y), expected)


def _root_vectors(loss: OutputLoss, z: Tensor, y: Any) -> list[Tensor]:
    return list(loss.hessian_sqrt(z, y))


def _root(batch: _Batch, note: str = "") -> None:
    z, y = batch.z, batch.y
    leaf = z.clone().requires_grad_()
    for reduction, loss in batch.losses.items():
        identity = f"sum_k v_k v_k^T = H_n for the vectors of hessian_sqrt{note}"
        vectors = batch.subject.value(identity, partial(_root_vectors, loss, leaf, y))
        shapes = {tuple(v.shape) for v in vectors}
        batch.subject.holds("hessian_sqrt gives vectors of z's shape", shapes <= {tuple(z.shape)}, f"got {shapes}")
        flat = torch.stack([v.flatten(1) for v in vectors]) if vectors else z.new_zeros(0, *z.flatten(1).shape)
        batch.subject.holds("hessian_sqrt gives at most O vectors", len(flat) <= z[0].numel(), f"got {len(flat)}")
        batch.equal(identity, torch.einsum("kno,knp->nop", flat, flat), batch.blocks(reduction))
        results = [loss.gradient(leaf, y), loss.empirical_gradient(leaf, y), *vectors]
        batch.subject.holds("results carry no graph", not any(x.requires_grad for x in results), "one has a graph")


def _reduction(batch: _Batch) -> None:
    mean, total = batch.losses["mean"], batch.losses["sum"]
    z, y = batch.z, batch.y
    w = batch.subject.value("batch_weight(z, y)", lambda: mean.batch_weight(z, y))
    batch.equal("batch_weight = 1 / scale", 1 / mean.scale(z, y), w)
    batch.equal("sum = batch_weight x mean", mean.value(z, y) * w, total.value(z, y), z.numel())
    batch.equal("the sum has weight 1", total.batch_weight(z, y), torch.ones_like(w))
    counted = mean.counted(z, y)
    if counted is not None:
        ignored = total.gradient(z, y)[~counted]
        batch.subject.holds("examples that do not count have no gradient", not ignored.any(), f"got {ignored}")


def _precision(batch: _Batch) -> None:
    z = batch.z.to(torch.bfloat16)
    given = batch.y if isinstance(batch.y, tuple) else (batch.y,)
    if any(isinstance(x, Tensor) and x.is_floating_point() for x in given):
        return
    for loss in batch.losses.values():
        identity = "half precision is computed in float32"
        gradient = batch.subject.value(identity, partial(loss.gradient, z, batch.y))
        batch.subject.holds(identity, gradient.dtype == torch.float32, f"got {gradient.dtype}")


def _draws(batch: _Batch, case: LossCase) -> None:
    z, y, subject = batch.z, batch.y, batch.subject
    for loss in batch.losses.values():
        if not case.likelihood:
            identity = "sample_gradient is refused without a likelihood, naming GGN()"
            subject.refuses(identity, partial(loss.sample_gradient, z, y), (NotImplementedError,), "GGN()")
            continue

        def sample(seed: int, loss: OutputLoss = loss) -> Tensor:
            return loss.sample_gradient(z, y, torch.Generator().manual_seed(seed))

        v = subject.value("sample_gradient(z, y, generator)", lambda: sample(0))
        subject.holds("sample_gradient has z's type", v.dtype == z.dtype, f"got {v.dtype}")
        counted = loss.counted(z, y)
        if counted is not None:
            subject.holds("no gradient is drawn for examples that do not count", not v[~counted].any(), f"got {v}")
        subject.holds("sample_gradient has z's shape", v.shape == z.shape, f"got {tuple(v.shape)}")
        state = torch.get_rng_state()
        subject.same("the same generator gives the same draw", lambda: sample(0), v)
        subject.same("with a generator, global random numbers are not used", torch.get_rng_state(), state)


def _moments(batch: _Batch, case: LossCase, draws: int) -> None:
    """Two-sided z-tests of every entry; 5.5 standard errors leave a false alarm below 1e-6 for 20 entries."""
    for reduction, loss in batch.losses.items():
        generator = torch.Generator().manual_seed(1)
        z, y = batch.z, batch.y
        v = torch.stack([loss.sample_gradient(z, y, generator).flatten(1) for _ in range(draws)])
        _z_test(batch.subject, f"drawn gradients have mean zero ({reduction})", v, torch.zeros_like(v[0]))
        between = torch.einsum("ko,kp->kop", v[:, 0], v[:, 1])
        identity = f"drawn gradients of different examples are independent ({reduction})"
        _z_test(batch.subject, identity, between, torch.zeros_like(between[0]))
        if case.natural:
            products = torch.einsum("kno,knp->knop", v, v)
            identity = f"E[v_n v_n^T] = H_n for drawn gradients v ({reduction})"
            _z_test(batch.subject, identity, products, batch.blocks(reduction))


def _z_test(subject: Subject, identity: str, samples: Tensor, expected: Tensor) -> None:
    mean, error = samples.mean(0), samples.std(0) / len(samples) ** 0.5
    away = (mean - expected).abs() > 5.5 * error + 1e-9
    subject.holds(
        identity, not bool(away.any()), f"expected {expected}\ngot a mean of {mean}\nwith standard errors {error}"
    )
