"""Ragged block-sparse attention on a GPU: online softmax over the pieces of keys that a work list names.

Source: FlashAttention-2 (arXiv 2307.08691) for the online softmax; the work lists are ours (docs/kernels.md).
"""

import triton
import triton.language as tl

LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _softmax_step(scores, to_base_2, m, total):
    """One step in base 2: weights, the factor on what was summed before, and the new maximum and total.

    ``to_base_2`` is positive; it meets the scores in one multiply-add before the exponential. A row without a finite
    maximum keeps -inf without making NaN. A NaN score makes the weight and the total NaN.
    """
    m_new = tl.maximum(m, tl.max(scores, 1) * to_base_2)
    safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    weights = tl.math.exp2(scores * to_base_2 - safe[:, None])
    rescale = tl.math.exp2(m - safe)
    return weights, rescale, m_new, total * rescale + tl.sum(weights, 1)


@triton.jit
def _rows(
    base,
    place,
    stride,
    column,
    live,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    WIDE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Load rows ``place`` of a matrix with ``stride``: [len(place), PADDED]; 0 in columns behind SIZE and dead rows."""
    offset = place.to(tl.int64) if WIDE else place
    pointers = base + offset[:, None] * stride + column[None, :]
    if MASKED:
        return tl.load(pointers, mask=live[:, None] & (column < SIZE)[None, :], other=0.0)
    if SIZE != PADDED:
        return tl.load(pointers, mask=(column < SIZE)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def _pieces_of(pieces, chunk, BLOCK_K: tl.constexpr, PIECE: tl.constexpr):
    """The piece that each key lane of a chunk belongs to, or the one piece of the chunk."""
    if PIECE == BLOCK_K:
        piece = tl.load(pieces + chunk)
    else:
        piece = tl.load(pieces + chunk * (BLOCK_K // PIECE) + tl.arange(0, BLOCK_K) // PIECE)
    return piece


@triton.jit
def _attend_chunk(
    q,
    k,
    v,
    k_stride,
    v_stride,
    batch,
    key_head,
    piece,
    m,
    total,
    acc,
    to_base_2,
    BLOCK_K: tl.constexpr,
    PIECE: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    FLIP: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add a chunk of keys to the running softmax. MASKED: pieces may be short, the lanes behind them are others'."""
    lane = tl.arange(0, BLOCK_K) % PIECE
    live = lane < (piece & 255)
    place = (piece >> 8) + lane
    if TMA:
        k_tile = k.load([batch, key_head, piece >> 8, 0]).reshape([BLOCK_K, D_PAD])
    else:
        k_tile = _rows(k, place, k_stride, tl.arange(0, D_PAD), live, D, D_PAD, WIDE, MASKED)
    scores = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)  # [BLOCK_Q, BLOCK_K]
    if FLIP:
        scores = -scores
    if MASKED:
        scores = tl.where(live[None, :], scores, float("-inf"))
    weights, rescale, m, total = _softmax_step(scores, to_base_2, m, total)
    if TMA:
        v_tile = v.load([batch, key_head, piece >> 8, 0]).reshape([BLOCK_K, DV_PAD])
        if MASKED:
            v_tile = tl.where(live[:, None], v_tile, 0.0)  # a weight of 0 times another piece's NaN is NaN
    else:
        v_tile = _rows(v, place, v_stride, tl.arange(0, DV_PAD), live, DV, DV_PAD, WIDE, MASKED)
    acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision=PRECISION)
    return m, total, acc


