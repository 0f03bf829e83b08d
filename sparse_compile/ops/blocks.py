"""Ops of AdaSpa: cut the tokens into blocks, measure the mass of each pair of blocks, choose among them."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from sparse_compile.ops.library import implementation, register


def _token_blocks(
    q: Tensor,
    k: Tensor,
    q_valid: Tensor | None,
    k_valid: Tensor | None,
    q_video: list[int],
    k_video: list[int],
    q_block: int,
    k_block: int,
    kernel: str,
) -> tuple[Tensor, ...]:
    """Cut both token axes at every border between text and video, then into blocks (docs/adaspa.md, section 3).

    Args:
        q: [B, H, Sq, D]; only its shape is read.
        k: [B, Hkv, Sk, D]; only its shape is read.
        q_valid: bool [B or 1, Sq], False for padding queries; None: all valid.
        k_valid: bool [B or 1, Sk], the same for keys.
        q_video: bounds [start, stop, …] of the visual queries; the rest is text.
        k_video: bounds of the visual keys.
        q_block: most tokens of a query block.
        k_block: most tokens of a key block.
        kernel: which implementation.

    Returns:
        q_order int32 [B, H, Sq], q_offsets int32 [B, H, Gq + 1], q_is_video bool [Gq], and the same for k with Hkv
        heads. The last group is padding. Where no mask is given the tokens stay in place, and the order is [B, H, 0].
    """
    from sparse_compile.kernels.token_blocks import reference

    implementation(kernel)
    query = reference.token_blocks(q, q_valid, q_video, q_block)
    key = reference.token_blocks(k, k_valid, k_video, k_block)
    return (*query, *key)


def _token_blocks_fake(
    q: Tensor,
    k: Tensor,
    q_valid: Tensor | None,
    k_valid: Tensor | None,
    q_video: list[int],
    k_video: list[int],
    q_block: int,
    k_block: int,
    kernel: str,
) -> tuple[Tensor, ...]:
    def side(x: Tensor, valid: Tensor | None, video: list[int], block: int) -> tuple[Tensor, Tensor, Tensor]:
        b, h, s, _ = x.shape
        pieces = itertools.pairwise([0, *video, s])
        groups = sum((stop - start + block - 1) // block for start, stop in pieces) + 1
        return (
            x.new_empty((b, h, 0 if valid is None else s), dtype=torch.int32),
            x.new_empty((b, h, groups + 1), dtype=torch.int32),
            x.new_empty((groups,), dtype=torch.bool),
        )

    return (*side(q, q_valid, q_video, q_block), *side(k, k_valid, k_video, k_block))


def _block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    ready: Tensor,
    q_order: Tensor | None,
    q_offsets: Tensor,
    k_order: Tensor | None,
    k_offsets: Tensor,
    largest_group: int,
    scale: float,
    row_stride: int,
    fresh: bool,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """The softmax mass of every pair of groups, from the log-sum-exp of its rows (docs/adaspa.md, section 4).

    Args:
        q: [B, H, Sq, D].
        k: [B, Hkv, Sk, D].
        lse: float32 [B, H, Sq], natural log. Unless ``fresh`` it is an earlier call's; it is then brought up to date in
            place, for the rows that were looked at.
        ready: int32 [1]; 0: ``lse`` holds nothing yet, and is computed.
        q_order: see `Plan`, as for the next three.
        q_offsets: see `Plan`.
        k_order: see `Plan`.
        k_offsets: see `Plan`.
        largest_group: no group but padding has more tokens; a bound for kernels with tiles of fixed size.
        scale: softmax scale.
        row_stride: look at every so manyth row of a query group, from its first; the mass is scaled up to all rows.
        fresh: whether ``lse`` is that of this q and k.
        kernel: which implementation.

    Returns:
        mass float32 [B, H, Gq, Gk]: the sum over the rows of group p and the keys of group r of exp(scale q.k - lse);
        0 for the padding group of either side, and for whatever is not finite. With an exact ``lse`` row p sums to the
        size of p. And spread float32 [B, H] in nats: how much the log-sum-exp moved within a query group since ``lse``
        was kept (0 if ``fresh``, or with one row a group). Above `MOST_SPREAD`, and where it cannot be told, ``lse`` is
        computed anew and the mass is exact again.
    """
    from sparse_compile.plan import Groups

    query, key = Groups(q_order, q_offsets), Groups(k_order, k_offsets)
    chosen = implementation(kernel)
    if chosen == "triton":
        from sparse_compile.kernels.block_mass import triton_launch

        return triton_launch.block_mass(q, k, lse, ready, query, key, largest_group, scale, row_stride, fresh)
    if chosen == "cpu":
        from sparse_compile.kernels.block_mass import cpu

        return cpu.block_mass(q, k, lse, ready, query, key, scale, row_stride, fresh)
    from sparse_compile.kernels.block_mass import reference

    return reference.block_mass(q, k, lse, ready, query, key, scale, row_stride, fresh)


def _block_mass_fake(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    ready: Tensor,
    q_order: Tensor | None,
    q_offsets: Tensor,
    k_order: Tensor | None,
    k_offsets: Tensor,
    *_: object,
) -> tuple[Tensor, Tensor]:
    b, h = q.shape[:2]
    mass = lse.new_empty((b, h, q_offsets.shape[2] - 1, k_offsets.shape[2] - 1))
    return mass, lse.new_empty((b, h))


def _plan_top_k(
    mass: Tensor,
    q_offsets: Tensor,
    q_is_video: Tensor,
    k_offsets: Tensor,
    k_is_video: Tensor,
    keep: Tensor,
    ready: Tensor,
    sparsity: float,
    head_adaptive: str,
    rank_by: str,
    padded_queries_attend: bool,
    seed: int,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """Keep the key blocks with the most mass in each row, and file them (docs/adaspa.md, sections 5 and 6).

    Args:
        mass: float32 [B, H, Gq, Gk], from `block_mass`.
        q_offsets: int32 [B, H, Gq + 1].
        q_is_video: bool [Gq].
        k_offsets: int32 [B, Hkv, Gk + 1].
        k_is_video: bool [Gk].
        keep: int32 [B, H, Gq, ceil(Gk / 32)]; set to the keep bitmap of the Plan.
        ready: int32 [1]; set to 1.
        sparsity: share of the video blocks that a row leaves out, in [0, 1).
        head_adaptive: ``paper``, ``guarded`` or ``off``: how heads trade budgets.
        rank_by: ``mass``, ``mass_per_key`` or ``random``.
        padded_queries_attend: whether padding queries attend to every valid key or to nothing.
        seed: seed of ``random``.
        kernel: which implementation.

    Returns:
        recall float32 [B, H], the share of its mass that a video row keeps, mean over their tokens (1 where there is no
        mass); and counts int32 [B, H], the video blocks that each video row keeps.
    """
    from sparse_compile.kernels.block_map import top_k_reference

    sides = (q_offsets, q_is_video, k_offsets, k_is_video)
    if implementation(kernel) == "triton":
        from sparse_compile.kernels.block_map import triton_launch

        kept, recall, counts = triton_launch.plan_top_k(
            mass, *sides, sparsity, head_adaptive, rank_by, padded_queries_attend, seed
        )
    else:
        kept, recall, counts = top_k_reference.plan_top_k(
            mass, *sides, sparsity, head_adaptive, rank_by, padded_queries_attend, seed
        )
    keep.copy_(kept)
    ready.fill_(1)
    return recall, counts


def _plan_top_k_fake(mass: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    heads = mass.shape[:2]
    return mass.new_empty(heads), mass.new_empty(heads, dtype=torch.int32)


def _kept_blocks(
    keep: Tensor,
    ready: Tensor,
    q_offsets: Tensor,
    q_is_video: Tensor,
    k_offsets: Tensor,
    k_is_video: Tensor,
    padded_queries_attend: bool,
    kernel: str,
) -> Tensor:
    """The keep bitmap of an earlier call for the tokens of this one.

    Args:
        keep: int32 [B, H, Gq, ceil(Gk / 32)], from `plan_top_k`.
        ready: int32 [1]; 0: ``keep`` holds nothing yet, and every valid key is kept for every query.
        q_offsets: int32 [B, H, Gq + 1].
        q_is_video: bool [Gq].
        k_offsets: int32 [B, Hkv, Gk + 1].
        k_is_video: bool [Gk].
        padded_queries_attend: whether padding queries attend to every valid key or to nothing.
        kernel: which implementation.

    Returns:
        A keep bitmap of the same shape. Text is kept as it is now, also where a block of it held only padding then. A
        row that had no tokens then keeps everything; groups that have none now are neither kept nor keep anything.
    """
    from sparse_compile.kernels.block_map import top_k_reference

    implementation(kernel)
    return top_k_reference.kept_blocks(keep, ready, q_offsets, q_is_video, k_offsets, k_is_video, padded_queries_attend)


def _kept_blocks_fake(keep: Tensor, *_: object) -> Tensor:
    return keep.new_empty(keep.shape)


register(
    "token_blocks(Tensor q, Tensor k, Tensor? q_valid, Tensor? k_valid, SymInt[] q_video, SymInt[] k_video,"
    " int q_block, int k_block, str kernel) -> (Tensor q_order, Tensor q_offsets, Tensor q_is_video,"
    " Tensor k_order, Tensor k_offsets, Tensor k_is_video)",
    _token_blocks,
    _token_blocks_fake,
)
register(
    "block_mass(Tensor q, Tensor k, Tensor(a!) lse, Tensor ready, Tensor? q_order, Tensor q_offsets,"
    " Tensor? k_order, Tensor k_offsets, int largest_group, float scale, int row_stride, bool fresh, str kernel)"
    " -> (Tensor mass, Tensor spread)",
    _block_mass,
    _block_mass_fake,
)
register(
    "plan_top_k(Tensor mass, Tensor q_offsets, Tensor q_is_video, Tensor k_offsets, Tensor k_is_video,"
    " Tensor(a!) keep, Tensor(b!) ready, float sparsity, str head_adaptive, str rank_by, bool padded_queries_attend,"
    " int seed, str kernel) -> (Tensor recall, Tensor counts)",
    _plan_top_k,
    _plan_top_k_fake,
)
register(
    "kept_blocks(Tensor keep, Tensor ready, Tensor q_offsets, Tensor q_is_video, Tensor k_offsets, Tensor k_is_video,"
    " bool padded_queries_attend, str kernel) -> Tensor",
    _kept_blocks,
    _kept_blocks_fake,
)
