"""What changes from step to step, and returns to what it was where a step is not taken or fails."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from jaxtyping import Float
from torch import Tensor


class StepState(ABC):
    """A running state that every step moves on, of one optimizer.

    A step begins with a :meth:`snapshot` and ends with :meth:`accepted` or :meth:`rejected`; an error at any place in
    between, also after these two, ends it with :meth:`restore`.
    """

    def snapshot(self) -> Any:
        """Return what :meth:`restore` takes, held until the step has ended. Default: :meth:`state_dict`.

        It is made at each step and has no copies: what the state consists of is replaced and never modified in place.
        """
        return self.state_dict()

    def restore(self, snapshot: Any) -> None:
        """Return bit for bit to the snapshot, as if no step had been tried since. Default: :meth:`load_state_dict`."""
        self.load_state_dict(snapshot)

    def accepted(self, step: Float[Tensor, " D"]) -> None:  # noqa: B027 - most states learn nothing from a step
        """Learn that a step (D,) is taken, about to be written."""

    def rejected(self, snapshot: Any) -> None:
        """Learn that the step tried since a snapshot was not taken. Default: :meth:`restore`.

        A state may return to the snapshot and change what a rejection speaks against, such as a warm start.
        """
        self.restore(snapshot)

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on, by reference."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; nothing is changed if it raises.

        Raises:
            ValueError: the state is incomplete.
        """
