"""What must be as before: everything of a model that its user can see, and the global random numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from curvlib.testing.identities import Subject


class Snapshot:
    """The parameters, gradients, buffers, hooks, attributes and modes of a model, and the random numbers, at a time."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tensors = {name: None if x is None else x.detach().clone() for name, x in _tensors(model).items()}
        self._facts = _facts(model)

    def compare(self, subject: Subject, what: str) -> None:
        """Raise IdentityError unless all is as it was."""
        for name, now in _tensors(self._model).items():
            before = self._tensors.get(name)
            same = now is before if now is None or before is None else torch.equal(now, before)
            subject.holds(f"{what} leaves {name} as it was", same, f"expected {before}, got {now}")
        for name, fact in _facts(self._model).items():
            before = self._facts.get(name)
            subject.holds(f"{what} leaves {name} as it was", fact == before, f"expected {before}, got {fact}")


def _tensors(model: nn.Module) -> dict[str, Tensor | None]:
    found: dict[str, Tensor | None] = {"the global random numbers": torch.get_rng_state()}
    for name, parameter in model.named_parameters():
        found[f"parameter {name}"] = parameter
        found[f"the gradient of {name}"] = parameter.grad
    for place, module in model.named_modules():
        if not module.training:  # a forward pass in training mode moves running statistics
            own = module.named_buffers(recurse=False)
            found.update({f"buffer {name} of {place or 'the model'}": buffer for name, buffer in own})
    return found


def _facts(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        kinds = [kind for kind in vars(module) if kind.endswith("_hooks")]
        hooks = {kind: len(vars(module)[kind]) for kind in kinds if vars(module)[kind]}
        place = name or "the model"
        found[f"the hooks of {place}"] = hooks
        found[f"the attributes of {place}"] = sorted(vars(module))
        found[f"the mode of {place}"] = module.training
    for name, parameter in model.named_parameters():
        found[f"requires_grad of {name}"] = parameter.requires_grad
        found[f"the attributes of {name}"] = sorted(vars(parameter))
    return found
