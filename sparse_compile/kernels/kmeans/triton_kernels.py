"""Triton kernels of Lloyd's k-means (docs/svg2.md, section 5): of queries and of keys at once, each (b, h) a problem.

``q_*`` and ``k_*`` arguments are those of either side; a program finds its side from its number. What is private to the
op lies in one array for both sides, q's part first:

- kinds int8 [B, S]: 0 a token to cluster, 1 text, 2 padding;
- labels int32 [B, H, S];
- operand [B, H, padded, D_PAD] and norms float32 [B, H, padded]: the centroids in the dtype of x and the squared norms
  of these. ``padded`` is C rounded up to the tile; the lanes beyond C and D hold 0, and the norms there are inf.

Strides are in units of UNIT elements, which shows the compiler how far rows are aligned.
"""

import triton
import triton.language as tl

from sparse_compile.kernels.permutation.triton_kernels import labels_of_problem, side_of

COUNTABLE = tl.constexpr(3.4028234663852886e38 / 16)
"""Squared norms up to here cannot make a score overflow: `reference.countable`."""
INFINITY = tl.constexpr(float("inf"))
VARYING = [
    "q_b",
    "q_h",
    "q_s",
    "k_b",
    "k_h",
    "k_s",
    "q_problems",
    "k_problems",
    "q_heads",
    "k_heads",
    "q_tokens",
    "k_tokens",
    "q_clusters",
    "k_clusters",
    "q_padded",
    "k_padded",
    "iteration",
]
"""Numbers that change from call to call, or from model to model: none is worth a compilation of its own."""


