"""Kinds of arguments that the commands share."""

from __future__ import annotations

import argparse

from sparse_compile.evaluation.demo_model import PATCH, VideoSize


def video_size(text: str) -> VideoSize:
    """``12x32x48`` as a size that the model can take."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"a size is FRAMESxHEIGHTxWIDTH, such as 12x32x48; got {text!r}")
    size = VideoSize(*map(int, parts))
    if size.height % PATCH or size.width % PATCH:
        raise argparse.ArgumentTypeError(f"height and width are multiples of {PATCH}; got {text!r}")
    return size
