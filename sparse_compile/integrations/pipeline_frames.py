"""Which diffusers pipeline is calling: the one whose method lies nearest on the call stack."""

from __future__ import annotations

import inspect
import sys
from types import FrameType
from typing import Any

from diffusers import DiffusionPipeline

PIPELINES: tuple[type, ...] = (DiffusionPipeline,)
try:
    from diffusers.modular_pipelines.modular_pipeline import ModularPipeline
except ImportError:  # a diffusers that is too old, which is said once a pipeline is to be attached
    pass
else:
    PIPELINES += (ModularPipeline,)

REFERENCES = 3
"""To the variables of a frame where nobody else has them: the frame's, our own and that of the call that counts."""


def nearest_pipeline() -> tuple[Any, FrameType] | None:
    """The pipeline that called, through whatever lies between, and the frame of that call; None where none did."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        # Only methods are asked for their locals, which costs a copy of them.
        if code.co_argcount and code.co_varnames[0] == "self":
            owner = local_variable(frame, "self")
            # `type`, since isinstance asks a weak proxy for its class, and raises where its object is gone.
            if issubclass(type(owner), PIPELINES):
                return owner, frame
        frame = frame.f_back
    return None


def local_variable(frame: FrameType, name: str) -> Any:
    """What a variable of a running function is bound to, None without one; the frame is left as it was.

    Before Python 3.13 asking leaves a dict of all variables in the frame, which would hold the tensors of a forward
    until that returns. It is emptied again, unless somebody else has it (``locals()``) or a tracer might write it back.
    """
    variables = frame.f_locals
    value = variables.get(name)
    is_snapshot = type(variables) is dict and frame.f_code.co_flags & inspect.CO_OPTIMIZED
    if is_snapshot and sys.gettrace() is None and sys.getrefcount(variables) == REFERENCES:
        variables.clear()
    return value
