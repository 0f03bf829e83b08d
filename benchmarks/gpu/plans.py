"""Plans to measure attention by: random groups at a given density, made on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.shapes import Shape
from sparse_compile.plan import Plan, pack_bits

HEADS_AT_ONCE = 8
"""Bitmaps before they are packed take 8 bytes and more a pair of groups."""
KINDS = ("ragged", "uniform64", "uniform128")
TOY_BLOCKS = {"uniform64": 16, "uniform128": 32}


def make_plan(kind: str, shape: Shape, density: float, device: torch.device, seed: int = 0) -> Plan:
    """A plan of one of `KINDS`."""
    if kind == "ragged":
        return ragged_plan(shape, density, device, seed)
    return uniform_plan(shape, block_of(kind, shape), density, device, seed)


def block_of(kind: str, shape: Shape) -> int:
    """Tokens of a block of a uniform plan; few in a toy."""
    return TOY_BLOCKS[kind] if shape.name.startswith("toy") else int(kind.removeprefix("uniform"))


def uniform_plan(shape: Shape, block: int, density: float, device: torch.device, seed: int = 0) -> Plan:
    """Blocks of equal size in place; each row of video keeps the same number of random video blocks, and all text.

    Text rows keep everything. The last block of video and of text may be shorter.

    Args:
        shape: of the call.
        block: tokens of a block.
        density: share of the video blocks that a row keeps, rounded to whole blocks, at least one.
        device: where the plan is made.
        seed: of the choice.
    """
    generator = torch.Generator(device).manual_seed(seed)
    video, text = -(-shape.video // block), -(-shape.text // block)
    bounds = torch.cat(
        [
            (torch.arange(video + 1, device=device) * block).clamp(max=shape.video),
            (shape.video + torch.arange(1, text + 1, device=device) * block).clamp(max=shape.tokens),
            torch.full((1,), shape.tokens, device=device),  # the padding group is empty
        ]
    )
    offsets = bounds.int().expand(1, shape.heads, -1).contiguous()
    count = max(1, round(density * video))
    groups = video + text + 1

    def choose(heads: range) -> Tensor:
        chosen = torch.rand(len(heads), video, video, generator=generator, device=device).argsort(-1)[..., :count]
        kept = torch.zeros(len(heads), groups, groups, dtype=torch.bool, device=device)
        kept[:, :video, :video].scatter_(-1, chosen, True)
        return kept

    return Plan(None, offsets, None, offsets, _packed(choose, shape, video, video))


def ragged_plan(shape: Shape, density: float, device: torch.device, seed: int = 0) -> Plan:
    """Clusters of random tokens with sizes of Dirichlet(1); rows keep random clusters up to the density, and all text.

    Groups are as SVG2 has them: clusters, text, padding. A cluster is kept when the keys before it and half of its own
    stay below ``density`` of the video keys; the first always is (docs/svg2.md, section 7).

    Args:
        shape: of the call, with its numbers of clusters.
        density: share of the video keys that a row keeps.
        device: where the plan is made.
        seed: of tokens and choice.
    """
    generator = torch.Generator(device).manual_seed(seed)
    q_order, q_offsets = _random_clusters(shape, shape.q_clusters, generator)
    k_order, k_offsets = _random_clusters(shape, shape.k_clusters, generator)
    k_sizes = k_offsets[0].diff()[:, : shape.k_clusters]

    def choose(heads: range) -> Tensor:
        sizes = k_sizes[heads.start : heads.stop, None].expand(-1, shape.q_clusters, -1)
        drawn = torch.rand(sizes.shape, generator=generator, device=device)
        ranked = torch.where(sizes > 0, drawn, 2.0).argsort(-1)  # empty clusters last
        own = sizes.gather(-1, ranked)
        chosen = own.cumsum(-1) - own + own / 2 < density * shape.video
        chosen[..., 0] = True
        kept = torch.zeros(len(heads), shape.q_clusters + 2, shape.k_clusters + 2, dtype=torch.bool, device=device)
        kept[:, : shape.q_clusters, : shape.k_clusters].scatter_(-1, ranked, chosen)
        return kept

    keep = _packed(choose, shape, shape.q_clusters, shape.k_clusters)
    return Plan(q_order, q_offsets, k_order, k_offsets, keep)


def _packed(choose: Callable[[range], Tensor], shape: Shape, q_video: int, k_video: int) -> Tensor:
    """Bits of all heads from ``choose(heads)``, bool [heads, Gq, Gk]; text is kept by all, as keys and as queries."""
    parts = []
    for start in range(0, shape.heads, HEADS_AT_ONCE):
        kept = choose(range(start, min(start + HEADS_AT_ONCE, shape.heads)))
        kept[:, q_video:-1, :-1] = True
        kept[:, :-1, k_video:-1] = True
        parts.append(pack_bits(kept))
    return torch.cat(parts).unsqueeze(0)


def _random_clusters(shape: Shape, clusters: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Order and bounds of one side."""
    device = generator.device
    shares = torch.empty(shape.heads, clusters, device=device).exponential_(generator=generator).cumsum(-1)
    drawn = torch.rand(shape.heads, shape.video, generator=generator, device=device) * shares[:, -1:]
    labels = torch.searchsorted(shares, drawn).clamp(max=clusters - 1)
    text = torch.full((shape.heads, shape.text), clusters, device=device)
    labels = torch.cat([labels, text], -1)
    order = labels.sort(dim=-1, stable=True).indices.int().unsqueeze(0)
    counts = torch.zeros(shape.heads, clusters + 2, dtype=torch.int64, device=device)
    counts.scatter_add_(1, labels, torch.ones_like(labels))
    offsets = torch.nn.functional.pad(counts.cumsum(-1), (1, 0)).int().unsqueeze(0)
    return order, offsets
