"""One attention site with the state of both methods: every op of the package as a call that can be timed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import sparse_compile.ops  # noqa: F401 - registers the ops
from benchmarks.gpu.shapes import Shape
from sparse_compile.call_log import log_spec
from sparse_compile.config import Config
from sparse_compile.plan import Plan, PooledKeys
from sparse_compile.strategies.svg2 import key_clusters, query_clusters

OPS = torch.ops.sparse_compile
BLOCK = 64
TOP_P = 0.9
"""The budget of SVG2's paper (arXiv 2505.18875)."""


class Site:
    """q, k and v of one call, and what the layers of a model keep from step to step. Options are the defaults.

    Args:
        shape: of the call.
        operands: q, k and v, [1, H, S, D].
        kernel: which implementation of the ops.
    """

    def __init__(self, shape: Shape, operands: tuple[Tensor, ...], kernel: str) -> None:
        self.shape, self.kernel, self.scale = shape, kernel, shape.scale
        self.q, self.k, self.v = operands
        self.video = [0, shape.video]
        self.config = Config.from_options({}, environ={})
        device, heads = self.q.device, shape.heads
        spec = log_spec(device, heads)
        self.log = torch.zeros(spec.shape, dtype=spec.dtype, device=device)
        clusters = (query_clusters(shape.video, self.config), key_clusters(shape.video, self.config))
        self.centroids = [self.q.new_zeros((1, heads, int(count), shape.size)) for count in clusters]
        self.earlier = self.centroids
        self.ready = torch.zeros(1, dtype=torch.int32, device=device)
        self.lse = torch.zeros(1, heads, shape.tokens, device=device)
        self.offset = torch.zeros(1, heads, device=device)
        self.planned = torch.zeros(1, heads, device=device)
        self.blocks = self.token_blocks()
        groups = self.blocks[1].shape[-1] - 1
        self.keep = torch.zeros(1, heads, groups, -(-groups // 32), dtype=torch.int32, device=device)

    # ------------------------------------------------------------------ what every method does

    def attention(self, plan: Plan, pooled: PooledKeys | None = None, mass: Tensor | None = None) -> tuple[Any, Any]:
        """`block_sparse_attention`: output and log-sum-exp."""
        tail = (None,) * 4 if pooled is None else (pooled.mean_k, pooled.mean_v, pooled.log_size, pooled.coupling)
        out, lse = OPS.block_sparse_attention(
            self.q,
            self.k,
            self.v,
            *_fields(plan),
            *tail,
            mass,
            None,
            None,
            None,
            self.log,
            self.scale,
            True,
            self.kernel,
        )
        return out, lse

    def pooled_keys(self, plan: Plan, coupled: bool = True) -> PooledKeys:
        """`pooled_keys`, with the coupling matrix or without."""
        made = OPS.pooled_keys(self.k, self.v, plan.k_order, plan.k_offsets, self.video, coupled, self.kernel)
        return PooledKeys(*made[:3], made[3] if coupled else None)

    def kept_mass(self, plan: Plan) -> Tensor:
        """`kept_mass` on as many probe rows as by default."""
        settings = (self.scale, self.config.probe_rows, self.config.seed, self.kernel)
        measured: Tensor = OPS.kept_mass(self.q, self.k, None, self.video, *_fields(plan), *settings)
        return measured

    # ------------------------------------------------------------------ SVG2

    def kmeans(self, restart: bool) -> tuple[Tensor, ...]:
        """`kmeans` of a search or of a sparse call."""
        iterations = self.config.kmeans_iters_init if restart else self.config.kmeans_iters
        state = (*self.centroids, self.ready)
        settings = (restart, iterations, self.config.seed, self.kernel)
        made: tuple[Tensor, ...] = OPS.kmeans(self.q, self.k, None, None, self.video, self.video, *state, *settings)
        return made

    def keep_centroids(self, noise: float = 0.1, seed: int = 0) -> None:
        """Remember the centroids, moved by noise: what a step finds whose q and k are not those of the step before.

        From the very centroids of the call before, k-means is at rest, and skips what a step of a model has to do.
        """
        generator = torch.Generator(self.q.device).manual_seed(seed)
        draws = [torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype) for x in self.centroids]
        self.earlier = [x + noise * draw for x, draw in zip(self.centroids, draws, strict=True)]

    def restore_centroids(self) -> None:
        """What `keep_centroids` remembered."""
        for x, earlier in zip(self.centroids, self.earlier, strict=True):
            x.copy_(earlier)

    def plan_top_p(self, clusters: tuple[Tensor, ...], density: float | None = None) -> Plan:
        """`plan_top_p` for what `kmeans` returned; by the paper's top-p, or at a density."""
        q_order, q_offsets, q_means, k_order, k_offsets, k_means, _ = clusters
        settings = (self.scale, TOP_P, self.config.min_kept, density, "mass", True, self.config.seed)
        keep = OPS.plan_top_p(q_means, k_means, q_offsets, k_offsets, self.ready, *settings, self.kernel)
        return Plan(q_order, q_offsets, k_order, k_offsets, keep)

    def svg2_call(self, density: float) -> tuple[Any, Any]:
        """All ops of SVG2's sparse call."""
        plan = self.plan_top_p(self.kmeans(restart=False), density)
        return self.attention(plan, self.pooled_keys(plan), self.kept_mass(plan))

    # ------------------------------------------------------------------ AdaSpa

    def token_blocks(self) -> tuple[Tensor, ...]:
        """`token_blocks` of the default size."""
        sides = (None, None, self.video, self.video, BLOCK, BLOCK)
        made: tuple[Tensor, ...] = OPS.token_blocks(self.q, self.k, *sides, self.kernel)
        return made

    def attention_with_lse(self) -> Tensor:
        """`attention_with_lse`; writes ``lse``."""
        settings = (True, self.scale, True, self.kernel)
        out: Tensor = OPS.attention_with_lse(self.q, self.k, self.v, None, None, self.lse, *settings)
        return out

    def block_mass(self, fresh: bool) -> Tensor:
        """`block_mass` of a search (with the log-sum-exp of this call) or of a refining call (with a kept one)."""
        _, q_offsets, _, _, k_offsets, _ = self.blocks
        groups = (None, q_offsets, None, k_offsets, BLOCK)
        mass: Tensor = OPS.block_mass(self.q, self.k, self.lse, self.ready, *groups, self.scale, 1, fresh, self.kernel)[
            0
        ]
        return mass

    def plan_top_k(self, mass: Tensor, density: float) -> Plan:
        """`plan_top_k`; writes the plan into ``keep``."""
        sides = tuple(self.blocks[place] for place in (1, 2, 4, 5))
        settings = (1 - density, "paper", "mass", True, self.config.seed)
        OPS.plan_top_k(mass, *sides, self.keep, self.ready, *settings, self.kernel)
        return self.block_plan(self.keep)

    def block_plan(self, keep: Tensor) -> Plan:
        """A plan over the blocks."""
        return Plan(None, self.blocks[1], None, self.blocks[4], keep)

    def adaspa_call(self) -> tuple[Any, Any]:
        """All ops of AdaSpa's sparse call."""
        self.blocks = self.token_blocks()
        sides = tuple(self.blocks[place] for place in (1, 2, 4, 5))
        plan = self.block_plan(OPS.kept_blocks(self.keep, self.ready, *sides, True, self.kernel))
        mass = OPS.paired_kept_mass(self.kept_mass(plan), None, self.offset, self.planned, self.kernel)
        return self.attention(plan, self.pooled_keys(plan), mass)


def _fields(plan: Plan) -> tuple[Tensor | None, ...]:
    return (plan.q_order, plan.q_offsets, plan.k_order, plan.k_offsets, plan.keep)
