"""SVG2: cluster queries and keys by k-means, keep the key clusters with the most mass.

Source: Sparse VideoGen2 (arXiv 2505.18875). State: the centroids of queries and keys, from which the next call's
k-means starts. Each call makes its own plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch

from sparse_compile.phases import Moment, Phase
from sparse_compile.plan import TensorSpec
from sparse_compile.sites import Reason
from sparse_compile.strategies.base import Effort
from sparse_compile.strategies.sparse_attention import PlanFigures, PlanNodes, write_kept_mass, write_sparse_attention

if TYPE_CHECKING:
    from torch.fx import Node

    from sparse_compile.config import Config
    from sparse_compile.sites import Site
    from sparse_compile.strategies.base import GraphBuilder

Size = int | torch.SymInt

TOKENS_PER_QUERY_CLUSTER, QUERY_CLUSTERS = 256, (32, 400)
TOKENS_PER_KEY_CLUSTER, KEY_CLUSTERS = 76, (64, 1000)
TOKENS_PER_CLUSTER_FLOOR = 4
"""Below this many tokens per cluster there is nothing to gain (docs/svg2.md, section 3)."""

EXPECTED_DENSITY = 0.3
"""Of sparse calls under ``top_p``, before any was made: arXiv 2505.18875 reports 0.26 to 0.31 of its main settings."""
EVERYTHING = 1.0
"""The ``top_p`` of a plan that goes by another budget."""


class Svg2:
    """The phases: dense first steps, one search (k-means from scratch, attends sparsely), then sparse."""

    name = "svg2"
    phases = (Phase.DENSE, Phase.SEARCH, Phase.SPARSE)

    def phase(self, moment: Moment, searched: int | None, config: Config) -> Phase:
        """Dense for the first ``dense_steps``, then a search per generation and branch."""
        if moment.step < moment.count(config.dense_steps):
            return Phase.DENSE
        return Phase.SEARCH if searched is None else Phase.SPARSE

    def state(self, site: Site, config: Config) -> Mapping[str, TensorSpec]:
        """Centroids in the dtype of q, whether a search has filled them, and what a recall target asks of each head."""
        assert site.layout is not None and site.key_layout is not None, "classify_sites fills the layouts"
        batch, heads, q_tokens, dim = site.query.meta["example_value"].shape
        _, kv_heads, k_tokens, _ = site.key.meta["example_value"].shape
        q_clusters = query_clusters(site.layout.video_size(q_tokens), config)
        k_clusters = key_clusters(site.key_layout.video_size(k_tokens), config)
        specs = {
            "q_centroids": TensorSpec((batch, heads, q_clusters, dim), site.dtype, site.device),
            "k_centroids": TensorSpec((batch, kv_heads, k_clusters, dim), site.dtype, site.device),
            "ready": TensorSpec((1,), torch.int32, site.device),
        }
        if _calibrated(config):
            specs["asked"] = TensorSpec((batch, heads), torch.float32, site.device)
        return specs

    def unsupported_reason(self, site: Site, config: Config) -> Reason | None:
        """Too few tokens for the number of clusters, unless ``min_tokens`` says otherwise."""
        video = 0 if site.layout is None else site.layout.video_tokens
        return Reason.TOO_SHORT if video < self.fewest_tokens(config) else None

    def fewest_tokens(self, config: Config) -> int:
        """Some tokens a cluster; where their number follows the tokens, the least number of clusters decides."""
        if config.min_tokens is not None:
            return config.min_tokens
        q_clusters = QUERY_CLUSTERS[0] if config.q_clusters is None else config.q_clusters
        k_clusters = KEY_CLUSTERS[0] if config.k_clusters is None else config.k_clusters
        return TOKENS_PER_CLUSTER_FLOOR * max(q_clusters, k_clusters)

    def effort(self, site: Site, config: Config) -> Effort:
        """The products of k-means, and a fixed density or what a budget of mass leads to."""
        assert site.layout is not None and site.key_layout is not None, "classify_sites fills the layouts"
        queries, keys = site.layout.video_tokens, site.key_layout.video_tokens
        q_groups, k_groups = int(query_clusters(queries, config)), int(key_clusters(keys, config))
        density = EXPECTED_DENSITY if config.density_at_work is None else config.density_at_work
        if config.target_recall is not None:
            density = min(max(density, config.min_density), config.max_density)
        return Effort(density, config.kmeans_iters * (queries * q_groups + keys * k_groups), k_groups)

    def write(self, build: GraphBuilder, site: Site, phase: Phase) -> Node:
        """k-means, plan, sparse attention; a search differs in how k-means starts and how long it runs."""
        config, restart = build.config, phase is Phase.SEARCH
        made = write_clusters(build, restart)
        if config.target_recall is None:
            return write_sparse_attention(build, _write_plan(build, made), non_finite=made.non_finite)
        plan, figures = _write_recall_plan(build, made, config.target_recall)
        if restart and _calibrated(config):  # nothing is known of these heads yet: once more, with what this one kept
            plan, figures = _write_recall_plan(build, made, config.target_recall)
        return write_sparse_attention(build, plan, figures=figures, non_finite=made.non_finite)


class Clusters(NamedTuple):
    """The nodes of `kmeans`."""

    q_order: Node
    q_offsets: Node
    q_means: Node
    k_order: Node
    k_offsets: Node
    k_means: Node
    non_finite: Node

    def plan(self, keep: Node) -> PlanNodes:
        """The Plan of these clusters, text and padding, with a bitmap."""
        return PlanNodes(self.q_order, self.q_offsets, self.k_order, self.k_offsets, keep)


def write_clusters(build: GraphBuilder, restart: bool) -> Clusters:
    """Cluster q and k: from scratch, or from where the centroids of the state lie."""
    config = build.config
    clusters = build.call(
        "kmeans",
        build.query,
        build.key,
        build.valid("query"),
        build.valid("key"),
        build.video_spans("query"),
        build.video_spans("key"),
        build.state("q_centroids"),
        build.state("k_centroids"),
        build.state("ready"),
        restart,
        config.kmeans_iters_init if restart else config.kmeans_iters,
        config.seed,
    )
    return Clusters(*(build.item(clusters, index) for index in range(7)))


def _calibrated(config: Config) -> bool:
    """Whether probe rows correct what a recall target asks of the estimate."""
    return config.target_recall is not None and config.probe_rows > 0


def _write_plan(build: GraphBuilder, clusters: Clusters) -> PlanNodes:
    """A plan by a fixed density, or by the paper's top-p."""
    config = build.config
    keep = build.call(
        "plan_top_p",
        clusters.q_means,
        clusters.k_means,
        clusters.q_offsets,
        clusters.k_offsets,
        build.state("ready"),
        build.scale,
        EVERYTHING if config.top_p is None else config.top_p,
        config.min_kept,
        config.density_at_work,
        config.rank_by,
        build.padded_queries_attend(),
        config.seed,
    )
    return clusters.plan(keep)


