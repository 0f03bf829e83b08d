"""Sliding Tile Attention (arXiv 2502.04507) as a sparse-attention method of one's own, in one short file.

    python examples/custom_strategy.py

The video is cut into tiles of frames x rows x columns. Each tile attends to the window of tiles around it, which is
moved inside where it would leave the video, and to all text; text attends to everything. The paper's training-free mode
searches a window for each head; here all heads have the same. A method is one class, which writes ops. This one needs a
single op of its own, for the plan; `write_sparse_attention` does the rest, correction and measured kept mass included.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_compile
from sparse_compile.evaluation.demo_model import TRAINED_SIZES, demo_scenes, generate, load_pipeline
from sparse_compile.phases import Moment, Phase
from sparse_compile.plan import TensorSpec, pack_bits
from sparse_compile.sites import Reason, Site
from sparse_compile.strategies.base import GraphBuilder
from sparse_compile.strategies.sparse_attention import PlanNodes, write_sparse_attention

TILE = (1, 2, 4)  # tokens a side, for the 9 x 8 x 8 of the demo; the paper's, for 30 x 48 x 80, is (6, 8, 8)
WINDOW = (3, 3, 3)  # tiles a side, odd; an axis that has fewer is attended to whole


def tiles_and_windows(grid: list[int], tile: list[int], window: list[int]) -> tuple[Tensor, Tensor]:
    """The tile of each token, [T*H*W] in (frame, row, column) order, and which tiles attend to which, bool [N, N]."""
    tile_of, near = torch.zeros((), dtype=torch.long), torch.ones(1, 1, dtype=torch.bool)
    for tokens, side, reach in zip(grid, tile, window, strict=True):
        place = torch.arange(count := -(-tokens // side))
        first = (place - reach // 2).clamp(max=count - reach).clamp(min=0).unsqueeze(1)
        near = torch.kron(near, (first <= place) & (place < first + reach))
        tile_of = tile_of.unsqueeze(-1) * count + torch.arange(tokens) // side
    return tile_of.flatten(), near


def plan(
    x: Tensor, valid: Tensor | None, start: int, grid: list[int], tile: list[int], window: list[int], pad_attends: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One side of a `sparse_compile.plan.Plan`, and its bitmap. The G groups are the N tiles, text, and padding.

    Shapes: x (queries or keys) [B, H, S, D], its video from ``start`` on; valid bool [B or 1, S]; gives order int32
        [B, H, S], offsets int32 [B, H, G + 1], keep int32 [B, H, G, ceil(G / 32)].
    """
    tile_of, near = (table.to(x.device) for table in tiles_and_windows(grid, tile, window))
    text, padding = len(near), len(near) + 1
    group = F.pad(tile_of, (start, x.shape[2] - start - len(tile_of)), value=text).unsqueeze(0)
    group, order = (group if valid is None else torch.where(valid, group, padding)).sort(dim=-1, stable=True)
    offsets = torch.searchsorted(group, torch.arange(padding + 2, device=x.device).repeat(len(group), 1))
    kept = F.pad(F.pad(near, (0, 1, 0, 1), value=True), (0, 0, 0, 1), value=pad_attends)  # [G, N + 1]
    holds = (offsets.diff() > 0).unsqueeze(1)  # a group without tokens is not kept and keeps nothing
    keep = pack_bits(F.pad(kept & holds.mT & holds[..., :-1], (0, 1)))  # and nobody attends to padding
    made = (table.int().unsqueeze(1) for table in (order, offsets, keep))
    order, offsets, keep = (table.expand(*x.shape[:2], *table.shape[2:]).contiguous() for table in made)
    return order, offsets, keep


# No shape in there depends on a value, so that the function can also tell torch.compile the shapes.
torch.library.custom_op("sliding_tile::plan", plan, mutates_args=()).register_fake(plan)


class SlidingTile:
    """The strategy: dense at first, then sparse; it keeps no state and never searches."""

    name = "sliding_tile"
    phases = (Phase.DENSE, Phase.SPARSE)

    def phase(self, moment: Moment, searched: int | None, config: sparse_compile.Config) -> Phase:
        """Sparse after the dense steps."""
        return Phase.DENSE if moment.step < moment.count(config.dense_steps) else Phase.SPARSE

    def state(self, site: Site, config: sparse_compile.Config) -> Mapping[str, TensorSpec]:
        """No tensors."""
        return {}

    def unsupported_reason(self, site: Site, config: sparse_compile.Config) -> Reason | None:
        """Tiles need one video whose (frames, height, width) the graph gives in numbers."""
        videos = [part for part in site.layout.parts if part.visual] if site.layout else []
        known = len(videos) == 1 and len(videos[0].grid) == 3 and isinstance(videos[0].size, int)
        return None if known else Reason.UNKNOWN_GRID

    def write(self, build: GraphBuilder, site: Site, phase: Phase) -> torch.fx.Node:
        """Plan, then attend."""
        assert site.layout, "a site without a layout stays dense"
        rest = (build.video_spans("query")[0], site.layout.grid, TILE, WINDOW, build.padded_queries_attend())
        q, k = (build.call("sliding_tile::plan", x, build.valid("query"), *rest) for x in (build.query, build.key))
        (q_order, q_offsets, keep), (k_order, k_offsets, _) = ([build.item(x, i) for i in range(3)] for x in (q, k))
        return write_sparse_attention(build, PlanNodes(q_order, q_offsets, k_order, k_offsets, keep))


if __name__ == "__main__":
    pipe = load_pipeline()
    options = {"method": f"{__name__}:SlidingTile", "min_tokens": 64, "dense_layers": 0}
    pipe.transformer.compile(backend="sparse_attn", options=options)  # whole: a block alone does not know the grid
    generate(pipe, demo_scenes(1, seed=0), TRAINED_SIZES[1], steps=5)
    print(sparse_compile.explain(pipe))
