"""Kernels of the mass of pairs of groups; what each result means is in reference.py.

All of them walk *slots*: a group owns a fixed number of them, so that tiles of rows and keys hold whole groups (or
whole pieces of a group) whatever their sizes. `fill_slots` says which token stands in which slot; -1: none.

A row leaves one number, ``moved``:

* a number below `MISFIT`: ln of its sum of exp(score - lse), by how much its log-sum-exp has moved;
* `MISFIT`: it has a log-sum-exp, but ``lse`` does not fit it;
* NaN, inf or -inf: that *is* its log-sum-exp, so it cannot be measured and says nothing. Such a log-sum-exp comes from
  the scores of the valid keys alone: NaN if any of them is; else inf if any is; else -inf if no score is above -inf, or
  there is no key. So the largest score and a trace of NaN tell it, without the log-sum-exp of all rows.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
MISFIT: tl.constexpr = tl.constexpr(1e30)


@triton.jit(do_not_specialize=["groups"])
def fill_slots(
    offsets,
    order,
    slots,
    stride_ob,
    stride_oh,
    stride_og,
    stride_tb,
    stride_th,
    stride_ts,
    heads,
    groups,
    row_stride,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the token of each slot of a head, -1 where there is none: one program per BLOCK slots of a head.

    Slot r of group g holds the group's member r * row_stride.
    Shapes: offsets int32 [B, H, groups + 2], the last group being padding; order int32 [B, H, S] or None: in place;
        slots int32 [B, H, groups, SLOTS].
    """
    tiles = tl.cdiv(groups * SLOTS, BLOCK)
    program = tl.program_id(0)
    head = (program // tiles).to(tl.int64)
    slot = (program % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < groups * SLOTS
    bounds = offsets + head // heads * stride_ob + head % heads * stride_oh + slot // SLOTS * stride_og
    start = tl.load(bounds, mask=inside, other=0)
    stop = tl.load(bounds + stride_og, mask=inside, other=0)
    token = start + (slot % SLOTS) * row_stride
    member = inside & (token < stop)
    if order is not None:
        place = order + head // heads * stride_tb + head % heads * stride_th
        token = tl.load(place + token * stride_ts, mask=member, other=-1).to(tl.int64)
    tl.store(slots + head * groups * SLOTS + slot, tl.where(member, token, -1).to(tl.int32), mask=inside)


@triton.jit
def _load_rows(x, token, stride_s, stride_d, D: tl.constexpr, D_PAD: tl.constexpr):
    """The rows of x [S, D] at the tokens [n], 0 where a token is -1 and beyond D: [n, D_PAD]."""
    d = tl.arange(0, D_PAD)
    mask = (token >= 0)[:, None]
    if D < D_PAD:
        mask = mask & (d < D)[None, :]
    at = tl.where(token >= 0, token, 0).to(tl.int64)
    return tl.load(x + at[:, None] * stride_s + d[None, :] * stride_d, mask=mask, other=0.0)  # [n, D_PAD]


@triton.jit
def _products(q, k):
    """The float32 products [M, N] of rows q [M, D] and keys k [N, D]."""
    return tl.dot(q, tl.trans(k), input_precision="tf32x3")  # which says nothing for 16-bit inputs


@triton.jit(do_not_specialize=["q_pieces", "k_groups"])
def sum_blocks(
    q,
    k,
    lse,
    q_slots,
    k_slots,
    q_offsets,
    ready,
    usable,
    mass,
    moved,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_kd,
    stride_lb,
    stride_lh,
    stride_ls,
    stride_ob,
    stride_oh,
    stride_og,
    stride_mh,
    stride_mq,
    heads,
    shared,
    q_pieces,
    k_groups,
    row_stride,
    scale_log2,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    Q_PIECE: tl.constexpr,
    PIECES_PER_GROUP: tl.constexpr,
    K_SLOTS: tl.constexpr,
    LARGEST_EXPONENT: tl.constexpr,
    ONLY_READY: tl.constexpr,
    ONLY_UNUSABLE: tl.constexpr,
):
    """Sum exp2(min(scale_log2 q.k - lse / ln 2, LARGEST_EXPONENT)) over pairs of a query piece and a key group.

    Source: AdaSpa (arXiv 2502.21079), docs/adaspa.md, section 4.
    One program: the BLOCK_M / Q_PIECE pieces in BLOCK_M slots of a head, against all keys, BLOCK_N slots at a time.
    With a known log-sum-exp there is no maximum, no rescaling and no value; each sum has one owner.

    ONLY_READY: the pass with a kept lse. Nothing runs unless ``ready``, and each row leaves ``moved`` (see above).
    ONLY_UNUSABLE: the pass after that: heads with a usable lse are left as they are.

    Shapes: q [B, H, Sq, D]; k [B, Hkv, Sk, D]; lse float32 [B, H, Sq]; q_slots int32 [B, H, q_pieces, Q_PIECE], k_slots
        int32 [B, Hkv, k_groups, K_SLOTS]; q_offsets int32 [B, H, Gq + 1]; ready int32 [1]; usable int32 [B, H]; mass
        float32 [B * H, q_pieces, k_groups] with strides; moved float32 [B, H, q_pieces, Q_PIECE].
    """
    tiles = tl.cdiv(q_pieces * Q_PIECE, BLOCK_M)
    program = tl.program_id(0)
    head = (program // tiles).to(tl.int64)  # of all batch items; neighbours share their keys
    if ONLY_READY:
        runs = tl.load(ready) != 0
    elif ONLY_UNUSABLE:
        runs = tl.load(usable + head) == 0
    else:
        runs = True
    if not runs:
        return
    b, h = head // heads, head % heads
    slot = (program % tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = slot < q_pieces * Q_PIECE
    token = tl.load(q_slots + head * q_pieces * Q_PIECE + slot, mask=inside, other=-1)  # [BLOCK_M]
    rows = _load_rows(q + b * stride_qb + h * stride_qh, token, stride_qs, stride_qd, D, D_PAD)
    kept = tl.load(
        lse + b * stride_lb + h * stride_lh + tl.where(token >= 0, token, 0).to(tl.int64) * stride_ls,
        mask=token >= 0,
        other=float("inf"),
    )
    shift = kept * LOG2_E
    known = tl.abs(shift) < float("inf")  # false for NaN; a row without a log-sum-exp has no mass
    shift = tl.where(known, shift, 0.0)

    Q_IN_TILE: tl.constexpr = BLOCK_M // Q_PIECE
    K_PIECE: tl.constexpr = K_SLOTS if K_SLOTS < BLOCK_N else BLOCK_N
    K_IN_TILE: tl.constexpr = BLOCK_N // K_PIECE
    piece = (program % tiles).to(tl.int64) * Q_IN_TILE + tl.arange(0, Q_IN_TILE)
    bounds = q_offsets + b * stride_ob + h * stride_oh + piece // PIECES_PER_GROUP * stride_og
    size = tl.load(bounds + stride_og, mask=piece < q_pieces, other=0)
    size -= tl.load(bounds, mask=piece < q_pieces, other=0)
    looks = tl.maximum(tl.cdiv(size, row_stride), 1)
    rows_per_look = tl.div_rn(size.to(tl.float32), looks.to(tl.float32))  # [Q_IN_TILE]

    k_head = b * (heads // shared) + h // shared
    keys = k + b * stride_kb + h // shared * stride_kh
    key_tokens = k_slots + k_head * k_groups * K_SLOTS
    sums = mass + head * stride_mh + piece[:, None] * stride_mq
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    ratio = tl.zeros([BLOCK_M], tl.float32)
    carried = tl.zeros([Q_IN_TILE, K_IN_TILE], tl.float32)
    key_slot = tl.arange(0, BLOCK_N)
    next_token = tl.load(key_tokens + key_slot, mask=key_slot < k_groups * K_SLOTS, other=-1)  # [BLOCK_N]
    for start in tl.range(0, k_groups * K_SLOTS, BLOCK_N):
        key_token = next_token  # known an iteration ahead, so that the loads of keys can run ahead as well
        key = _load_rows(keys, key_token, stride_ks, stride_kd, D, D_PAD)
        following = start + BLOCK_N + key_slot
        next_token = tl.load(key_tokens + following, mask=following < k_groups * K_SLOTS, other=-1)
        exponent = _products(rows, key) * scale_log2 - shift[:, None]  # [BLOCK_M, BLOCK_N]
        exponent = tl.where((key_token >= 0)[None, :], exponent, float("-inf"))
        if ONLY_READY:
            largest = tl.maximum(largest, tl.max(exponent, 1))  # passes over NaN, which the sum then shows
            term = tl.exp2(tl.minimum(exponent, LARGEST_EXPONENT, propagate_nan=tl.PropagateNan.ALL))
            ratio += tl.sum(term, 1)
        else:
            term = tl.exp2(tl.minimum(exponent, LARGEST_EXPONENT))
        term = tl.where(exponent < float("inf"), term, 0.0)  # an infinite score is not a large one, nor is NaN
        by_key = tl.sum(tl.reshape(term, [BLOCK_M, K_IN_TILE, K_PIECE]), 2)  # [BLOCK_M, K_IN_TILE]
        by_key = tl.where(known[:, None], by_key, 0.0)
        total = tl.sum(tl.reshape(by_key, [Q_IN_TILE, Q_PIECE, K_IN_TILE]), 1)  # [Q_IN_TILE, K_IN_TILE]
        key_group = start // K_SLOTS + tl.arange(0, K_IN_TILE)
        owned = (piece < q_pieces)[:, None] & (key_group < k_groups)[None, :]
        if K_PIECE < K_SLOTS:  # a key group takes several iterations; the last one has its sum
            total += tl.where(start % K_SLOTS == 0, 0.0, carried)
            carried = total
            owned = owned & ((start + BLOCK_N) % K_SLOTS == 0)
        tl.store(sums + key_group[None, :], total * rows_per_look[:, None], mask=owned)
    if ONLY_READY:
        reach = tl.exp2(tl.full([BLOCK_M], LARGEST_EXPONENT, tl.float32))
        fits = known & (ratio > 1 / reach) & (ratio < reach)
        number = tl.where(fits, tl.log(tl.where(fits, ratio, 1.0)), MISFIT)
        number = tl.where(tl.abs(largest) < float("inf"), number, largest)
        number = tl.where(ratio == ratio, number, float("nan"))
        tl.store(moved + head * q_pieces * Q_PIECE + slot, number, mask=inside)


@triton.jit(do_not_specialize=["groups"])
def judge_heads(
    moved,
    q_slots,
    ready,
    spread,
    usable,
    groups,
    SLOTS: tl.constexpr,
    GROUPS_AT_ONCE: tl.constexpr,
    MOST_SPREAD: tl.constexpr,
):
    """Decide of which heads the kept log-sum-exp is usable (docs/adaspa.md, section 8): one program per head.

    Spread: the mean, over the groups with tokens, of the standard deviation of ``moved`` within the group; inf where
    the log-sum-exp is not ``ready`` or some row is a misfit.
    Shapes: moved float32 and q_slots int32 [B, H, groups, SLOTS]; ready int32 [1]; spread float32 [B, H]; usable int32
        [B, H].
    """
    head = tl.program_id(0).to(tl.int64)
    is_ready = tl.load(ready) != 0
    deviations = tl.zeros([GROUPS_AT_ONCE], tl.float32)
    filled = tl.zeros([GROUPS_AT_ONCE], tl.int32)
    misfits = tl.zeros([GROUPS_AT_ONCE], tl.int32)
    for first in tl.range(0, tl.where(is_ready, groups, 0), GROUPS_AT_ONCE):
        group = first + tl.arange(0, GROUPS_AT_ONCE)
        slot = (head * groups + group)[:, None] * SLOTS + tl.arange(0, SLOTS)[None, :]  # [GROUPS_AT_ONCE, SLOTS]
        token = tl.load(q_slots + slot, mask=(group < groups)[:, None], other=-1)
        number = tl.load(moved + slot, mask=token >= 0, other=float("nan"))
        counted = tl.abs(number) < MISFIT  # false for NaN and inf
        count = tl.maximum(tl.sum(counted.to(tl.int32), 1), 1).to(tl.float32)
        mean = tl.sum(tl.where(counted, number, 0.0), 1) / count
        distance = tl.where(counted, number - mean[:, None], 0.0)
        deviations += tl.sqrt(tl.sum(distance * distance, 1) / count)
        filled += tl.max((token >= 0).to(tl.int32), 1)
        misfits += tl.max((number == MISFIT).to(tl.int32), 1)
    found = tl.sum(deviations, 0) / tl.maximum(tl.sum(filled, 0), 1).to(tl.float32)
    fits = is_ready & (tl.sum(misfits, 0) == 0)
    tl.store(spread + head, tl.where(fits, found, float("inf")))
    tl.store(usable + head, (fits & (found <= MOST_SPREAD)).to(tl.int32))


@triton.jit(do_not_specialize=["q_groups", "k_slot_count"])
def renew_lse(
    q,
    k,
    lse,
    q_slots,
    k_slots,
    moved,
    usable,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_kd,
    stride_lb,
    stride_lh,
    stride_ls,
    heads,
    shared,
    q_groups,
    k_slot_count,
    row_stride,
    scale_log2,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLOTS: tl.constexpr,
    LOOKS: tl.constexpr,
):
    """Bring lse up to date: by ``moved`` where the head is usable, else as the log-sum-exp over all valid keys.

    One program: BLOCK_M slots of a head. In a usable head only the rows that were looked at change; in any other all
    rows but padding, whose log-sum-exp is made online in base 2 as in FlashAttention-2 (arXiv 2307.08691).
    Shapes: q [B, H, Sq, D]; k [B, Hkv, Sk, D]; lse float32 [B, H, Sq]; q_slots int32 [B, H, q_groups, SLOTS] of all
        rows; k_slots int32 [B, Hkv, k_slot_count]; moved float32 [B, H, q_groups, LOOKS]; usable int32 [B, H].
    """
    tiles = tl.cdiv(q_groups * SLOTS, BLOCK_M)
    program = tl.program_id(0)
    head = (program // tiles).to(tl.int64)
    b, h = head // heads, head % heads
    slot = (program % tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.load(q_slots + head * q_groups * SLOTS + slot, mask=slot < q_groups * SLOTS, other=-1)  # [BLOCK_M]
    own = lse + b * stride_lb + h * stride_lh + tl.where(token >= 0, token, 0).to(tl.int64) * stride_ls
    if tl.load(usable + head) != 0:
        place = slot % SLOTS
        looked_at = (token >= 0) & (place % row_stride == 0)
        look = (head * q_groups + slot // SLOTS) * LOOKS + place // row_stride
        number = tl.load(moved + look, mask=looked_at, other=0.0)
        kept = tl.load(own, mask=looked_at, other=0.0)
        tl.store(own, tl.where(tl.abs(number) < MISFIT, kept + number, number), mask=looked_at)
        return
    rows = _load_rows(q + b * stride_qb + h * stride_qh, token, stride_qs, stride_qd, D, D_PAD)
    keys = k + b * stride_kb + h // shared * stride_kh
    key_tokens = k_slots + (b * (heads // shared) + h // shared) * k_slot_count
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    key_slot = tl.arange(0, BLOCK_N)
    next_token = tl.load(key_tokens + key_slot, mask=key_slot < k_slot_count, other=-1)  # [BLOCK_N]
    for start in tl.range(0, k_slot_count, BLOCK_N):
        key_token = next_token  # known an iteration ahead, so that the loads of keys can run ahead as well
        key = _load_rows(keys, key_token, stride_ks, stride_kd, D, D_PAD)
        following = start + BLOCK_N + key_slot
        next_token = tl.load(key_tokens + following, mask=following < k_slot_count, other=-1)
        score = tl.where((key_token >= 0)[None, :], _products(rows, key) * scale_log2, float("-inf"))
        larger = tl.maximum(largest, tl.max(score, 1))
        # An infinite largest score is not subtracted: where there is no key, or an infinite score, inf - inf is NaN.
        base = tl.where(tl.abs(larger) < float("inf"), larger, 0.0)
        total = total * tl.exp2(largest - base) + tl.sum(tl.exp2(score - base[:, None]), 1)
        largest = larger
    base = tl.where(tl.abs(largest) < float("inf"), largest, 0.0)
    tl.store(own, (base + tl.log2(total)) * LN_2, mask=token >= 0)
