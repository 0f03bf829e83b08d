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


@dataclass(frozen=True)
class PlanFigures:
    """What the report is told of a Plan beside its density; None where it is not known.

    Nodes: kept_mass and planned_mass float32 [B, H], now and when the Plan was made; at_bounds float32 [B, H, 2], the
    shares of the queries that the floor and the ceiling of their budget hold.
    """

    kept_mass: Node | None = None
    planned_mass: Node | None = None
    at_bounds: Node | None = None


def write_sparse_attention(
    build: GraphBuilder, plan: PlanNodes, *, figures: PlanFigures | None = None, non_finite: Node | None = None
) -> Node:
    """Attend by a Plan, with the correction that the options ask for.

    Args:
        build: the builder of the site.
        plan: which key groups each query group attends to.
        figures: for the report; None: the kept mass is measured on as many probe rows as the options say.
        non_finite: count of unusable tokens for the report; None: rows without a finite result are counted.

    Returns:
        The node of the attention output.
    """
    told = PlanFigures(write_kept_mass(build, plan)) if figures is None else figures
    attention = build.call(
        "block_sparse_attention",
        build.query,
        build.key,
        build.value,
        *plan.fields(),
        *_write_pooled_keys(build, plan),
        told.kept_mass,
        told.planned_mass,
        told.at_bounds,
        non_finite,
        build.log(),
        build.scale,
        build.token_major(),
    )
    return build.item(attention, 0)


def write_kept_mass(build: GraphBuilder, plan: PlanNodes) -> Node | None:
    """Measure on probe rows the attention mass that a Plan keeps, float32 [B, H]; None where ``probe_rows`` is 0."""
    if build.config.probe_rows == 0:
        return None
    return build.call(
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
