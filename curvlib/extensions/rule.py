"""What a layer rule is: how one module acts as an affine map at T positions of each example.

Symbols: N examples, T positions, a (N, T, d_in) inputs, g (N, T, d_out) output gradients. For one example and one
output-space vector v, the part of J^T v that belongs to the layer's (d_out, d_in) weight matrix is sum_t g_t a_t^T.

A rule is a BackPACK module extension. :class:`PositionFactors` gathers all rules in one BackPACK extension, which
works in a plain ``with backpack(PositionFactors()):`` block; curvlib drives it itself (see :mod:`.capture`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from backpack.extensions.firstorder.base import FirstOrderBackpropExtension, FirstOrderModuleExtension
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class AffineUse:
    """One call of a module, seen as an affine map; both factors are made when first asked for.

    Attributes:
        rule: the rule of the module's class.
        module: the module.
        input: what the module was called with.
        output_gradient: J^T v at the module's output.
    """

    rule: LayerRule
    module: nn.Module
    input: Tensor
    output_gradient: Tensor

    @cached_property
    def a(self) -> Float[Tensor, "N T d_in"]:
        """Inputs of the affine map, without the homogeneous coordinate, in float32 at least."""
        return _at_least_float32(self.rule.inputs(self.module, self.input.detach()))

    @cached_property
    def g(self) -> Float[Tensor, "N T d_out"]:
        """Gradients of the affine map's outputs, in float32 at least."""
        return _at_least_float32(self.rule.output_gradients(self.module, self.output_gradient.detach()))


class LayerRule(FirstOrderModuleExtension):
    """How a module is an affine map y_t = W a_t + b used at T positions.

    A subclass gives :meth:`inputs` and :meth:`output_gradients`, and :meth:`weight_matrix` if the weight does not
    become the (d_out, d_in) matrix W by flattening all its dimensions but the first. The module's parameters must be
    called ``weight`` and ``bias`` (which may be None).
    """

    def __init__(self) -> None:
        super().__init__(params=["weight", "bias"])

    def inputs(self, module: nn.Module, x: Tensor) -> Float[Tensor, "N T d_in"]:
        """Return a from the tensor that the module was called with, without a homogeneous coordinate."""
        raise TypeError(f"{type(self).__name__} must define inputs(module, x) -> (N, T, d_in).")

    def output_gradients(self, module: nn.Module, g: Tensor) -> Float[Tensor, "N T d_out"]:
        """Return g from the gradient at the module's output."""
        raise TypeError(f"{type(self).__name__} must define output_gradients(module, g) -> (N, T, d_out).")

    def weight_matrix(self, module: nn.Module, weight: Tensor) -> Int[Tensor, "d_out d_in"]:
        """Return a tensor of the weight's shape rearranged as the matrix W of the affine map."""
        return weight.reshape(weight.shape[0], -1)

    def call_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the tensor that the affine map acts on, from the arguments of the module's call."""
        return args[0] if args else kwargs["input"]

    def weight(self, ext: Any, module: nn.Module, g_inp: Any, g_out: tuple[Tensor, ...], bp: Any) -> AffineUse:
        """BackPACK's entry for the weight: the use (a, g) of this call."""
        return AffineUse(self, module, vars(module)["input0"], g_out[0])

    # One use serves the whole layer: the bias is the weight of a constant input of one.
    bias = weight


class PositionFactors(FirstOrderBackpropExtension):
    """The BackPACK extension that gathers every layer rule; saves an :class:`AffineUse` on each parameter.

    Rules are found along the class's method resolution order, unlike BackPACK's own exact match.

    Example:
        >>> from backpack import backpack, extend
        >>> layer = extend(nn.Linear(3, 2))
        >>> with backpack(PositionFactors()):
        ...     layer(torch.ones(5, 3, requires_grad=True)).sum().backward()
        >>> layer.weight.position_factors.a.shape, layer.bias.position_factors.g.shape
        (torch.Size([5, 1, 3]), torch.Size([5, 1, 2]))
    """

    savefield_name: ClassVar[str] = "position_factors"

    def __init__(self) -> None:
        super().__init__(self.savefield_name, module_exts={})

    def __call__(self, module: nn.Module, g_inp: Any, g_out: Any) -> None:
        """Run the module's rule, if it has one."""
        rule, _ = find_rule(module)
        if rule is not None:
            rule(self, module, g_inp, g_out)

    def collect(self, module: nn.Module, x: Tensor, output_gradient: Tensor) -> AffineUse:
        """Run the rule of one call outside BackPACK's own hooks and return its use.

        The tensors that BackPACK expects on the module are put into its ``__dict__`` for the duration of the call, so
        that a submodule or parameter of the same name is neither hit nor lost.
        """
        before: dict[str, Any] = {name: vars(module)[name] for name in ("input0", "output") if name in vars(module)}
        # BackPACK looks at the output's identity only, to find quantities that first-order extensions do not have.
        vars(module)["input0"], vars(module)["output"] = x, output_gradient
        try:
            self(module, (None,), (output_gradient,))
        finally:
            for name in ("input0", "output"):
                del vars(module)[name]
            vars(module).update(before)
        uses = []
        for parameter in (module.weight, module.bias):
            if parameter is not None and hasattr(parameter, self.savefield):
                uses.append(getattr(parameter, self.savefield))
                delattr(parameter, self.savefield)
        return uses[0]


_RULES: dict[type[nn.Module], LayerRule] = {}


def register(module_type: type[nn.Module], rule: LayerRule) -> None:
    """Make ``rule`` the rule of ``module_type`` and of its subclasses that keep its ``forward``.

    Args:
        module_type: a module class with parameters named ``weight`` and ``bias`` (``bias`` may be None).
        rule: an instance of a :class:`LayerRule` subclass. A rule that was there before is replaced.

    Raises:
        TypeError: an argument is not of these types.

    Example:
        >>> class Scaled(nn.Linear):
        ...     def forward(self, x):
        ...         return 2.0 * super().forward(x)
        >>> class ScaledRule(LayerRule):
        ...     def inputs(self, module, x):
        ...         return x.reshape(x.shape[0], -1, x.shape[-1])
        ...     def output_gradients(self, module, g):
        ...         return 2.0 * g.reshape(g.shape[0], -1, g.shape[-1])
        >>> register(Scaled, ScaledRule())
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"register needs a subclass of torch.nn.Module, got {module_type!r}.")
    if not isinstance(rule, LayerRule):
        raise TypeError(f"register needs an instance of a LayerRule subclass, got {rule!r}.")
    _RULES[module_type] = rule


def find_rule(module: nn.Module) -> tuple[LayerRule | None, str]:
    """Return the rule of a module and "", or None and the reason why it has none.

    The nearest class along the method resolution order with a rule counts, but only while the module's ``forward`` is
    still that class's: a subclass that computes something else must register a rule of its own.
    """
    for base in type(module).__mro__:
        if base in _RULES:
            if "forward" in vars(module) or type(module).forward is not base.forward:
                return None, f"{type(module).__name__} overrides {base.__name__}.forward"
            return _RULES[base], ""
    return None, f"no layer rule for {type(module).__name__}"


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
