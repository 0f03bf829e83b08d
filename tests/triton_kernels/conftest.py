"""The cases of this folder run twice: on a GPU, and without one in Triton's interpreter.

Triton decides when a kernel's module is imported, so the interpreter has a process of its own
(tests/kernels/test_interpreter.py starts it with ``TRITON_INTERPRET=1``). Without that variable the cases need a GPU.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark by where the process runs them; a case that is too slow for the interpreter is marked gpu already."""
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("gpu") is None:
            item.add_marker(pytest.mark.interpreter if INTERPRETED else pytest.mark.gpu)


@pytest.fixture
def device() -> str:
    """Where the tensors of a case live."""
    return "cpu" if INTERPRETED else "cuda"


def _mend_interpreter() -> None:
    """Two defects of Triton's interpreter, mended here so that kernels stay as they are, and a waste of time.

    Loop bounds become ints through an array of one element, which NumPy 2.4 refuses; and values in bfloat16 are kept as
    bit patterns, which ``tl.dot`` multiplies as integers. And each call of a function looks through the whole language
    for what is not patched yet.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch_language = interpreter._patch_lang

    def patch_once(function: Any) -> Any:
        """A function called by a kernel mostly finds the language patched by the kernel."""
        seen = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        patched = not any(tl.core.is_builtin(language.arange) for language in seen)
        return interpreter._LangPatchScope() if patched else patch_language(function)

    interpreter._patch_lang = patch_once
    patch_tensor, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype("uint32") << 16).view("float32"), tl.float32)

    interpreter._patch_lang_tensor = patched
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)


if INTERPRETED:
    torch.set_num_threads(1)
    _mend_interpreter()
