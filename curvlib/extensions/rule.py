"""What a layer rule is: how one module acts as an affine map at T positions of each example.

Symbols: N examples, T positions, a (N, T, d_in) inputs, g (N, T, d_out) output gradients. For one example and one
output-space vector v, the part of J^T v that belongs to the layer's (d_out, d_in) weight matrix is sum_t g_t a_t^T.

A rule is a BackPACK module extension. :class:`PositionFactors` gathers all rules in one BackPACK extension, which
works in a plain ``with backpack(PositionFactors()):`` block; curvlib drives it itself (see :mod:`.capture`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, ClassVar

from backpack.extensions.firstorder.base import FirstOrderBackpropExtension, FirstOrderModuleExtension
from jaxtyping import Float, Int
from torch import Tensor, nn

from curvlib.extensions.uses import AffineUse, InputMoments, Use, chunks_of, moments_of_rows, tensors_in


@dataclass(frozen=True, kw_only=True)
class Part:
    """One affine map inside a module: where its weight W and its bias b are kept.

    Attributes:
        name: what distinguishes it from the module's other maps; "" for the only one.
        weight: attribute of the module, dotted for one of a submodule.
        bias: likewise, or None where the map has no such attribute.
        weight_rows: which rows of the weight belong to the map, (first, end); None for all.
        bias_rows: likewise of the bias.
        groups: how many maps of equal shape stand side by side, each with inputs and outputs of its own.
    """

    name: str = ""
    weight: str = "weight"
    bias: str | None = "bias"
    weight_rows: tuple[int, int] | None = None
    bias_rows: tuple[int, int] | None = None
    groups: int = 1


class LayerRule(FirstOrderModuleExtension):
    """How a module is an affine map y_t = W a_t + b used at T positions.

    A subclass gives :meth:`inputs` and :meth:`output_gradients`, and :meth:`weight_matrix` if the weight does not
    become the (d_out, d_in) matrix W by flattening all its dimensions but the first. Parameters with other names than
    ``weight`` and ``bias``, groups, and several maps in one module are said by :meth:`parts`; with several maps
    :meth:`uses` takes the place of the first two methods.

    Attributes:
        elementwise: whether W is a scale of each feature, so that a diagonal is K-FAC's block.
        ordered: whether the T positions of an example follow one another, as steps of time do. Where a model has a
            recurrent layer or its loss ignores targets, those behind the last one that the outputs depend on are
            padding.
        recurrent: whether the module is made for sequences.
        sparse: whether the uses are lookups, so that K-FAC's A is diagonal.
        computed_by: methods of the module that compute its output; the rule is not that of a subclass with others.
    """

    elementwise: ClassVar[bool] = False
    ordered: ClassVar[bool] = False
    recurrent: ClassVar[bool] = False
    sparse: ClassVar[bool] = False
    computed_by: ClassVar[tuple[str, ...]] = ("forward",)

    def __init__(self, parameters: tuple[str, ...] = ("weight", "bias")) -> None:
        # BackPACK calls the method of each parameter's name; one use serves them all.
        for name in parameters:
            setattr(self, name, self._backpack_entry)
        super().__init__(params=list(parameters))

    def inputs(self, module: nn.Module, x: Any) -> Float[Tensor, "N T d_in"]:
        """Return a from what :meth:`call_input` kept, without a homogeneous coordinate; groups one after another."""
        raise TypeError(f"{type(self).__name__} must define inputs(module, x) -> (N, T, d_in).")

    def output_gradients(self, module: nn.Module, g: Tensor) -> Float[Tensor, "N T d_out"]:
        """Return g from the gradient at the module's output; groups one after another."""
        raise TypeError(f"{type(self).__name__} must define output_gradients(module, g) -> (N, T, d_out).")

    def weight_matrix(self, module: nn.Module, weight: Tensor) -> Int[Tensor, "d_out d_in"]:
        """Return a tensor of the weight's shape as the matrix W of the affine map; groups one below the other."""
        return weight.reshape(weight.shape[0], -1)

    def parts(self, module: nn.Module) -> tuple[Part, ...]:
        """Return the affine maps of the module."""
        return (Part(),)

    def refusal(self, module: nn.Module) -> str:
        """Return why this module cannot be treated, because of an option, or ""."""
        return ""

    def call_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the map acts on, from the arguments of the call: a tensor, or a tuple with tensors in it.

        Where :meth:`uses` is the inherited one, every tensor in it has the examples first.
        """
        return args[0] if args else kwargs["input"]

    def call_refusal(self, module: nn.Module) -> str:
        """Return why a call in the module's present mode cannot be treated, or ""."""
        return ""

    def call_begins(self, module: nn.Module) -> Any:
        """Return what has to be noted before a call, such as the state of the random numbers."""
        return None

    def call_record(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, begun: Any
    ) -> Any:
        """Return what :meth:`uses` needs of a call: the inputs alone, or also its output and :meth:`call_begins`."""
        return self.call_input(module, args, kwargs)

    def call_outputs(self, output: Any) -> tuple[Tensor, ...]:
        """Return the tensors of the call's result whose gradients :meth:`uses` takes."""
        return (output,)

    def examples(self, module: nn.Module, outputs: tuple[Tensor, ...]) -> int:
        """Return how many examples :meth:`call_outputs` have."""
        return outputs[0].shape[0] if outputs[0].ndim > 0 else 0

    def uses(self, module: nn.Module, x: Any, g: Any) -> tuple[Use, ...]:
        """Return the use of each of :meth:`parts` in one call.

        Args:
            module: the module.
            x: what :meth:`call_record` kept.
            g: J^T v at :meth:`call_outputs`: a tensor where there is one, else a tuple with None for those that the
                model's outputs do not depend on.
        """
        return (AffineUse(self, module, x, g),)

    def input_numbers(self, module: nn.Module, x: Any, g: Tensor) -> int:
        """Return how many numbers the inputs a of one example take; what bounds the examples that are taken at once."""
        return x[0].numel() if isinstance(x, Tensor) else 1

    def input_moments(self, use: AffineUse, groups: int) -> InputMoments:
        """Return the sums of a a^T and of a over all examples and positions; here from the inputs, chunk by chunk."""
        parts = (use.take(chunk) for chunk in chunks_of(use.examples, use.numbers))
        return reduce(add, (moments_of_rows(part.a.flatten(0, 1).unflatten(-1, (groups, -1))) for part in parts))

    def _backpack_entry(
        self, ext: Any, module: nn.Module, g_inp: Any, g_out: tuple[Tensor, ...], bp: Any
    ) -> tuple[Use, ...] | Use:
        uses = self.uses(module, vars(module)["input0"], g_out[0])
        return uses[0] if len(uses) == 1 else uses


