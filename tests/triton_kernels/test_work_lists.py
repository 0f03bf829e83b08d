"""Pieces and tiles against a walk over the bitmap in Python."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_oracles import packed, random_plan
from plan_placement import moved

from sparse_compile.error_budget import nan_filled_empty
from sparse_compile.kernels.work_lists import triton_launch
from sparse_compile.kernels.work_lists.triton_launch import Tiles, Tiling, WorkLists, density, tile_fill, work_lists
from sparse_compile.plan import Plan

RAGGED, SHORT, BLOCKS = Tiling(32, 64, 16), Tiling(16, 64, 16, short_q=8), Tiling(16, 32, 32)


def walked(
    plan: Plan, batch: int, head: int, row: int, piece: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The whole and the short pieces of one row, each (start, length)."""
    kept = plan.kept()[batch, head, row].tolist()
    bounds = plan.k_offsets[batch, head // (plan.keep.shape[1] // plan.k_offsets.shape[1])].tolist()
    runs: list[list[int]] = []
    for group, (start, stop) in enumerate(itertools.pairwise(bounds[:-1])):
        if not kept[group] or start == stop:
            continue
        if runs and runs[-1][1] == start:
            runs[-1][1] = stop
        else:
            runs.append([start, stop])
    whole, short = [], []
    for start, stop in runs:
        cuts = [(at, min(piece, stop - at)) for at in range(start, stop, piece)]
        whole += [cut for cut in cuts if cut[1] == piece]
        short += [cut for cut in cuts if cut[1] < piece]
    return whole, short


def assert_lists_match(plan: Plan, lists: WorkLists, tiling: Tiling) -> None:
    batches, heads, rows, _ = plan.keep.shape
    sizes, k_sizes, kept = plan.q_offsets.diff(), plan.k_offsets.diff(), plan.kept()
    for batch, head, row in itertools.product(range(batches), range(heads), range(rows)):
        flat = (batch * heads + head) * rows + row
        whole, short = walked(plan, batch, head, row, tiling.piece)
        n_whole, n_all = lists.counts[flat].tolist()
        assert (n_whole, n_all) == (len(whole), len(whole) + len(short))
        filled = -(-n_all // tiling.pieces_per_chunk) * tiling.pieces_per_chunk
        found = [(value >> 8, value & 255) for value in lists.pieces[flat, :filled].tolist()]
        assert found[:n_whole] == whole and found[n_whole:n_all] == short
        assert all(length == 0 for _, length in found[n_all:])
        assert lists.kept_keys[batch, head, row] == sum(length for _, length in whole + short)
        own = k_sizes[batch, head // (heads // k_sizes.shape[1])]
        wanted = ~kept[batch, head, row] & (own > 0)
        wanted[-1] = False
        words = lists.skipped[flat].tolist()
        bits = [bool(words[group // 32] >> (group % 32) & 1) for group in range(len(own))]
        assert bits == (wanted if row < rows - 1 else torch.zeros_like(wanted)).tolist()

    tiles, short = in_use(lists.tiles), in_use(lists.short_tiles)
    for flat in range(batches * heads * rows):
        batch, head, row = flat // (heads * rows), flat // rows % heads, flat % rows
        own, left = ([(start, length) for of, start, length, _ in some if of == flat] for some in (tiles, short))
        covered = [token for start, length in own + left for token in range(start, start + length)]
        first, stop = plan.q_offsets[batch, head, row : row + 2].tolist()
        assert covered == list(range(first, stop))
        assert all(0 < length <= tiling.block_q for _, length in own)
        assert all(0 < length <= tiling.short_q for _, length in left)
        rest = (stop - first) % tiling.block_q
        assert len(left) == (0 < rest <= tiling.short_q)
        assert len(own) == -(-int(sizes[batch, head, row]) // tiling.block_q) - len(left)
    for some in (tiles, short):
        order = [(row // rows, -int(lists.counts[row, 1])) for row, *_ in some]
        assert order == sorted(order), "head by head, and most keys first"


def in_use(tiles: Tiles | None) -> list[list[int]]:
    return [] if tiles is None else tiles.ranges[: int(tiles.number)].tolist()


def on_cpu(lists: WorkLists) -> WorkLists:
    tiles, short, *others = lists
    moved_tiles = (None if some is None else Tiles(*(x.cpu() for x in some)) for some in (tiles, short))
    return WorkLists(*moved_tiles, *(x.cpu() for x in others))


@pytest.mark.parametrize("tiling", [RAGGED, SHORT, BLOCKS], ids=["ragged", "with-short-tiles", "blocks"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_pieces_and_tiles_cover_the_plan_exactly(device: str, tiling: Tiling, share: float) -> None:
    plan = random_plan(1, 2, 1, 90, 150, 4, 9, share=share)
    with nan_filled_empty():
        lists = work_lists(moved(plan, device), 90, 150, tiling)
    lists = on_cpu(lists)
    assert_lists_match(plan, lists, tiling)
    assert torch.equal(density(plan, lists.kept_keys), plan.density())


def test_groups_come_in_segments_and_runs_cross_them(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes 0 and 1 among large ones; runs over the border of two segments, and a run without keys."""
    monkeypatch.setattr(triton_launch, "GROUPS_AT_ONCE", 32)
    generator = torch.Generator().manual_seed(3)
    sizes = torch.tensor([0, 1, 5, 40])[torch.randint(4, (80,), generator=generator)]
    sizes[28:36] = 40
    offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int().view(1, 1, -1)
    keys = int(offsets[..., -1])
    kept = torch.rand(1, 1, 3, 80, generator=generator) < 0.5
    kept[:, :, 0, 20:40] = True
    kept[..., -1] = False
    q_offsets = torch.tensor([[[0, 33, 33, 37]]], dtype=torch.int32)
    plan = Plan(None, q_offsets, None, offsets, packed(kept))
    lists = on_cpu(work_lists(moved(plan, device), 37, keys, RAGGED))
    assert_lists_match(plan, lists, RAGGED)


def test_a_single_token_and_no_token(device: str) -> None:
    for queries, keys in ((1, 1), (0, 5), (5, 0)):
        plan = random_plan(1, 1, 1, queries, keys, 2, 2, share=1.0)
        lists = on_cpu(work_lists(moved(plan, device), queries, keys, RAGGED))
        assert_lists_match(plan, lists, RAGGED)


def test_the_fill_counts_half_empty_tiles(device: str) -> None:
    q_offsets = torch.tensor([[[0, 33, 33]]], dtype=torch.int32)
    k_offsets = torch.tensor([[[0, 17, 17]]], dtype=torch.int32)
    plan = Plan(None, q_offsets, None, k_offsets, torch.tensor([[[[1], [0]]]], dtype=torch.int32))
    lists = work_lists(moved(plan, device), 33, 17, RAGGED)
    fill = tile_fill(moved(plan, device), lists, RAGGED)
    assert fill.item() == pytest.approx(33 * 17 / (2 * 32 * 64))
    with_short = RAGGED._replace(short_q=16)
    lists = work_lists(moved(plan, device), 33, 17, with_short)
    assert tile_fill(moved(plan, device), lists, with_short).item() == pytest.approx(33 * 17 / ((32 + 16) * 64))


def test_more_keys_than_a_piece_can_number_are_refused_before_a_launch(device: str) -> None:
    plan = moved(random_plan(1, 1, 1, 5, 5, 2, 2), device)
    with pytest.raises(ValueError, match="fewer than 8388608 keys; got 8388608"):
        work_lists(plan, 5, triton_launch.LONGEST_SEQUENCE, RAGGED)
