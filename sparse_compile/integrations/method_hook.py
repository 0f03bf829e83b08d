"""Hears of the calls of one bound method of one object, and can be taken away again."""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any


def has_method(owner: object, name: str) -> bool:
    """Whether the class of an object has this method; one that lies on the object alone cannot be hooked."""
    return callable(getattr(type(owner), name, None))


class MethodHook:
    """Stands for one bound method of one instance; calls it, and tells of it.

    A deep copy of the instance gets the plain method (pipelines copy their scheduler for a second stream).

    Args:
        owner: the instance; held weakly.
        name: of its method.
        after: called with the owner and what the method returned.
        around: for a method that returns a context manager: given its first argument, the context to enter before it.
    """

    def __init__(
        self,
        owner: Any,
        name: str,
        after: Callable[[Any, Any], None] | None = None,
        around: Callable[[str], contextlib.AbstractContextManager[None]] | None = None,
    ) -> None:
        self.owner = weakref.ref(owner)
        self._name = name
        self._after = after
        self._around = around
        self._before = vars(owner).get(name)
        functools.update_wrapper(self, getattr(type(owner), name))
        self.__signature__ = inspect.signature(getattr(owner, name))
        setattr(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The method, then the news of it."""
        owner = self.owner()
        method = self._before or getattr(type(owner), self._name).__get__(owner)
        if self._around is not None:
            return self._both(str(args[0] if args else kwargs.get("name")), method(*args, **kwargs))
        result = method(*args, **kwargs)
        if self._after is not None:
            self._after(owner, result)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo.get(id(self.owner()))
        return self if twin is None else getattr(type(twin), self._name).__get__(twin)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.owner(), self._name)

    def remove(self) -> None:
        """Give the method back, from beneath later hooks too; if somebody else has wrapped it, pass calls on."""
        self._after = self._around = None
        owner = self.owner()
        if owner is None:
            return
        above = vars(owner).get(self._name)
        if above is self and self._before is None:
            delattr(owner, self._name)
        elif above is self:
            setattr(owner, self._name, self._before)
        while isinstance(above, MethodHook):
            if above._before is self:
                above._before = self._before
            above = above._before

    @contextlib.contextmanager
    def _both(self, name: str, inner: contextlib.AbstractContextManager[Any]) -> Iterator[Any]:
        assert self._around is not None, "called for context managers only"
        with self._around(name), inner as value:
            yield value
