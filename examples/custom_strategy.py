"""A sparse-attention method of your own: each stretch of tokens attends to its neighbourhood.

    python examples/custom_strategy.py

A method is one class: which phases it has, what it keeps between calls, which ops it writes. This one needs a single op
of its own, which makes the plan; `write_sparse_attention` does the rest, correction and measured kept mass included. It
keeps no state and never searches.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

import sparse_compile
from sparse_compile.evaluation.demo_model import TRAINED_SIZES, demo_scenes, generate, load_pipeline
from sparse_compile.phases import Moment, Phase
from sparse_compile.plan import TensorSpec, pack_bits
from sparse_compile.sites import MaskForm, Reason, Site
from sparse_compile.strategies.base import GraphBuilder
from sparse_compile.strategies.sparse_attention import PlanNodes, write_sparse_attention

BLOCK, REACH = 32, 3  # tokens in a block, and how many blocks a query looks to either side

LIBRARY = torch.library.Library("neighbourhood", "DEF")
LIBRARY.define("plan(Tensor q, int block, int reach) -> (Tensor offsets, Tensor keep)")


def plan(q: torch.Tensor, block: int, reach: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds of the blocks (the last group, for padding, is empty), and the band of blocks that each one keeps."""
    batch, heads, tokens, _ = q.shape
    blocks = -(-tokens // block)
    bounds = torch.arange(blocks + 2, device=q.device, dtype=torch.int32) * block
    place = torch.arange(blocks + 1, device=q.device)
    band = ((place[:, None] - place).abs() <= reach) & (place[:, None] < blocks) & (place < blocks)
    offsets, keep = bounds.clamp(max=tokens), pack_bits(band)
    return offsets.expand(batch, heads, -1).contiguous(), keep.expand(batch, heads, -1, -1).contiguous()


def plan_fake(q: torch.Tensor, block: int, reach: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes and dtypes of `plan`."""
    batch, heads, tokens, _ = q.shape
    blocks = (tokens + block - 1) // block
    offsets = q.new_empty((batch, heads, blocks + 2), dtype=torch.int32)
    return offsets, q.new_empty((batch, heads, blocks + 1, (blocks + 1 + 31) // 32), dtype=torch.int32)


LIBRARY.impl("plan", plan, "CompositeExplicitAutograd")
torch.library.register_fake("neighbourhood::plan", plan_fake, lib=LIBRARY)


class Neighbourhood:
    """The strategy: dense at first, then sparse, without a search."""

    name = "neighbourhood"
    phases = (Phase.DENSE, Phase.SPARSE)

    def phase(self, moment: Moment, searched: int | None, config: sparse_compile.Config) -> Phase:
        """Sparse after the dense steps; there is nothing to be ready for."""
        return Phase.DENSE if moment.step < moment.count(config.dense_steps) else Phase.SPARSE

    def state(self, site: Site, config: sparse_compile.Config) -> Mapping[str, TensorSpec]:
        """Nothing is kept."""
        return {}

    def unsupported_reason(self, site: Site, config: sparse_compile.Config) -> Reason | None:
        """Masks and grouped heads would need more than this example does."""
        if site.mask_form is not MaskForm.NONE:
            return Reason.MASK
        return Reason.GQA if site.query_sizes[1] != site.key_sizes[1] else None

    def write(self, build: GraphBuilder, site: Site, phase: Phase) -> torch.fx.Node:
        """Plan, then attend."""
        made = build.call("neighbourhood::plan", build.query, BLOCK, REACH)
        offsets, keep = build.item(made, 0), build.item(made, 1)
        return write_sparse_attention(build, PlanNodes(None, offsets, None, offsets, keep))  # tokens stay in place


if __name__ == "__main__":
    pipe = load_pipeline()
    options = {"method": f"{__name__}:Neighbourhood", "min_tokens": 64, "dense_layers": 0}
    pipe.transformer.compile_repeated_blocks(backend="sparse_attn", options=options)
    generate(pipe, demo_scenes(1, seed=0), TRAINED_SIZES[0], steps=5)
    print(sparse_compile.explain(pipe))
