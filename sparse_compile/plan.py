"""The Plan: which key groups each query group attends to; and the state that makes the next one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BITS_PER_WORD = 32


class TensorSpec(NamedTuple):
    """Shape, dtype and device of one tensor of state. Sizes may be symbolic while a graph is being written."""

    shape: tuple[int | torch.SymInt, ...]
    dtype: torch.dtype
    device: torch.device


class Groups(NamedTuple):
    """One side of a Plan: the tokens in the grouped order (None: in place), and the bounds of the groups."""

    order: Tensor | None
    offsets: Tensor


@dataclass(frozen=True)
class Plan:
    """Which key groups each query group attends to.

    Query groups partition the queries of one (batch, head), key groups the keys. The **last** group of either side
    holds padding: it exists in every Plan, is empty where there is none, and no row keeps the last key group.

    Shapes (B batch, H query heads, Hkv key heads, Gq and Gk groups, S tokens):
        q_order int32 [B, H, Sq] or None (identity): the token at each position of the grouped order
        q_offsets int32 [B, H, Gq + 1]: bounds of the groups in the grouped order; first 0, last Sq
        k_order int32 [B, Hkv, Sk] or None, k_offsets int32 [B, Hkv, Gk + 1]: the same for the keys
        keep int32 [B, H, Gq, ceil(Gk / 32)]: bit j % 32 of word j // 32 is set where a row attends to key group j
    """

    q_order: Tensor | None
    q_offsets: Tensor
    k_order: Tensor | None
    k_offsets: Tensor
    keep: Tensor

    @property
    def query_side(self) -> Groups:
        """Order and bounds of the queries."""
        return Groups(self.q_order, self.q_offsets)

    @property
    def key_side(self) -> Groups:
        """Order and bounds of the keys."""
        return Groups(self.k_order, self.k_offsets)

    @property
    def key_groups(self) -> int:
        """Number of key groups Gk, the padding group included."""
        return self.k_offsets.shape[-1] - 1

    def kept(self) -> Tensor:
        """The bitmap as bool [B, H, Gq, Gk]."""
        return unpack_bits(self.keep, self.key_groups)

    def density(self) -> Tensor:
        """Attended pairs over valid pairs, float32 [B, H]; padding counts on neither side (docs/svg2.md, section 11).

        1.0 where there is no valid pair. Products are taken in float64, one head at a time: at 720p it has 6e9 pairs
        of tokens and 3e6 pairs of blocks.
        """
        q_sizes, k_sizes = self.q_offsets.diff(), self.k_offsets.diff()
        shared = q_sizes.shape[1] // max(1, k_sizes.shape[1])
        densities = torch.ones(q_sizes.shape[:2], dtype=torch.float32, device=q_sizes.device)
        for batch in range(q_sizes.shape[0]):
            for head in range(q_sizes.shape[1]):
                own = k_sizes[batch, head // shared]
                kept = unpack_bits(self.keep[batch, head], self.key_groups)
                row_keys = torch.where(kept, own, 0).sum(-1)
                rows = q_sizes[batch, head, :-1].double()
                valid = rows.sum() * own[:-1].sum()
                share = rows @ row_keys[:-1].double() / valid.clamp(min=1)
                densities[batch, head] = torch.where(valid > 0, share, torch.ones_like(share))
        return densities


@dataclass(frozen=True)
class PooledKeys:
    """What stands for each key group where a row skips it; made anew in each call (docs/correction.md).

    Shapes (B batch, Hkv key heads, Gk key groups, D and Dv sizes of keys and values):
        mean_k float32 [B, Hkv, Gk, D], mean_v float32 [B, Hkv, Gk, Dv]
        log_size float32 [B, Hkv, Gk]: ln of the number of keys; -inf for an empty group and for padding
        coupling float32 [B, Hkv, D, Dv] or None: covariance of keys and values within a group, mean over the keys
    """

    mean_k: Tensor
    mean_v: Tensor
    log_size: Tensor
    coupling: Tensor | None


def pack_bits(kept: Tensor) -> Tensor:
    """Pack bool [..., G] into int32 [..., ceil(G / 32)], lowest bit first."""
    groups = kept.shape[-1]
    words = -(-groups // BITS_PER_WORD)
    padded = torch.nn.functional.pad(kept, (0, words * BITS_PER_WORD - groups))
    weights = 2 ** torch.arange(BITS_PER_WORD, device=kept.device)
    packed = (padded.unflatten(-1, (words, BITS_PER_WORD)) * weights).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def unpack_bits(packed: Tensor, groups: int) -> Tensor:
    """Undo `pack_bits`: int32 [..., W] to bool [..., groups]."""
    shifts = torch.arange(BITS_PER_WORD, device=packed.device, dtype=torch.int32)
    bits = (packed.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2)[..., :groups].bool()
