"""The mass of pairs of groups on a GPU. Nothing is read on the host, and all heads take part in each launch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_compile.kernels.block_mass.configs import Config, candidates
from sparse_compile.kernels.block_mass.reference import LARGEST_EXPONENT, LOG2_E, MOST_SPREAD
from sparse_compile.kernels.block_mass.triton_kernels import fill_slots, judge_heads, renew_lse, sum_blocks
from sparse_compile.kernels.launching import device_of, lanes, launch
from sparse_compile.kernels.tuning import chosen, problem
from sparse_compile.plan import Groups

SLOTS_AT_ONCE = 1024
NUMBERS_AT_ONCE = 4096
FEWEST_KEY_SLOTS = 16


class Slots(NamedTuple):
    """The tokens of one side with a fixed number of places for each group.

    token int32 [B, H, G - 1, slots]: -1 where a group has no such member; padding, the last group, has no slots.
    """

    token: Tensor

    @property
    def groups(self) -> int:
        """Number of groups but padding."""
        return self.token.shape[2]

    @property
    def per_group(self) -> int:
        """Slots of a group, a power of two."""
        return self.token.shape[3]

    def piece(self, block: int) -> int:
        """Slots of a group that a tile of ``block`` slots can hold."""
        return min(self.per_group, block)

    def pieces(self, block: int) -> int:
        """Number of such pieces of all groups."""
        return self.groups * (self.per_group // self.piece(block))


class Measured(NamedTuple):
    """What the pass with a kept log-sum-exp leaves for the next kernels.

    moved float32 [B, H, Gq - 1, slots]: see triton_kernels.py; usable int32 [B, H]: whether a head keeps its mass.
    """

    moved: Tensor
    usable: Tensor


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    ready: Tensor,
    query: Groups,
    key: Groups,
    largest_group: int,
    scale: float,
    row_stride: int,
    fresh: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.block_mass`; a log-sum-exp that is fresh, or kept and fits, takes one pass over the scores.

    Source: AdaSpa (arXiv 2502.21079); docs/adaspa.md, sections 4 and 8.
    Shapes: q [B, H, Sq, D]; k [B, Hkv, Sk, D]; lse float32 [B, H, Sq]; ready int32 [1]; query and key as in `Plan`; any
        strides.
    Dtypes: q and k alike, float16, bfloat16 or float32; float32 products, scores and sums.
    Args beyond the reference's: no group but padding has more tokens than ``largest_group``; ``config``: tile sizes.

    With a kept log-sum-exp: one pass makes the mass and, for each row looked at, how far its log-sum-exp has moved; one
    program per head judges by that (`judge_heads`); then `lse` is brought up to date, and the mass made again, where
    programs of usable heads have nothing left to multiply.
    """
    rows = candidates(device_of(q), q.dtype, q.shape[3])
    config = config or chosen("block_mass", problem(q.dtype, q.shape[3]), rows, q)
    b, h = q.shape[:2]
    spread = q.new_zeros((b, h), dtype=torch.float32)
    looks = _slots(query, lanes(-(-largest_group // row_stride), 1), row_stride)
    keys = _slots(key, lanes(largest_group, FEWEST_KEY_SLOTS), 1)
    pieces = looks.pieces(config.block_m)
    mass = q.new_empty((b, h, looks.groups + 1, keys.groups + 1), dtype=torch.float32)
    sums = mass if pieces == looks.groups else mass.new_empty((b, h, pieces, keys.groups))
    tensors = (q, k, lse, looks, keys, query.offsets, ready, sums)
    if fresh:
        _sum_blocks(*tensors, scale, row_stride, config)
    else:
        every_row = looks if row_stride == 1 else _slots(query, lanes(largest_group, 1), 1)
        usable = torch.empty((b, h), dtype=torch.int32, device=q.device)
        measured = Measured(mass.new_empty(looks.token.shape), usable)
        _sum_blocks(*tensors, scale, row_stride, config, measured)
        _judge_heads(measured, looks, ready, spread)
        _renew_lse(q, k, lse, every_row, keys, measured, scale, row_stride, config)
        _sum_blocks(*tensors, scale, row_stride, config, measured, again=True)
    if pieces != looks.groups:
        return torch.nn.functional.pad(_added(sums, looks.groups), (0, 1, 0, 1)), spread
    mass.select(2, -1).zero_()
    mass.select(3, -1).zero_()
    return mass, spread


def _slots(side: Groups, slots: int, row_stride: int) -> Slots:
    """Slots of every ``row_stride``-th token of each group, from its first."""
    b, h, bounds = side.offsets.shape
    token = torch.empty((b, h, bounds - 2, slots), dtype=torch.int32, device=side.offsets.device)
    launch(
        fill_slots,
        (b * h * -(-(bounds - 2) * slots // SLOTS_AT_ONCE),),
        side.offsets,
        side.order,
        token,
        *side.offsets.stride(),
        *((0, 0, 0) if side.order is None else side.order.stride()),
        h,
        bounds - 2,
        row_stride,
        SLOTS=slots,
        BLOCK=SLOTS_AT_ONCE,
        warps=4,
        stages=1,
    )
    return Slots(token)


def _sum_blocks(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    looks: Slots,
    keys: Slots,
    q_offsets: Tensor,
    ready: Tensor,
    sums: Tensor,
    scale: float,
    row_stride: int,
    config: Config,
    measured: Measured | None = None,
    again: bool = False,
) -> None:
    """Write sums [B, H, pieces of query groups, key groups]; ``again``: of the heads that are not usable."""
    q_piece, q_pieces = looks.piece(config.block_m), looks.pieces(config.block_m)
    launch(
        sum_blocks,
        (q.shape[0] * q.shape[1] * -(-q_pieces * q_piece // config.block_m),),
        q,
        k,
        lse,
        looks.token,
        keys.token,
        q_offsets,
        ready,
        None if measured is None else measured.usable,
        sums,
        None if measured is None else measured.moved,
        *q.stride(),
        *k.stride(),
        *lse.stride(),
        *q_offsets.stride(),
        *sums.stride()[1:3],
        q.shape[1],
        q.shape[1] // k.shape[1],
        q_pieces,
        keys.groups,
        row_stride,
        scale * LOG2_E,
        **_head_size(q),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        Q_PIECE=q_piece,
        PIECES_PER_GROUP=looks.per_group // q_piece,
        K_SLOTS=keys.per_group,
        LARGEST_EXPONENT=LARGEST_EXPONENT,
        ONLY_READY=measured is not None and not again,
        ONLY_UNUSABLE=again,
        warps=config.warps,
        stages=config.stages,
    )


def _judge_heads(measured: Measured, looks: Slots, ready: Tensor, spread: Tensor) -> None:
    """Write spread and `Measured.usable`."""
    launch(
        judge_heads,
        (spread.numel(),),
        measured.moved,
        looks.token,
        ready,
        spread,
        measured.usable,
        looks.groups,
        SLOTS=looks.per_group,
        GROUPS_AT_ONCE=max(1, NUMBERS_AT_ONCE // looks.per_group),
        MOST_SPREAD=MOST_SPREAD,
        warps=8,
        stages=2,
    )


def _renew_lse(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    rows: Slots,
    keys: Slots,
    measured: Measured,
    scale: float,
    row_stride: int,
    config: Config,
) -> None:
    """Bring ``lse`` up to date; ``rows`` holds all rows, not only those that were looked at."""
    launch(
        renew_lse,
        (q.shape[0] * q.shape[1] * -(-rows.groups * rows.per_group // config.block_m),),
        q,
        k,
        lse,
        rows.token,
        keys.token,
        measured.moved,
        measured.usable,
        *q.stride(),
        *k.stride(),
        *lse.stride(),
        q.shape[1],
        q.shape[1] // k.shape[1],
        rows.groups,
        keys.groups * keys.per_group,
        row_stride,
        scale * LOG2_E,
        **_head_size(q),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        SLOTS=rows.per_group,
        LOOKS=measured.moved.shape[3],
        warps=config.warps,
        stages=config.stages,
    )


def _head_size(q: Tensor) -> dict[str, int]:
    return {"D": q.shape[3], "D_PAD": lanes(q.shape[3])}


def _added(sums: Tensor, groups: int) -> Tensor:
    """Add the pieces of each query group, one after another: their order must not depend on other shapes."""
    b, h, _, keys = sums.shape
    parts: tuple[Tensor, ...] = sums.view(b, h, groups, -1, keys).unbind(3)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
