"""A trial method: SVG2 that keeps the pairs of clusters where a stand-in would do the most harm.

SVG2 ranks key clusters by the attention mass they take. Where pooled keys stand for what is skipped, mass is not what
is lost: a cluster whose keys and values hardly differ is stood for well, however heavy it is. This method ranks by an
estimate of the error of being pooled, per key. For query cluster i, key cluster j of n_j keys, and softmax scale s::

    P_ij   = softmax_j(s q_mean_i . k_mean_j + ln n_j)       estimated mass
    u_ij^2 = s^2 sum_d mean_i(q_d^2) var_j(k_d)              variance of the logits inside the pair
    w_j^2  = sum_d var_j(v_d)                                spread of the values
    e_ij   = P_ij u_ij w_j                                   ranked by e_ij / n_j

To first order the error of a pooled pair is P_ij u_ij w_j times the correlation of logits and values within it.

    options = {"method": "sparse_compile.evaluation.error_budget:ErrorBudget", "density": 0.25}

The budget is ``density``, a share of the keys of each row, as in SVG2; or, with ``top_p``, a row keeps pairs until the
sum of its other e_ij is at most (1 - top_p) of the spread of all values of the head: an error in units of the output,
since a share of the row's own errors would spend as much on rows that have next to none. ``rank_by`` and ``min_kept``
have no effect. The other options are those of SVG2.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sparse_compile.errors import SparseAttentionError
from sparse_compile.kernels.block_map.completion import complete_rows
from sparse_compile.kernels.block_map.reference import log_mass, scores, select, shares
from sparse_compile.phases import Phase
from sparse_compile.plan import BITS_PER_WORD, pack_bits
from sparse_compile.strategies.sparse_attention import write_sparse_attention
from sparse_compile.strategies.svg2 import Svg2, write_clusters

if TYPE_CHECKING:
    from torch.fx import Node

    from sparse_compile.config import Config
    from sparse_compile.sites import Site
    from sparse_compile.strategies.base import GraphBuilder

NAMESPACE = "sparse_compile_error_budget"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
LIBRARY.define(
    "plan(Tensor q, Tensor k, Tensor v, Tensor q_order, Tensor q_offsets, Tensor q_means, Tensor k_order,"
    " Tensor k_offsets, Tensor k_means, Tensor ready, float scale, float? density, float top_p,"
    " bool padded_queries_attend) -> Tensor keep"
)


class ErrorBudget(Svg2):
    """SVG2 in its phases and state, with another choice among the clusters."""

    name = "error_budget"

    def write(self, build: GraphBuilder, site: Site, phase: Phase) -> Node:
        """k-means as SVG2 has it, the plan by expected errors, sparse attention."""
        density, top_p = budget(build.config)
        clusters = write_clusters(build, restart=phase is Phase.SEARCH)
        keep = build.call(
            f"{NAMESPACE}::plan",
            build.query,
            build.key,
            build.value,
            *clusters[:6],
            build.state("ready"),
            build.scale,
            density,
            top_p,
            build.padded_queries_attend(),
        )
        return write_sparse_attention(build, clusters.plan(keep), non_finite=clusters.non_finite)


def budget(config: Config) -> tuple[float | None, float]:
    """The density, or None and the top_p.

    Raises:
        SparseAttentionError: another budget was asked for.
    """
    if config.target_recall is not None:
        raise SparseAttentionError(
            "ErrorBudget goes by density or top_p", f"target_recall={config.target_recall}", "Leave it out."
        )
    return config.density_at_work, 1.0 if config.top_p is None else config.top_p


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_order: Tensor,
    q_offsets: Tensor,
    q_means: Tensor,
    k_order: Tensor,
    k_offsets: Tensor,
    k_means: Tensor,
    ready: Tensor,
    scale: float,
    density: float | None,
    top_p: float,
    padded_queries_attend: bool,
) -> Tensor:
    """The keep bitmap of a Plan, by the expected errors of the pairs of clusters.

    Shapes: q [B, H, Sq, D], k [B, Hkv, Sk, D], v [B, Hkv, Sk, Dv]; orders, offsets and means as `kmeans` returns them
        (C clusters, then text, then padding); ready int32 [1], where 0 keeps every valid key for every query.
    Returns: int32 [B, H, Cq + 2, ceil((Ck + 2) / 32)].
    """
    batches, heads, q_clusters, _ = q_means.shape
    key_heads, k_clusters = k_means.shape[1:3]
    rows = []
    for batch in range(batches):
        for head in range(heads):
            key_head = head // (heads // key_heads)
            q_side = (q_order[batch, head], q_offsets[batch, head], q_clusters)
            k_side = (k_order[batch, key_head], k_offsets[batch, key_head], k_clusters)
            sizes = k_offsets[batch, key_head].diff()[:k_clusters]
            values = moments(v[batch, key_head], *k_side)
            error = pair_errors(
                scores(q_means[batch, head], k_means[batch, key_head], scale),
                sizes,
                moments(q[batch, head], *q_side),
                moments(k[batch, key_head], *k_side),
                values,
                scale,
            )
            rows.append(choose(error, sizes, density, top_p, whole_spread(values, sizes)))
    kept = torch.stack(rows).view(batches, heads, q_clusters, k_clusters)
    with_text = torch.nn.functional.pad(kept, (0, 1), value=True)
    keep = pack_bits(torch.nn.functional.pad(with_text, (0, 1, 0, 2)))
    text_or_padding = torch.arange(q_clusters + 2, device=keep.device) >= q_clusters
    whole = ((ready.view(()) == 0) | text_or_padding).expand(keep.shape[:3])
    return complete_rows(keep, whole, q_offsets, k_offsets, padded_queries_attend)


class Moments(NamedTuple):
    """Mean and variance of each column in each cluster, float64 [C, D]; both 0 where a cluster is empty."""

    mean: Tensor
    variance: Tensor


def moments(x: Tensor, order: Tensor, offsets: Tensor, clusters: int) -> Moments:
    """Of the first groups of an order.

    Shapes: x [S, D]; order int32 [S]; offsets int32 [G + 1], of which the first ``clusters`` groups count.
    """
    rows = x[order.long()].double()
    sizes = offsets.diff()
    group = torch.arange(len(sizes), device=x.device).repeat_interleave(sizes.long(), output_size=len(order))

    def mean(columns: Tensor) -> Tensor:
        sums = columns.new_zeros(len(sizes), columns.shape[1]).index_add(0, group, columns)
        return sums / sizes.clamp(min=1).unsqueeze(-1)

    means = mean(rows)
    return Moments(means[:clusters], mean((rows - means[group]).square())[:clusters])


def pair_errors(
    similarity: Tensor, sizes: Tensor, queries: Moments, keys: Moments, values: Moments, scale: float
) -> Tensor:
    """e_ij of the module's docstring, float64 [Cq, Ck]; inf where it is not finite, so that such a pair is kept.

    Args:
        similarity: s q_mean_i . k_mean_j, [Cq, Ck].
        sizes: n_j, [Ck].
        queries: of the query clusters.
        keys: of the key clusters.
        values: of the values in the key clusters.
        scale: s.
    """
    mass = shares(log_mass(similarity, sizes))
    squares = queries.mean.square() + queries.variance
    logit_spread = abs(scale) * (squares @ keys.variance.t()).sqrt()
    error = mass * logit_spread * values.variance.sum(-1).sqrt()
    return torch.where(torch.isfinite(error), error, math.inf)


def choose(error: Tensor, sizes: Tensor, density: float | None, top_p: float, spread: Tensor) -> Tensor:
    """Which pairs to keep exactly, bool [Cq, Ck]: per key the largest errors first, at least one pair a row.

    Args:
        error: e_ij, [Cq, Ck].
        sizes: n_j, [Ck].
        density: share of the keys that a row keeps; None: until what is left is at most (1 - top_p) of the spread.
        top_p: see above; 1 keeps everything.
        spread: of the values of the head, [].
    """
    rank = error / sizes.clamp(min=1)
    if density is not None:
        return select(error, rank, sizes, 1.0, 0, density)
    occupied = (sizes > 0).expand_as(error)
    if top_p >= 1:
        return occupied
    order = torch.where(occupied, rank, -math.inf).argsort(dim=-1, descending=True, stable=True)
    left = error.gather(-1, order).flip(-1).cumsum(-1).flip(-1)  # were this place, and all behind it, not kept
    first = torch.arange(len(sizes), device=error.device) == 0
    taken = (left > (1 - top_p) * spread) | first
    return torch.zeros_like(taken).scatter(-1, order, taken) & occupied


def whole_spread(values: Moments, sizes: Tensor) -> Tensor:
    """Root of the summed variances of all values in the clusters of these sizes, []; 0 where it is not finite."""
    share = sizes / sizes.sum().clamp(min=1).double()
    between = (values.mean - share @ values.mean).square()
    spread = (share @ (values.variance + between)).sum().sqrt()
    return torch.where(torch.isfinite(spread), spread, 0)


def _plan_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
    q_offsets, k_offsets = rest[1], rest[4]
    words = (k_offsets.shape[2] - 1 + BITS_PER_WORD - 1) // BITS_PER_WORD
    return q.new_empty((*q.shape[:2], q_offsets.shape[2] - 1, words), dtype=torch.int32)


LIBRARY.impl("plan", plan, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::plan", _plan_fake, lib=LIBRARY)
