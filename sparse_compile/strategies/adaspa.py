"""AdaSpa: measure the exact mass of every block once, keep the heaviest of each row, reuse the plan for many steps.

Source: AdaSpa (arXiv 2502.21079); docs/adaspa.md says what is computed, and what the paper leaves open. State: the plan
as a bitmap, and the log-sum-exp of each query row, which makes a later search cost one product of queries and keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sparse_compile.errors import SparseAttentionError
from sparse_compile.phases import Moment, Phase
from sparse_compile.plan import BITS_PER_WORD, TensorSpec
from sparse_compile.sites import Reason, TokenLayout
from sparse_compile.strategies.base import Effort
from sparse_compile.strategies.sparse_attention import PlanFigures, PlanNodes, write_kept_mass, write_sparse_attention

if TYPE_CHECKING:
    from torch.fx import Node

    from sparse_compile.config import Config
    from sparse_compile.sites import Site
    from sparse_compile.strategies.base import GraphBuilder, Side

Size = int | torch.SymInt

FEWEST_TOKENS, FEWEST_BLOCKS = 4096, 16
"""Below these there is nothing to gain (docs/adaspa.md, section 9)."""
EXPECTED_DENSITY = 0.3
"""Of sparse calls under ``target_recall``, before any was made: a guess, near that of SVG2's budgets of mass."""
FEWEST_STEPS_TO_SEARCH_AGAIN = 20
"""In a shorter run a share names no later search: the plan is not held for long (docs/adaspa.md, section 8)."""


