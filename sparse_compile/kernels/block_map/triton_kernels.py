"""Keep bitmaps without a sort: the prefix of an order is found by halving the range of what it is ordered by.

A row of G groups lies in the registers of one program, in LANES lanes. Its groups are ordered by an unsigned integer,
the *key*, largest first; groups that cannot be chosen have key 0. What is kept is a prefix of that order. Its end is
the least t for which the groups with a key above t still weigh little enough: one bit of t at a time, each by a masked
sum over the row. Among the groups whose key is t itself the lower index comes first.

The sums of a row always add in the same tree, in which a part of the row never sums to more than the whole: so that
halving is exact although sums are rounded, and what is kept is always a prefix.
"""

import triton
import triton.language as tl


@triton.jit
def sortable(x):
    """Unsigned integers in the order of floats, of their width: float32 or float64. -0.0 is 0.0."""
    x = tl.where(x == 0, 0.0, x)
    if x.dtype == tl.float64:
        wide = x.to(tl.int64, bitcast=True)
        key = (wide ^ ((wide >> 63) | -0x8000000000000000)).to(tl.uint64, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True)
        key = (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)
    return key


@triton.jit
def mixed(state, counter):
    """One step of `hash_counters` in kernels/kmeans/counter_hash.py: a counter joins the state, both uint32."""
    word = state ^ (counter + 0x9E3779B9)
    word = ((word >> 16) ^ word) * 0x45D9F3B
    word = ((word >> 16) ^ word) * 0x45D9F3B
    return (word >> 16) ^ word


@triton.jit
def hashed(seed_low, seed_high, head, row, lane):
    """``hash_counters(seed, head, row, column)`` for the columns in ``lane``: uint32 of its shape."""
    state = mixed(tl.full([], 0, tl.uint32), seed_low.to(tl.uint32))
    state = mixed(state, seed_high.to(tl.uint32))
    state = mixed(state, head.to(tl.uint32))
    state = mixed(state, row.to(tl.uint32))
    return mixed(state, lane.to(tl.uint32))


@triton.jit
def prefix_end(key, weight, bound, number, COUNTED: tl.constexpr):
    """The least t for which groups with a key above t weigh at most ``bound``, or, if COUNTED, are under ``number``.

    NaN is never too much: with it the end is 0, and everything has a key above that.

    Shapes: key unsigned [LANES], weight [LANES].
    """
    found = tl.full([], 0, key.dtype)
    below = ~found >> 1
    bit = below + 1
    for _ in range(key.dtype.primitive_bitwidth):
        above = key > (found | below)  # were this bit 0
        too_much = tl.sum(tl.where(above, weight, 0), 0) > bound
        if COUNTED:
            too_much = too_much & (tl.sum(above.to(tl.int32), 0) >= number)
        found = tl.where(too_much, found | bit, found)
        bit, below = bit >> 1, below >> 1
    return found


@triton.jit
def prefix_ends(key, numbers):
    """The least t for which fewer groups than each of ``numbers`` have a key above t, all found side by side.

    Shapes: key unsigned [LANES], numbers int32 [N]. Returns: as ``key`` [N].
    """
    found = tl.zeros_like(numbers).to(key.dtype)
    below = ~tl.full([], 0, key.dtype) >> 1
    bit = below + 1
    for _ in range(key.dtype.primitive_bitwidth):
        above = tl.sum((key[None, :] > (found | below)[:, None]).to(tl.int32), 1)  # [N]
        found = tl.where(above >= numbers, found | bit, found)
        bit, below = bit >> 1, below >> 1
    return found


