"""Properties that a dataclass field of the same name may replace."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    overridable = property
else:

    class overridable:  # noqa: N801
        """A property that gives way to a dataclass field of the same name.

        ``dataclass`` would take a plain property for the field's default value, and the property would then refuse the
        assignment. This descriptor is invisible on the class and has no setter, so an instance attribute replaces it.
        """

        def __init__(self, getter: Callable) -> None:
            self._getter = getter
            self.__doc__ = getter.__doc__

        def __get__(self, instance: Any, owner: type) -> Any:
            if instance is None:
                raise AttributeError(self._getter.__name__)
            return self._getter(instance)