@triton.jit
def rows_of_problem(is_k, problem, q, k, q_b, q_h, k_b, k_h, q_heads, k_heads, UNIT: tl.constexpr):
    """Where the rows of a problem begin, in the strided tensor of its side."""
    heads = tl.where(is_k, k_heads, q_heads)
    batch, head = (problem // heads).to(tl.int64), (problem % heads).to(tl.int64)
    rows = k if is_k else q
    return rows + (batch * tl.where(is_k, k_b, q_b) + head * tl.where(is_k, k_h, q_h)) * UNIT


@triton.jit
def kinds_of_problem(kinds, is_k, problem, q_problems, q_heads, k_heads, q_tokens, k_tokens):
    """Where the kinds of a problem's tokens begin: [B, S] of q, then of k."""
    batch = problem // tl.where(is_k, k_heads, q_heads)
    skipped = tl.where(is_k, (q_problems // q_heads).to(tl.int64) * q_tokens, 0)
    return kinds + skipped + batch.to(tl.int64) * tl.where(is_k, k_tokens, q_tokens)


@triton.jit
def centroids_of_problem(is_k, problem, q_problems, q_padded, k_padded):
    """The first row of a problem in ``operand`` and ``norms``: int64."""
    skipped = tl.where(is_k, q_problems.to(tl.int64) * q_padded, 0)
    return skipped + problem.to(tl.int64) * tl.where(is_k, k_padded, q_padded)


@triton.jit
def is_countable(x):
    """`reference.countable` of float32 rows [N, D_PAD]: false for a row with a NaN, too."""
    return tl.sum(x * x, 1) < COUNTABLE


@triton.jit
def as_operand(means, dtype: tl.constexpr):
    """`reference.scoring_operands` of float32 rows [N, D_PAD]: rounded rows, and their squared norms [N].

    A centroid whose norm overflows is never the nearest one: its norm is inf and its products are 0 rather than NaN.
    """
    rounded = means.to(dtype)
    exact = rounded.to(tl.float32)
    norms = tl.sum(exact * exact, 1)
    reachable = norms < INFINITY  # false for NaN
    return tl.where(reachable[:, None], exact, 0.0).to(dtype), tl.where(reachable, norms, INFINITY)


@triton.jit(do_not_specialize=VARYING)
def mark_included(
    q,
    k,
    kinds,
    included,
    q_b,
    q_h,
    q_s,
    k_b,
    k_h,
    k_s,
    q_problems,
    q_heads,
    k_heads,
    q_tokens,
    k_tokens,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Which tokens may be sampled: uint8, laid out as the labels are. ROWS tokens of one problem."""
    q_blocks = tl.cdiv(q_tokens, ROWS)
    is_k, problem, block = side_of(tl.program_id(0), q_problems * q_blocks, q_blocks, tl.cdiv(k_tokens, ROWS))
    tokens = tl.where(is_k, k_tokens, q_tokens)
    row = block * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, D_PAD)
    base = rows_of_problem(is_k, problem, q, k, q_b, q_h, k_b, k_h, q_heads, k_heads, UNIT)
    places = row.to(tl.int64)[:, None] * tl.where(is_k, k_s, q_s) * UNIT + lane[None, :]
    x = tl.load(base + places, mask=(row < tokens)[:, None] & (lane < D)[None, :], other=0.0)  # [ROWS, D_PAD]
    kind = kinds_of_problem(kinds, is_k, problem, q_problems, q_heads, k_heads, q_tokens, k_tokens)
    usable = is_countable(x.to(tl.float32)) & (tl.load(kind + row, mask=row < tokens, other=2) == 0)
    own = labels_of_problem(included, is_k, problem, q_problems, q_tokens, k_tokens)
    tl.store(own + row, usable.to(tl.uint8), mask=row < tokens)


@triton.jit(do_not_specialize=VARYING)
def begin(
    q_start,
    k_start,
    q_means,
    k_means,
    operand,
    norms,
    q_b,
    q_h,
    q_s,
    k_b,
    k_h,
    k_s,
    q_problems,
    q_heads,
    k_heads,
    q_clusters,
    k_clusters,
    q_padded,
    k_padded,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Make means, operand and norms of the centroids to start from: ROWS of one problem, and all that is padded.

    q_start, k_start: [B, H, C, D], strided, in the dtype of x. q_means, k_means: float32 [B, H, C, D], contiguous.
    """
    q_blocks = q_padded // ROWS
    is_k, problem, block = side_of(tl.program_id(0), q_problems * q_blocks, q_blocks, k_padded // ROWS)
    clusters = tl.where(is_k, k_clusters, q_clusters)
    row = block * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, D_PAD)
    live = (row < clusters)[:, None] & (lane < D)[None, :]
    base = rows_of_problem(is_k, problem, q_start, k_start, q_b, q_h, k_b, k_h, q_heads, k_heads, UNIT)
    places = row.to(tl.int64)[:, None] * tl.where(is_k, k_s, q_s) * UNIT + lane[None, :]
    means = tl.load(base + places, mask=live, other=0.0).to(tl.float32)  # [ROWS, D_PAD]
    means_out = k_means if is_k else q_means
    means_out += problem.to(tl.int64) * clusters * D
    tl.store(means_out + row[:, None] * D + lane[None, :], means, mask=live)
    rounded, norm = as_operand(means, operand.dtype.element_ty)
    first = centroids_of_problem(is_k, problem, q_problems, q_padded, k_padded)
    tl.store(operand + (first + row)[:, None] * D_PAD + lane[None, :], rounded)
    tl.store(norms + first + row, tl.where(row < clusters, norm, INFINITY))


@triton.jit(do_not_specialize=VARYING)
def assign(
    q,
    k,
    kinds,
    operand,
    norms,
    labels,
    moved,
    non_finite,
    q_b,
    q_h,
    q_s,
    k_b,
    k_h,
    k_s,
    q_problems,
    k_problems,
    q_heads,
    k_heads,
    q_tokens,
    k_tokens,
    q_clusters,
    k_clusters,
    q_padded,
    k_padded,
    iteration,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    UNIT: tl.constexpr,
    POINTS: tl.constexpr,
    CENTROIDS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Label POINTS tokens of one problem: the nearest centroid, C for text, C + 1 for padding (flash-kmeans).

    The nearest has the least |c|^2 - 2 x.c, ties to the lowest index, CENTROIDS at a time with a running least. A token
    that is not countable gets 0.

    moved: int32 [iterations + 1, problems]. A problem whose entry at ``iteration`` is 0 has not changed in the
    iteration before and cannot change again: it is left as it is. The entry after is set to 1 where a label is not what
    ``labels`` held. non_finite: int32 [1], to which the first iteration adds the valid tokens that are not countable.
    """
    q_blocks = tl.cdiv(q_tokens, POINTS)
    is_k, problem, block = side_of(tl.program_id(0), q_problems * q_blocks, q_blocks, tl.cdiv(k_tokens, POINTS))
    problems = q_problems + k_problems
    flag = moved + iteration * problems + tl.where(is_k, q_problems + problem, problem)
    if tl.load(flag) == 0:
        return
    tokens = tl.where(is_k, k_tokens, q_tokens)
    clusters = tl.where(is_k, k_clusters, q_clusters)
    row = block * POINTS + tl.arange(0, POINTS)
    lane = tl.arange(0, D_PAD)
    base = rows_of_problem(is_k, problem, q, k, q_b, q_h, k_b, k_h, q_heads, k_heads, UNIT)
    places = row.to(tl.int64)[:, None] * tl.where(is_k, k_s, q_s) * UNIT + lane[None, :]
    x = tl.load(base + places, mask=(row < tokens)[:, None] & (lane < D)[None, :], other=0.0)  # [POINTS, D_PAD]
    kind = kinds_of_problem(kinds, is_k, problem, q_problems, q_heads, k_heads, q_tokens, k_tokens)
    kind = tl.load(kind + row, mask=row < tokens, other=2)
    countable = is_countable(x.to(tl.float32))
    included = countable & (kind == 0)
    best = tl.full([POINTS], INFINITY, tl.float32)
    nearest = tl.zeros([POINTS], tl.int32)
    first = centroids_of_problem(is_k, problem, q_problems, q_padded, k_padded)
    column = tl.arange(0, CENTROIDS)
    # A block of nothing but text and padding needs no product.
    wanted = tl.where(tl.max(included.to(tl.int32), 0) > 0, tl.where(is_k, k_padded, q_padded), 0)
    for start in range(0, wanted, CENTROIDS):
        own = first + start + column
        c = tl.load(operand + own[:, None] * D_PAD + lane[None, :])  # [CENTROIDS, D_PAD]
        scores = tl.load(norms + own)[None, :] - 2.0 * tl.dot(x, tl.trans(c), input_precision=PRECISION)
        least = tl.min(scores, 1)
        index = tl.min(tl.where(scores == least[:, None], column[None, :], CENTROIDS), 1)
        nearest = tl.where(least < best, start + index, nearest)  # an equal one further on does not count
        best = tl.minimum(best, least)
    label = tl.where(kind == 0, tl.where(included, nearest, 0), clusters - 1 + kind.to(tl.int32))
    label_out = labels_of_problem(labels, is_k, problem, q_problems, q_tokens, k_tokens) + row
    before = tl.load(label_out, mask=row < tokens, other=0)
    if tl.max(((label != before) & (row < tokens)).to(tl.int32), 0) > 0:
        tl.store(flag + problems, 1)  # whichever program comes last writes the same
    tl.store(label_out, label, mask=row < tokens)
    if iteration == 0:
        odd = tl.sum(((kind != 2) & (countable == 0)).to(tl.int32), 0)
        if odd > 0:
            tl.atomic_add(non_finite, odd)


@triton.jit(do_not_specialize=VARYING)
def update(
    q,
    k,
    q_order,
    k_order,
    q_offsets,
    k_offsets,
    q_means,
    k_means,
    operand,
    norms,
    moved,
    q_b,
    q_h,
    q_s,
    k_b,
    k_h,
    k_s,
    q_problems,
    k_problems,
    q_heads,
    k_heads,
    q_tokens,
    k_tokens,
    q_clusters,
    k_clusters,
    q_padded,
    k_padded,
    iteration,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Move one centroid to the mean of its tokens, in the grouped order; without any it stays.

    order: int32 [B, H, S], offsets: int32 [B, H, C + 3], of the sorted labels. ROWS tokens are summed at a time, in
    float64 if WIDE, else in float32; and these sums in float64. The order is always the same. Tokens that are not
    countable have a label but no part in the mean.

    moved: as in `assign`; looked up after ``iteration``, so a problem with the labels of the iteration before is left.
    """
    is_k, problem, cluster = side_of(tl.program_id(0), q_problems * q_clusters, q_clusters, k_clusters)
    problems = q_problems + k_problems
    if tl.load(moved + (iteration + 1) * problems + tl.where(is_k, q_problems + problem, problem)) == 0:
        return
    tokens = tl.where(is_k, k_tokens, q_tokens)
    clusters = tl.where(is_k, k_clusters, q_clusters)
    lane = tl.arange(0, D_PAD)
    base = rows_of_problem(is_k, problem, q, k, q_b, q_h, k_b, k_h, q_heads, k_heads, UNIT)
    stride = tl.where(is_k, k_s, q_s)
    if is_k:
        order, bounds, means = k_order, k_offsets, k_means
    else:
        order, bounds, means = q_order, q_offsets, q_means
    order += problem.to(tl.int64) * tokens
    bounds += problem.to(tl.int64) * (clusters + 3) + cluster
    stop = tl.load(bounds + 1)
    total = tl.zeros([D_PAD], tl.float64)
    count = 0
    for start in range(tl.load(bounds), stop, ROWS):
        place = start + tl.arange(0, ROWS)
        token = tl.load(order + place, mask=place < stop, other=0).to(tl.int64)
        places = token[:, None] * stride * UNIT + lane[None, :]
        x = tl.load(base + places, mask=(place < stop)[:, None] & (lane < D)[None, :], other=0.0)  # [ROWS, D_PAD]
        x = x.to(tl.float32)
        usable = is_countable(x) & (place < stop)
        x = tl.where(usable[:, None], x, 0.0)
        total += tl.sum(x.to(tl.float64), 0) if WIDE else tl.sum(x, 0).to(tl.float64)
        count += tl.sum(usable.to(tl.int32), 0)
    means += (problem.to(tl.int64) * clusters + cluster) * D + lane
    before = tl.load(means, mask=lane < D, other=0.0)
    mean = (total / tl.maximum(count, 1).to(tl.float64)).to(tl.float32)
    mean = tl.where(count > 0, mean, before)
    tl.store(means, mean, mask=lane < D)
    rounded, norm = as_operand(mean[None, :], operand.dtype.element_ty)
    own = centroids_of_problem(is_k, problem, q_problems, q_padded, k_padded) + cluster + tl.arange(0, 1)
    tl.store(operand + own[:, None] * D_PAD + lane[None, :], rounded)
    tl.store(norms + own, norm)
