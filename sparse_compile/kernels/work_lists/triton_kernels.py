"""Expansion of a Plan's bitmap on the device (docs/kernels.md, "Work lists").

A **row** is one query group of one (batch item, head). A **piece** is a range of at most ``PIECE`` neighbouring keys of
the grouped order, packed into an int32 as start * 256 + length. Kept groups that touch make one run, which is cut into
pieces from its start; so only the last piece of a run is short.
"""

import triton
import triton.language as tl


@triton.jit
def _later(left, right):
    return tl.maximum(left, right)


@triton.jit
def _kept(words, offsets, group, groups):
    """Whether groups are kept or have no keys. The last one, padding, is neither."""
    inside = (group >= 0) & (group < groups - 1)
    word = tl.load(words + group // 32, mask=inside, other=0)
    start = tl.load(offsets + group, mask=inside, other=0)
    stop = tl.load(offsets + group + 1, mask=inside, other=1)
    bit = group & 31  # not a remainder: that of -1 is -1 on a GPU, and nothing is defined that is shifted by that
    return inside & ((((word >> bit) & 1) != 0) | (start == stop)), start, stop


@triton.jit
def _owned_pieces(words, offsets, group, groups, run_start, PIECE: tl.constexpr):
    """The pieces that end in each group: how many whole ones, the first of them, the length of a short one.

    A group without keys joins runs but owns at most their end. ``run_start``: that of the group before the first.
    """
    kept, start, stop = _kept(words, offsets, group, groups)
    before, _, _ = _kept(words, offsets, group - 1, groups)
    after, _, _ = _kept(words, offsets, group + 1, groups)
    began = tl.where(kept & (before == 0), start, -1)
    began = tl.maximum(tl.associative_scan(began, 0, _later), run_start)  # starts ascend: the latest is the run's
    first = (start - began) // PIECE
    whole = tl.where(kept, (stop - began) // PIECE - first, 0)
    short = tl.where(kept & (after == 0), (stop - began) % PIECE, 0)
    return began, first, whole, short, tl.where(kept, stop - start, 0)


@triton.jit
def _store_skipped(words, offsets, skipped, base, rows_of_head, row, groups, words_of_row, GROUPS: tl.constexpr):
    """Bits of the groups from ``base`` that a row could have kept and does not; none for the last row, padding."""
    kept, _, _ = _kept(words, offsets, base + tl.arange(0, GROUPS), groups)  # groups without keys count as kept
    inside = base + tl.arange(0, GROUPS) < groups - 1
    passed = inside & (kept == 0) & (row % rows_of_head != rows_of_head - 1)
    shifted = passed.to(tl.int32) << (tl.arange(0, GROUPS) % 32)
    packed = tl.sum(tl.reshape(shifted, [GROUPS // 32, 32]), 1)
    word = base // 32 + tl.arange(0, GROUPS // 32)
    tl.store(skipped + word, packed, mask=word < words_of_row)


@triton.jit(do_not_specialize=["rows_of_head", "groups", "words_of_row", "shared", "capacity"])
def expand_rows(
    keep,
    k_offsets,
    pieces,
    counts,
    kept_keys,
    skipped,
    rows_of_head,
    groups,
    words_of_row,
    shared,
    capacity,
    PIECE: tl.constexpr,
    PER_CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """List the pieces of one row: whole ones first, then short ones, then empty ones up to a multiple of PER_CHUNK.

    keep int32 [rows, words_of_row]; k_offsets int32 [key heads, groups + 1]; pieces int32 [rows, capacity]; counts
    int32 [rows, 2]: whole pieces, and all that are not empty; kept_keys int32 [rows]; skipped int32 [rows,
    words_of_row]: bits of the groups that hold keys, are no padding and are not kept.
    """
    row = tl.program_id(0).to(tl.int64)
    words = keep + row * words_of_row
    offsets = k_offsets + (row // rows_of_head // shared) * (groups + 1)
    lane = tl.arange(0, GROUPS)

    run_start, wholes, shorts, keys = -1, 0, 0, 0
    for base in tl.range(0, groups, GROUPS):
        began, _, whole, short, size = _owned_pieces(words, offsets, base + lane, groups, run_start, PIECE)
        run_start = tl.max(began, 0)
        wholes += tl.sum(whole, 0)
        shorts += tl.sum((short > 0).to(tl.int32), 0)
        keys += tl.sum(size, 0)
        _store_skipped(
            words, offsets, skipped + row * words_of_row, base, rows_of_head, row, groups, words_of_row, GROUPS
        )
    tl.store(counts + row * 2, wholes)
    tl.store(counts + row * 2 + 1, wholes + shorts)
    tl.store(kept_keys + row, keys)

    own = pieces + row * capacity
    run_start, at_whole, at_short = -1, 0, wholes
    for base in tl.range(0, groups, GROUPS):
        began, first, whole, short, _ = _owned_pieces(words, offsets, base + lane, groups, run_start, PIECE)
        run_start = tl.max(began, 0)
        place = at_whole + tl.cumsum(whole, 0) - whole
        for index in tl.range(0, tl.max(whole, 0)):
            start = began + (first + index) * PIECE
            tl.store(own + place + index, start * 256 + PIECE, mask=index < whole)
        has_short = (short > 0).to(tl.int32)
        place_short = at_short + tl.cumsum(has_short, 0) - has_short
        tl.store(own + place_short, (began + (first + whole) * PIECE) * 256 + short, mask=short > 0)
        at_whole += tl.sum(whole, 0)
        at_short += tl.sum(has_short, 0)
    filler = tl.arange(0, PER_CHUNK)
    total = wholes + shorts
    tl.store(
        own + total + filler, tl.zeros([PER_CHUNK], tl.int32), mask=filler < (PER_CHUNK - total % PER_CHUNK) % PER_CHUNK
    )


@triton.jit(do_not_specialize=["rows_of_head"])
def write_tiles(
    row_order, first_tile, starts, sizes, tiles, rows_of_head, BLOCK_Q: tl.constexpr, AT_ONCE: tl.constexpr
):
    """Cut some neighbouring queries of one row into tiles of nearly equal length, at most BLOCK_Q.

    row_order int32 or int64 [heads, rows_of_head]: the row of each rank in its head; first_tile [heads * rows_of_head]:
    where the tiles of a rank begin; starts and sizes int32 [heads, rows_of_head]: the queries of each row, in the
    grouped order; tiles int32 [n, 4]: row, first query, number of queries, 0.
    """
    rank = tl.program_id(0).to(tl.int64)
    head = rank // rows_of_head
    row = tl.load(row_order + rank)
    start = tl.load(starts + head * rows_of_head + row)
    size = tl.load(sizes + head * rows_of_head + row)
    number = (size + BLOCK_Q - 1) // BLOCK_Q
    length = (size + number - 1) // tl.maximum(number, 1)
    first = tl.load(first_tile + rank).to(tl.int64)
    for base in tl.range(0, number, AT_ONCE):
        index = base + tl.arange(0, AT_ONCE)
        mine = index < number
        tile = tiles + (first + index) * 4
        tl.store(tile, (head * rows_of_head + row).to(tl.int32) + tl.zeros([AT_ONCE], tl.int32), mask=mine)
        tl.store(tile + 1, start + index * length, mask=mine)
        tl.store(tile + 2, tl.minimum(length, size - index * length), mask=mine)
        tl.store(tile + 3, tl.zeros([AT_ONCE], tl.int32), mask=mine)
