"""sparse_compile: sparse attention for video diffusion transformers as a torch.compile backend.

    model = torch.compile(model, backend="sparse_attn")

Importing this package is cheap: no triton, no diffusers, no compiler. `torch` itself may be importing it (when
``TORCH_LOGS`` names it), so what needs torch is loaded at its first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from sparse_compile.config import Config
from sparse_compile.errors import SparseAttentionError, StrictModeError

if TYPE_CHECKING:
    from sparse_compile.api import attach, denoising, disable, enable, explain
    from sparse_compile.strategies.base import Strategy

__version__ = "0.1.0"
__all__ = [
    "Config",
    "SparseAttentionError",
    "Strategy",
    "StrictModeError",
    "attach",
    "denoising",
    "disable",
    "enable",
    "explain",
]

_LAZY = {
    "Strategy": "sparse_compile.strategies.base",
    "attach": "sparse_compile.api",
    "denoising": "sparse_compile.api",
    "disable": "sparse_compile.api",
    "enable": "sparse_compile.api",
    "explain": "sparse_compile.api",
}


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
