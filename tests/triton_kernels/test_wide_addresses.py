"""Tokens so far apart that the last ones lie behind 2^31 elements give the bits of tokens side by side.

Only the pages in use take memory on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_oracles import OPS, assert_same_bits, random_plan, random_tensor
from plan_placement import moved
from torch import Tensor

TOKENS, SIZE, SCALE, SPAN = 40, 16, 0.25, [0, 36]
APART = 2**26


def far(x: Tensor) -> Tensor:
    """The same values, each token 2^26 elements behind the one before."""
    memory = torch.empty((TOKENS - 1) * APART + SIZE, dtype=x.dtype, device=x.device)
    wide = memory.as_strided(x.shape, (1, 1, APART, 1))
    wide.copy_(x)
    return wide


def kmeans(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    centroids = [x[:, :, :count].contiguous() for x, count in ((q, 4), (k, 6))]
    ready = torch.ones(1, dtype=torch.int32, device=q.device)
    found = OPS.kmeans(q, k, None, None, SPAN, SPAN, *centroids, ready, False, 2, 0, "triton")
    return [*found, *centroids]


def restart(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    centroids = [torch.zeros_like(x[:, :, :count]).contiguous() for x, count in ((q, 4), (k, 6))]
    ready = torch.zeros(1, dtype=torch.int32, device=q.device)
    found = OPS.kmeans(q, k, None, None, SPAN, SPAN, *centroids, ready, True, 1, 0, "triton")
    return [*found, *centroids]


def pooled_keys(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    plan = moved(random_plan(1, 1, 1, TOKENS, TOKENS), str(q.device))
    return list(OPS.pooled_keys(k, v, plan.k_order, plan.k_offsets, SPAN, True, "triton"))


def kept_mass(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    plan = moved(random_plan(1, 1, 1, TOKENS, TOKENS), str(q.device))
    return [OPS.kept_mass(q, k, None, SPAN, *vars(plan).values(), SCALE, 8, 0, "triton")]


def block_mass(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    blocks = OPS.token_blocks(q, k, None, None, SPAN, SPAN, 16, 16, "triton")
    lse, ready = torch.zeros(1, 1, TOKENS, device=q.device), torch.ones(1, dtype=torch.int32, device=q.device)
    found = OPS.block_mass(q, k, lse, ready, None, blocks[1], None, blocks[4], 16, SCALE, 1, False, "triton")
    return [*found, lse]


@pytest.mark.parametrize("call", [kmeans, restart, pooled_keys, kept_mass, block_mass], ids=lambda call: call.__name__)
def test_offsets_pass_2_to_the_31(device: str, call: Callable[[Tensor, Tensor, Tensor], list[Tensor]]) -> None:
    near = [random_tensor(1, 1, TOKENS, SIZE, seed=seed, dtype=torch.float16).to(device) for seed in range(3)]
    assert_same_bits(call(*(far(x) for x in near)), call(*near))
