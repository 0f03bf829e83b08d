"""Triton kernels of the label sort and of the row gather (docs/svg2.md, section 8).

The sort treats two sets of problems at once, q's and k's: ``q_*`` and ``k_*`` arguments are those of either side, and a
program finds its side from its number. Labels of both sides lie in one array, q's first.
"""

import triton
import triton.language as tl

COUNTS = ["q_programs", "q_problems", "k_problems", "q_tokens", "k_tokens", "q_groups", "k_groups", "iteration"]


@triton.jit
def side_of(program, q_programs, q_each, k_each):
    """Side (True: k), problem within the side, and place within the problem, of a program in a grid of both sides.

    The first ``q_programs`` programs are q's, ``q_each`` to a problem; then come k's, ``k_each`` to a problem.
    """
    is_k = program >= q_programs
    own = tl.where(is_k, program - q_programs, program)
    each = tl.where(is_k, k_each, q_each)
    return is_k, own // each, own % each


@triton.jit
def labels_of_problem(labels, is_k, problem, q_problems, q_tokens, k_tokens):
    """Where the labels of a problem begin: in one array, all of q's before all of k's."""
    skipped = tl.where(is_k, q_problems.to(tl.int64) * q_tokens, 0)
    return labels + skipped + problem.to(tl.int64) * tl.where(is_k, k_tokens, q_tokens)


@triton.jit(do_not_specialize=COUNTS)
def count_labels(
    labels,
    moved,
    counts,
    q_programs,
    q_problems,
    k_problems,
    q_tokens,
    k_tokens,
    iteration,
    TOKENS: tl.constexpr,
    LABELS: tl.constexpr,
    FLAGGED: tl.constexpr,
):
    """Histogram of one block of TOKENS labels.

    labels: int32, q's [q_problems, q_tokens], then k's. counts: int32 [programs, LABELS].
    LABELS is a power of two above the number of groups: absent tokens take the last bin, which is no group.
    moved: int32 [iterations + 1, problems]; with FLAGGED a problem whose entry at ``iteration`` is 0 is left as it is.
    """
    program = tl.program_id(0)
    is_k, problem, block = side_of(program, q_programs, tl.cdiv(q_tokens, TOKENS), tl.cdiv(k_tokens, TOKENS))
    number = tl.where(is_k, q_problems + problem, problem)
    if FLAGGED and tl.load(moved + iteration * (q_problems + k_problems) + number) == 0:
        return
    tokens = tl.where(is_k, k_tokens, q_tokens)
    own = labels_of_problem(labels, is_k, problem, q_problems, q_tokens, k_tokens)
    token = block * TOKENS + tl.arange(0, TOKENS)
    label = tl.load(own + token, mask=token < tokens, other=LABELS - 1)
    tl.store(counts + program.to(tl.int64) * LABELS + tl.arange(0, LABELS), tl.histogram(label, LABELS))


@triton.jit(do_not_specialize=COUNTS)
def scan_blocks(
    counts,
    moved,
    totals,
    q_programs,
    q_problems,
    k_problems,
    q_tokens,
    k_tokens,
    iteration,
    TOKENS: tl.constexpr,
    LABELS: tl.constexpr,
    LABEL_BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    FLAGGED: tl.constexpr,
):
    """For LABEL_BLOCK labels of one problem: how many such tokens the blocks before each block have.

    Writes them over ``counts`` [programs of count_labels, LABELS], and their sums to totals int32 [problems, LABELS].
    """
    parts: tl.constexpr = LABELS // LABEL_BLOCK
    is_k, problem, part = side_of(tl.program_id(0), q_programs, parts, parts)
    number = tl.where(is_k, q_problems + problem, problem)
    if FLAGGED and tl.load(moved + iteration * (q_problems + k_problems) + number) == 0:
        return
    q_blocks = tl.cdiv(q_tokens, TOKENS)
    blocks = tl.where(is_k, tl.cdiv(k_tokens, TOKENS), q_blocks)
    first = (tl.where(is_k, q_problems * q_blocks, 0) + problem * blocks).to(tl.int64)
    label = part * LABEL_BLOCK + tl.arange(0, LABEL_BLOCK)
    before = tl.zeros([LABEL_BLOCK], tl.int32)
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        places = (first + block)[:, None] * LABELS + label[None, :]  # [BLOCKS, LABEL_BLOCK]
        present = (block < blocks)[:, None]
        count = tl.load(counts + places, mask=present, other=0)
        tl.store(counts + places, before[None, :] + tl.cumsum(count, 0) - count, mask=present)
        before += tl.sum(count, 0)
    tl.store(totals + number.to(tl.int64) * LABELS + label, before)


