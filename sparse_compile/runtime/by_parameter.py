"""A weak dictionary by Parameter objects, quick enough for a guard.

`torch.utils.weak.WeakIdKeyDictionary` makes an object and calls Python's `__hash__` and `__eq__` for each look-up, some
4 microseconds; a guard and a Region look up on every call of a compiled graph.
"""

from __future__ import annotations

import functools
import weakref
from typing import Generic, TypeVar

Value = TypeVar("Value")


class ByParameter(Generic[Value]):
    """Values by the identity of their Parameter, which they do not outlive."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[object], Value]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, parameter: object) -> Value | None:
        """The value of this very object, or None."""
        entry = self._entries.get(id(parameter))
        # The id of a dead Parameter may be that of a new one before the callback has run.
        return entry[1] if entry is not None and entry[0]() is parameter else None

    def setdefault(self, parameter: object, value: Value) -> Value:
        """The value of this object, ``value`` from now on where there was none."""
        found = self.get(parameter)
        if found is not None:
            return found
        key = id(parameter)
        self._entries[key] = (weakref.ref(parameter, functools.partial(self._forget, key)), value)
        return value

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    def _forget(self, key: int, reference: weakref.ref[object]) -> None:
        entry = self._entries.get(key)
        if entry is not None and entry[0] is reference:
            del self._entries[key]
