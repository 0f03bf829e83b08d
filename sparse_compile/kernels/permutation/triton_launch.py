"""The label sort and the row gather on a GPU (docs/svg2.md, section 8)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_compile.kernels.launching import lanes, launch
from sparse_compile.kernels.permutation import reference, triton_kernels

MOST_GROUPS = 4096
"""More would need a histogram that does not fit the registers of a program."""
TOKENS_AT_ONCE = 1024
"""Tokens that one program ranks, and that have a histogram of their own."""
TOKENS_COMPARED = 64
"""Tokens that are compared with each other, to rank those of equal labels."""
LABELS_AT_ONCE = 64
BLOCKS_AT_ONCE = 32
ROWS_AT_ONCE = 64
FEWEST_LABELS = 16


class Grouping(NamedTuple):
    """Where a sort writes the groups of one side.

    groups: how many; labels lie in [0, groups).
    order: int32 [B, H, S], contiguous.
    offsets: int32 [B, H, groups + 1], contiguous.
    """

    groups: int
    order: Tensor
    offsets: Tensor

    @property
    def problems(self) -> int:
        """How many pairs of batch item and head."""
        return self.order.shape[0] * self.order.shape[1]

    @property
    def tokens(self) -> int:
        """S."""
        return self.order.shape[2]


class Workspace(NamedTuple):
    """Memory of one sort of two sides, for as many sorts of these sizes as wanted: int32.

    counts: [blocks of tokens, labels].
    totals: [problems, labels].
    """

    counts: Tensor
    totals: Tensor


def sort_labels(labels: Tensor, groups: int, *, block: int = TOKENS_AT_ONCE) -> tuple[Tensor, Tensor]:
    """`reference.sort_labels` as a counting sort in four launches; with over 4096 groups it is torch's own sort.

    Shapes: labels int32 [B, H, S] with values in [0, groups).
    Returns: order int32 [B, H, S], the tokens by label and, within a label, by place; offsets int32
        [B, H, groups + 1].

    The histogram of each block of tokens, summed over the blocks before it and over the labels before, says where the
    block's tokens of a label go. Without atomics on memory, hence the same every time.
    """
    side = grouping(labels, labels.shape[:-1], labels.shape[-1], groups)
    nothing = Grouping(groups, side.order.narrow(0, 0, 0), side.offsets.narrow(0, 0, 0))
    space = workspace(labels, side, nothing, block)
    sort_both(labels.contiguous().view(-1), side, nothing, space, block=block)
    return side.order, side.offsets


def grouping(like: Tensor, heads: tuple[int, ...], tokens: int, groups: int) -> Grouping:
    """Memory for the groups of ``tokens`` tokens, for each of ``heads`` = (B, H), on the device of ``like``."""
    order = torch.empty((*heads, tokens), dtype=torch.int32, device=like.device)
    return Grouping(groups, order, torch.empty((*heads, groups + 1), dtype=torch.int32, device=like.device))


def workspace(like: Tensor, q: Grouping, k: Grouping, block: int = TOKENS_AT_ONCE) -> Workspace:
    """What `sort_both` needs for these two sides, on the device of ``like``."""
    labels = _labels(q, k)
    if labels > MOST_GROUPS:
        labels = 0  # torch's sort has a workspace of its own
    blocks = sum(side.problems * blocks_of(side.tokens, block) for side in (q, k))
    counts = torch.empty((blocks, labels), dtype=torch.int32, device=like.device)
    totals = torch.empty((q.problems + k.problems, labels), dtype=torch.int32, device=like.device)
    return Workspace(counts, totals)


def sort_both(
    labels: Tensor,
    q: Grouping,
    k: Grouping,
    space: Workspace,
    moved: Tensor | None = None,
    iteration: int = 0,
    block: int = TOKENS_AT_ONCE,
) -> None:
    """Write orders and offsets of both sides.

    Args:
        labels: int32, those of q and then those of k, each [B, H, S] without gaps.
        q: where the groups of the one side go.
        k: where those of the other go, which may have no problems.
        space: of `workspace`, for the same sides and the same block.
        moved: int32 [iterations + 1, problems], or None: a problem whose entry at ``iteration`` is 0 may be left as it
            is, as its labels are those of the sort before.
        iteration: row of ``moved``.
        block: tokens that one program ranks, a power of two.
    """
    wanted = _labels(q, k)
    if wanted > MOST_GROUPS:
        edge = q.order.numel()
        for side, own in ((q, labels[:edge]), (k, labels[edge:])):
            order, offsets = reference.sort_labels(own.view(side.order.shape), side.groups)
            side.order.copy_(order)
            side.offsets.copy_(offsets)
        return
    flags = labels if moved is None else moved
    q_programs = q.problems * blocks_of(q.tokens, block)
    programs = q_programs + k.problems * blocks_of(k.tokens, block)
    problems = (q.problems, k.problems)
    sizes = (*problems, q.tokens, k.tokens)
    groups = (q.groups, k.groups)
    constants = {"LABELS": wanted, "FLAGGED": moved is not None}
    launch(
        triton_kernels.count_labels,
        (programs,),
        *(labels, flags, space.counts, q_programs, *sizes, iteration),
        warps=4,
        stages=1,
        TOKENS=block,
        **constants,
    )
    at_once = min(LABELS_AT_ONCE, wanted)
    parts = wanted // at_once
    launch(
        triton_kernels.scan_blocks,
        (sum(problems) * parts,),
        *(space.counts, flags, space.totals, q.problems * parts, *sizes, iteration),
        warps=4,
        stages=1,
        TOKENS=block,
        LABEL_BLOCK=at_once,
        BLOCKS=BLOCKS_AT_ONCE,
        **constants,
    )
    launch(
        triton_kernels.scan_labels,
        (sum(problems),),
        *(space.totals, flags, q.offsets, k.offsets, *problems, *groups, iteration),
        warps=4,
        stages=1,
        **constants,
    )
    launch(
        triton_kernels.scatter_tokens,
        (programs,),
        *(labels, flags, space.counts, q.offsets, k.offsets, q.order, k.order, q_programs, *sizes, *groups, iteration),
        warps=4,
        stages=1,
        TOKENS=block,
        CHUNK=min(TOKENS_COMPARED, block),
        **constants,
    )


def _labels(q: Grouping, k: Grouping) -> int:
    """Bins of a histogram: a power of two above the number of groups of either side, for one bin that is no group."""
    return max(FEWEST_LABELS, 1 << max(q.groups, k.groups).bit_length())


def gather_rows(k: Tensor, v: Tensor, order: Tensor, *, rows: int = ROWS_AT_ONCE) -> tuple[Tensor, Tensor]:
    """Copy keys and values in the order of their groups, both in one launch.

    Shapes: k [B, H, S, D] and v [B, H, S, Dv], any strides, D and Dv up to 256 and not necessarily equal; order int32
        [B, H, N] with values in [0, S). Slices of heads are fine.
    Returns: [B, H, N, D] and [B, H, N, Dv], contiguous, in the dtypes of k and v.
    """
    k, v = rows_without_gaps(k), rows_without_gaps(v)
    order = order.contiguous()
    batches, heads, tokens = order.shape
    size, value_size = k.shape[3], v.shape[3]
    k_out = torch.empty((batches, heads, tokens, size), dtype=k.dtype, device=k.device)
    v_out = torch.empty((batches, heads, tokens, value_size), dtype=v.dtype, device=v.device)
    unit = stride_unit(k, v)
    launch(
        triton_kernels.gather_rows,
        (batches * heads * blocks_of(tokens, rows),),
        *(k, v, order, k_out, v_out),
        *(stride // unit for x in (k, v) for stride in x.stride()[:3]),
        *(heads, tokens),
        warps=4,
        stages=1,
        D=size,
        DV=value_size,
        D_PAD=lanes(size),
        DV_PAD=lanes(value_size),
        UNIT=unit,
        ROWS=rows,
    )
    return k_out, v_out


def rows_without_gaps(x: Tensor) -> Tensor:
    """``x`` itself where the elements of a row are neighbours, as they nearly always are; else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def stride_unit(*tensors: Tensor) -> int:
    """The number of elements that all strides above the last are multiples of: 8 or 1."""
    return 8 if all(stride % 8 == 0 for x in tensors for stride in x.stride()[:-1]) else 1


def blocks_of(count: int, size: int) -> int:
    """Blocks of ``size`` that hold ``count``."""
    return -(-count // size)
