"""How the values of options are read, from Python or from the strings of the environment.

A parser returns the value in its one form, or raises ValueError.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

Parse = Callable[[object], Any]


def number(value: object) -> float:
    """A finite number, or a string that holds one."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    given = float(value)
    if not math.isfinite(given):
        raise ValueError
    return given


def whole(value: object) -> int:
    """A whole number."""
    given = number(value)
    if not given.is_integer():
        raise ValueError
    return int(given)


def within(low: float, high: float, *, open_low: bool = False, open_high: bool = False) -> Parse:
    """A number between two bounds, which count unless they are open."""

    def parse(value: object) -> float:
        given = number(value)
        above = low < given if open_low else low <= given
        below = given < high if open_high else given <= high
        if not (above and below):
            raise ValueError
        return given

    return parse


def at_least(least: int) -> Parse:
    """A whole number that is not below ``least``."""

    def parse(value: object) -> int:
        given = whole(value)
        if given < least:
            raise ValueError
        return given

    return parse


def one_word_or(word: str, replacement: Any, parse: Parse) -> Parse:
    """One word (or None), which stands for ``replacement``, or else what ``parse`` accepts."""

    def parse_either(value: object) -> Any:
        return replacement if value == word or value is None else parse(value)

    return parse_either


def one_of(*words: str) -> Parse:
    """One of these words."""

    def parse(value: object) -> str:
        if value not in words:
            raise ValueError
        return str(value)

    return parse


def boolean(value: object) -> bool:
    """True or false, or one of the words for them."""
    known = {
        "1": True,
        "true": True,
        "yes": True,
        "on": True,
        "0": False,
        "false": False,
        "no": False,
        "off": False,
    }
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in known:
        return known[value.lower()]
    raise ValueError


def share_or_count(value: object) -> float | int:
    """A float (or a string with a point) is a share in [0, 1]; an int is a count."""
    if isinstance(value, float) or (isinstance(value, str) and "." in value):
        return float(within(0.0, 1.0)(value))
    return int(at_least(0)(value))


def layers(value: object) -> float | int | str:
    """A share, a count, or a list such as ``0-2,-1``."""
    if not isinstance(value, str):
        return share_or_count(value)
    try:
        return share_or_count(value)
    except ValueError:
        layer_ranges(value)
        return value.replace(" ", "")


def layer_ranges(text: str) -> tuple[tuple[int, int], ...]:
    """The (first, last) pairs of a list of layers such as ``0-2,-1``; negative numbers count from the end.

    Raises:
        ValueError: the text is no such list.
    """
    ranges = []
    for item in text.replace(" ", "").split(","):
        sign, digits = (-1, item[1:]) if item.startswith("-") else (1, item)
        first, dash, last = digits.partition("-")
        if not first.isdigit() or (dash and (sign < 0 or not last.isdigit() or int(last) < int(first))):
            raise ValueError
        ranges.append((sign * int(first), int(last) if dash else sign * int(first)))
    return tuple(ranges)


def search_steps(value: object) -> tuple[float | int, ...]:
    """Rising shares, or rising counts, of the steps: a sequence, one number, or text such as ``0.2,0.6``."""
    items: list[object]
    if isinstance(value, str):
        items = [item.strip() for item in value.split(",")]
    else:
        items = list(value) if isinstance(value, list | tuple) else [value]
    steps = tuple(share_or_count(item) for item in items)
    if not steps or len({type(step) for step in steps}) > 1:
        raise ValueError
    if any(earlier >= later for earlier, later in itertools.pairwise(steps)):
        raise ValueError
    return steps
