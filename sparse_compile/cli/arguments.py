"""Arguments that several subcommands share: their types and choices."""

from __future__ import annotations

import argparse
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What `add_subparsers` gives; argparse has no public name for it."""

SIZES = ("12x32x48", "9x32x32")
"""Frames x height x width that the demo model was trained at."""


def positive(text: str) -> int:
    """An integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def share(text: str) -> float:
    """A number in [0, 1]."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1], not {number:g}")
    return number


def frames_height_width(text: str) -> tuple[int, int, int]:
    """Three sizes, ``21x60x104``."""
    sizes = text.split("x")
    if len(sizes) != 3:
        raise argparse.ArgumentTypeError(f"must look like 21x60x104, not {text!r}")
    frames, height, width = map(positive, sizes)
    return frames, height, width


def key_value(text: str) -> tuple[str, str]:
    """A pair ``KEY=VALUE``."""
    key, equals, value = text.partition("=")
    if not equals or not key or not value:
        raise argparse.ArgumentTypeError(f"must look like density=0.5, not {text!r}")
    return key, value
