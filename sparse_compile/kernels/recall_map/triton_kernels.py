"""Keep bitmaps that hold a share of the mass of each row, without a sort.

One row of G groups lies in the registers of one program, and the end of a prefix is found by halving the range of what
groups are ordered by, as in kernels/block_map/triton_kernels.py. A row is made of three prefixes of one order: what its
mass wants, and the least and the most that its keys allow. The last two are looked for only where they matter.
"""

import triton
import triton.language as tl

from sparse_compile.kernels.block_map.triton_kernels import completed, hashed, packed, prefix, prefix_end, sortable

HELD_UP: tl.constexpr = tl.constexpr(1)
HELD_DOWN: tl.constexpr = tl.constexpr(2)
CHOSE: tl.constexpr = tl.constexpr(4)


@triton.jit
def covering_end(key, weight, sure, needed):
    """The least t for which ``sure`` and the groups with a key above t weigh less than ``needed``. NaN is never enough.

    Shapes: key unsigned [LANES]; weight float [LANES]; sure and needed scalars of the same type.
    """
    found = tl.full([], 0, key.dtype)
    below = ~found >> 1
    bit = below + 1
    for _ in range(key.dtype.primitive_bitwidth):
        above = key > (found | below)  # were this bit 0
        enough = sure + tl.sum(tl.where(above, weight, 0), 0) >= needed
        found = tl.where(enough, found | bit, found)
        bit, below = bit >> 1, below >> 1
    return found


@triton.jit
def covering(key, candidate, weight, sure, needed):
    """Keep groups, largest key first, while ``sure`` and what comes before are less than ``needed``: bool [LANES].

    Ties: lower lane first. Shapes: as in `covering_end`; key and weight are 0 unless ``candidate``.
    """
    end = covering_end(key, weight, sure, needed)
    above = key > end
    tied = candidate & (key == end)
    place = tl.cumsum(tied.to(tl.int32), 0) - 1
    own = tl.where(tied, weight, 0)
    before = sure + (tl.sum(tl.where(above, weight, 0), 0) + (tl.cumsum(own, 0) - own))
    short = tied & ((before >= needed) == 0)
    # A count, so that rounding cannot tear a hole into the tie.
    return above | (tied & (place < tl.sum(short.to(tl.int32), 0)))


@triton.jit
def bounded(key, candidate, keys, bound):
    """The groups, largest key first, that meet a bound on the keys of a row: those before and half of its own.

    Shapes: key unsigned [LANES]; keys int32 [LANES], twice the keys of a candidate and 0 elsewhere; bound int32, what
        twice the keys may be. The first is kept whatever it weighs.
    """
    end = prefix_end(key, keys, bound, 0, False)
    return prefix(key, candidate, keys, end, bound, 1, False, True)


@triton.jit
def covered(key, candidate, weight, sure, needed, keys, least, most):
    """`cover` of reference.py for one row: bool [LANES], and which bound holds it, int32.

    Shapes: as in `covering` and `bounded`; least and most are bounds.
    """
    wanted = covering(key, candidate, weight, sure, needed)
    kept = wanted
    if tl.sum(tl.where(wanted, keys, 0), 0) <= least:  # otherwise the next group lies behind the floor
        kept = kept | bounded(key, candidate, keys, least)
    held_up = tl.max((kept & (wanted == 0)).to(tl.int32), 0)
    if tl.sum(tl.where(kept, keys, 0), 0) > most:
        kept = kept & bounded(key, candidate, keys, most)
    held_down = tl.max((wanted & (kept == 0)).to(tl.int32), 0)
    return kept, held_up * HELD_UP + held_down * HELD_DOWN + CHOSE


