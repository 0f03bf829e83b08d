"""The least versions of other packages that are supported, as pyproject.toml has them."""

from __future__ import annotations

import re

OLDEST = {"torch": (2, 11), "diffusers": (0, 42)}


def oldest(package: str) -> str:
    """The least version of a package, ``2.11``."""
    return ".".join(map(str, OLDEST[package]))


def is_too_old(package: str, installed: str) -> bool:
    """Whether a version is below the least one; False for packages of which any will do, and for no version at all."""
    numbers = re.match(r"(\d+)\.(\d+)", installed)
    return package in OLDEST and numbers is not None and (int(numbers[1]), int(numbers[2])) < OLDEST[package]
