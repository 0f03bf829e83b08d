"""Lloyd's k-means of queries and keys on a GPU, both in the same launches (docs/svg2.md, sections 4, 5 and 8).

Each iteration is one `assign`, the four launches of a label sort, and one `update`. The host reads nothing: a problem
whose labels have come to rest is skipped by the programs themselves, which changes no bit of the result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_compile.kernels.kmeans import configs, triton_kernels
from sparse_compile.kernels.kmeans.stratified import one_of_each_stratum_of_heads
from sparse_compile.kernels.launching import device_of, lanes, launch
from sparse_compile.kernels.permutation.triton_launch import (
    TOKENS_AT_ONCE,
    Grouping,
    blocks_of,
    grouping,
    rows_without_gaps,
    sort_both,
    stride_unit,
    workspace,
)
from sparse_compile.kernels.tuning import chosen, problem

ROLES = (0, 1)
"""Of queries and keys, in `one_of_each_stratum`."""
ROWS_MARKED = 32
ROWS_BEGUN = 16


class _Side(NamedTuple):
    """Queries or keys: x [B, H, S, D] with rows without gaps; state [B, H, C, D]; means float32 [B, H, C, D]."""

    x: Tensor
    state: Tensor
    means: Tensor
    groups: Grouping

    @property
    def problems(self) -> int:
        return self.groups.problems

    @property
    def heads(self) -> int:
        return self.x.shape[1]

    @property
    def tokens(self) -> int:
        return self.x.shape[2]

    @property
    def clusters(self) -> int:
        return self.state.shape[2]


def cluster_both(
    q: Tensor,
    k: Tensor,
    q_valid: Tensor | None,
    k_valid: Tensor | None,
    q_video: list[int],
    k_video: list[int],
    q_centroids: Tensor,
    k_centroids: Tensor,
    ready: Tensor,
    restart: bool,
    iterations: int,
    seed: int,
    *,
    assign: configs.Assign | None = None,
    update: configs.Update | None = None,
    sorted_at_once: int = TOKENS_AT_ONCE,
    rests: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The kmeans op (`clustering.cluster` for q and for k); it says what arguments and results are.

    Source: SVG2 (arXiv 2505.18875); flash-kmeans (arXiv 2603.09229).
    Shapes: q [B, H, Sq, D]; k [B, Hkv, Sk, D]; centroids [B, H, Cq, D] and [B, Hkv, Ck, D] in q's dtype; any strides.
    Dtypes: float32, float16 or bfloat16; products accumulate in float32, and so do means in blocks, which are summed in
        float64.
    Limits: D at most 256.

    The centroids and ``ready`` are written last, when nothing more is allocated: a call that runs out of memory leaves
    them as they were.

    Args (besides those of the op):
        assign: tiles of the assignment; None: the best known.
        update: tiles of the update.
        sorted_at_once: tokens that a program of the sort ranks.
        rests: whether a problem whose labels have not changed is left alone.
    """
    assert iterations > 0, "at least one iteration"
    device, size = device_of(q), q.shape[3]
    rows = configs.assign_candidates(device, q.dtype, size)
    assign = assign or chosen("kmeans", problem(q.dtype, size), rows, q)
    update = update or configs.update_candidates(device, q.dtype, size)[0]
    sides = (_side(q, q_centroids), _side(k, k_centroids))
    groups = (sides[0].groups, sides[1].groups)
    padded = tuple(blocks_of(side.clusters, assign.centroids) * assign.centroids for side in sides)

    labels = q.new_empty((sum(side.groups.order.numel() for side in sides),), dtype=torch.int32)
    operand_rows = sum(side.problems * rows for side, rows in zip(sides, padded, strict=True))
    operand = q.new_empty((operand_rows, lanes(size)))
    norms = q.new_empty((operand_rows,), dtype=torch.float32)
    space = workspace(labels, *groups, sorted_at_once)
    non_finite = torch.zeros((1,), dtype=torch.int32, device=q.device)
    moved = _flags(sides, iterations, rests)
    kinds = _kinds(sides, (q_valid, k_valid), (q_video, k_video))

    starts = _sample(sides, kinds, seed) if restart else tuple(rows_without_gaps(side.state) for side in sides)
    unit = stride_unit(*starts)
    problems, heads = tuple(side.problems for side in sides), tuple(side.heads for side in sides)
    tokens, clusters = tuple(side.tokens for side in sides), tuple(side.clusters for side in sides)
    launch(
        triton_kernels.begin,
        (operand_rows // ROWS_BEGUN,),
        *(*starts, sides[0].means, sides[1].means, operand, norms),
        *(*_strides(starts, unit), problems[0], *heads, *clusters, *padded),
        warps=4,
        stages=1,
        UNIT=unit,
        ROWS=ROWS_BEGUN,
        **_lanes(size),
    )
    points = (sides[0].x, sides[1].x)
    unit = stride_unit(*points)
    numbers = (*_strides(points, unit), *problems, *heads, *tokens, *clusters, *padded)
    constants = {"UNIT": unit, **_lanes(size)}
    for iteration in range(iterations):
        launch(
            triton_kernels.assign,
            (sum(side.problems * blocks_of(side.tokens, assign.points) for side in sides),),
            *(*points, kinds, operand, norms, labels, moved, non_finite, *numbers, iteration),
            warps=assign.warps,
            stages=assign.stages,
            POINTS=assign.points,
            CENTROIDS=assign.centroids,
            PRECISION="ieee",
            **constants,
        )
        sort_both(labels, *groups, space, moved, iteration + 1, sorted_at_once)
        launch(
            triton_kernels.update,
            (sum(side.problems * side.clusters for side in sides),),
            *(*points, groups[0].order, groups[1].order, groups[0].offsets, groups[1].offsets),
            *(sides[0].means, sides[1].means, operand, norms, moved, *numbers, iteration),
            warps=update.warps,
            stages=update.stages,
            ROWS=update.rows,
            # A sum of few 16-bit numbers is all but exact in float32; equal float32 numbers would not keep their mean.
            WIDE=q.dtype == torch.float32,
            **constants,
        )
    for side in sides:
        side.state.copy_(side.means)
    if restart:
        ready.fill_(1)
    first, second = ((side.groups.order, side.groups.offsets, side.means) for side in sides)
    return (*first, *second, non_finite)


def _side(x: Tensor, state: Tensor) -> _Side:
    means = x.new_empty(state.shape, dtype=torch.float32)
    return _Side(rows_without_gaps(x), state, means, grouping(x, x.shape[:2], x.shape[2], state.shape[2] + 2))


def _flags(sides: tuple[_Side, _Side], iterations: int, rests: bool) -> Tensor:
    """Whether problems have to be worked on: int32 [iterations + 1, problems], 1 before and after the first iteration.

    The iterations themselves set what comes further on.
    """
    shape = (iterations + 1, sides[0].problems + sides[1].problems)
    moved = torch.zeros(shape, dtype=torch.int32, device=sides[0].x.device)
    moved.narrow(0, 0, 2 if rests else iterations + 1).fill_(1)
    return moved


def _kinds(
    sides: tuple[_Side, _Side], valid: tuple[Tensor | None, Tensor | None], video: tuple[list[int], list[int]]
) -> Tensor:
    """Kind of each token, for each batch item of q and then of k: int8, 0 video, 1 text, 2 padding, which wins."""
    sizes = [side.x.shape[0] * side.tokens for side in sides]
    kinds = torch.ones((sum(sizes),), dtype=torch.int8, device=sides[0].x.device)
    for side, own, here, spans in zip(sides, kinds.split(sizes), valid, video, strict=True):
        kind = own.view(side.x.shape[0], side.tokens)
        for start, stop in zip(spans[::2], spans[1::2], strict=True):
            first, last = max(0, start), min(stop, side.tokens)
            if first < last:
                kind.narrow(1, first, last - first).zero_()
        if here is not None:
            kind.masked_fill_(here.logical_not(), 2)
    return kinds


def _sample(sides: tuple[_Side, _Side], kinds: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """`reference.stratified_sample` of every problem: [B, H, C, D] of q and of k, in their dtype."""
    rows = (sides[0].x, sides[1].x)
    unit = stride_unit(*rows)
    sizes = [side.groups.order.numel() for side in sides]
    included = torch.empty((sum(sizes),), dtype=torch.uint8, device=kinds.device)
    launch(
        triton_kernels.mark_included,
        (sum(side.problems * blocks_of(side.tokens, ROWS_MARKED) for side in sides),),
        *(*rows, kinds, included, *_strides(rows, unit), sides[0].problems),
        *(sides[0].heads, sides[1].heads, sides[0].tokens, sides[1].tokens),
        warps=4,
        stages=1,
        UNIT=unit,
        ROWS=ROWS_MARKED,
        **_lanes(rows[0].shape[3]),
    )
    usable = included.view(torch.bool).split(sizes)
    first, second = (
        _sample_of_side(side, own.view(side.x.shape[:3]), seed, role)
        for side, own, role in zip(sides, usable, ROLES, strict=True)
    )
    return first, second


def _sample_of_side(side: _Side, included: Tensor, seed: int, role: int) -> Tensor:
    """One included token of each stratum, [B, H, C, D]; zeros where there is none."""
    if side.tokens == 0:
        return torch.zeros(side.state.shape, dtype=side.x.dtype, device=side.x.device)
    token, occupied = one_of_each_stratum_of_heads(included, side.clusters, seed, role, side.heads)
    sample = side.x.gather(2, token.unsqueeze(-1).expand(side.state.shape))
    return sample.masked_fill_(occupied.any(-1).logical_not().unsqueeze(-1).unsqueeze(-1), 0)


def _strides(tensors: tuple[Tensor, ...], unit: int) -> tuple[int, ...]:
    """Of the first three dimensions, in units."""
    return tuple(stride // unit for x in tensors for stride in x.stride()[:3])


def _lanes(size: int) -> dict[str, int]:
    return {"D": size, "D_PAD": lanes(size)}