@triton.jit(do_not_specialize=["queries", "keys", "seed_low", "seed_high"])
def keep_estimated_recall(
    scores,
    log_sizes,
    q_offsets,
    k_offsets,
    bounds,
    asked,
    ready,
    keep,
    held,
    heads,
    shared,
    queries,
    keys,
    seed_low,
    seed_high,
    RANK_BY: tl.constexpr,
    PADDED_ATTEND: tl.constexpr,
    LANES: tl.constexpr,
):
    """One row of the keep bitmap of SVG2 under a recall target: one program for a query group.

    Its G = keys + 2 key groups lie in LANES lanes. The last group of either side is padding, the one before it text.
    Source: docs/svg2.md, sections 6 and 7. The mass of a group is its size times exp(score), in float32.
    Shapes: scores float32 [B, H, queries, keys]; log_sizes float32 [B, Hkv, keys]; q_offsets int32 [B, H, queries + 3];
        k_offsets int32 [B, Hkv, keys + 3]; bounds int32 [B, Hkv, 2], see `bounded`; asked float32 [B, H]; ready
        int32 [1]; keep int32 [B, H, queries + 2, words]; held int32 [B, H, queries + 2], see `covered`, 0 for rows that
        have nothing to choose. Grid: (B * H * (queries + 2),).
    """
    rows = queries + 2
    row = tl.program_id(0) % rows
    batch_head = (tl.program_id(0) // rows).to(tl.int64)
    key_head = batch_head // heads * (heads // shared) + batch_head % heads // shared
    lane = tl.arange(0, LANES)
    own_offsets = k_offsets + key_head * (keys + 3) + lane
    start = tl.load(own_offsets, mask=lane < keys + 1, other=0)
    size = tl.load(own_offsets + 1, mask=lane < keys + 1, other=0) - start  # [LANES], 0 for padding and beyond
    valid = size > 0
    cluster = valid & (lane < keys)
    q_start = tl.load(q_offsets + batch_head * (rows + 1) + row)
    row_size = tl.load(q_offsets + batch_head * (rows + 1) + row + 1) - q_start
    whole = (tl.load(ready) == 0) | (row == queries)
    chosen, flags = cluster, tl.full([], 0, tl.int32)
    if (row < queries) & (row_size > 0):
        own_scores = scores + (batch_head * queries + row) * keys
        score = tl.load(own_scores + lane, mask=lane < keys, other=0.0)  # [LANES]
        rank = score + tl.load(log_sizes + key_head * keys + lane, mask=lane < keys, other=0.0)
        peak = tl.max(tl.where(cluster, rank, float("-inf")), 0)
        # The size as a factor and not by its logarithm, which would be rounded on the scale of the scores.
        weight = tl.where(cluster, size.to(tl.float32) * tl.exp(score - peak), 0.0)
        needed = tl.load(asked + batch_head) * tl.sum(weight, 0)
        if RANK_BY == "mass":
            key = sortable(rank)
        elif RANK_BY == "mass_per_key":
            key = sortable(score)
        else:
            key = hashed(seed_low, seed_high, batch_head % heads, row, lane)
        key = tl.where(cluster, key, 0).to(tl.uint32)
        least, most = tl.load(bounds + key_head * 2), tl.load(bounds + key_head * 2 + 1)
        chosen, flags = covered(key, cluster, weight, 0.0, needed, tl.where(cluster, 2 * size, 0), least, most)
    kept = completed(chosen, valid, lane == keys, whole, row_size, row == rows - 1, PADDED_ATTEND)
    word = tl.arange(0, LANES // 32)
    words = tl.cdiv(keys + 2, 32)
    tl.store(keep + (batch_head * rows + row) * words + word, packed(kept, LANES), mask=word < words)
    tl.store(held + batch_head * rows + row, flags)


@triton.jit(do_not_specialize=["rows", "groups", "seed_low", "seed_high"])
def keep_measured_recall(
    mass,
    q_offsets,
    q_is_video,
    k_offsets,
    k_is_video,
    bounds,
    target,
    keep,
    held,
    kept_mass,
    all_mass,
    mass_batch,
    mass_head,
    mass_row,
    mass_column,
    heads,
    rows,
    groups,
    seed_low,
    seed_high,
    RANK_BY: tl.constexpr,
    PADDED_ATTEND: tl.constexpr,
    LANES: tl.constexpr,
):
    """One row of the keep bitmap of AdaSpa under a recall target: a program for a row, its groups in LANES lanes.

    Source: docs/adaspa.md, section 13. Mass that is not finite counts as 0. Sums and quotients in float64, as in
    `keep_top_k`.
    Shapes: mass float32 [B, H, rows, groups], any strides; q_offsets int32 [B, rows + 1]; q_is_video bool [rows];
        k_offsets int32 [B, groups + 1]; k_is_video bool [groups]; bounds int32 [B, 2], see `bounded`; target float64
        [1]; keep int32 [B, H, rows, words]; held int32 [B, H, rows], as in `keep_estimated_recall`; kept_mass and
        all_mass float64 [B, H, rows], sums over the groups with tokens. Grid: (B * H * rows,).
    """
    row = tl.program_id(0) % rows
    batch_head = (tl.program_id(0) // rows).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    lane = tl.arange(0, LANES)
    inside = lane < groups
    own_offsets = k_offsets + batch * (groups + 1) + lane
    start = tl.load(own_offsets, mask=lane < groups - 1, other=0)
    size = tl.load(own_offsets + 1, mask=lane < groups - 1, other=0) - start  # [LANES], 0 for padding and beyond
    valid = size > 0
    video = tl.load(k_is_video + lane, mask=inside, other=0) != 0
    candidate = valid & video
    source = mass + batch * mass_batch + head * mass_head + row.to(tl.int64) * mass_row
    raw = tl.load(source + lane.to(tl.int64) * mass_column, mask=inside, other=0.0)  # [LANES]
    finite = tl.where(valid & (tl.abs(raw) < float("inf")), raw, 0.0).to(tl.float64)
    total = tl.sum(finite, 0)
    q_start = tl.load(q_offsets + batch * (rows + 1) + row)
    row_size = tl.load(q_offsets + batch * (rows + 1) + row + 1) - q_start
    whole = tl.load(q_is_video + row) == 0
    chosen, flags = candidate, tl.full([], 0, tl.int32)
    if (row_size > 0) & (whole == 0) & (row < rows - 1):
        if RANK_BY == "mass":
            key = tl.where(candidate, sortable(finite.to(tl.float32)), 0).to(tl.uint32)
        elif RANK_BY == "mass_per_key":
            key = sortable(finite / tl.where(valid, size, 1).to(tl.float64))
            key = tl.where(candidate, key, 0).to(tl.uint64)
        else:
            key = tl.where(candidate, hashed(seed_low, seed_high, head, row, lane), 0).to(tl.uint32)
        sure = tl.sum(tl.where(video, 0.0, finite), 0)  # text is kept anyway
        needed = tl.load(target) * total
        least, most = tl.load(bounds + batch * 2), tl.load(bounds + batch * 2 + 1)
        weight = tl.where(candidate, finite, 0.0)
        chosen, flags = covered(key, candidate, weight, sure, needed, tl.where(candidate, 2 * size, 0), least, most)
    kept = completed(chosen, valid, video == 0, whole, row_size, row == rows - 1, PADDED_ATTEND)
    place = batch_head * rows + row
    word = tl.arange(0, LANES // 32)
    words = tl.cdiv(groups, 32)
    tl.store(keep + place * words + word, packed(kept, LANES), mask=word < words)
    tl.store(held + place, flags)
    tl.store(kept_mass + place, tl.sum(tl.where(kept, finite, 0.0), 0))
    tl.store(all_mass + place, total)


@triton.jit(do_not_specialize=["rows", "groups"])
def settle_heads(
    held,
    q_offsets,
    k_offsets,
    keep,
    at_bounds,
    heads,
    shared,
    rows,
    groups,
    UNREACHED: tl.constexpr,
    PADDED_ATTEND: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_WRITTEN: tl.constexpr,
):
    """What share of its queries the bounds hold, and everything for a head that is out of reach: a program for a head.

    Source: docs/svg2.md, section 7, and docs/adaspa.md, section 13; `held_shares` and `unreached` of reference.py.
    Shapes: held int32 [B, H, rows], of the planner's kernel; q_offsets int32 [B, H, rows + 1]; k_offsets int32
        [B, Hkv, groups + 1]; keep int32 [B, H, rows, words]; at_bounds float32 [B, H, 2]. Grid: (B * H,).
    """
    batch_head = tl.program_id(0).to(tl.int64)
    own_offsets = q_offsets + batch_head * (rows + 1)
    chose = tl.zeros([ROWS], tl.int32)
    up = tl.zeros([ROWS], tl.int32)
    down = tl.zeros([ROWS], tl.int32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        start = tl.load(own_offsets + row, mask=row < rows, other=0)
        size = tl.load(own_offsets + row + 1, mask=row < rows, other=0) - start
        flags = tl.load(held + batch_head * rows + row, mask=row < rows, other=0)
        chose += tl.where(flags & CHOSE != 0, size, 0)
        up += tl.where(flags & HELD_UP != 0, size, 0)
        down += tl.where(flags & HELD_DOWN != 0, size, 0)
    tokens = tl.maximum(tl.sum(chose, 0), 1).to(tl.float64)
    held_up = (tl.sum(up, 0).to(tl.float64) / tokens).to(tl.float32)
    held_down = (tl.sum(down, 0).to(tl.float64) / tokens).to(tl.float32)
    tl.store(at_bounds + batch_head * 2, held_up)
    tl.store(at_bounds + batch_head * 2 + 1, held_down)
    if held_down > UNREACHED:
        key_head = batch_head // heads * (heads // shared) + batch_head % heads // shared
        lane = tl.arange(0, LANES)
        key_offsets = k_offsets + key_head * (groups + 1) + lane
        start = tl.load(key_offsets, mask=lane < groups - 1, other=0)
        stop = tl.load(key_offsets + 1, mask=lane < groups - 1, other=0)
        everything = packed(stop > start, LANES)[None, :]  # without padding
        word = tl.arange(0, LANES // 32)[None, :]
        words = tl.cdiv(groups, 32)
        last = rows if PADDED_ATTEND else rows - 1
        for first in range(0, rows, ROWS_WRITTEN):
            row = first + tl.arange(0, ROWS_WRITTEN)
            q_start = tl.load(own_offsets + row, mask=row < last, other=0)
            q_stop = tl.load(own_offsets + row + 1, mask=row < last, other=0)
            place = keep + (batch_head * rows + row)[:, None] * words + word  # [ROWS_WRITTEN, LANES / 32]
            tl.store(place, everything, mask=(q_stop > q_start)[:, None] & (word < words))
