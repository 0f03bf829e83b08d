"""Ops that attend: densely with a log-sum-exp, and over the groups that a Plan keeps, with what stands for the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.ops.library import implementation, register


def _attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_valid: Tensor | None,
    k_valid: Tensor | None,
    lse: Tensor,
    padded_queries_attend: bool,
    scale: float,
    token_major: bool,
    kernel: str,
) -> Tensor:
    """Dense attention that keeps its log-sum-exp (docs/adaspa.md, section 4).

    Args:
        q: [B, H, Sq, D].
        k: [B, Hkv, Sk, D].
        v: [B, Hkv, Sk, Dv].
        q_valid: bool [B or 1, Sq], False for padding queries; None: all valid.
        k_valid: bool [B or 1, Sk], the same for keys, which then take no mass.
        lse: float32 [B, H, Sq]; set to the natural log of the sum of exp(scale q.k) over the valid keys.
        padded_queries_attend: whether padding queries attend to every valid key or to nothing.
        scale: softmax scale.
        token_major: lay the output out as [B, Sq, H, Dv] in memory.
        kernel: which implementation.

    Returns:
        out [B, H, Sq, Dv] in q's dtype. A row without a key gives 0, and -inf in ``lse``.
    """
    out = _attention_output(q, v, token_major)
    chosen = implementation(kernel)
    if chosen == "triton":
        from sparse_compile.kernels.block_sparse_attention import triton_launch

        triton_launch.attention_with_lse(q, k, v, q_valid, k_valid, padded_queries_attend, scale, out, lse)
    elif chosen == "cpu":
        from sparse_compile.kernels.block_sparse_attention import cpu

        cpu.attention_with_lse(q, k, v, q_valid, k_valid, padded_queries_attend, scale, out, lse)
    else:
        from sparse_compile.kernels.block_mass import reference

        reference.attention_with_lse(q, k, v, q_valid, k_valid, padded_queries_attend, scale, out, lse)
    return out


def _attention_with_lse_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_valid: Tensor | None,
    k_valid: Tensor | None,
    lse: Tensor,
    padded_queries_attend: bool,
    scale: float,
    token_major: bool,
    kernel: str,
) -> Tensor:
    return _attention_output(q, v, token_major)


def _pooled_keys(
    k: Tensor,
    v: Tensor,
    k_order: Tensor | None,
    k_offsets: Tensor,
    k_video: list[int],
    coupled: bool,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What stands for each key group where it is skipped (docs/correction.md).

    Args:
        k: [B, Hkv, Sk, D].
        v: [B, Hkv, Sk, Dv].
        k_order: see `Plan`.
        k_offsets: see `Plan`.
        k_video: bounds [start, stop, …] of the visual keys; only they enter the coupling matrix.
        coupled: whether to make the coupling matrix.
        kernel: which implementation.

    Returns:
        The fields of `PooledKeys`: mean_k float32 [B, Hkv, Gk, D], mean_v float32 [B, Hkv, Gk, Dv], log_size float32
        [B, Hkv, Gk] (-inf for an empty group and for padding), and coupling float32 [B, Hkv, D, Dv], which is
        [B, Hkv, 0, 0] unless ``coupled``.
    """
    chosen = implementation(kernel)
    if chosen == "triton":
        from sparse_compile.kernels.pooled_keys import triton_launch

        return triton_launch.pooled_keys(k, v, k_order, k_offsets, k_video, coupled)
    if chosen == "cpu":
        from sparse_compile.kernels.pooled_keys import cpu

        return cpu.pooled_keys(k, v, k_order, k_offsets, k_video, coupled)
    from sparse_compile.kernels.pooled_keys import reference

    return reference.pooled_keys(k, v, k_order, k_offsets, k_video, coupled)