class PositionFactors(FirstOrderBackpropExtension):
    """The BackPACK extension that gathers every layer rule; saves the uses of a call on the module's parameters.

    In a plain ``with backpack`` block it works for modules with one input and one output tensor. Rules are found along
    the class's method resolution order, unlike BackPACK's own exact match.

    Example:
        >>> import torch
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

    def collect(self, module: nn.Module, x: Any, output_gradient: Any) -> tuple[Use, ...]:
        """Run the rule of one call outside BackPACK's own hooks and return its uses.

        The tensors that BackPACK expects on the module are put into its ``__dict__`` for the duration of the call, so
        that a submodule or parameter of the same name is neither hit nor lost.
        """
        before: dict[str, Any] = {name: vars(module)[name] for name in ("input0", "output") if name in vars(module)}
        # BackPACK looks at the output's identity only, to find quantities that first-order extensions do not have.
        vars(module)["input0"], vars(module)["output"] = x, tensors_in(output_gradient)[0]
        try:
            self(module, (None,), (output_gradient,))
        finally:
            for name in ("input0", "output"):
                del vars(module)[name]
            vars(module).update(before)
        saved = []
        for parameter in module._parameters.values():
            if parameter is not None and hasattr(parameter, self.savefield):
                saved.append(getattr(parameter, self.savefield))
                delattr(parameter, self.savefield)
        if not saved:  # all that is trained belongs to submodules, where BackPACK does not look
            rule, _ = find_rule(module)
            assert rule is not None  # it was planned with one
            return rule.uses(module, x, output_gradient)
        return saved[0] if isinstance(saved[0], tuple) else (saved[0],)


_RULES: dict[type[nn.Module], LayerRule] = {}


def register(module_type: type[nn.Module], rule: LayerRule) -> None:
    """Make ``rule`` the rule of ``module_type`` and of its subclasses that keep its ``forward``.

    Args:
        module_type: a module class.
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
    still that class's: a subclass that computes something else must register a rule of its own. A rule may refuse a
    module because of one of its options.
    """
    for base in type(module).__mro__:
        if base in _RULES:
            rule = _RULES[base]
            for method in rule.computed_by:
                if method in vars(module) or getattr(type(module), method) is not getattr(base, method):
                    return None, f"{type(module).__name__} overrides {base.__name__}.{method}"
            reason = rule.refusal(module)
            return (None, reason) if reason else (rule, "")
    return None, f"no layer rule for {type(module).__name__}"
