"""Whether what an evaluation answers for is still there: parameters, batch and training mode as they were."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from curvlib.objective.errors import StaleEvaluationError

if TYPE_CHECKING:
    from curvlib.objective.objective import Objective


class Freshness:
    """The state of an objective's parameters and of a batch at one moment.

    Args:
        objective: whose parameters and training mode count.
        batch: tensors of the batch.
    """

    def __init__(self, objective: Objective, batch: Iterable[Tensor]) -> None:
        self._objective = objective
        # tensors made in inference mode have no version; autograd keeps none of them either
        self._batch = [tensor for tensor in batch if not tensor.is_inference()]
        self._made_at, self._mode = self._fingerprint(), objective.mode()

    @property
    def unchanged(self) -> bool:
        """Whether parameters, batch and training mode are as they were."""
        return self._fingerprint() == self._made_at and self._objective.mode() == self._mode

    def check(self) -> None:
        """Raise StaleEvaluationError if a parameter or the batch has changed."""
        now = self._fingerprint()
        if now == self._made_at:
            return
        names = [*(f"parameter {name!r}" for name in self._objective.layout.names), *(["the batch"] * len(self._batch))]
        changed = [(name, new, old) for name, new, old in zip(names, now, self._made_at, strict=True) if new != old]
        name, new, old = changed[0]
        how = "has changed" if new[0] == old[0] and new[1] == old[1] else "has been replaced or frozen"
        raise StaleEvaluationError(
            f"{name} {how} since this Evaluation was made (by a write, or modified in place), and it answers for the "
            "old values only: call objective.at(batch) again, after making a new Objective if a parameter was frozen."
        )

    def check_batch(self) -> None:
        """Raise StaleEvaluationError if the batch or the training mode of a module has changed."""
        batch = len(self._made_at) - len(self._batch)
        if self._fingerprint()[batch:] != self._made_at[batch:] or self._objective.mode() != self._mode:
            raise StaleEvaluationError(
                "the batch or the training mode of a module has changed since this Evaluation was made, so values at "
                "other parameters could not be compared with it: call objective.at(batch) again."
            )

    def _fingerprint(self) -> list[tuple[int, bool, int, int]]:
        """Return identity, trainability, version and place in memory of everything."""
        tensors = (*self._objective.current_parameters(), *self._batch)
        return [
            (id(x), x.requires_grad, x._version, x.data_ptr()) if x is not None else (0, False, 0, 0) for x in tensors
        ]