@triton.jit
def _attend_pooled(
    q,
    mean_k,
    mean_v,
    log_size,
    skipped,
    groups,
    m,
    total,
    acc,
    to_base_2,
    BLOCK_P: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    FLIP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what stands for the skipped groups (docs/correction.md); also give the pooled share, and their number.

    Groups that are not skipped are not loaded, and change no bit. A group whose log_size is -inf does not count.
    """
    share = tl.zeros_like(total)
    passed_groups = 0
    for base in tl.range(0, groups, BLOCK_P, num_stages=2):
        group = base + tl.arange(0, BLOCK_P)
        inside = group < groups
        word = tl.load(skipped + group // 32, mask=inside, other=0)
        size = tl.load(log_size + group, mask=inside, other=float("-inf"))  # natural log
        passed = (((word >> (group % 32)) & 1) != 0) & (size > float("-inf"))
        k_tile = _rows(mean_k, group, D, tl.arange(0, D_PAD), passed, D, D_PAD, False, True)
        v_tile = _rows(mean_v, group, DV, tl.arange(0, DV_PAD), passed, DV, DV_PAD, False, True)
        scores = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * to_base_2
        if FLIP:
            scores = -scores
        scores = tl.where(passed[None, :], scores + (size / LN_2)[None, :], float("-inf"))
        weights, rescale, m, total = _softmax_step(scores, 1.0, m, total)
        share = share * rescale + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision=PRECISION)
        passed_groups += tl.sum(passed.to(tl.int32), 0)
    return m, total, acc, share, passed_groups


@triton.jit(
    do_not_specialize=[
        "n_rows",
        "queries",
        "heads",
        "shared",
        "groups",
        "words_of_row",
        "capacity",
        "q_batch",
        "q_head",
    ]
)
def attend_tiles(
    q,
    k,
    v,
    out,
    lse,
    q_order,
    tiles,
    n_tiles,
    pieces,
    counts,
    skipped,
    mean_k,
    mean_v,
    log_size,
    coupling,
    queries,
    heads,
    shared,
    rows_of_head,
    groups,
    words_of_row,
    capacity,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    out_batch,
    out_head,
    out_token,
    scale,
    to_base_2,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    ORDERED: tl.constexpr,
    POOLED: tl.constexpr,
    COUPLED: tl.constexpr,
    FLIP: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend the queries of some tiles to the keys of their rows' pieces, then to the pooled keys of skipped groups.

    q [B, H, Sq, D], gathered through q_order int32 [B, H, Sq]; k, v: in the grouped order, or under TMA descriptors of
    them in blocks [1, 1, BLOCK_K, D_PAD]; out [B, H, Sq, DV] and lse float32 [B, H, Sq] in the order of q. mean_k,
    mean_v in q's dtype, log_size, coupling: fields of PooledKeys. tiles, pieces, counts, skipped: see WorkLists.
    to_base_2: |scale| / ln 2; FLIP: scale is negative.
    """
    column = tl.arange(0, D_PAD)
    value_column = tl.arange(0, DV_PAD)
    lane = tl.arange(0, BLOCK_Q)
    for tile in tl.range(tl.program_id(0), tl.load(n_tiles), tl.num_programs(0), disable_licm=True):
        row = tl.load(tiles + tile * 4)
        first = tl.load(tiles + tile * 4 + 1)
        live = lane < tl.load(tiles + tile * 4 + 2)
        head_of_all = row // rows_of_head
        batch = head_of_all // heads
        head = head_of_all % heads
        key_head = head // shared
        token = first + lane
        if ORDERED:
            token = tl.load(q_order + head_of_all.to(tl.int64) * queries + token, mask=live, other=0)
        token = token.to(tl.int64)
        q_base = q + batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head
        q_pointers = q_base + token[:, None] * q_token + column[None, :]
        q_mask = live[:, None] & (column < D)[None, :]
        q_tile = tl.load(q_pointers, mask=q_mask, other=0.0)  # [BLOCK_Q, D_PAD]
        if TMA:
            k_base = k
            v_base = v
        else:
            k_base = k + batch.to(tl.int64) * k_batch + key_head.to(tl.int64) * k_head
            v_base = v + batch.to(tl.int64) * v_batch + key_head.to(tl.int64) * v_head

        own = pieces + row.to(tl.int64) * capacity
        whole_chunks = tl.load(counts + row.to(tl.int64) * 2) // (BLOCK_K // PIECE)
        chunks = tl.cdiv(tl.load(counts + row.to(tl.int64) * 2 + 1), BLOCK_K // PIECE)
        m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        acc = tl.zeros([BLOCK_Q, DV_PAD], tl.float32)
        # Short pieces are loaded a chunk ahead, so that loads of keys depend on nothing that is still under way. One
        # number a chunk needs no such care, and on sm_100 Triton 3.9 cannot schedule it.
        AHEAD: tl.constexpr = PIECE < BLOCK_K
        piece = _pieces_of(own, 0, BLOCK_K, PIECE)
        for chunk in tl.range(0, whole_chunks):
            if AHEAD:
                following = _pieces_of(own, chunk + 1, BLOCK_K, PIECE)
            else:
                piece = _pieces_of(own, chunk, BLOCK_K, PIECE)
            m, total, acc = _attend_chunk(
                q_tile, k_base, v_base, k_token, v_token, batch, key_head, piece, m, total, acc, to_base_2,
                BLOCK_K, PIECE, D, D_PAD, DV, DV_PAD, FLIP, TMA, WIDE, False, PRECISION,
            )  # fmt: skip
            if AHEAD:
                piece = following
        for chunk in tl.range(whole_chunks, chunks):
            if AHEAD:
                following = _pieces_of(own, chunk + 1, BLOCK_K, PIECE)
            else:
                piece = _pieces_of(own, chunk, BLOCK_K, PIECE)
            m, total, acc = _attend_chunk(
                q_tile, k_base, v_base, k_token, v_token, batch, key_head, piece, m, total, acc, to_base_2,
                BLOCK_K, PIECE, D, D_PAD, DV, DV_PAD, FLIP, TMA, WIDE, True, PRECISION,
            )  # fmt: skip
            if AHEAD:
                piece = following
        if POOLED:
            pooled_head = (head_of_all // shared).to(tl.int64)
            m, total, acc, share, passed = _attend_pooled(
                q_tile,
                mean_k + pooled_head * groups * D,
                mean_v + pooled_head * groups * DV,
                log_size + pooled_head * groups,
                skipped + row.to(tl.int64) * words_of_row,
                groups,
                m, total, acc, to_base_2, BLOCK_P, D, D_PAD, DV, DV_PAD, FLIP, PRECISION,
            )  # fmt: skip
            if COUPLED:
                if passed > 0:
                    matrix = coupling + pooled_head * D * DV
                    part = tl.arange(0, 16)
                    for base in tl.range(0, D, 16):  # by slices of D, so that it needs little shared memory
                        inside = base + part < D
                        q_part = tl.load(
                            q_base + token[:, None] * q_token + (base + part)[None, :],
                            mask=live[:, None] & inside[None, :],
                            other=0.0,
                        )
                        c_part = tl.load(
                            matrix + (base + part)[:, None] * DV + value_column[None, :],
                            mask=inside[:, None] & (value_column < DV)[None, :],
                            other=0.0,
                        )
                        change = q_part.to(tl.float32) * (share * scale)[:, None]
                        acc = tl.dot(change, c_part, acc, input_precision="tf32x3" if PRECISION == "tf32x3" else "tf32")

        seen = total != 0.0  # also where it is NaN
        acc = acc / tl.where(seen, total, 1.0)[:, None]
        result = tl.where(seen, (m + tl.math.log2(tl.where(seen, total, 1.0))) * LN_2, float("-inf"))
        out_base = out + batch.to(tl.int64) * out_batch + head.to(tl.int64) * out_head
        out_mask = live[:, None] & (value_column < DV)[None, :]
        tl.store(
            out_base + token[:, None] * out_token + value_column[None, :], acc.to(out.dtype.element_ty), mask=out_mask
        )
        tl.store(lse + head_of_all.to(tl.int64) * queries + token, result, mask=live)
