"""The k-means driver of all implementations: token classes, Lloyd iterations, orders (docs/svg2.md, 4, 5, 8)."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from sparse_compile.kernels.kmeans import cpu, reference
from sparse_compile.kernels.permutation.cpu import sort_labels as counting_sort
from sparse_compile.kernels.permutation.reference import sort_labels as stable_sort
from sparse_compile.kernels.precision import compute_dtype
from sparse_compile.kernels.token_blocks.spans import inside

IMPLEMENTATIONS: dict[str, ModuleType] = {"cpu": cpu, "reference": reference}


def cluster(
    x: Tensor,
    valid: Tensor | None,
    video_spans: list[int],
    centroids: Tensor,
    restart: bool,
    iterations: int,
    seed: int,
    role: str,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cluster the visual tokens of x, and group all tokens: clusters, then text, then padding.

    Source: SVG2 (arXiv 2505.18875); flash-kmeans (arXiv 2603.09229).
    Shapes: x [B, H, S, D], any strides; valid bool [B or 1, S] or None; video_spans [start, stop, …];
        centroids [B, H, C, D], read unless ``restart``, then overwritten with the means rounded to their
        dtype.
    Returns: order int32 [B, H, S]; offsets int32 [B, H, C + 3]; means float32 [B, H, C, D] of exactly the
        returned labels (an empty cluster keeps its centroid); and how many valid vectors were not finite,
        int64 [].

    Each (b, h) is a problem of its own, so that a batch equals its items bit for bit.
    """
    batches, heads, tokens, _ = x.shape
    clusters = centroids.shape[2]
    at_once = implementation == "cpu" and x.dtype is not torch.float64
    steps = IMPLEMENTATIONS["cpu" if at_once else "reference"]
    video = inside(video_spans, tokens, x.device)
    valid_of = (torch.ones_like(video).unsqueeze(0) if valid is None else valid).expand(batches, tokens)
    included = torch.empty((batches, heads, tokens), dtype=torch.bool, device=x.device)
    start = torch.empty_like(centroids) if restart else centroids
    non_finite = torch.zeros((), dtype=torch.int64, device=x.device)
    for batch in range(batches):
        for head in range(heads):
            own = x[batch, head]
            finite = steps.countable(own)
            torch.logical_and(video & valid_of[batch], finite, out=included[batch, head])
            if restart:
                start[batch, head] = steps.stratified_sample(own, included[batch, head], clusters, seed, role, head)
            non_finite = non_finite + (valid_of[batch] & ~finite).sum()
    solve, sort_labels = (lloyd, counting_sort) if at_once else (_lloyd_by_heads, stable_sort)
    nearest, means = solve(x, included, start, iterations, steps)
    order, offsets = sort_labels(_group_of(nearest, video, valid_of.unsqueeze(1), clusters), clusters + 2)
    centroids.copy_(means)
    return order, offsets, means, non_finite


def _lloyd_by_heads(
    x: Tensor, included: Tensor, start: Tensor, iterations: int, steps: ModuleType
) -> tuple[Tensor, Tensor]:
    """`lloyd` of one batch item and head after the other: labels int32 [B, H, S] and means float32 [B, H, C, D]."""
    labels = torch.empty(x.shape[:3], dtype=torch.int32, device=x.device)
    means = torch.empty(start.shape, dtype=torch.float32, device=x.device)
    for batch in range(x.shape[0]):
        for head in range(x.shape[1]):
            problem = (x[batch, head], included[batch, head], start[batch, head])
            labels[batch, head], means[batch, head] = lloyd(*problem, iterations, steps)
    return labels, means


def lloyd(x: Tensor, included: Tensor, start: Tensor, iterations: int, steps: ModuleType) -> tuple[Tensor, Tensor]:
    """Alternate assignment and update; return the last labels int32 [S] and the means [C, D] of just these.

    Of one head, or of all at once ([B, H, S, D] and so on) with the steps for CPU tensors. Centroids stay in float32
    between iterations; only the assignment rounds them (section 5.1).
    """
    means = start.to(compute_dtype(x.dtype))
    labels = None
    for _ in range(iterations):
        previous = labels
        labels = steps.assign(x, means, included)
        if steps.STOPS_AT_FIXED_POINT and previous is not None and torch.equal(labels, previous):
            break  # equal labels have equal means, so every further iteration would repeat this one
        means = steps.update(x, labels, included, means)
    assert labels is not None, "at least one iteration"
    return labels, means


def _group_of(nearest: Tensor, video: Tensor, valid: Tensor, clusters: int) -> Tensor:
    """Group of each token: its cluster, C for text, C + 1 for padding, which wins."""
    return torch.where(valid, torch.where(video, nearest, clusters), clusters + 1)
