"""The ops that a rewritten graph calls: schemas, fakes, and dispatch to the kernels by device.

Opaque to Inductor (`Library.define/impl`), so that one body serves every device and nothing is decomposed. What an op
writes is marked in its schema; everything it returns is fresh. Tensors may have any strides. The last argument names
the implementation: ``cpu`` or ``reference`` (plain torch, any device). No op reads a device value on the host, except
the CPU implementation, where host and device are one.

Notation: B batch, H query heads, Hkv key/value heads, S tokens, D head size, C clusters, G = C + 2 groups: the
clusters, then text, then padding (docs/svg2.md, section 4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.errors import SparseAttentionError

LIBRARY = torch.library.Library("sparse_compile", "DEF")
"""Keeps the registrations alive."""

KERNELS = ("cpu", "reference")

LIBRARY.define(
    "kmeans(Tensor q, Tensor k, Tensor? q_valid, Tensor? k_valid, SymInt[] q_video, SymInt[] k_video,"
    " Tensor(a!) q_centroids, Tensor(b!) k_centroids, Tensor(c!) ready, bool restart, int iterations, int seed,"
    " str kernel) -> (Tensor q_order, Tensor q_offsets, Tensor q_means,"
    " Tensor k_order, Tensor k_offsets, Tensor k_means, Tensor non_finite)"
)
LIBRARY.define(
    "plan_top_p(Tensor q_means, Tensor k_means, Tensor q_offsets, Tensor k_offsets, Tensor ready, float scale,"
    " float top_p, float min_kept, float? density, str rank_by, bool padded_queries_attend, int seed, str kernel)"
    " -> Tensor keep"
)
LIBRARY.define(
    "block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor? q_order, Tensor q_offsets, Tensor? k_order,"
    " Tensor k_offsets, Tensor keep, Tensor? non_finite, Tensor(a!) log, float scale, bool token_major, str kernel)"
    " -> (Tensor out, Tensor lse)"
)


def _kmeans(
    q: Tensor,
    k: Tensor,
    q_valid: Tensor | None,
    k_valid: Tensor | None,
    q_video: list[int],
    k_video: list[int],
    q_centroids: Tensor,
    k_centroids: Tensor,
    ready: Tensor,
    restart: bool,
    iterations: int,
    seed: int,
    kernel: str,
) -> tuple[Tensor, ...]:
    """Cluster q and k, renew their centroids, and give both orders (docs/svg2.md, sections 4, 5 and 8).

    Args:
        q: [B, H, Sq, D].
        k: [B, Hkv, Sk, D], of q's dtype.
        q_valid: bool [B or 1, Sq], False for padding queries; None: all valid.
        k_valid: bool [B or 1, Sk], the same for keys.
        q_video: bounds [start, stop, …] of the visual queries; the rest is text.
        k_video: bounds of the visual keys.
        q_centroids: [B, H, Cq, D] in q's dtype: read unless ``restart``, then written.
        k_centroids: [B, Hkv, Ck, D], likewise.
        ready: int32 [1]; set to 1 by a restart, never touched otherwise.
        restart: start from a stratified sample rather than from the centroids.
        iterations: Lloyd iterations, at least 1.
        seed: start of the sample.
        kernel: which implementation.

    Returns:
        q_order int32 [B, H, Sq], q_offsets int32 [B, H, Cq + 3], q_means float32 [B, H, Cq, D], the same for k, and
        non_finite int32 [1]: how many query and key vectors had a non-finite component or score.
    """
    from sparse_compile.kernels.kmeans import clustering

    implementation = _implementation(kernel)
    query = clustering.cluster(q, q_valid, q_video, q_centroids, restart, iterations, seed, "query", implementation)
    key = clustering.cluster(k, k_valid, k_video, k_centroids, restart, iterations, seed, "key", implementation)
    if restart:
        ready.fill_(1)
    return (*query[:3], *key[:3], (query[3] + key[3]).to(torch.int32).view(1))


def _kmeans_fake(
    q: Tensor,
    k: Tensor,
    q_valid: Tensor | None,
    k_valid: Tensor | None,
    q_video: list[int],
    k_video: list[int],
    q_centroids: Tensor,
    k_centroids: Tensor,
    ready: Tensor,
    restart: bool,
    iterations: int,
    seed: int,
    kernel: str,
) -> tuple[Tensor, ...]:
    def side(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, h, s, d = x.shape
        c = centroids.shape[2]
        return (
            x.new_empty((b, h, s), dtype=torch.int32),
            x.new_empty((b, h, c + 3), dtype=torch.int32),
            x.new_empty((b, h, c, d), dtype=torch.float32),
        )

    return (*side(q, q_centroids), *side(k, k_centroids), q.new_empty((1,), dtype=torch.int32))


def _plan_top_p(
    q_means: Tensor,
    k_means: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    ready: Tensor,
    scale: float,
    top_p: float,
    min_kept: float,
    density: float | None,
    rank_by: str,
    padded_queries_attend: bool,
    seed: int,
    kernel: str,
) -> Tensor:
    """Choose the key clusters of each query cluster (docs/svg2.md, sections 4, 6 and 7).

    Args:
        q_means: float32 [B, H, Cq, D].
        k_means: float32 [B, Hkv, Ck, D].
        q_offsets: int32 [B, H, Cq + 3].
        k_offsets: int32 [B, Hkv, Ck + 3].
        ready: int32 [1]; 0 keeps every valid key for every query.
        scale: softmax scale.
        top_p: mass kept per row, in (0, 1].
        min_kept: least share of the key clusters kept.
        density: fixed share of keys kept per row in place of top_p, or None.
        rank_by: ``mass``, ``mass_per_key`` or ``random``.
        padded_queries_attend: whether padding queries attend to every valid key or to nothing.
        seed: seed of ``random``.
        kernel: which implementation.

    Returns:
        The keep bitmap of a Plan: int32 [B, H, Cq + 2, ceil((Ck + 2) / 32)].
    """
    from sparse_compile.kernels.block_map import reference

    _implementation(kernel)
    return reference.plan_top_p(
        q_means,
        k_means,
        q_offsets,
        k_offsets,
        ready,
        scale,
        top_p,
        min_kept,
        density,
        rank_by,
        padded_queries_attend,
        seed,
    )


def _plan_top_p_fake(
    q_means: Tensor,
    k_means: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    ready: Tensor,
    scale: float,
    top_p: float,
    min_kept: float,
    density: float | None,
    rank_by: str,
    padded_queries_attend: bool,
    seed: int,
    kernel: str,
) -> Tensor:
    b, h, cq, _ = q_means.shape
    words = (k_means.shape[2] + 2 + 31) // 32
    return q_means.new_empty((b, h, cq + 2, words), dtype=torch.int32)


def _block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_order: Tensor | None,
    q_offsets: Tensor,
    k_order: Tensor | None,
    k_offsets: Tensor,
    keep: Tensor,
    non_finite: Tensor | None,
    log: Tensor,
    scale: float,
    token_major: bool,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """Exact attention over the kept key groups, and one row of the call log (docs/svg2.md, section 9).

    Args:
        q: [B, H, Sq, D].
        k: [B, Hkv, Sk, D].
        v: [B, Hkv, Sk, Dv].
        q_order: fields of the Plan, as are the next four.
        q_offsets: see `Plan`.
        k_order: see `Plan`.
        k_offsets: see `Plan`.
        keep: see `Plan`.
        non_finite: count for the log, or None.
        log: the call log; one row is appended.
        scale: softmax scale.
        token_major: lay the output out as [B, Sq, H, Dv] in memory.
        kernel: which implementation.

    Returns:
        out [B, H, Sq, Dv] in q's dtype, and the natural log-sum-exp over the kept keys, float32 [B, H, Sq]. A row
        without a key gives 0 and -inf.
    """
    from sparse_compile.call_log import append_row
    from sparse_compile.plan import Plan

    plan = Plan(q_order, q_offsets, k_order, k_offsets, keep)
    out = _attention_output(q, v, token_major)
    if _implementation(kernel) == "cpu":
        from sparse_compile.kernels.block_sparse_attention import cpu

        lse = cpu.attention(q, k, v, plan, scale, out)
    else:
        from sparse_compile.kernels.block_sparse_attention import reference

        lse = reference.attention(q, k, v, plan, scale, out)
    append_row(log, plan.density(), None, non_finite)
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


def _implementation(kernel: str) -> str:
    if kernel not in KERNELS:
        raise SparseAttentionError(
            f"kernel must be one of {', '.join(KERNELS)}", kernel, "Use the option kernel='auto'."
        )
    return kernel


for _name, _function, _fake in (
    ("kmeans", _kmeans, _kmeans_fake),
    ("plan_top_p", _plan_top_p, _plan_top_p_fake),
    ("block_sparse_attention", _block_sparse_attention, _block_sparse_attention_fake),
):
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")  # plain torch: one body for every device
    torch.library.register_fake(f"sparse_compile::{_name}", _fake, lib=LIBRARY)