@triton.jit(do_not_specialize=COUNTS)
def scan_labels(
    totals,
    moved,
    q_offsets,
    k_offsets,
    q_problems,
    k_problems,
    q_groups,
    k_groups,
    iteration,
    LABELS: tl.constexpr,
    FLAGGED: tl.constexpr,
):
    """Bounds of the groups of one problem: offsets int32 [problems, groups + 1], from totals [problems, LABELS]."""
    number = tl.program_id(0)
    if FLAGGED and tl.load(moved + iteration * (q_problems + k_problems) + number) == 0:
        return
    is_k, problem, _ = side_of(number, q_problems, 1, 1)
    groups = tl.where(is_k, k_groups, q_groups)
    label = tl.arange(0, LABELS)
    total = tl.load(totals + number.to(tl.int64) * LABELS + label)
    offsets = k_offsets if is_k else q_offsets
    offsets += problem.to(tl.int64) * (groups + 1)
    tl.store(offsets + label, tl.cumsum(total, 0) - total, mask=label <= groups)


@triton.jit(do_not_specialize=COUNTS)
def scatter_tokens(
    labels,
    moved,
    counts,
    q_offsets,
    k_offsets,
    q_order,
    k_order,
    q_programs,
    q_problems,
    k_problems,
    q_tokens,
    k_tokens,
    q_groups,
    k_groups,
    iteration,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    LABELS: tl.constexpr,
    FLAGGED: tl.constexpr,
):
    """Write the tokens of one block of TOKENS where they belong: order int32 [problems, tokens].

    counts: of `scan_blocks`. CHUNK tokens at a time, each compared with those of its chunk; ``place`` [LABELS] is where
    the next token of each label goes.
    """
    program = tl.program_id(0)
    is_k, problem, block = side_of(program, q_programs, tl.cdiv(q_tokens, TOKENS), tl.cdiv(k_tokens, TOKENS))
    number = tl.where(is_k, q_problems + problem, problem)
    if FLAGGED and tl.load(moved + iteration * (q_problems + k_problems) + number) == 0:
        return
    tokens = tl.where(is_k, k_tokens, q_tokens)
    groups = tl.where(is_k, k_groups, q_groups)
    own = labels_of_problem(labels, is_k, problem, q_problems, q_tokens, k_tokens)
    if is_k:
        offsets, order = k_offsets, k_order
    else:
        offsets, order = q_offsets, q_order
    offsets += problem.to(tl.int64) * (groups + 1)
    order += problem.to(tl.int64) * tokens
    group = tl.arange(0, LABELS)
    place = tl.load(counts + program.to(tl.int64) * LABELS + group)
    place += tl.load(offsets + group, mask=group < groups, other=0)
    lane = tl.arange(0, CHUNK)
    earlier = lane[:, None] < lane[None, :]
    for start in range(block * TOKENS, tl.minimum(block * TOKENS + TOKENS, tokens), CHUNK):
        token = start + lane
        label = tl.load(own + token, mask=token < tokens, other=LABELS - 1)
        # The lanes of a warp lie along the tokens that are ranked, so that the sum needs no exchange between them.
        other = tl.load(own + token[:, None], mask=(token < tokens)[:, None], other=LABELS - 1)  # [CHUNK, 1]
        rank = tl.sum(((other == label[None, :]) & earlier).to(tl.int32), 0)
        tl.store(order + tl.gather(place, label, 0) + rank, token, mask=token < tokens)
        place += tl.histogram(label, LABELS)


@triton.jit(do_not_specialize=["k_b", "k_h", "k_s", "v_b", "v_h", "v_s", "heads", "tokens"])
def gather_rows(
    k,
    v,
    order,
    k_out,
    v_out,
    k_b,
    k_h,
    k_s,
    v_b,
    v_h,
    v_s,
    heads,
    tokens,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Copy ROWS rows of keys and of values from where ``order`` says: k_out [B, H, S, D], v_out [B, H, S, DV].

    order: int32 [B, H, S]. Strides of k and v are in units of UNIT elements, which shows the compiler how far rows are
    aligned; it is 8 wherever it can be, and 16 bytes move at once.
    """
    blocks = tl.cdiv(tokens, ROWS)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = problem // heads, problem % heads
    place = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    present = place < tokens
    token = tl.load(order + problem * tokens + place, mask=present, other=0).to(tl.int64)
    row = problem * tokens + place
    lane = tl.arange(0, D_PAD)
    mask = present[:, None] & (lane < D)[None, :]
    found = tl.load(
        k + (batch * k_b + head * k_h + token * k_s)[:, None] * UNIT + lane[None, :], mask=mask
    )  # [ROWS, D_PAD]
    tl.store(k_out + row[:, None] * D + lane[None, :], found, mask=mask)
    lane = tl.arange(0, DV_PAD)
    mask = present[:, None] & (lane < DV)[None, :]
    found = tl.load(
        v + (batch * v_b + head * v_h + token * v_s)[:, None] * UNIT + lane[None, :], mask=mask
    )  # [ROWS, DV_PAD]
    tl.store(v_out + row[:, None] * DV + lane[None, :], found, mask=mask)
