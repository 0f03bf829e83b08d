"""Which modules of a transformer to compile: its repeated blocks one by one, or the whole.

Blocks compile in a fraction of the time, since equal ones share their code; but attention outside of them is not seen.
What a model says of itself decides: `_repeated_blocks` names the classes of its blocks, and an attention module holds a
`processor`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from sparse_compile.errors import SparseAttentionError

MOST_NAMES = 3


@dataclass(frozen=True)
class Parts:
    """What to compile of a model."""

    modules: tuple[nn.Module, ...]
    choice: str
    """Which modules these are, and why they."""
    warning: str = ""
    """Which attention lies outside of them."""


def parts_to_compile(model: nn.Module, regional: bool | None) -> Parts:
    """The repeated blocks of a model, or the whole.

    Args:
        model: a transformer.
        regional: True: the blocks; False: the whole; None: the blocks where all attention lies in them, else the whole.

    Raises:
        SparseAttentionError: the blocks are asked for, and the model has none.
    """
    declared = getattr(model, "_repeated_blocks", None) or ()
    blocks = [module for module in model.modules() if type(module).__name__ in declared]
    inside = {module for block in blocks for module in block.modules()}
    attention = {name: module for name, module in model.named_modules() if callable(getattr(module, "processor", None))}
    outside = [name for name, module in attention.items() if module not in inside]
    if regional is None:
        obstacle = _obstacle(declared, blocks, attention, outside)
        return (
            Parts((model,), f"the whole model, since {obstacle}")
            if obstacle
            else _blocks(blocks, "which hold all attention")
        )
    if not regional:
        return Parts((model,), "the whole model, as asked")
    if not blocks:
        raise SparseAttentionError(
            "regional=True needs a model that names its repeated blocks",
            type(model).__name__,
            "Leave regional out to compile it whole.",
        )
    if not outside:
        return _blocks(blocks, "as asked")
    return _blocks(
        blocks,
        "as asked",
        f"attention outside the repeated blocks is not compiled and stays as it is: {_some(outside)}; "
        "leave regional out to have it compiled too",
    )


def _obstacle(
    declared: Sequence[str], blocks: Sequence[nn.Module], attention: dict[str, nn.Module], outside: Sequence[str]
) -> str:
    """Why not the blocks; empty for nothing."""
    if not blocks:
        return (
            "none of its blocks is of a class that it names as repeated" if declared else "it names no repeated blocks"
        )
    if not attention:
        return "none of its modules is known to attend"
    return f"attention lies outside its repeated blocks: {_some(outside)}" if outside else ""


def _blocks(blocks: Sequence[nn.Module], why: str, warning: str = "") -> Parts:
    counts = Counter(type(block).__name__ for block in blocks)
    kinds = ", ".join(f"{count} {name}" for name, count in counts.items())
    return Parts(tuple(blocks), f"the repeated blocks ({kinds}), {why}", warning)


def _some(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
