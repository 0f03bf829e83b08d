"""Ops of SVG2: cluster the tokens, choose among the clusters.

C clusters make G = C + 2 groups: the clusters, then text, then padding (docs/svg2.md, section 4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.ops.library import implementation, register


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

    chosen = implementation(kernel)
    if chosen == "triton":
        from sparse_compile.kernels.kmeans import triton_launch

        return triton_launch.cluster_both(
            q, k, q_valid, k_valid, q_video, k_video, q_centroids, k_centroids, ready, restart, iterations, seed
        )
    query = clustering.cluster(q, q_valid, q_video, q_centroids, restart, iterations, seed, "query", chosen)
    key = clustering.cluster(k, k_valid, k_video, k_centroids, restart, iterations, seed, "key", chosen)
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

    arguments = (q_means, k_means, q_offsets, k_offsets, ready, scale, top_p, min_kept, density, rank_by)
    if implementation(kernel) == "triton":
        from sparse_compile.kernels.block_map import triton_launch

        return triton_launch.plan_top_p(*arguments, padded_queries_attend, seed)
    return reference.plan_top_p(*arguments, padded_queries_attend, seed)


def _plan_top_p_fake(q_means: Tensor, k_means: Tensor, *ignored: object) -> Tensor:
    b, h, cq, _ = q_means.shape
    words = (k_means.shape[2] + 2 + 31) // 32
    return q_means.new_empty((b, h, cq + 2, words), dtype=torch.int32)


register(
    "kmeans(Tensor q, Tensor k, Tensor? q_valid, Tensor? k_valid, SymInt[] q_video, SymInt[] k_video,"
    " Tensor(a!) q_centroids, Tensor(b!) k_centroids, Tensor(c!) ready, bool restart, int iterations, int seed,"
    " str kernel) -> (Tensor q_order, Tensor q_offsets, Tensor q_means,"
    " Tensor k_order, Tensor k_offsets, Tensor k_means, Tensor non_finite)",
    _kmeans,
    _kmeans_fake,
)
register(
    "plan_top_p(Tensor q_means, Tensor k_means, Tensor q_offsets, Tensor k_offsets, Tensor ready, float scale,"
    " float top_p, float min_kept, float? density, str rank_by, bool padded_queries_attend, int seed, str kernel)"
    " -> Tensor keep",
    _plan_top_p,
    _plan_top_p_fake,
)
