"""Pooled keys in Triton: means of groups of keys and values, and their coupling (docs/correction.md)."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["groups", "heads", "order_stride_h"])
def group_means(
    k,
    v,
    order,
    offsets,
    mean_k,
    mean_v,
    log_size,
    groups,
    heads,
    k_stride_b,
    k_stride_h,
    k_stride_s,
    k_stride_d,
    v_stride_b,
    v_stride_h,
    v_stride_s,
    v_stride_d,
    order_stride_h,
    HAS_ORDER: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Mean key, mean value and log size of one group of one (batch item, key head).

    k [B, H, S, D], v [B, H, S, DV] with strides; order int32 [B, H, S] (tokens contiguous) unless in place; offsets
    int32 [B, H, groups + 1]. Writes mean_k [B, H, groups, D], mean_v [B, H, groups, DV], log_size [B, H, groups], all
    contiguous float32. Grid: B * H * groups.

    Source: SVG-EAR (arXiv 2603.08982). Rows are added in float32, BLOCK_ROWS at a time, and these sums in float64, so
    that a mean of any number of keys is good to some float32 roundings.
    """
    program = tl.program_id(0)
    group = program % groups
    head = (program // groups).to(tl.int64)  # of all batch items
    bound = offsets + head * (groups + 1) + group
    start = tl.load(bound)
    stop = tl.load(bound + 1)
    stop = tl.where(group == groups - 1, start, stop)  # the last group is padding: not read, a size of 0
    k += (head // heads) * k_stride_b + (head % heads) * k_stride_h
    v += (head // heads) * v_stride_b + (head % heads) * v_stride_h
    order += head * order_stride_h
    row = tl.arange(0, BLOCK_ROWS)
    lane_k = tl.arange(0, D_PAD)
    lane_v = tl.arange(0, DV_PAD)
    sum_k = tl.zeros([D_PAD], tl.float64)
    sum_v = tl.zeros([DV_PAD], tl.float64)
    for first in tl.range(start, stop, BLOCK_ROWS):
        position = first + row
        own = position < stop
        token = position.to(tl.int64)
        if HAS_ORDER:
            token = tl.load(order + position, mask=own, other=0).to(tl.int64)
        part_k = tl.load(  # [BLOCK_ROWS, D_PAD]
            k + token[:, None] * k_stride_s + lane_k[None, :] * k_stride_d,
            mask=own[:, None] & (lane_k < D)[None, :],
            other=0.0,
        ).to(tl.float32)
        part_v = tl.load(  # [BLOCK_ROWS, DV_PAD]
            v + token[:, None] * v_stride_s + lane_v[None, :] * v_stride_d,
            mask=own[:, None] & (lane_v < DV)[None, :],
            other=0.0,
        ).to(tl.float32)
        sum_k += tl.sum(part_k, 0).to(tl.float64)
        sum_v += tl.sum(part_v, 0).to(tl.float64)
    count = stop - start
    divisor = tl.maximum(count, 1).to(tl.float64)
    place = head * groups + group
    tl.store(mean_k + place * D + lane_k, (sum_k / divisor).to(tl.float32), mask=lane_k < D)
    tl.store(mean_v + place * DV + lane_v, (sum_v / divisor).to(tl.float32), mask=lane_v < DV)
    tl.store(log_size + place, tl.where(count > 0, tl.log(tl.maximum(count, 1).to(tl.float32)), -float("inf")))


@triton.jit(do_not_specialize=["tokens", "groups", "heads", "chunks", "chunk_tokens", "order_stride_h"])
def partial_coupling(
    k,
    v,
    order,
    group_at,
    video,
    mean_k,
    mean_v,
    partials,
    counts,
    tokens,
    groups,
    heads,
    chunks,
    chunk_tokens,
    k_stride_b,
    k_stride_h,
    k_stride_s,
    k_stride_d,
    v_stride_b,
    v_stride_h,
    v_stride_s,
    v_stride_d,
    order_stride_h,
    HAS_ORDER: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Sum of (k - mean)^T (v - mean) over the visual keys of one chunk of positions: one piece of the matrix.

    k [B, H, S, D], v [B, H, S, DV] with strides; order int32 [B, H, S] unless in place; group_at int32 [B, H, S], by
    position; video bool [S], by token; means as of `group_means`. Writes partials float32 [B, H, chunks, D, DV] and
    counts int32 [B, H, chunks], how many keys were added. Grid: B * H * chunks * pieces of the matrix.

    Source: docs/correction.md. Differences come before the product, in float32: a sum of products minus a product of
    sums would cancel.
    """
    PIECES_V: tl.constexpr = (DV + BLOCK_DV - 1) // BLOCK_DV
    PIECES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D * PIECES_V
    program = tl.program_id(0)
    piece = program % PIECES
    part = (program // PIECES).to(tl.int64)  # of the chunks of all heads
    head = part // chunks
    chunk = part % chunks
    start = (chunk * chunk_tokens).to(tl.int32)
    stop = tl.minimum(start + chunk_tokens, tokens)
    k += (head // heads) * k_stride_b + (head % heads) * k_stride_h
    v += (head // heads) * v_stride_b + (head % heads) * v_stride_h
    order += head * order_stride_h
    group_at += head * tokens
    mean_k += head * groups * D
    mean_v += head * groups * DV
    row = tl.arange(0, BLOCK_ROWS)
    lane_k = piece // PIECES_V * BLOCK_D + tl.arange(0, BLOCK_D)
    lane_v = piece % PIECES_V * BLOCK_DV + tl.arange(0, BLOCK_DV)
    total = tl.zeros([BLOCK_D, BLOCK_DV], tl.float32)
    number = tl.zeros([BLOCK_ROWS], tl.int32)
    for first in tl.range(start, stop, BLOCK_ROWS):
        position = first + row
        group = tl.load(group_at + position, mask=position < stop, other=groups - 1).to(tl.int64)
        counted = group < groups - 1  # the last group is padding
        token = position.to(tl.int64)
        if HAS_ORDER:
            token = tl.load(order + position, mask=counted, other=0).to(tl.int64)
        counted = counted & (tl.load(video + token, mask=counted, other=0) != 0)
        number += counted.to(tl.int32)
        loaded = counted[:, None] & (lane_k < D)[None, :]
        deviation_k = tl.load(  # [BLOCK_ROWS, BLOCK_D]
            k + token[:, None] * k_stride_s + lane_k[None, :] * k_stride_d, mask=loaded, other=0.0
        ).to(tl.float32) - tl.load(mean_k + group[:, None] * D + lane_k[None, :], mask=loaded, other=0.0)
        loaded = counted[:, None] & (lane_v < DV)[None, :]
        deviation_v = tl.load(  # [BLOCK_ROWS, BLOCK_DV]
            v + token[:, None] * v_stride_s + lane_v[None, :] * v_stride_d, mask=loaded, other=0.0
        ).to(tl.float32) - tl.load(mean_v + group[:, None] * DV + lane_v[None, :], mask=loaded, other=0.0)
        total = tl.dot(tl.trans(deviation_k), deviation_v, total, input_precision="tf32x3")
    tl.store(
        partials + part * D * DV + lane_k[:, None] * DV + lane_v[None, :],
        total,
        mask=(lane_k < D)[:, None] & (lane_v < DV)[None, :],
    )
    if piece == 0:
        tl.store(counts + part, tl.sum(number, 0))


@triton.jit(do_not_specialize=["chunks"])
def sum_of_partials(partials, counts, coupling, chunks, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements of the coupling matrix of one (batch item, key head): the sum over its chunks, by their count.

    partials float32 [B, H, chunks, SIZE], counts int32 [B, H, chunks]. Writes coupling float32 [B, H, SIZE]; without
    any key, 0. Added in float64 in the order of the chunks. Grid: B * H * ceil(SIZE / BLOCK).
    """
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    head = (program // BLOCKS).to(tl.int64)
    element = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    number = tl.zeros([1], tl.int64)
    for chunk in tl.range(0, chunks):
        part = head * chunks + chunk
        total += tl.load(partials + part * SIZE + element, mask=element < SIZE, other=0.0).to(tl.float64)
        number += tl.load(counts + part)
    mean = total / tl.maximum(number, 1).to(tl.float64)
    tl.store(coupling + head * SIZE + element, mean.to(tl.float32), mask=element < SIZE)
