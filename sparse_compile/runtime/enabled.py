"""What `enable` did to a model: how it was compiled and why so, and how that is undone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakSet

from sparse_compile.config import Config


@dataclass(frozen=True)
class Compilation:
    """How a pipeline's transformers are to be compiled."""

    config: Config
    regional: bool | None = None
    """The repeated blocks one by one, the whole model, or None: whatever finds all attention."""
    fullgraph: bool = False
    dynamic: bool | None = None


@dataclass(eq=False)
class Enabled:
    """One model that `enable` compiled. It holds the model weakly."""

    compilation: Compilation
    choice: str
    """What was compiled, and why that."""
    warning: str
    """What is missed by it; empty for nothing."""
    undo: Callable[[], None]
    pipelines: WeakSet[object] = field(default_factory=WeakSet)
    """Those that it was enabled for."""
