"""What every method writes once its Plan is made: stand-ins for the skipped keys, kept mass, attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.fx import Node

    from sparse_compile.strategies.base import GraphBuilder


@dataclass(frozen=True)
class PlanNodes:
    """The nodes of a `sparse_compile.plan.Plan`; an order of None leaves the tokens in place."""

    q_order: Node | None
    q_offsets: Node
    k_order: Node | None
    k_offsets: Node
    keep: Node

    def fields(self) -> tuple[Node | None, ...]:
        """In the order in which the ops take them."""
        return (self.q_order, self.q_offsets, self.k_order, self.k_offsets, self.keep)


def write_sparse_attention(
    build: GraphBuilder,
    plan: PlanNodes,
    *,
    non_finite: Node | None = None,
    recall: Node | None = None,
    offset: Node | None = None,
) -> Node:
    """Attend by a Plan, with the correction and the probe rows that the options ask for.

    Args:
        build: the builder of the site.
        plan: which key groups each query group attends to.
        non_finite: count of unusable tokens for the report; None: rows without a finite result are counted.
        recall: see `write_kept_mass`.
        offset: see `write_kept_mass`.

    Returns:
        The node of the attention output.
    """
    attention = build.call(
        "block_sparse_attention",
        build.query,
        build.key,
        build.value,
        *plan.fields(),
        *_write_pooled_keys(build, plan),
        write_kept_mass(build, plan, recall=recall, offset=offset),
        non_finite,
        build.log(),
        build.scale,
        build.token_major(),
    )
    return build.item(attention, 0)


def write_kept_mass(
    build: GraphBuilder, plan: PlanNodes, *, recall: Node | None = None, offset: Node | None = None
) -> Node | None:
    """Measure the attention mass that a Plan keeps, float32 [B, H]; None where ``probe_rows`` is 0.

    Args:
        build: the builder of the site.
        plan: the Plan.
        recall: the exact kept mass of a Plan just made, to which the probe rows are then tied.
        offset: state float32 [B, H] that holds what ties them; None for a method that makes a Plan in each call.
    """
    if build.config.probe_rows == 0:
        return None
    measured = build.call(
        "kept_mass",
        build.query,
        build.key,
        build.valid("query"),
        build.video_spans("query"),
        *plan.fields(),
        build.scale,
        build.config.probe_rows,
        build.config.seed,
    )
    return measured if offset is None else build.call("paired_kept_mass", measured, recall, offset)


def _write_pooled_keys(build: GraphBuilder, plan: PlanNodes) -> tuple[Node | None, ...]:
    """The nodes of `sparse_compile.plan.PooledKeys`, or four times None."""
    correction = build.config.correction_at_work
    if correction == "none":
        return (None, None, None, None)
    coupled = correction == "coupled"
    spans = build.video_spans("key")
    pooled = build.call("pooled_keys", build.key, build.value, plan.k_order, plan.k_offsets, spans, coupled)
    mean_k, mean_v, log_size, coupling = (build.item(pooled, index) for index in range(4))
    return (mean_k, mean_v, log_size, coupling if coupled else None)