class AdaSpa:
    """The phases: dense first steps, whose last one searches; then sparse; a refining call searches again.

    A search is dense in its output. A refining call makes a new plan and attends by it at once.
    """

    name = "adaspa"
    phases = (Phase.DENSE, Phase.SEARCH, Phase.SPARSE, Phase.REFINE)

    def phase(self, moment: Moment, searched: int | None, config: Config) -> Phase:
        """Without a plan dense, then a search; with one sparse, and a refining call where a search is due.

        Due is latched: a step whose call was skipped hands its search to the next call. The schedule says what is due,
        and the monitor: it asks for searches beside it, and takes back those that are not needed.
        """
        dense_steps = moment.count(config.dense_steps)
        if dense_steps >= moment.steps:
            return Phase.DENSE
        steps = {*search_steps(moment, config)}
        if config.watches_plans:  # the verdicts may be about other models of the clock
            steps = steps - {*moment.sound} | {*moment.stale}
        if searched is None:
            return Phase.DENSE if moment.step < dense_steps - 1 else Phase.SEARCH
        return Phase.REFINE if any(searched < step <= moment.step for step in steps) else Phase.SPARSE

    def state(self, site: Site, config: Config) -> Mapping[str, TensorSpec]:
        """The plan's bitmap, the log-sum-exp, whether both are filled, and what is known of the plan's recall."""
        assert site.layout is not None and site.key_layout is not None, "classify_sites fills the layouts"
        batch, heads, q_tokens, _ = site.query.meta["example_value"].shape
        k_tokens = site.key.meta["example_value"].shape[2]
        rows = block_groups(site.layout, q_tokens, config.block_size)
        columns = block_groups(site.key_layout, k_tokens, config.block_size)
        words = (columns + BITS_PER_WORD - 1) // BITS_PER_WORD
        specs = {
            "keep": TensorSpec((batch, heads, rows, words), torch.int32, site.device),
            "lse": TensorSpec((batch, heads, q_tokens), torch.float32, site.device),
            "ready": TensorSpec((1,), torch.int32, site.device),
        }
        if config.probe_rows:
            specs["probe_offset"] = TensorSpec((batch, heads), torch.float32, site.device)
            specs["planned_mass"] = TensorSpec((batch, heads), torch.float32, site.device)
        if config.target_recall is not None:
            specs["at_bounds"] = TensorSpec((batch, heads, 2), torch.float32, site.device)
        return specs

    def unsupported_reason(self, site: Site, config: Config) -> Reason | None:
        """Too few tokens or blocks, unless ``min_tokens`` says otherwise; a single block in any case."""
        layout = site.layout or TokenLayout(())
        if config.min_tokens is None and layout.video_tokens < self.fewest_tokens(config):
            return Reason.TOO_SHORT
        video = [layout.parts[start:stop] for start, stop in layout.visual_runs()]
        blocks = sum(-(-sum(part.length for part in run) // config.block_size) for run in video)
        return Reason.ONE_BLOCK if blocks <= 1 else None

    def fewest_tokens(self, config: Config) -> int:
        """A number of tokens, and one of blocks, the last of which may be short; never a single block."""
        if config.min_tokens is not None:
            return max(config.min_tokens, config.block_size + 1)
        return max(FEWEST_TOKENS, (FEWEST_BLOCKS - 1) * config.block_size + 1)

    def effort(self, site: Site, config: Config) -> Effort:
        """Whatever is not a pair of video tokens is kept; the plan is kept from an earlier call."""
        assert site.layout is not None and site.key_layout is not None, "classify_sites fills the layouts"
        queries, keys = site.query_sizes[2], site.key_sizes[2]
        video = site.layout.video_tokens * site.key_layout.video_tokens / (queries * keys)
        density = 1 - config.sparsity_at_work
        if config.target_recall is not None:
            density = min(max(EXPECTED_DENSITY, config.min_density), config.max_density)
        return Effort(1 - (1 - density) * video, 0, -(-keys // config.block_size))

    def write(self, build: GraphBuilder, site: Site, phase: Phase) -> Node:
        """Dense attention and a search, or sparse attention by the kept plan or by a new one."""
        blocks = _write_blocks(build)
        if phase is Phase.SPARSE:
            plan = _write_kept_plan(build, blocks)
            return write_sparse_attention(build, plan, figures=_write_figures(build, plan, None))
        if phase is Phase.REFINE:
            plan, recall = _write_search(build, blocks, fresh=False)
            return write_sparse_attention(build, plan, figures=_write_figures(build, plan, recall))
        out = build.call(
            "attention_with_lse",
            build.query,
            build.key,
            build.value,
            build.valid("query"),
            build.valid("key"),
            build.state("lse"),
            build.padded_queries_attend(),
            build.scale,
            build.token_major(),
        )
        plan, recall = _write_search(build, blocks, fresh=True)
        _write_figures(build, plan, recall)
        return out


@dataclass(frozen=True)
class _Blocks:
    """The nodes of `token_blocks`; an order of None where no mask moves padding to the end."""

    q_order: Node | None
    q_offsets: Node
    q_is_video: Node
    k_order: Node | None
    k_offsets: Node
    k_is_video: Node

    def plan(self, keep: Node) -> PlanNodes:
        return PlanNodes(self.q_order, self.q_offsets, self.k_order, self.k_offsets, keep)


def _write_blocks(build: GraphBuilder) -> _Blocks:
    sides: tuple[Side, Side] = ("query", "key")
    size = build.config.block_size
    made = build.call(
        "token_blocks",
        build.query,
        build.key,
        *(build.valid(side) for side in sides),
        *(build.video_spans(side) for side in sides),
        size,
        size,
    )
    q_order, q_offsets, q_is_video, k_order, k_offsets, k_is_video = (build.item(made, index) for index in range(6))
    return _Blocks(
        None if build.valid("query") is None else q_order,
        q_offsets,
        q_is_video,
        None if build.valid("key") is None else k_order,
        k_offsets,
        k_is_video,
    )


def _write_kept_plan(build: GraphBuilder, blocks: _Blocks) -> PlanNodes:
    kept = build.call(
        "kept_blocks",
        build.state("keep"),
        build.state("ready"),
        blocks.q_offsets,
        blocks.q_is_video,
        blocks.k_offsets,
        blocks.k_is_video,
        build.padded_queries_attend(),
    )
    return blocks.plan(kept)


def _write_search(build: GraphBuilder, blocks: _Blocks, *, fresh: bool) -> tuple[PlanNodes, Node]:
    """Measure all blocks and file a new plan; the plan, and the mass it keeps in each head.

    Args:
        build: the builder of the site.
        blocks: its blocks.
        fresh: whether the log-sum-exp in the state is that of this call.
    """
    config = build.config
    keep, lse, ready = (build.state(name) for name in ("keep", "lse", "ready"))
    plan = blocks.plan(keep)
    groups = plan.fields()[:-1]
    mass = build.call(
        "block_mass",
        build.query,
        build.key,
        lse,
        ready,
        *groups,
        config.block_size,
        build.scale,
        config.search_row_stride,
        fresh,
    )
    recall = _write_choice(build, blocks, build.item(mass, 0))
    if config.min_recall is not None:
        sides = (blocks.q_offsets, blocks.k_offsets)
        recall = build.call(
            "keep_weak_heads_whole", recall, *sides, keep, config.min_recall, build.padded_queries_attend()
        )
    return plan, recall


def _write_choice(build: GraphBuilder, blocks: _Blocks, mass: Node) -> Node:
    """Choose among the blocks by the budget of the options, and file the plan; the mass it keeps in each head."""
    config = build.config
    sides = (blocks.q_offsets, blocks.q_is_video, blocks.k_offsets, blocks.k_is_video)
    filed = (build.state("keep"), build.state("ready"))
    rest = (config.rank_by, build.padded_queries_attend(), config.seed)
    if config.target_recall is None:
        budget = (config.sparsity_at_work, config.head_adaptive)
        return build.item(build.call("plan_top_k", mass, *sides, *filed, *budget, *rest), 0)
    bounds = (config.target_recall, config.min_density, config.max_density)
    return build.call("plan_measured_recall", mass, *sides, *filed, build.state("at_bounds"), *bounds, *rest)


def _write_figures(build: GraphBuilder, plan: PlanNodes, recall: Node | None) -> PlanFigures:
    """What the report is told of a plan: ``recall`` is its exact kept mass if this call made it, else None."""
    at_bounds = None if build.config.target_recall is None else build.state("at_bounds")
    measured = write_kept_mass(build, plan)
    if measured is None:
        return PlanFigures(at_bounds=at_bounds)
    offset, planned = build.state("probe_offset"), build.state("planned_mass")
    paired = build.call("paired_kept_mass", measured, recall, offset, planned)
    return PlanFigures(paired, planned, at_bounds)


def search_steps(moment: Moment, config: Config) -> tuple[int, ...]:
    """The steps, from 0, whose calls search again: an option of 10 (or 0.2 of 50) is the tenth step, 9; 0 is the first.

    Raises:
        SparseAttentionError: a count lies behind the last step.
    """
    steps = []
    for given in config.search_steps:
        if isinstance(given, int) and given > moment.steps:
            raise SparseAttentionError(
                "search_steps must lie within the run",
                f"{given} of {moment.steps} steps",
                "Give shares, such as '0.2,0.6', which fit every run.",
            )
        if isinstance(given, float) and moment.steps < FEWEST_STEPS_TO_SEARCH_AGAIN:
            continue
        steps.append(max(0, moment.count(given) - 1))
    return tuple(steps)


def block_groups(layout: TokenLayout, tokens: Size, block: int) -> Size:
    """Groups on a token axis: its blocks, and the one of padding."""
    sizes = layout.segments(tokens)
    groups: Size = sum((size + block - 1) // block for size in sizes) + 1
    return groups
