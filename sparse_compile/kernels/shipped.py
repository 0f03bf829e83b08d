"""Every launch that ships: one call of each host function for each configuration of its table, without memory.

Under `launching.compiled_ahead` these calls compile all kernels for a GPU that need not be there. What is compiled is
what would be launched: the shapes are those of Wan 1.3B at 480p (32,760 tokens, 12 heads).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_compile.kernels.block_map import triton_launch as plans
from sparse_compile.kernels.block_mass import configs as mass_configs
from sparse_compile.kernels.block_mass import triton_launch as mass
from sparse_compile.kernels.block_sparse_attention import configs as attention_configs
from sparse_compile.kernels.block_sparse_attention import triton_launch as attention
from sparse_compile.kernels.kept_mass import configs as kept_configs
from sparse_compile.kernels.kept_mass import triton_launch as kept
from sparse_compile.kernels.kmeans import configs as kmeans_configs
from sparse_compile.kernels.kmeans import triton_launch as clusters
from sparse_compile.kernels.launching import Device
from sparse_compile.kernels.pooled_keys import configs as pooled_configs
from sparse_compile.kernels.pooled_keys import triton_launch as pooled
from sparse_compile.kernels.recall_map import triton_launch as recall
from sparse_compile.kernels.recall_map.reference import Bounds
from sparse_compile.plan import Groups, Plan, PooledKeys

BATCH, HEADS, TOKENS, BLOCK = 1, 12, 32_760, 64
Q_CLUSTERS, K_CLUSTERS = 128, 431
SCALE = 0.125


class Shipped(NamedTuple):
    """One call: the folder of its kernels, what its configuration is for, the configuration, and the call itself."""

    kernel: str
    problem: str
    config: tuple[object, ...]
    run: Callable[[], object]


def shipped(device: Device, dtype: torch.dtype, size: int) -> Iterator[Shipped]:
    """All calls for one GPU, one dtype of q, k and v, and one head size; of each table the best configuration first."""
    q, k, v, out = (_tensor(TOKENS, HEADS, size, dtype=dtype).transpose(1, 2) for _ in range(4))
    for ragged in (True, False):
        plan = _clusters() if ragged else _blocks()
        groups = plan.key_groups
        means = PooledKeys(
            _tensor(HEADS, groups, size),
            _tensor(HEADS, groups, size),
            _tensor(HEADS, groups),
            _tensor(HEADS, size, size),
        )
        rows = {
            config: None
            for mean_row in (TOKENS / Q_CLUSTERS, BLOCK)
            for config in attention_configs.candidates(device, dtype, size, ragged=ragged, mean_row=mean_row)
        }
        for config in rows:
            for tail, name in ((means, "coupled"), (None, "without tail")):
                run = functools.partial(attention.attention, q, k, v, plan, tail, SCALE, out, config)
                yield Shipped("block_sparse_attention", f"{'ragged' if ragged else 'blocks'}, {name}", config, run)
    yield from _planning(device, q, k, dtype, size)
    yield from _measuring(device, q, k, v, dtype, size)


def _planning(device: Device, q: Tensor, k: Tensor, dtype: torch.dtype, size: int) -> Iterator[Shipped]:
    """k-means with its sorts, and the planners of both methods."""
    ready, span = _tensor(1, dtype=torch.int32), [0, TOKENS - 512]
    centroids = (_tensor(HEADS, Q_CLUSTERS, size, dtype=dtype), _tensor(HEADS, K_CLUSTERS, size, dtype=dtype))
    for assign in kmeans_configs.assign_candidates(device, dtype, size):
        both = (q, k, None, None, span, span, *centroids, ready, False, 2, 0)
        yield Shipped(
            "kmeans", "two iterations", assign, functools.partial(clusters.cluster_both, *both, assign=assign)
        )
    ragged, blocks = _clusters(), _blocks()
    means = (_tensor(HEADS, Q_CLUSTERS, size), _tensor(HEADS, K_CLUSTERS, size))
    top_p = (*means, ragged.q_offsets, ragged.k_offsets, ready, SCALE, 0.9, 0.1, None, "mass", True, 0)
    yield Shipped("block_map", "top p", (), functools.partial(plans.plan_top_p, *top_p))
    groups = blocks.key_groups
    video = _tensor(groups, dtype=torch.bool).squeeze(0)
    top_k = (_tensor(HEADS, groups, groups), blocks.q_offsets, video, blocks.k_offsets, video)
    yield Shipped("block_map", "top k", (), functools.partial(plans.plan_top_k, *top_k, 0.8, "paper", "mass", True, 0))
    asked, rest = _tensor(HEADS), (Bounds(0.02, 1.0), "mass", True, 0)
    estimated = (*means, ragged.q_offsets, ragged.k_offsets, ready, asked, SCALE, *rest)
    yield Shipped("recall_map", "estimated recall", (), functools.partial(recall.plan_estimated_recall, *estimated))
    measured = functools.partial(recall.plan_measured_recall, *top_k, 0.9, *rest)
    yield Shipped("recall_map", "measured recall", (), measured)


def _measuring(device: Device, q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, size: int) -> Iterator[Shipped]:
    """Block mass, pooled keys and kept mass."""
    plan, ready, lse = _blocks(), _tensor(1, dtype=torch.int32), _tensor(HEADS, TOKENS)
    sides = Groups(None, plan.q_offsets), Groups(None, plan.k_offsets)
    for mass_config in mass_configs.candidates(device, dtype, size):
        search = functools.partial(
            mass.block_mass, q, k, lse, ready, *sides, BLOCK, SCALE, 1, False, config=mass_config
        )
        yield Shipped("block_mass", "kept log-sum-exp", mass_config, search)
    ragged, span = _clusters(), [0, TOKENS - 512]
    for coupling in pooled_configs.coupling_candidates(device, dtype, size):
        pool = functools.partial(
            pooled.pooled_keys, k, v, ragged.k_order, ragged.k_offsets, span, True, coupling_config=coupling
        )
        yield Shipped("pooled_keys", "coupled", coupling, pool)
    for config in kept_configs.candidates(device, dtype, size):
        probe = functools.partial(kept.kept_mass, q, k, None, span, ragged, SCALE, 64, 0, config=config)
        yield Shipped("kept_mass", "64 rows", config, probe)


def _tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory, with a batch dimension in front."""
    return torch.empty((BATCH, *shape), dtype=dtype, device="meta")


def _integers(*shape: int) -> Tensor:
    return _tensor(*shape, dtype=torch.int32)


def _clusters() -> Plan:
    """The shape of a plan of SVG2: clusters, text and padding."""
    rows, columns = Q_CLUSTERS + 2, K_CLUSTERS + 2
    order, keep = _integers(HEADS, TOKENS), _integers(HEADS, rows, -(-columns // 32))
    return Plan(order, _integers(HEADS, rows + 1), order, _integers(HEADS, columns + 1), keep)


def _blocks() -> Plan:
    """The shape of a plan of AdaSpa without a mask: blocks in place and padding."""
    groups = -(-TOKENS // BLOCK) + 1
    bounds = _integers(HEADS, groups + 1)
    return Plan(None, bounds, None, bounds, _integers(HEADS, groups, -(-groups // 32)))
