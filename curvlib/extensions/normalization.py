"""The layer rules of normalisation layers: a scale and a shift of normalised features.

Symbols: N examples, T positions, C features that are scaled one by one, x the input normalised: y = w x + b. Each
feature is an affine map of its own, with one input and one output.
"""

from __future__ import annotations

from abc import abstractmethod
from math import prod
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from curvlib.extensions.rule import LayerRule, Part, register


class ScaleAndShiftRule(LayerRule):
    """A module that scales and shifts what it has normalised, feature by feature."""

    elementwise: ClassVar[bool] = True

    @abstractmethod
    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return the input normalised, before scale and shift, of the same shape."""

    @abstractmethod
    def by_position(self, module: nn.Module, x: Tensor) -> Float[Tensor, "N T C"]:
        """Return a tensor of the output's shape with its features last."""

    def parts(self, module: Any) -> tuple[Part, ...]:
        """Return one map a feature."""
        bias = "bias" if "bias" in module._parameters else None
        trained = module.weight if module.weight is not None else module.bias
        return (Part(bias=bias, groups=trained.numel()),)

    def weight_matrix(self, module: nn.Module, weight: Int[Tensor, " *C"]) -> Int[Tensor, "C 1"]:
        """Return the scales below each other."""
        return weight.reshape(-1, 1)

    def inputs(self, module: nn.Module, x: Tensor) -> Float[Tensor, "N T C"]:
        """Return the normalised input."""
        return self.by_position(module, self.normalised(module, x))

    def output_gradients(self, module: nn.Module, g: Tensor) -> Float[Tensor, "N T C"]:
        """Return the gradients with the features last."""
        return self.by_position(module, g)


class _ChannelsSecond(ScaleAndShiftRule):
    def by_position(self, module: nn.Module, x: Float[Tensor, "N C *S"]) -> Float[Tensor, "N T C"]:
        return x.reshape(*x.shape[:2], -1).transpose(1, 2)


class BatchNormRule(_ChannelsSecond):
    """``nn.BatchNorm1d/2d/3d`` that normalise by running statistics (evaluation mode).

    In training mode the examples of a batch meet in it, which the check of their independence refuses.
    """

    def normalised(self, module: Any, x: Float[Tensor, "N C *S"]) -> Float[Tensor, "N C *S"]:
        """Return the input normalised as the module does it, its running statistics untouched."""
        if module.training or module.running_mean is None:
            return functional.batch_norm(x, None, None, training=True, eps=module.eps)
        return functional.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)


class InstanceNormRule(_ChannelsSecond):
    """``nn.InstanceNorm1d/2d/3d`` with ``affine=True``."""

    def by_position(self, module: Any, x: Float[Tensor, "N C *S"]) -> Float[Tensor, "N T C"]:
        """Return a tensor with its channels last; one without a dimension of examples is refused."""
        if x.ndim == module._get_no_batch_dim():
            raise ValueError(
                f"{type(module).__name__} gave an output of shape {tuple(x.shape)}; layer statistics need the examples "
                "first: (N, channels, ...)."
            )
        return super().by_position(module, x)

    def normalised(self, module: Any, x: Float[Tensor, "N C *S"]) -> Float[Tensor, "N C *S"]:
        """Return the input normalised by each example's own statistics, or by running ones in evaluation mode."""
        if module.training or module.running_mean is None:
            return functional.instance_norm(x, eps=module.eps)
        return functional.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)


class GroupNormRule(_ChannelsSecond):
    """``nn.GroupNorm``."""

    def normalised(self, module: Any, x: Float[Tensor, "N C *S"]) -> Float[Tensor, "N C *S"]:
        """Return the input normalised group by group."""
        return functional.group_norm(x, module.num_groups, eps=module.eps)


class LayerNormRule(ScaleAndShiftRule):
    """``nn.LayerNorm``: its features are all entries of its normalised shape."""

    def normalised(self, module: Any, x: Tensor) -> Tensor:
        """Return the input normalised over its last dimensions."""
        return functional.layer_norm(x, module.normalized_shape, eps=module.eps)

    def by_position(self, module: Any, x: Tensor) -> Float[Tensor, "N T C"]:
        """Return a tensor with the normalised dimensions as one, the others but the first as positions."""
        return x.reshape(x.shape[0], -1, prod(module.normalized_shape))


class RMSNormRule(LayerNormRule):
    """``nn.RMSNorm``: a scale without a shift."""

    def __init__(self) -> None:
        super().__init__(("weight",))

    def normalised(self, module: Any, x: Tensor) -> Tensor:
        """Return the input divided by its root mean square."""
        return functional.rms_norm(x, module.normalized_shape, eps=module.eps)


for _batch_norm in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
    register(_batch_norm, BatchNormRule())
for _instance_norm in (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d):
    register(_instance_norm, InstanceNormRule())
register(nn.GroupNorm, GroupNormRule())
register(nn.LayerNorm, LayerNormRule())
register(nn.RMSNorm, RMSNormRule())
