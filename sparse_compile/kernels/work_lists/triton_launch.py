"""Work lists made on the device: their sizes on the host depend on shapes alone (docs/kernels.md, "Work lists")."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_compile.kernels.launching import lanes, launch
from sparse_compile.kernels.work_lists.triton_kernels import expand_rows, write_tiles
from sparse_compile.plan import Plan

LONGEST_SEQUENCE = 2**23
"""Keys that the packing of a piece can number."""
GROUPS_AT_ONCE = 1024
GROUPS_OF_WARP = 128
TILES_AT_ONCE = 16


class Tiling(NamedTuple):
    """How an attention kernel cuts a Plan.

    block_q: most queries of a tile.
    block_k: keys of a chunk, which the kernel looks at together.
    piece: most keys of a piece; divides block_k. Several pieces, of places that need not touch, make a chunk.
    short_q: most queries of a short tile, for what is left of a row behind its whole tiles; 0: there are none.
    """

    block_q: int
    block_k: int
    piece: int
    short_q: int = 0

    @property
    def pieces_per_chunk(self) -> int:
        """Pieces of a chunk."""
        return self.block_k // self.piece


class Tiles(NamedTuple):
    """Ranges of queries that are attended together.

    ranges int32 [n, 4]: row, first query in the grouped order, number of queries, 0; head by head, and in a head the
        tiles with the most keys first.
    number int32 [1]: how many of them are in use.
    """

    ranges: Tensor
    number: Tensor


class WorkLists(NamedTuple):
    """A Plan as an attention kernel walks it; a row is a query group of a (batch item, head), R = B * H * Gq of them.

    tiles: of at most ``block_q`` queries.
    short_tiles: of at most ``short_q``; None where there are none.
    pieces int32 [R, capacity]: key ranges of the grouped order as start * 256 + length; whole ones first; empty ones
        fill the last chunk.
    counts int32 [R, 2]: whole pieces, and all pieces that are not empty.
    kept_keys int32 [B, H, Gq]: keys of the kept groups.
    skipped int32 [R, ceil(Gk / 32)]: bits of the groups with keys that a row passes over, padding on neither side.
    """

    tiles: Tiles
    short_tiles: Tiles | None
    pieces: Tensor
    counts: Tensor
    kept_keys: Tensor
    skipped: Tensor


def work_lists(plan: Plan, queries: int, keys: int, tiling: Tiling) -> WorkLists:
    """Expand a Plan.

    Args:
        plan: its tensors on one device; ``keep`` and the offsets contiguous.
        queries: Sq.
        keys: Sk, less than `LONGEST_SEQUENCE`.
        tiling: of the kernel that will walk the lists.

    Raises:
        ValueError: more keys than a piece can number.
    """
    if keys >= LONGEST_SEQUENCE:
        raise ValueError(f"work lists number fewer than {LONGEST_SEQUENCE} keys; got {keys}. Use kernel='reference'.")
    batches, heads, rows, words = plan.keep.shape
    device = plan.keep.device
    capacity = piece_capacity(keys, plan.key_groups, tiling)
    pieces = torch.empty((batches * heads * rows, capacity), dtype=torch.int32, device=device)
    counts = torch.empty((batches * heads * rows, 2), dtype=torch.int32, device=device)
    kept_keys = torch.empty((batches, heads, rows), dtype=torch.int32, device=device)
    skipped = torch.empty((batches * heads * rows, words), dtype=torch.int32, device=device)
    groups_at_once = min(GROUPS_AT_ONCE, lanes(plan.key_groups, 32))
    launch(
        expand_rows,
        (batches * heads * rows,),
        plan.keep.contiguous(),
        plan.k_offsets.contiguous(),
        pieces,
        counts,
        kept_keys,
        skipped,
        rows,
        plan.key_groups,
        words,
        heads // plan.k_offsets.shape[1],
        capacity,
        PIECE=tiling.piece,
        PER_CHUNK=tiling.pieces_per_chunk,
        GROUPS=groups_at_once,
        warps=max(1, groups_at_once // GROUPS_OF_WARP),
        stages=1,
    )
    order = counts[:, 1].view(batches, heads, rows).sort(dim=-1, descending=True, stable=True).indices
    starts = plan.q_offsets[..., :-1].contiguous()
    whole, left = _split_rows(plan.q_offsets.diff(), tiling)
    most = batches * heads * (queries // tiling.block_q + rows)
    tiles = _tiles(order, starts, whole, most, tiling.block_q)
    short = None if left is None else _tiles(order, starts + whole, left, batches * heads * rows, tiling.short_q)
    return WorkLists(tiles, short, pieces, counts, kept_keys, skipped)


def _split_rows(sizes: Tensor, tiling: Tiling) -> tuple[Tensor, Tensor | None]:
    """Queries of each row in tiles and in a short tile behind them: int32 as ``sizes`` [B, H, Gq]."""
    if not tiling.short_q:
        return sizes, None
    rest = sizes % tiling.block_q
    left = torch.where(rest <= tiling.short_q, rest, 0)
    return sizes - left, left


def _tiles(order: Tensor, starts: Tensor, sizes: Tensor, capacity: int, block_q: int) -> Tiles:
    """Cut the queries of each row; ``order`` int64 [B, H, Gq] gives the rows of each head, those with most keys first.

    Tiles of one head are neighbours, so that its keys stay in cache.
    """
    tiles = torch.empty((capacity, 4), dtype=torch.int32, device=sizes.device)
    ranked = ((sizes + (block_q - 1)) // block_q).gather(-1, order).flatten()
    last = ranked.cumsum(0, dtype=torch.int32)
    launch(
        write_tiles,
        (sizes.numel(),),
        order,
        last - ranked,
        starts,
        sizes,
        tiles,
        sizes.shape[2],
        BLOCK_Q=block_q,
        AT_ONCE=TILES_AT_ONCE,
        warps=1,
        stages=1,
    )
    return Tiles(tiles, last[-1:])


def piece_capacity(keys: int, groups: int, tiling: Tiling) -> int:
    """Most pieces of a row, in whole chunks, and one chunk more, which a kernel may load but not use.

    Each run adds one short piece, and runs do not touch.
    """
    most = keys // tiling.piece + (groups + 1) // 2
    return (-(-most // tiling.pieces_per_chunk) + 1) * tiling.pieces_per_chunk


def density(plan: Plan, kept_keys: Tensor) -> Tensor:
    """Attended pairs over valid pairs, float32 [B, H], as `Plan.density`, from what the work lists counted."""
    q_sizes = plan.q_offsets.diff()[..., :-1].double()
    valid_keys = plan.k_offsets[..., -2].double().repeat_interleave(q_sizes.shape[1] // plan.k_offsets.shape[1], dim=1)
    valid = q_sizes.sum(-1) * valid_keys
    attended = (q_sizes * kept_keys[..., :-1]).sum(-1)
    return torch.where(valid > 0, attended / valid.clamp(min=1), 1.0).float()


def tile_fill(plan: Plan, lists: WorkLists, tiling: Tiling) -> Tensor:
    """Attended pairs over computed pairs, float64 []: what ragged groups cost in half-filled tiles."""
    q_sizes = plan.q_offsets.diff()
    chunks = -(-lists.counts[:, 1].view_as(q_sizes) // tiling.pieces_per_chunk)
    whole, left = _split_rows(q_sizes, tiling)
    lanes = -(-whole // tiling.block_q) * tiling.block_q
    if left is not None:
        lanes = lanes + torch.where(left > 0, tiling.short_q, 0)
    computed = (lanes * chunks).double().sum() * tiling.block_k
    return (q_sizes.double() * lists.kept_keys).sum() / computed
