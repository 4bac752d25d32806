"""One evaluation of an objective: value, gradient, linearisation and layer factors from one graph.

Symbols: D parameters, N examples, z (N, ...) the model's outputs, L(z, y) the loss, J = dz/dtheta, u of z's shape.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from curvlib.extensions import Layer, LayerFactors, LayerPlan, Tape
from curvlib.objective.elsewhere import BACKWARD, FORWARD, Elsewhere
from curvlib.objective.errors import (
    FusedKernelError,
    FusedKernelWarning,
    LinearizationError,
)
from curvlib.objective.forward import ForwardPass, tensors_of
from curvlib.objective.freshness import Freshness
from curvlib.objective.independence import examples_are_independent, fixed_vector
from curvlib.operators import full_precision

if TYPE_CHECKING:
    from curvlib.objective.objective import Objective


# Work of a backward pass down to the layers' outputs alone.
_TO_OUTPUTS = 1 / 3


# How PyTorch names, in its error, the backward passes that it cannot differentiate although another kernel could.
_FUSED_KERNELS = ("scaled_dot_product", "_cudnn_rnn")


class Evaluation:
    """The objective on one batch at one parameter vector.

    Made by :meth:`Objective.at`. It keeps the autograd graph alive and raises :class:`StaleEvaluationError` when it is
    used after the parameters or the batch have changed. (A change is noticed through PyTorch's version counters, which
    writes to ``parameter.data`` do not move; write under ``torch.no_grad()`` instead. Steps of fused optimizers move
    them, see :mod:`.fused`.)

    Attributes:
        objective: what was evaluated.
        batch: on which batch, ``(inputs, targets)``.
        layout: how theta's tensors lie in flat vectors (D,).
        targets: the batch's targets.
        work: forward and backward passes made so far, in gradients of this batch (a forward pass is 1/3 of one);
            checks that are made once for an objective are not counted, nor is the second, partial pass that the
            statistics of large networks make to save memory.
    """

    def __init__(
        self,
        objective: Objective,
        parameters: list[nn.Parameter],
        batch: tuple[Any, Any],
        outputs: Tensor,
        tape: Tape,
        forward: ForwardPass,
        linearize: bool,
    ) -> None:
        self.batch = batch
        inputs, self.targets = batch
        self.objective = objective
        self.layout = objective.layout
        self._outputs = outputs.detach().to(torch.promote_types(outputs.dtype, torch.float32))
        self._parameters = parameters
        self._graph = self._recorded = outputs
        self._tape = tape
        self._forward = forward
        self._linearize = linearize
        self.work = FORWARD
        self._freshness = Freshness(objective, (*tensors_of(inputs), *tensors_of(self.targets)))
        hooked = [name for name, p in zip(self.layout.names, parameters, strict=True) if p._backward_hooks]
        if hooked:
            raise ValueError(
                f"parameter {hooked[0]!r} has a gradient hook (register_hook), which would change products: remove it."
            )
        with full_precision(self.layout.device):
            self._value = objective.total(objective.loss.value(self._outputs, self.targets), parameters)

    @property
    def value(self) -> Float[Tensor, ""]:
        """h, a scalar tensor without a graph."""
        self.check_fresh()
        return self._value

    @property
    def outputs(self) -> Float[Tensor, "N ..."]:
        """The model's outputs, detached, in float32 at least."""
        self.check_fresh()
        return self._outputs

    @property
    def examples(self) -> int:
        """N."""
        return self._outputs.shape[0]

    @property
    def counted_examples(self) -> int:
        """How many examples have a target that counts: N, where the loss ignores none."""
        return self.examples if self._counted is None else len(self._counted)

    @cached_property
    def _counted(self) -> Int[Tensor, " n"] | None:
        """The numbers of these examples, None for all. Waits for the device where the loss may ignore some."""
        counted = self.objective.loss.counted(self._outputs, self.targets)
        return None if counted is None or bool(counted.all()) else counted.nonzero().squeeze(1)

    @property
    def plan(self) -> LayerPlan:
        """The layers that this forward pass has complete records of, and the parameters outside of them."""
        return self._tape.plan

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of :attr:`plan`."""
        return self._tape.plan.layers

    @property
    def is_fresh(self) -> bool:
        """Whether parameters, batch and training mode are as they were when the evaluation was made."""
        return self._freshness.unchanged

    def check_fresh(self) -> None:
        """Raise StaleEvaluationError if the parameters or the batch have changed since the evaluation was made."""
        self._freshness.check()

    @property
    def output_gradient(self) -> Float[Tensor, "N ..."]:
        """dL/dz, of the outputs' shape."""
        self.check_fresh()
        return self._output_gradient

    @cached_property
    def _output_gradient(self) -> Float[Tensor, "N ..."]:
        with full_precision(self.layout.device):
            return self.objective.loss.gradient(self._outputs, self.targets)

    def gradient(self) -> Float[Tensor, " D"]:
        """Return dh/dtheta (D,), by one backward pass, computed once. Do not modify it in place."""
        self.check_fresh()
        return self._gradient

    @cached_property
    def _gradient(self) -> Tensor:
        gradient = self._transposed[1].detach() if self._linearize else self.vjp(self.output_gradient)
        if self.objective.l2 > 0:
            return gradient.add(self.objective.parameter_vector(), alpha=self.objective.l2)
        return gradient

    @cached_property
    def _transposed(self) -> tuple[Tensor, Float[Tensor, " D"]]:
        """A leaf u with the value dL/dz, and J^T u with the graph that makes it a function of u (and of theta)."""
        self.work += BACKWARD
        u = self.output_gradient.to(self._graph.dtype).detach().requires_grad_()
        with torch.enable_grad(), full_precision(self.layout.device):
            rows = torch.autograd.grad(self._graph, self._parameters, u, create_graph=True, allow_unused=True)
            # One flat vector: a product then differentiates one tensor, which small networks notice.
            return u, self.layout.join(rows)

    def jvp(self, vector: Float[Tensor, " D"]) -> Float[Tensor, "N ..."]:
        """Return J v, of the outputs' shape: one backward pass through the graph of J^T u, as J v = d(J^T u . v)/du.

        Raises:
            LinearizationError: an operation of the model has a backward pass that cannot be differentiated.
        """
        self.check_fresh()
        self.layout.check(vector)
        with full_precision(self.layout.device):
            return self._jvp(vector)

    def _jvp(self, vector: Float[Tensor, " D"]) -> Float[Tensor, "N ..."]:
        return self._derivatives(vector)[0].to(self._outputs.dtype)

    def vjp(self, vector: Float[Tensor, "N ..."]) -> Float[Tensor, " D"]:
        """Return J^T v for v of the outputs' shape: one ordinary backward pass."""
        self.check_fresh()
        with full_precision(self.layout.device):
            return self._vjp(vector)

    def _vjp(self, vector: Float[Tensor, "N ..."]) -> Float[Tensor, " D"]:
        self.work += BACKWARD
        rows = torch.autograd.grad(
            self._graph, self._parameters, vector.to(self._graph.dtype), retain_graph=True, allow_unused=True
        )
        return self.layout.join(rows)

    def product(self, output_product: Callable[[Tensor], Tensor], vector: Float[Tensor, " D"]) -> Float[Tensor, " D"]:
        """Return J^T M J v for a function x -> M x on output space: a :meth:`jvp` and a :meth:`vjp`."""
        self.check_fresh()
        with full_precision(self.layout.device):
            return self._vjp(output_product(self._jvp(vector)))

    def jvp_and_second_order(self, vector: Float[Tensor, " D"]) -> tuple[Tensor, Float[Tensor, " D"]]:
        """Return J v and the product of v with the curvature of the model itself, sum_i (dL/dz_i) d^2 z_i/dtheta^2."""
        self.check_fresh()
        self.layout.check(vector)
        with full_precision(self.layout.device):
            product, *second = self._derivatives(vector, self._parameters)
        return product.to(self._outputs.dtype), self.layout.join(second)

    def layer_factors(
        self, vector: Float[Tensor, "N ..."], reached: Mapping[str, Tensor] | None = None
    ) -> Iterator[LayerFactors]:
        """Yield (a, g) of every layer for an output-space vector: one backward pass down to the layers' outputs.

        Args:
            vector: of the outputs' shape.
            reached: what :meth:`reached_positions` gave, where one vector alone does not reach all positions.
        """
        self.check_fresh()
        self.work += _TO_OUTPUTS
        with full_precision(self.layout.device):
            for factors in self._tape.factors(self._recorded, vector):
                yield factors.limited(self._counted, self._padded, reached if reached is not None else {})

    @cached_property
    def _padded(self) -> Bool[Tensor, " N"] | None:
        """Which examples may have padding: all with recurrent layers, else those with ignored targets; None for none.

        Elsewhere, as in networks of sets, a gradient of zero says nothing of a position.
        """
        if not self._tape.has_steps:
            return None
        if self._tape.is_recurrent:
            return torch.ones(self.examples, dtype=torch.bool, device=self.layout.device)
        return self.objective.loss.ignores(self._outputs, self.targets)

    def layer_chain(self) -> tuple[Layer, ...]:
        """Return the layers from the first to the last, where each one's inputs depend on the layer before alone.

        Raises:
            UnsupportedLayerError: they form no chain; the layers where it branches.
        """
        return self._tape.chain(self._recorded)

    def reached_positions(self) -> dict[str, Bool[Tensor, "N T"]]:
        """Return, by affine map with ordered positions, those that the outputs depend on whose targets count.

        One backward pass, from a vector that is zero where a target is ignored. Empty where nothing may be padding.
        """
        if self._padded is None:
            return {}
        flat = fixed_vector(self._outputs.numel(), self._outputs)
        with full_precision(self.layout.device):
            vector = self.objective.loss.linearize(self._outputs, self.targets)(flat.view_as(self._outputs))
        found: dict[str, Tensor] = {}
        for factors in self.layer_factors(vector):
            found.update(factors.reached())
        return found

    def per_example_vjp(self, names: tuple[str, ...], vector: Float[Tensor, "N ..."]) -> Iterator[list[Tensor]]:
        """Yield J_n^T v_n for the named parameters, example by example: N backward passes, for any model."""
        self.check_fresh()
        chosen = [self._parameters[self.layout.names.index(name)] for name in names]
        vector = vector.to(self._graph.dtype)
        for n in range(self.examples):
            self.work += BACKWARD
            rows = torch.autograd.grad(self._graph[n], chosen, vector[n], retain_graph=True, allow_unused=True)
            yield [
                torch.zeros_like(parameter) if row is None else row for parameter, row in zip(chosen, rows, strict=True)
            ]

    def value_at(self, parameters: Float[Tensor, " D"]) -> Float[Tensor, ""]:
        """Return h on the same batch, with the same random numbers (dropout), at other parameters (D,).

        The model's own parameters and buffers are left as they are.

        Raises:
            StaleEvaluationError: the batch, or the training mode of a module, has changed.
        """
        self._freshness.check_batch()
        self.work += FORWARD
        parts = self.layout.unflatten(parameters)
        with torch.no_grad():
            outputs = self._forward.at(dict(zip(self.layout.names, parts, strict=True))).to(self._outputs.dtype)
            with full_precision(self.layout.device):
                return self.objective.total(self.objective.loss.value(outputs, self.targets), parts)

    def elsewhere(self, parameters: Float[Tensor, " D"]) -> Elsewhere:
        """Return the objective on the same batch at other parameters (D,) for its gradient there, like value_at."""
        self._freshness.check_batch()
        self.work += FORWARD
        return Elsewhere(self, self._forward, parameters)

    def forward_again(self) -> Float[Tensor, "N ..."]:
        """Return the outputs of another forward pass, with a graph: same parameters, random numbers and precision."""
        self.check_fresh()
        self.work += FORWARD
        with torch.enable_grad():
            return self._forward.at(dict(zip(self.layout.names, self._parameters, strict=True)))

    def same_precision(self) -> AbstractContextManager[None]:
        """Return a context with the autocast setting that this evaluation was made with."""
        return self._forward.same_precision()

    def check_examples_are_independent(self) -> None:
        """Refuse a model in which examples meet, see :mod:`.independence`. Made once for an objective and its mode.

        Raises:
            UnsupportedLayerError: a layer's output gradients are not zero for the other examples; its name.
        """
        if self.examples == 1 or not self.objective.is_due("independence of examples"):
            return
        work = self.work
        if examples_are_independent(self):
            self.objective.passed("independence of examples")
        self.work = work

    @cached_property
    def _linearization(self) -> tuple[Tensor, Float[Tensor, " D"]]:
        """:attr:`_transposed`, once it has been seen to be linear in all of u: <J v, J v> = <v, J^T J v>.

        A custom backward pass that is not differentiable can be dropped by autograd without an error.
        """
        u, transposed = self._transposed
        if self.objective.is_due("linearization"):
            work, v = self.work, fixed_vector(self.layout.size, transposed)
            jv = self._differentiate(transposed, [u], v)[0].to(self._outputs.dtype)
            square = jv.square().sum()
            difference = (v @ self._vjp(jv) - square).abs()
            # Half the digits of the coarsest type: rounding stays far below, a lost layer far above.
            if bool(difference > self.coarsest_eps() ** 0.5 * square):
                raise LinearizationError(
                    f"<J v, J v> and <v, J^T J v> differ by {float(difference / square):.1e} of their size: some "
                    "operation's backward pass cannot be differentiated (once_differentiable, or computed outside "
                    "of PyTorch), or the model computes in a lower precision than its parameters and outputs have. "
                    "Give it a differentiable one, or use autocast for low precision; layerwise approximations need "
                    "neither."
                )
            self.objective.passed("linearization")
            self.work = work
        return u, transposed

    def _derivatives(self, vector: Float[Tensor, " D"], parameters: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
        """Return the derivatives of J^T u . v by u and by the given parameters."""
        try:
            u, transposed = self._linearization
            return self._differentiate(transposed, [u, *parameters], vector)
        except FusedKernelError:
            self._replace_fused_kernels()
            u, transposed = self._linearization
            return self._differentiate(transposed, [u, *parameters], vector)

    def _replace_fused_kernels(self) -> None:
        """Make the forward pass again with kernels that can be differentiated twice, and say so once."""
        if not self.objective.differentiable_kernels:
            self.objective.differentiable_kernels = True
            warnings.warn(
                "exact products differentiate the backward pass, which fused kernels of attention and cuDNN's of "
                "recurrent layers do not allow: forward passes for them use PyTorch's SDPBackend.MATH and recurrent "
                "layers without cuDNN from now on (those of objective.at(batch, linearize=False) do not).",
                FusedKernelWarning,
                stacklevel=2,
            )
        self._forward.differentiable_kernels = True
        self.work += FORWARD
        with torch.enable_grad():
            self._graph = self._forward.at(dict(zip(self.layout.names, self._parameters, strict=True)))
        for cached in ("_transposed", "_linearization"):
            vars(self).pop(cached, None)

    def coarsest_eps(self) -> float:
        """Return the rounding error of the coarsest type that takes part: outputs, parameters, autocast."""
        types = {self._graph.dtype, *(parameter.dtype for parameter in self._parameters)}
        autocast = self._forward.autocast_type
        return max(torch.finfo(dtype).eps for dtype in (*types, *((autocast,) if autocast is not None else ())))

    def _differentiate(self, transposed: Tensor, of: list[Tensor], vector: Tensor) -> tuple[Any, ...]:
        self.work += BACKWARD
        try:
            # u itself is always used
            return torch.autograd.grad(transposed, of, vector, retain_graph=True, allow_unused=len(of) > 1)
        except RuntimeError as error:
            if "not implemented" not in str(error):
                raise
            fused = any(name in str(error) for name in _FUSED_KERNELS)
            if fused and not self._forward.differentiable_kernels:
                raise FusedKernelError(str(error)) from error
            raise LinearizationError(
                f"exact products need a backward pass that can be differentiated, but: {error}"
            ) from error
