"""Oracles and inputs for the kernel tests: float64, written as the formulas, slow and obvious."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sparse_compile.ops  # noqa: F401 - registers torch.ops.sparse_compile
from sparse_compile.call_log import COLUMNS, ROWS
from sparse_compile.plan import Plan, PooledKeys

OPS = torch.ops.sparse_compile
IMPLEMENTATIONS = ("cpu", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Clustered:
    """What one call of the kmeans op returned, and the state it left."""

    q_order: Tensor
    q_offsets: Tensor
    q_means: Tensor
    k_order: Tensor
    k_offsets: Tensor
    k_means: Tensor
    non_finite: Tensor
    q_centroids: Tensor
    k_centroids: Tensor
    ready: Tensor

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return tuple(vars(self).values())


def random_tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def new_log() -> Tensor:
    return torch.zeros(1 + ROWS, COLUMNS, dtype=torch.float32)


def cluster(
    q: Tensor,
    k: Tensor,
    q_clusters: int = 8,
    k_clusters: int = 16,
    *,
    q_valid: Tensor | None = None,
    k_valid: Tensor | None = None,
    q_video: list[int] | None = None,
    k_video: list[int] | None = None,
    state: Clustered | None = None,
    iterations: int = 10,
    seed: int = 0,
    kernel: str = "cpu",
) -> Clustered:
    """Run the kmeans op, from a sample or from the centroids of ``state`` (which stays as it is)."""
    if state is None:
        q_centroids = q.new_zeros((*q.shape[:2], q_clusters, q.shape[3]))
        k_centroids = k.new_zeros((*k.shape[:2], k_clusters, k.shape[3]))
        ready = torch.zeros(1, dtype=torch.int32)
    else:
        q_centroids, k_centroids, ready = (
            state.q_centroids.clone(),
            state.k_centroids.clone(),
            state.ready.clone(),
        )
    returned = OPS.kmeans(
        q,
        k,
        q_valid,
        k_valid,
        [0, q.shape[2]] if q_video is None else q_video,
        [0, k.shape[2]] if k_video is None else k_video,
        q_centroids,
        k_centroids,
        ready,
        state is None,
        iterations,
        seed,
        kernel,
    )
    return Clustered(*returned, q_centroids, k_centroids, ready)


def make_plan(clusters: Clustered, scale: float, *, kernel: str = "cpu", **options: Any) -> Plan:
    """The Plan of clustered queries and keys; options of plan_top_p by name."""
    settings = {
        "top_p": 0.9,
        "min_kept": 0.0,
        "density": None,
        "rank_by": "mass",
        "padded_queries_attend": True,
        "seed": 0,
    } | options
    keep = OPS.plan_top_p(
        clusters.q_means,
        clusters.k_means,
        clusters.q_offsets,
        clusters.k_offsets,
        clusters.ready,
        scale,
        *settings.values(),
        kernel,
    )
    return Plan(clusters.q_order, clusters.q_offsets, clusters.k_order, clusters.k_offsets, keep)


def fields_of(plan: Plan) -> tuple[Tensor | None, ...]:
    """The arguments that carry a Plan into an op."""
    return (plan.q_order, plan.q_offsets, plan.k_order, plan.k_offsets, plan.keep)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    scale: float,
    *,
    pooled: PooledKeys | None = None,
    kernel: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """The block_sparse_attention op: out and log-sum-exp."""
    tail = (None,) * 4 if pooled is None else (pooled.mean_k, pooled.mean_v, pooled.log_size, pooled.coupling)
    result: tuple[Tensor, Tensor] = OPS.block_sparse_attention(
        q, k, v, *fields_of(plan), *tail, None, None, None, None, new_log(), scale, True, kernel
    )
    return result


def random_plan(
    batch: int,
    q_heads: int,
    k_heads: int,
    queries: int,
    keys: int,
    q_groups: int = 5,
    k_groups: int = 7,
    *,
    share: float = 0.5,
    seed: int = 0,
) -> Plan:
    """A Plan of random groups and a random bitmap; the last group of either side is padding."""
    generator = torch.Generator().manual_seed(seed)

    def grouped(heads: int, tokens: int, groups: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(groups, (batch, heads, tokens), generator=generator)
        counts = torch.nn.functional.one_hot(labels, groups).sum(2)
        offsets = torch.nn.functional.pad(counts.cumsum(-1), (1, 0)).int()
        return labels.sort(stable=True).indices.int(), offsets

    q_order, q_offsets = grouped(q_heads, queries, q_groups)
    k_order, k_offsets = grouped(k_heads, keys, k_groups)
    kept = torch.rand(batch, q_heads, q_groups, k_groups, generator=generator) < share
    kept[..., -1] = False
    return Plan(q_order, q_offsets, k_order, k_offsets, packed(kept))


def packed(kept: Tensor) -> Tensor:
    """Bits to words by Python arithmetic, apart from the package's own packing."""
    words = -(-kept.shape[-1] // 32)
    flat = kept.reshape(-1, kept.shape[-1]).tolist()
    values = []
    for row in flat:
        for word in range(words):
            value = sum(1 << bit for bit, on in enumerate(row[32 * word : 32 * word + 32]) if on)
            values.append(value - 2**32 if value >= 2**31 else value)
    return torch.tensor(values, dtype=torch.int32).view(*kept.shape[:-1], words)


def labels_of(order: Tensor, offsets: Tensor) -> Tensor:
    """Group of every token, int64 [B, H, S], from an order and the bounds of its groups."""
    labels = torch.full(order.shape, -1, dtype=torch.int64)
    for b in range(order.shape[0]):
        for h in range(order.shape[1]):
            bounds = offsets[b, h].tolist()
            for group, (start, stop) in enumerate(itertools.pairwise(bounds)):
                labels[b, h, order[b, h, start:stop].long()] = group
    return labels


def token_mask(plan: Plan) -> Tensor:
    """Which query attends to which key, bool [B, H, Sq, Sk]: the bitmap read bit by bit."""
    q_labels = labels_of(plan.q_order, plan.q_offsets)
    k_labels = labels_of(plan.k_order, plan.k_offsets)
    shared = q_labels.shape[1] // k_labels.shape[1]
    mask = torch.zeros(*q_labels.shape, k_labels.shape[2], dtype=torch.bool)
    for b in range(mask.shape[0]):
        for h in range(mask.shape[1]):
            words = plan.keep[b, h].tolist()
            rows = [[(row[j // 32] >> (j % 32)) & 1 for j in range(plan.key_groups)] for row in words]
            bits = torch.tensor(rows, dtype=torch.bool)
            mask[b, h] = bits[q_labels[b, h]][:, k_labels[b, h // shared]]
    return mask


def exact_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Masked softmax attention in float64: output [B, H, Sq, Dv] and natural log-sum-exp [B, H, Sq]."""
    shared = q.shape[1] // k.shape[1]
    k64 = k.double().repeat_interleave(shared, dim=1)
    v64 = v.double().repeat_interleave(shared, dim=1)
    logits = (q.double() @ k64.transpose(-1, -2) * scale).masked_fill(~mask, -math.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.unsqueeze(-1)).exp().masked_fill(~mask, 0)
    return weights @ v64, lse


def squared_distances(x: Tensor, centroids: Tensor) -> Tensor:
    """By direct differences in float64: [S, D] and [C, D] to [S, C]."""
    return torch.cdist(x.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist").square()


def inertia(x: Tensor, labels: Tensor, centroids: Tensor) -> float:
    return float((x.double() - centroids.double()[labels.long()]).square().sum())


def exact_top_p(mass: Tensor, sizes: Tensor, top_p: float, minimum: int) -> Tensor:
    """The selection of docs/svg2.md, section 7, one row and one rank at a time, from log masses [Cq, Ck]."""
    kept = torch.zeros(mass.shape, dtype=torch.bool)
    for i, row in enumerate(mass.double().tolist()):
        alive = [j for j in range(len(row)) if sizes[j] > 0]
        peak = max((row[j] for j in alive), default=0.0)
        total = math.fsum(math.exp(row[j] - peak) for j in alive)
        before: list[float] = []
        for rank, j in enumerate(sorted(alive, key=lambda j: (-row[j], j))):
            kept[i, j] = top_p >= 1 or math.fsum(before) / total <= top_p or rank < minimum
            before.append(math.exp(row[j] - peak))
    return kept


def inputs(
    queries: int,
    keys: int,
    seed: int,
    *,
    batch: int = 1,
    heads: int = 2,
    key_heads: int = 1,
    size: int = 16,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k and v."""
    return (
        random_tensor(batch, heads, queries, size, seed=seed, dtype=dtype),
        random_tensor(batch, key_heads, keys, size, seed=seed + 1, dtype=dtype),
        random_tensor(batch, key_heads, keys, size, seed=seed + 2, dtype=dtype),
    )


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel: str = "cpu",
    plan: dict[str, Any] | None = None,
    scale: float = 0.25,
    **options: Any,
) -> tuple[Clustered, Plan, Tensor]:
    """k-means, plan and attention: (clusters, plan, out)."""
    clusters = cluster(q, k, kernel=kernel, **options)
    made = make_plan(clusters, scale, kernel=kernel, **(plan or {}))
    return clusters, made, attend(q, k, v, made, scale, kernel=kernel)[0]


def assert_same_bits(one: Iterable[Tensor], other: Iterable[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)
