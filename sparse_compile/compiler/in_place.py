"""Compile modules in place, beneath their hooks, and make them again exactly what they were."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from weakref import ref

import torch
from torch import nn

from sparse_compile.compiler import torch_internals

Slot = tuple[Any, str]
"""An object and the name of its attribute that holds a callable."""
Slots = Callable[[nn.Module], Iterable[Slot]]
"""Where the forward of a module may lie: in the module, and where hooks have put it that run around it."""


def without_hooks(module: nn.Module) -> Iterator[Slot]:
    """The slots of a module that nobody has put a hook around."""
    yield module, "forward"


class CompiledForward:
    """Stands for the forward of one module and runs it compiled.

    In place of the method, and not around the module's call: offloading and caching replace `forward` by a function
    that calls the former one, which Dynamo would break apart. A copy of the module runs as the module did before.
    """

    def __init__(self, forward: Callable[..., Any], **how: Any) -> None:
        self.forward = forward
        self.compiled: Callable[..., Any] = torch.compile(forward, **how)
        functools.update_wrapper(self, forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward."""
        return self.compiled(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.forward, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return _same, (self.forward,)


def _same(forward: Callable[..., Any]) -> Callable[..., Any]:
    return forward


class CompiledInPlace:
    """Modules that run compiled until `undo`. They are held weakly.

    Args:
        modules: what to compile; none of them is compiled yet.
        slots: where their forwards may lie.
        how: arguments of `torch.compile`.

    Raises:
        Exception: whatever `torch.compile` raises for these arguments; the modules are then as they were.
    """

    def __init__(self, modules: Sequence[nn.Module], slots: Slots = without_hooks, **how: Any) -> None:
        self._slots = slots
        self._placed: list[tuple[ref[nn.Module], ref[CompiledForward], bool]] = []
        try:
            for module in modules:
                self._compile(module, how)
        except Exception:
            self.undo()
            raise

    def _compile(self, module: nn.Module, how: dict[str, Any]) -> None:
        innermost = (slot for slot in self._slots(module) if _is_own_forward(getattr(*slot), module))
        holder, name = next(innermost, (module, "forward"))
        forward = CompiledForward(getattr(holder, name), **how)
        is_new = name not in vars(holder)
        setattr(holder, name, forward)
        self._placed.append((ref(module), ref(forward), is_new))

    def undo(self) -> None:
        """Put the forwards back where the compiled ones are now; where somebody has wrapped one, it runs as it is."""
        for module_ref, forward_ref, is_new in self._placed:
            module, forward = module_ref(), forward_ref()
            if module is None or forward is None:
                continue
            for holder, name in [slot for slot in self._slots(module) if getattr(*slot) is forward]:
                if is_new and holder is module and name == "forward":
                    delattr(holder, name)
                else:
                    setattr(holder, name, forward.forward)
            forward.compiled = forward.forward
        self._placed.clear()


def _is_own_forward(forward: object, module: nn.Module) -> bool:
    """Whether this is the method of the module's class, and nothing around it."""
    return getattr(forward, "__func__", None) is type(module).forward and getattr(forward, "__self__", None) is module


def compiled_part(model: nn.Module) -> str | None:
    """The name of a module of the model that is compiled already, "" for the model itself; None: there is none."""
    return next((name for name, module in model.named_modules() if torch_internals.is_compiled(module)), None)
