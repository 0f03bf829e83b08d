"""Kept mass on probe rows in Triton: where the rows lie, their softmax sums, and the mean of their shares."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens", "rows", "order_stride_h"])
def positions_of_tokens(
    order, token, position, tokens, rows, order_stride_h, BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr
):
    """Find tokens in BLOCK positions of the grouped order of one (batch item, head).

    order int32 [B, H, tokens], a permutation; token int64 [B, H, rows], with or without repetitions. Writes position
    int32 [B, H, rows]: each is found by exactly one program. Grid: B * H * ceil(tokens / BLOCK).
    """
    blocks = tl.cdiv(tokens, BLOCK)
    program = tl.program_id(0)
    head = (program // blocks).to(tl.int64)
    place = program % blocks * BLOCK + tl.arange(0, BLOCK)
    there = tl.load(order + head * order_stride_h + place, mask=place < tokens, other=-1)
    for first in tl.range(0, rows, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        wanted = tl.load(token + head * rows + row, mask=row < rows, other=-2).to(tl.int32)
        found = tl.max(tl.where(wanted[:, None] == there[None, :], place[None, :], -1), 1)  # [BLOCK_ROWS]
        tl.store(position + head * rows + row, found, mask=found >= 0)


@triton.jit(
    do_not_specialize=[
        "tokens",
        "rows",
        "heads",
        "key_heads",
        "q_groups",
        "key_groups",
        "words",
        "splits",
        "split_tokens",
        "order_stride_h",
    ]
)
def partial_masses(
    q,
    k,
    token,
    q_group,
    k_order,
    k_group,
    keep,
    partials,
    scale_log2e,
    tokens,
    rows,
    heads,
    key_heads,
    q_groups,
    key_groups,
    words,
    splits,
    split_tokens,
    q_stride_b,
    q_stride_h,
    q_stride_s,
    q_stride_d,
    k_stride_b,
    k_stride_h,
    k_stride_s,
    k_stride_d,
    order_stride_h,
    HAS_ORDER: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Softmax sums of BLOCK_ROWS probe rows of one head over one split of the key positions.

    q [B, heads, Sq, D], k [B, key_heads, tokens, D] with strides; token int64 and q_group int32 [B, heads, rows], what
    the probe rows are and their query groups; k_order int32 [B, key_heads, tokens] unless in place; k_group int32
    [B, key_heads, tokens], by position; keep int32 [B, heads, q_groups, words]. Writes partials float32
    [B, heads, splits, 3, rows]: the largest logit in base 2 over the valid keys, and relative to it the sums over the
    valid and over the kept keys. Grid: B * heads * splits * ceil(rows / BLOCK_ROWS); programs that read the same keys
    are neighbours.

    Source: docs/adaspa.md, section 13; online softmax as in FlashAttention-2 (arXiv 2307.08691).
    """
    tiles = tl.cdiv(rows, BLOCK_ROWS)
    shared = heads // key_heads
    program = tl.program_id(0)
    tile = program % tiles
    program //= tiles
    of_key_head = program % shared
    program //= shared
    split = program % splits
    key_head = (program // splits).to(tl.int64)  # of all batch items
    batch = key_head // key_heads
    head = key_head % key_heads * shared + of_key_head
    q += batch * q_stride_b + head * q_stride_h
    k += batch * k_stride_b + key_head % key_heads * k_stride_h
    head += batch * heads  # of all batch items from here on
    k_order += key_head * order_stride_h
    k_group += key_head * tokens
    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    lane = tl.arange(0, D_PAD)
    query = tl.load(token + head * rows + row, mask=row < rows, other=0)
    query = tl.load(  # [BLOCK_ROWS, D_PAD]
        q + query[:, None] * q_stride_s + lane[None, :] * q_stride_d,
        mask=(row < rows)[:, None] & (lane < D)[None, :],
        other=0.0,
    )
    group = tl.load(q_group + head * rows + row, mask=row < rows, other=0)
    keep += head * q_groups * words
    words_of_row = group * words  # [BLOCK_ROWS]
    peak = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    kept = tl.zeros([BLOCK_ROWS], tl.float32)
    start = split * split_tokens
    stop = tl.minimum(start + split_tokens, tokens)
    for first in tl.range(start, stop, BLOCK_KEYS):
        position = first + tl.arange(0, BLOCK_KEYS)
        key_group = tl.load(k_group + position, mask=position < stop, other=key_groups - 1)
        valid = key_group < key_groups - 1  # the last group is padding, whose keys are not read
        key_token = position.to(tl.int64)
        if HAS_ORDER:
            key_token = tl.load(k_order + position, mask=valid, other=0).to(tl.int64)
        key = tl.load(  # [D_PAD, BLOCK_KEYS]
            k + key_token[None, :] * k_stride_s + lane[:, None] * k_stride_d,
            mask=valid[None, :] & (lane < D)[:, None],
            other=0.0,
        )
        logits = tl.dot(query, key, input_precision=PRECISION) * scale_log2e  # [BLOCK_ROWS, BLOCK_KEYS]
        logits = tl.where(valid[None, :], logits, -float("inf"))
        word = tl.load(keep + (words_of_row[:, None] + (key_group // 32)[None, :]), mask=valid[None, :], other=0)
        largest = tl.maximum(peak, tl.max(logits, 1))
        # Where no logit is finite yet, -inf minus -inf would be NaN. A row with NaN or +inf has NaN sums from here on.
        shift = tl.where(largest == -float("inf"), 0.0, largest)
        weights = tl.exp2(logits - shift[:, None])
        rescale = tl.exp2(peak - shift)
        total = total * rescale + tl.sum(weights, 1)
        is_kept = ((word >> (key_group % 32)[None, :]) & 1) != 0
        kept = kept * rescale + tl.sum(tl.where(is_kept, weights, 0.0), 1)
        peak = largest
    place = partials + (head * splits + split) * 3 * rows + row
    tl.store(place, peak, mask=row < rows)
    tl.store(place + rows, total, mask=row < rows)
    tl.store(place + 2 * rows, kept, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "splits"])
def mean_of_shares(partials, occupied, measured, rows, splits, BLOCK_ROWS: tl.constexpr, BLOCK_SPLITS: tl.constexpr):
    """Mean over the probe rows of one (batch item, head) of the share of their softmax sum that is kept.

    partials float32 [B, H, splits, 3, rows] as of `partial_masses`; occupied uint8 [B, H, rows], which rows there are.
    Writes measured float32 [B, H]; NaN where no row counts. Rows whose sum is not finite or 0 do not count. Splits are
    merged in their order. Grid: B * H.
    """
    head = tl.program_id(0).to(tl.int64)
    shares = tl.zeros([BLOCK_ROWS], tl.float64)
    number = tl.zeros([BLOCK_ROWS], tl.int32)
    for first in tl.range(0, rows, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        peak = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_ROWS], tl.float32)
        kept = tl.zeros([BLOCK_ROWS], tl.float32)
        for first_split in tl.range(0, splits, BLOCK_SPLITS):
            split = first_split + tl.arange(0, BLOCK_SPLITS)
            loaded = (split < splits)[:, None] & (row < rows)[None, :]
            place = partials + (head * splits + split)[:, None] * 3 * rows + row[None, :]  # [BLOCK_SPLITS, BLOCK_ROWS]
            peaks = tl.load(place, mask=loaded, other=-float("inf"))
            largest = tl.maximum(peak, tl.max(peaks, 0))
            shift = tl.where(largest == -float("inf"), 0.0, largest)
            weights = tl.exp2(peaks - shift[None, :])
            rescale = tl.exp2(peak - shift)
            total = total * rescale + tl.sum(tl.load(place + rows, mask=loaded, other=0.0) * weights, 0)
            kept = kept * rescale + tl.sum(tl.load(place + 2 * rows, mask=loaded, other=0.0) * weights, 0)
            peak = largest
        share = kept / total  # NaN where a sum is NaN or without any key
        counted = (tl.load(occupied + head * rows + row, mask=row < rows, other=0) != 0) & (share == share)
        shares += tl.where(counted, tl.where(share > 1.0, 1.0, share), 0.0).to(tl.float64)
        number += counted.to(tl.int32)
    count = tl.sum(number, 0)
    mean = tl.sum(shares, 0) / tl.maximum(count, 1).to(tl.float64)
    tl.store(measured + head, tl.where(count > 0, mean.to(tl.float32), float("nan")))
