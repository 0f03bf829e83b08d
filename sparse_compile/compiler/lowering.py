"""Hand a graph to the code generator."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import fx

from sparse_compile.compiler import torch_internals
from sparse_compile.config import Config


def lower(graph_module: fx.GraphModule, inputs: Sequence[Any], config: Config) -> Callable[..., Any]:
    """Compile a graph with Inductor, or run it as it is under ``lowering="eager"``."""
    if config.lowering == "eager":
        forward: Callable[..., Any] = graph_module.forward
        return forward
    return torch_internals.compile_with_inductor(graph_module, inputs, config.compile_mode, cache_tag(config))


def cache_tag(config: Config) -> str:
    """Identity of our code and options, for the keys of Inductor's caches."""
    return f"sparse_compile:{source_hash()}:{hashlib.sha256(repr(config).encode()).hexdigest()[:16]}"


@functools.cache
def source_hash() -> str:
    """Hash of all sources of the package."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(path for pattern in ("*.py", "*.cpp", "*.h") for path in root.rglob(pattern)):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