def _write_recall_plan(build: GraphBuilder, clusters: Clusters, target: float) -> tuple[PlanNodes, PlanFigures]:
    """A plan that is to keep the target share of the mass; the estimate that it goes by is calibrated for the next."""
    config = build.config
    asked = build.state("asked") if _calibrated(config) else None
    planned = build.call(
        "plan_estimated_recall",
        clusters.q_means,
        clusters.k_means,
        clusters.q_offsets,
        clusters.k_offsets,
        build.state("ready"),
        asked,
        build.scale,
        target,
        config.min_density,
        config.max_density,
        config.rank_by,
        build.padded_queries_attend(),
        config.seed,
    )
    plan, at_bounds = clusters.plan(build.item(planned, 0)), build.item(planned, 1)
    measured = write_kept_mass(build, plan)
    if asked is not None:
        build.call("calibrate_recall", measured, at_bounds, target, asked)
    return plan, PlanFigures(measured, at_bounds=at_bounds)


def query_clusters(tokens: Size, config: Config) -> Size:
    """Number of query clusters Cq for this many video queries; never more clusters than tokens."""
    return _least(tokens, _clusters(config.q_clusters, tokens, TOKENS_PER_QUERY_CLUSTER, QUERY_CLUSTERS))


def key_clusters(tokens: Size, config: Config) -> Size:
    """Number of key clusters Ck for this many video keys."""
    return _least(tokens, _clusters(config.k_clusters, tokens, TOKENS_PER_KEY_CLUSTER, KEY_CLUSTERS))


def _clusters(given: int | None, tokens: Size, per_cluster: int, bounds: tuple[int, int]) -> Size:
    if given is not None:
        return given
    low, high = bounds
    clusters: Size = torch.sym_max(low, _least(high, tokens // per_cluster))
    return clusters


def _least(a: Size, b: Size) -> Size:
    """The smaller of two sizes; symbolic ones are not compared, which would add a guard."""
    least: Size = torch.sym_min(a, b)
    return least
