"""Work lists made on the device: their sizes on the host depend on shapes alone (docs/kernels.md, "Work lists")."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_compile.kernels.launching import launch
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
    """

    block_q: int
    block_k: int
    piece: int

    @property
    def pieces_per_chunk(self) -> int:
        """Pieces of a chunk."""
        return self.block_k // self.piece


class WorkLists(NamedTuple):
    """A Plan as an attention kernel walks it; a row is a query group of a (batch item, head), R = B * H * Gq of them.

    tiles int32 [n, 4]: row, first query in the grouped order, number of queries, 0; head by head, and in a head the
        tiles with the most keys first.
    n_tiles int32 [1]: how many of them are in use.
    pieces int32 [R, capacity]: key ranges of the grouped order as start * 256 + length; whole ones first; empty ones
        fill the last chunk.
    counts int32 [R, 2]: whole pieces, and all pieces that are not empty.
    kept_keys int32 [B, H, Gq]: keys of the kept groups.
    skipped int32 [R, ceil(Gk / 32)]: bits of the groups with keys that a row passes over, padding on neither side.
    """

    tiles: Tensor
    n_tiles: Tensor
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
    groups_at_once = max(32, min(GROUPS_AT_ONCE, 1 << (plan.key_groups - 1).bit_length()))
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
    tiles, n_tiles = _tiles(plan.q_offsets.contiguous(), counts, queries, tiling.block_q)
    return WorkLists(tiles, n_tiles, pieces, counts, kept_keys, skipped)


def _tiles(q_offsets: Tensor, counts: Tensor, queries: int, block_q: int) -> tuple[Tensor, Tensor]:
    """Tiles int32 [n, 4] and their number int32 [1], head by head, so that the keys of a head stay in cache."""
    batches, heads, rows = *q_offsets.shape[:2], q_offsets.shape[2] - 1
    capacity = batches * heads * (queries // block_q + rows)
    tiles = torch.empty((capacity, 4), dtype=torch.int32, device=q_offsets.device)
    order = counts[:, 1].view(batches, heads, rows).sort(dim=-1, descending=True, stable=True).indices
    tiles_of_row = (q_offsets.diff() + (block_q - 1)) // block_q
    ranked = tiles_of_row.gather(-1, order).flatten()
    last = ranked.cumsum(0, dtype=torch.int32)
    launch(
        write_tiles,
        (batches * heads * rows,),
        order,
        last - ranked,
        q_offsets,
        tiles,
        rows,
        BLOCK_Q=block_q,
        AT_ONCE=TILES_AT_ONCE,
        warps=1,
        stages=1,
    )
    return tiles, last[-1:]


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
    tiles = -(-q_sizes // tiling.block_q)
    computed = (tiles * chunks).double().sum() * (tiling.block_q * tiling.block_k)
    return (q_sizes.double() * lists.kept_keys).sum() / computed
