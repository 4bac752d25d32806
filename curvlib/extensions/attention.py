"""The layer rule of multi-head attention: four affine maps, three of them in front of the attention and one behind it.

Symbols: N examples, L query and S key positions, E features. ``nn.MultiheadAttention`` applies its weights as
functions, so no module call shows the projections; the rule makes the attention again from the module's inputs and asks
autograd for the gradients at the projections.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from curvlib.extensions.rule import LayerRule, Part, register
from curvlib.extensions.uses import PositionUse, Use, at_least_float32

# The arguments of the module's forward, in order.
_ARGUMENTS = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")


class MultiheadAttentionRule(LayerRule):
    """``nn.MultiheadAttention``: query, key, value and output projection are a layer each.

    Dropout inside the attention in training mode is refused, as its random numbers are not seen from outside.
    """

    ordered: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__(("in_proj_weight", "q_proj_weight"))

    def parts(self, module: Any) -> tuple[Part, ...]:
        """Return the three input projections, as rows of one weight or with weights of their own, and the output."""
        E = module.embed_dim
        bias = "in_proj_bias" if module.in_proj_bias is not None else None
        joint = module._qkv_same_embed_dim
        return (
            *(
                Part(
                    name=name,
                    weight="in_proj_weight" if joint else f"{name}_proj_weight",
                    bias=bias,
                    weight_rows=(place * E, (place + 1) * E) if joint else None,
                    bias_rows=(place * E, (place + 1) * E),
                )
                for place, name in enumerate("qkv")
            ),
            Part(name="out_proj", weight="out_proj.weight", bias="out_proj.bias"),
        )

    def call_input(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return query, key and value with the examples first, and the masks."""
        given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
        streams = tuple(given[name] for name in ("query", "key", "value"))
        if not module.batch_first:
            streams = tuple(stream.transpose(0, 1) for stream in streams)
        return *streams, given.get("key_padding_mask"), given.get("attn_mask")

    def call_refusal(self, module: Any) -> str:
        """Refuse random numbers inside the attention."""
        if module.training and module.dropout > 0:
            return (
                "MultiheadAttention with dropout in training mode draws random numbers that its layer rule cannot "
                "repeat (use dropout=0 inside the attention, or model.eval())"
            )
        return ""

    def call_outputs(self, output: Any) -> tuple[Tensor, ...]:
        """Return the attention's output, not its weights."""
        return (output[0],)

    def examples(self, module: Any, outputs: tuple[Tensor, ...]) -> int:
        """Return N, which may stand behind the positions; 0 for a single example without its dimension."""
        if outputs[0].ndim != 3:
            return 0
        return outputs[0].shape[0 if module.batch_first else 1]

    def uses(self, module: Any, x: Any, g: Any) -> tuple[Use, ...]:
        """Return the uses of the four projections."""
        *streams, padding_mask, mask = x
        # Not in the precision of autocast, whose weights and inputs have different types.
        streams = [at_least_float32(stream.detach()) for stream in streams]
        g = at_least_float32((g if module.batch_first else g.transpose(0, 1)).detach())
        projections = _input_projections(module, g.dtype)
        leaves = [
            functional.linear(stream, weight, bias).requires_grad_()
            for stream, (weight, bias) in zip(streams, projections, strict=True)
        ]
        with torch.enable_grad():
            attended = _attend(module, leaves, padding_mask, mask)
            gradients = torch.autograd.grad(attended, leaves, g @ module.out_proj.weight.detach().to(g.dtype))
        inner = (PositionUse(stream, gradient) for stream, gradient in zip(streams, gradients, strict=True))
        return *inner, PositionUse(attended.detach(), g)


def _input_projections(module: Any, dtype: torch.dtype) -> list[tuple[Tensor, Tensor | None]]:
    weights = (
        module.in_proj_weight.chunk(3)
        if module._qkv_same_embed_dim
        else (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    )
    biases = module.in_proj_bias.chunk(3) if module.in_proj_bias is not None else (None, None, None)
    return [
        (weight.detach().to(dtype), bias.detach().to(dtype) if bias is not None else None)
        for weight, bias in zip(weights, biases, strict=True)
    ]


def _attend(
    module: Any, projected: list[Float[Tensor, "N L E"]], padding_mask: Tensor | None, mask: Tensor | None
) -> Float[Tensor, "N L E"]:
    """Return what goes into the output projection, by PyTorch's own function with projections that do nothing."""
    unit = torch.eye(module.embed_dim, dtype=projected[0].dtype, device=projected[0].device)
    query, key, value = (stream.transpose(0, 1) for stream in projected)
    attended, _ = functional.multi_head_attention_forward(
        query,
        key,
        value,
        module.embed_dim,
        module.num_heads,
        None,  # in_proj_weight
        None,  # in_proj_bias
        _in_type(module.bias_k, unit.dtype),
        _in_type(module.bias_v, unit.dtype),
        module.add_zero_attn,
        0.0,  # dropout
        unit,  # out_proj_weight
        None,  # out_proj_bias
        training=False,
        key_padding_mask=_in_type(padding_mask, unit.dtype),
        need_weights=False,
        attn_mask=_in_type(mask, unit.dtype),
        use_separate_proj_weight=True,
        q_proj_weight=unit,
        k_proj_weight=unit,
        v_proj_weight=unit,
    )
    return attended.transpose(0, 1)


def _in_type(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a mask or a parameter in this type, a mask of truth values as it is."""
    return tensor.detach().to(dtype) if tensor is not None and tensor.is_floating_point() else tensor


register(nn.MultiheadAttention, MultiheadAttentionRule())
