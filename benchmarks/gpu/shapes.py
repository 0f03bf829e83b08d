"""The attention shapes that are measured, and inputs of these shapes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """One attention call: video tokens, then text tokens."""

    name: str
    video: int
    text: int
    heads: int
    size: int
    """Of a head: D."""
    q_clusters: int
    k_clusters: int
    """Of a ragged plan."""

    @property
    def tokens(self) -> int:
        """S, of queries and of keys."""
        return self.video + self.text

    @property
    def scale(self) -> float:
        """1 / sqrt(D)."""
        return 1 / math.sqrt(self.size)

    @property
    def dense_flops(self) -> float:
        """Of both products of one call without a plan."""
        return 4.0 * self.tokens**2 * self.size * self.heads


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("wan_720p", 75_600, 0, 40, 128, 300, 1000),
        Shape("hunyuan_720p", 118_800, 256, 24, 128, 300, 1000),
        Shape("wan_480p", 32_760, 0, 12, 128, 300, 1000),
        Shape("toy", 330, 0, 2, 32, 4, 12),
        Shape("toy_joint", 330, 20, 2, 32, 4, 12),
    )
}
"""81 frames of Wan 2.1 (21 x 45 x 80 and 21 x 30 x 52 tokens), 129 of HunyuanVideo (33 x 45 x 80); toys for tests."""
LARGE = ("wan_720p", "hunyuan_720p", "wan_480p")


def random_operands(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    """q, k and v of N(0, 1), [1, H, S, D] as views of token-major memory, as video transformers hand them over."""
    generator = torch.Generator(device).manual_seed(seed)
    sizes = (1, shape.tokens, shape.heads, shape.size)
    return tuple(torch.randn(sizes, generator=generator, device=device, dtype=dtype).transpose(1, 2) for _ in range(3))


def clustered_operands(
    shape: Shape, device: torch.device, dtype: torch.dtype, centres: int = 200, noise: float = 0.7, seed: int = 0
) -> tuple[Tensor, ...]:
    """The same with queries and keys around shared random centres, so that there is something to find.

    Args:
        shape: of the call.
        device: where.
        dtype: of the result.
        centres: how many a head has.
        noise: spread around a centre, in each component.
        seed: of the generator.
    """
    q, k, v = random_operands(shape, device, dtype, seed)
    generator = torch.Generator(device).manual_seed(seed + 1)
    points = torch.randn(shape.heads, centres, shape.size, generator=generator, device=device, dtype=dtype)
    for x in (q, k):
        x *= noise
        for head in range(shape.heads):
            chosen = torch.randint(centres, (shape.tokens,), generator=generator, device=device)
            x[0, head].add_(points[head].index_select(0, chosen))
    return q, k, v