def _pooled_keys_fake(
    k: Tensor,
    v: Tensor,
    k_order: Tensor | None,
    k_offsets: Tensor,
    k_video: list[int],
    coupled: bool,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, h, _, d = k.shape
    groups, dv = k_offsets.shape[2] - 1, v.shape[3]

    def empty(*shape: int) -> Tensor:
        return k.new_empty((b, h, *shape), dtype=torch.float32)

    return empty(groups, d), empty(groups, dv), empty(groups), empty(d, dv) if coupled else empty(0, 0)


def _kept_mass(
    q: Tensor,
    k: Tensor,
    q_valid: Tensor | None,
    q_video: list[int],
    q_order: Tensor | None,
    q_offsets: Tensor,
    k_order: Tensor | None,
    k_offsets: Tensor,
    keep: Tensor,
    scale: float,
    rows: int,
    seed: int,
    kernel: str,
) -> Tensor:
    """Measure the attention mass that a Plan keeps, on probe rows (docs/adaspa.md, section 13).

    Args:
        q: [B, H, Sq, D].
        k: [B, Hkv, Sk, D].
        q_valid: bool [B or 1, Sq], False for padding queries; None: all valid.
        q_video: bounds [start, stop, …] of the visual queries, from which the rows are taken.
        q_order: fields of the Plan, as are the next four.
        q_offsets: see `Plan`.
        k_order: see `Plan`.
        k_offsets: see `Plan`.
        keep: see `Plan`.
        scale: softmax scale.
        rows: probe rows a head, at least 1.
        seed: of the choice of rows; equal seeds take equal rows.
        kernel: which implementation.

    Returns:
        Kept mass, float32 [B, H] in [0, 1]; NaN where no probe row has a finite score.
    """
    from sparse_compile.kernels.kept_mass import reference
    from sparse_compile.plan import Plan

    plan = Plan(q_order, q_offsets, k_order, k_offsets, keep)
    if implementation(kernel) == "triton":
        from sparse_compile.kernels.kept_mass import triton_launch

        return triton_launch.kept_mass(q, k, q_valid, q_video, plan, scale, rows, seed)
    return reference.kept_mass(q, k, q_valid, q_video, plan, scale, rows, seed)


def _kept_mass_fake(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape[:2], dtype=torch.float32)


def _paired_kept_mass(measured: Tensor, recall: Tensor | None, offset: Tensor, planned: Tensor, kernel: str) -> Tensor:
    """Take out of a measurement what its rows missed when the Plan was made (docs/adaspa.md, section 13).

    Args:
        measured: float32 [B, H], from `kept_mass` with the same rows in each call.
        recall: float32 [B, H], the true kept mass, in the call that made the Plan; then ``offset`` is set to the
            difference, and ``planned`` to ``recall``. None in later calls.
        offset: float32 [B, H].
        planned: float32 [B, H].
        kernel: which implementation.

    Returns:
        Kept mass, float32 [B, H] in [0, 1]; NaN where it was not measured.
    """
    implementation(kernel)
    if recall is not None:
        offset.copy_((recall - measured).nan_to_num(nan=0.0))
        planned.copy_(recall)
    return (measured + offset).clamp(0, 1)


def _paired_kept_mass_fake(measured: Tensor, *_: object) -> Tensor:
    return measured.new_empty(measured.shape)


def _block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_order: Tensor | None,
    q_offsets: Tensor,
    k_order: Tensor | None,
    k_offsets: Tensor,
    keep: Tensor,
    mean_k: Tensor | None,
    mean_v: Tensor | None,
    log_size: Tensor | None,
    coupling: Tensor | None,
    kept_mass: Tensor | None,
    planned_mass: Tensor | None,
    at_bounds: Tensor | None,
    non_finite: Tensor | None,
    log: Tensor,
    scale: float,
    token_major: bool,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """Exact attention over the kept key groups, pooled over the others, and one row of the call log.

    The arithmetic is in docs/svg2.md (section 9) and docs/correction.md.

    Args:
        q: [B, H, Sq, D].
        k: [B, Hkv, Sk, D].
        v: [B, Hkv, Sk, Dv].
        q_order: fields of the Plan, as are the next four.
        q_offsets: see `Plan`.
        k_order: see `Plan`.
        k_offsets: see `Plan`.
        keep: see `Plan`.
        mean_k: fields of `PooledKeys`, as are the next three; None: what is not kept is dropped.
        mean_v: see `PooledKeys`; given if ``mean_k`` is.
        log_size: see `PooledKeys`; given if ``mean_k`` is.
        coupling: see `PooledKeys`; may be None beside the others.
        kept_mass: float32 [B, H] for the log, or None.
        planned_mass: float32 [B, H] for the log: the kept mass of the Plan when it was made, or None.
        at_bounds: float32 [B, H, 2] for the log: queries at the floor and the ceiling of their budget, or None.
        non_finite: count for the log; None: the rows whose log-sum-exp is NaN are counted.
        log: the call log; one row is appended.
        scale: softmax scale.
        token_major: lay the output out as [B, Sq, H, Dv] in memory.
        kernel: which implementation.

    Returns:
        out [B, H, Sq, Dv] in q's dtype, and the natural log-sum-exp over the kept keys and the pooled groups, float32
        [B, H, Sq]. A row without either gives 0 and -inf.
    """
    from sparse_compile.call_log import append_row
    from sparse_compile.plan import Plan, PooledKeys

    plan = Plan(q_order, q_offsets, k_order, k_offsets, keep)
    pooled = None
    if mean_k is not None and mean_v is not None and log_size is not None:
        pooled = PooledKeys(mean_k, mean_v, log_size, coupling)
    out = _attention_output(q, v, token_major)
    chosen = implementation(kernel)
    if chosen == "triton":
        from sparse_compile.kernels.block_sparse_attention import triton_launch

        lse, density = triton_launch.attention(q, k, v, plan, pooled, scale, out)
    elif chosen == "cpu":
        from sparse_compile.kernels.block_sparse_attention import cpu

        lse, density = cpu.attention(q, k, v, plan, pooled, scale, out), plan.density()
    else:
        from sparse_compile.kernels.block_sparse_attention import reference

        lse, density = reference.attention(q, k, v, plan, pooled, scale, out), plan.density()
    append_row(log, density, kept_mass, lse.isnan() if non_finite is None else non_finite, planned_mass, at_bounds)
    return out, lse


def _block_sparse_attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_order: Tensor | None,
    q_offsets: Tensor,
    k_order: Tensor | None,
    k_offsets: Tensor,
    keep: Tensor,
    mean_k: Tensor | None,
    mean_v: Tensor | None,
    log_size: Tensor | None,
    coupling: Tensor | None,
    kept_mass: Tensor | None,
    planned_mass: Tensor | None,
    at_bounds: Tensor | None,
    non_finite: Tensor | None,
    log: Tensor,
    scale: float,
    token_major: bool,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    return _attention_output(q, v, token_major), q.new_empty(q.shape[:3], dtype=torch.float32)


def _attention_output(q: Tensor, v: Tensor, token_major: bool) -> Tensor:
    b, h, s, _ = q.shape
    if token_major:
        return q.new_empty((b, s, h, v.shape[3])).transpose(1, 2)
    return q.new_empty((b, h, s, v.shape[3]))


register(
    "attention_with_lse(Tensor q, Tensor k, Tensor v, Tensor? q_valid, Tensor? k_valid, Tensor(a!) lse,"
    " bool padded_queries_attend, float scale, bool token_major, str kernel) -> Tensor out",
    _attention_with_lse,
    _attention_with_lse_fake,
)
register(
    "pooled_keys(Tensor k, Tensor v, Tensor? k_order, Tensor k_offsets, SymInt[] k_video, bool coupled, str kernel)"
    " -> (Tensor mean_k, Tensor mean_v, Tensor log_size, Tensor coupling)",
    _pooled_keys,
    _pooled_keys_fake,
)
register(
    "kept_mass(Tensor q, Tensor k, Tensor? q_valid, SymInt[] q_video, Tensor? q_order, Tensor q_offsets,"
    " Tensor? k_order, Tensor k_offsets, Tensor keep, float scale, int rows, int seed, str kernel) -> Tensor",
    _kept_mass,
    _kept_mass_fake,
)
register(
    "paired_kept_mass(Tensor measured, Tensor? recall, Tensor(a!) offset, Tensor(b!) planned, str kernel) -> Tensor",
    _paired_kept_mass,
    _paired_kept_mass_fake,
)
register(
    "block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor? q_order, Tensor q_offsets, Tensor? k_order,"
    " Tensor k_offsets, Tensor keep, Tensor? mean_k, Tensor? mean_v, Tensor? log_size, Tensor? coupling,"
    " Tensor? kept_mass, Tensor? planned_mass, Tensor? at_bounds, Tensor? non_finite, Tensor(a!) log, float scale,"
    " bool token_major, str kernel) -> (Tensor out, Tensor lse)",
    _block_sparse_attention,
    _block_sparse_attention_fake,
)
