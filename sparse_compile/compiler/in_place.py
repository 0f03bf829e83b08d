"""Compile modules in place, and make them again exactly what they were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn

from sparse_compile.compiler import torch_internals


class CompiledInPlace:
    """Modules that run compiled until `undo`. They are held weakly.

    Args:
        modules: what to compile; none of them is compiled yet.
        how: arguments of `torch.compile`.

    Raises:
        Exception: whatever `torch.compile` raises for these arguments; the modules are then as they were.
    """

    def __init__(self, modules: Sequence[nn.Module], **how: Any) -> None:
        self._calls: WeakKeyDictionary[nn.Module, ref[Any]] = WeakKeyDictionary()  # a call holds its module
        try:
            for module in modules:
                module.compile(**how)
                self._calls[module] = ref(torch_internals.compiled_call(module))
        except Exception:
            self.undo()
            raise

    def undo(self) -> None:
        """Take the compiled calls out again; one that somebody else has put in its place since stays."""
        for module, call in self._calls.items():
            if torch_internals.compiled_call(module) is call():
                torch_internals.undo_compile_in_place(module)
        self._calls.clear()


def compiled_part(model: nn.Module) -> str | None:
    """The name of a module of the model that is compiled already, "" for the model itself; None: there is none."""
    return next((name for name, module in model.named_modules() if torch_internals.is_compiled(module)), None)
