"""Which diffusers pipeline is calling: the one whose method lies nearest on the call stack."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.modular_pipelines.modular_pipeline import ModularPipeline

PIPELINES = (DiffusionPipeline, ModularPipeline)


def nearest_pipeline() -> tuple[Any, FrameType] | None:
    """The pipeline that called, through whatever lies between, and the frame of that call; None where none did."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        # Only methods are asked for their locals, which costs a copy of them.
        if code.co_argcount and code.co_varnames[0] == "self":
            owner = frame.f_locals.get("self")
            # `type`, since isinstance asks a weak proxy for its class, and raises where its object is gone.
            if issubclass(type(owner), PIPELINES):
                return owner, frame
        frame = frame.f_back
    return None