@triton.jit
def prefix(key, eligible, weight, end, bound, number, COUNTED: tl.constexpr, HALF: tl.constexpr):
    """Keep groups, largest key first, while what comes before each weighs at most ``bound``: bool [LANES].

    With HALF half of its own weight counts, too (weights are then even). With HALF or COUNTED the first ``number`` are
    kept whatever they weigh. Ties: lower lane first.

    Shapes: key unsigned [LANES], 0 unless ``eligible``; weight int32 or float32 [LANES], 0 unless ``eligible``; end,
        bound and number scalars, ``end`` from `prefix_end` or `prefix_ends` for the same.
    """
    above = key > end
    tied = eligible & (key == end)
    one = tied.to(tl.int32)
    place = tl.cumsum(one, 0) - one
    own = tl.where(tied, weight, 0)
    before = tl.sum(tl.where(above, weight, 0), 0) + (tl.cumsum(own, 0) - own)
    if HALF:
        before += own // 2
    enough = before <= bound
    if COUNTED or HALF:
        enough = enough | (tl.sum(above.to(tl.int32), 0) + place < number)
    # A count, so that rounding cannot tear a hole into the tie.
    return above | (tied & (place < tl.sum((tied & enough).to(tl.int32), 0)))


@triton.jit
def packed(kept, LANES: tl.constexpr):
    """Bits to words, lowest lane in the lowest bit: bool [LANES] to int32 [LANES / 32]."""
    bits = kept.to(tl.int32) << (tl.arange(0, LANES) % 32)
    return tl.sum(tl.reshape(bits, [LANES // 32, 32]), 1)


@triton.jit
def completed(kept, valid, text, whole, row_size, is_padding, PADDED_ATTEND: tl.constexpr):
    """`complete_rows` of completion.py for one row: text and whole rows, padding, and groups without tokens.

    Shapes: kept, valid (key groups with tokens, without padding) and text bool [LANES]; whole, whether the row keeps
    all that is valid, row_size and is_padding scalars. A row of padding is whole.
    """
    alive = row_size > 0
    if not PADDED_ATTEND:
        alive = alive & (is_padding == 0)
    return valid & alive & (kept | text | whole | is_padding)


@triton.jit(do_not_specialize=["queries", "keys"])
def score_tile(
    q,
    k,
    scores,
    q_batch,
    q_head,
    q_row,
    q_column,
    k_batch,
    k_head,
    k_row,
    k_column,
    heads,
    shared,
    queries,
    keys,
    scale,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Products scale * q.k of a tile of means: one program for BLOCK_Q queries and BLOCK_K keys of one head.

    Source: docs/svg2.md, section 6. Products and sums in float32, always in the order of D.
    Shapes: q float32 [B, H, queries, D], k float32 [B, H / shared, keys, D], any strides; scores float32
        [B, H, queries, keys]. Grid: (B * H * ceil(queries / BLOCK_Q), ceil(keys / BLOCK_K)).
    """
    tiles = tl.cdiv(queries, BLOCK_Q)
    batch_head = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    rows = (tl.program_id(0) % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)
    columns = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    q_rows = q + batch * q_batch + head * q_head + rows[:, None] * q_row
    k_rows = k + batch * k_batch + head // shared * k_head + columns[:, None] * k_row
    products = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for start in range(0, D, BLOCK_D):
        place = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        q_mask = (rows[:, None] < queries) & (place[None, :] < D)
        k_mask = (columns[:, None] < keys) & (place[None, :] < D)
        left = tl.load(q_rows + place[None, :] * q_column, mask=q_mask, other=0.0)  # [BLOCK_Q, BLOCK_D]
        right = tl.load(k_rows + place[None, :] * k_column, mask=k_mask, other=0.0)  # [BLOCK_K, BLOCK_D]
        products = tl.dot(left, tl.trans(right), products, input_precision="ieee")
    out = scores + (batch_head * queries + rows[:, None]) * keys + columns[None, :]
    tl.store(out, products * scale, mask=(rows[:, None] < queries) & (columns[None, :] < keys))


@triton.jit(do_not_specialize=["queries", "keys", "minimum", "seed_low", "seed_high"])
def keep_top_p(
    scores,
    log_sizes,
    q_offsets,
    k_offsets,
    bounds,
    ready,
    keep,
    heads,
    shared,
    queries,
    keys,
    top_p,
    minimum,
    seed_low,
    seed_high,
    RULE: tl.constexpr,
    RANK_BY: tl.constexpr,
    SCORED: tl.constexpr,
    COUNTED: tl.constexpr,
    PADDED_ATTEND: tl.constexpr,
    LANES: tl.constexpr,
):
    """One row of the keep bitmap of SVG2: one program for a query group, its G = keys + 2 key groups in LANES lanes.

    The last group of either side is padding, the one before it text.
    Source: docs/svg2.md, sections 4, 6 and 7; SVG2 (arXiv 2505.18875). RULE is ``top_p``, ``density`` or ``all``.
    Shapes: scores float32 [B, H, queries, keys], read if SCORED; log_sizes float32 [B, Hkv, keys]; q_offsets int32
        [B, H, queries + 3]; k_offsets int32 [B, Hkv, keys + 3]; bounds int32 [B, Hkv], with ``density``: the most that
        twice the keys before a cluster and its own may be; ready int32 [1]; keep int32 [B, H, queries + 2, words].
        Grid: (B * H * (queries + 2),).
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
    chosen = cluster
    if RULE != "all":  # decided when the kernel is compiled, unlike the next
        if (row < queries) & (row_size > 0) & (whole == 0):  # text, padding and empty groups have nothing to choose
            score = tl.zeros([LANES], tl.float32)
            rank = score
            if SCORED:
                own_scores = scores + (batch_head * queries + row) * keys
                score = tl.load(own_scores + lane, mask=lane < keys, other=0.0)  # [LANES]
                rank = score + tl.load(log_sizes + key_head * keys + lane, mask=lane < keys, other=0.0)
            if RULE == "density":
                weight = tl.where(cluster, 2 * size, 0)
                bound = tl.load(bounds + key_head)
            else:
                peak = tl.max(tl.where(cluster, rank, float("-inf")), 0)
                # The size as a factor and not by its logarithm, which would be rounded on the scale of the scores.
                weight = tl.where(cluster, size.to(tl.float32) * tl.exp(score - peak), 0.0)
                bound = top_p * tl.sum(weight, 0)
            if RANK_BY == "mass":
                key = sortable(rank)
            elif RANK_BY == "mass_per_key":
                key = sortable(score)
            else:
                key = hashed(seed_low, seed_high, batch_head % heads, row, lane)
            key = tl.where(cluster, key, 0).to(tl.uint32)
            end = prefix_end(key, weight, bound, minimum, COUNTED)
            chosen = prefix(key, cluster, weight, end, bound, minimum, COUNTED, RULE == "density")
    kept = completed(chosen, valid, lane == keys, whole, row_size, row == rows - 1, PADDED_ATTEND)
    word = tl.arange(0, LANES // 32)
    words = tl.cdiv(keys + 2, 32)
    tl.store(keep + (batch_head * rows + row) * words + word, packed(kept, LANES), mask=word < words)


@triton.jit(do_not_specialize=["rows", "groups", "seed_low", "seed_high"])
def keep_top_k(
    mass,
    q_offsets,
    q_is_video,
    k_offsets,
    k_is_video,
    budgets,
    maps,
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
    LEVELS: tl.constexpr,
    LEVEL_LANES: tl.constexpr,
    LANES: tl.constexpr,
):
    """The blocks of one row with the most mass, at each of LEVELS budgets: a program for a row, in LANES lanes.

    Source: AdaSpa (arXiv 2502.21079), equations 12 and 13; docs/adaspa.md, section 5. Mass that is not finite counts
    as 0. By ``mass_per_key`` blocks are ordered in float64, in which the quotients of a float32 and of a size up to
    2**28 differ wherever they differ at all.
    Shapes: mass float32 [B, H, rows, groups], any strides; q_offsets int32 [B, rows + 1]; q_is_video bool [rows];
        k_offsets int32 [B, groups + 1]; k_is_video bool [groups]; budgets int32 [B, LEVELS]; maps int32
        [B, H, LEVELS, rows, words]; kept_mass float64 [B, H, LEVELS, rows] and all_mass float64 [B, H, rows], sums over
        the groups with tokens. Grid: (B * H * rows,).
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
    finite = tl.where(tl.abs(raw) < float("inf"), raw, 0.0)
    held = tl.where(valid, finite, 0.0)
    tl.store(all_mass + batch_head * rows + row, tl.sum(held.to(tl.float64), 0))
    q_start = tl.load(q_offsets + batch * (rows + 1) + row)
    row_size = tl.load(q_offsets + batch * (rows + 1) + row + 1) - q_start
    whole = tl.load(q_is_video + row) == 0
    if RANK_BY == "mass":
        key = tl.where(candidate, sortable(finite), 0).to(tl.uint32)
    elif RANK_BY == "mass_per_key":
        per_key = finite.to(tl.float64) / tl.where(valid, size, 1).to(tl.float64)
        key = tl.where(candidate, sortable(per_key), 0).to(tl.uint64)
    else:
        key = tl.where(candidate, hashed(seed_low, seed_high, head, row, lane), 0).to(tl.uint32)
    word = tl.arange(0, LANES // 32)
    words = tl.cdiv(groups, 32)
    level_lane = tl.arange(0, LEVEL_LANES)
    every = tl.load(budgets + batch * LEVELS + level_lane, mask=level_lane < LEVELS, other=0)
    choosing = (row_size > 0) & (whole == 0)  # text, padding and empty groups have nothing to choose
    ends = tl.zeros([LEVEL_LANES], key.dtype)
    if choosing:
        ends = prefix_ends(key, every)
    for level in range(LEVELS):
        chosen = candidate
        if choosing:
            end = tl.sum(tl.where(level_lane == level, ends, 0), 0).to(key.dtype)
            budget = tl.load(budgets + batch * LEVELS + level)
            chosen = prefix(key, candidate, candidate.to(tl.int32), end, budget - 1, 0, False, False)
        kept = completed(chosen, valid, video == 0, whole, row_size, row == rows - 1, PADDED_ATTEND)
        place = (batch_head * LEVELS + level) * rows + row
        tl.store(maps + place * words + word, packed(kept, LANES), mask=word < words)
        tl.store(kept_mass + place, tl.sum(tl.where(kept, held, 0.0).to(tl.float64), 0))


@triton.jit(do_not_specialize=["rows"])
def head_recall(
    kept_mass, all_mass, q_offsets, q_is_video, recall, heads, rows, LEVELS: tl.constexpr, BLOCK: tl.constexpr
):
    """The share of its mass that a video row keeps, mean over the tokens: one program for a head and a budget.

    Source: docs/adaspa.md, section 6. Every row is divided by its own sum; rows without mass do not count, and without
    any that does the share is 1. Sums in float64, in one order whatever the batch.
    Shapes: kept_mass float64 [B, H, LEVELS, rows]; all_mass float64 [B, H, rows]; q_offsets int32 [B, rows + 1];
        q_is_video bool [rows]; recall float64 [B, H, LEVELS]. Grid: (B * H * LEVELS,).
    """
    program = tl.program_id(0).to(tl.int64)
    batch_head = program // LEVELS
    own_offsets = q_offsets + batch_head // heads * (rows + 1)
    kept = tl.zeros([BLOCK], tl.float64)
    tokens = tl.zeros([BLOCK], tl.float64)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        inside = row < rows - 1  # without padding
        video = tl.load(q_is_video + row, mask=inside, other=0) != 0
        start = tl.load(own_offsets + row, mask=inside, other=0)
        size = (tl.load(own_offsets + row + 1, mask=inside, other=0) - start).to(tl.float64)
        total = tl.load(all_mass + batch_head * rows + row, mask=inside, other=0.0)
        part = tl.load(kept_mass + program * rows + row, mask=inside, other=0.0)
        counts = video & (total > 0)
        tokens += tl.where(counts, size, 0.0)
        kept += tl.where(counts, part / tl.where(counts, total, 1.0) * size, 0.0)
    weight = tl.sum(tokens, 0)
    share = tl.minimum(tl.sum(kept, 0) / tl.where(weight > 0, weight, 1.0), 1.0)
    tl.store(recall + program, tl.where(weight > 0, share, 1.0))
