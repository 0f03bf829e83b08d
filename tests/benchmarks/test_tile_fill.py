"""The fills of docs/kernels.md, counted again group by group."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.gpu.plans import ragged_plan
from benchmarks.gpu.shapes import SHAPES
from benchmarks.tile_fill import BLOCK_K, BLOCK_Q, PIECE, SHORT_Q, fills
from sparse_compile.plan import Plan


def counted(plan: Plan) -> dict[str, float]:
    useful, computed = 0, dict.fromkeys(("clusters", "runs", "pieces", "pieces and short tiles"), 0)
    bounds = plan.k_offsets[0, 0].tolist()
    for kept, queries in zip(plan.kept()[0, 0].tolist(), plan.q_offsets[0, 0].diff().tolist(), strict=True):
        runs: list[list[int]] = []
        clusters = 0
        for keeps, (start, stop) in zip(kept, itertools.pairwise(bounds), strict=True):
            if not keeps or start == stop:
                continue
            useful += queries * (stop - start)
            clusters += -(-(stop - start) // BLOCK_K) * BLOCK_K
            if runs and runs[-1][1] == start:
                runs[-1][1] = stop
            else:
                runs.append([start, stop])
        rows = -(-queries // BLOCK_Q) * BLOCK_Q
        pieces = sum(-(-(stop - start) // PIECE) for start, stop in runs) * PIECE
        computed["clusters"] += rows * clusters
        computed["runs"] += rows * sum(-(-(stop - start) // BLOCK_K) * BLOCK_K for start, stop in runs)
        computed["pieces"] += rows * -(-pieces // BLOCK_K) * BLOCK_K
        whole, rest = divmod(queries, BLOCK_Q)
        rows = whole * BLOCK_Q + (0 if rest == 0 else SHORT_Q if rest <= SHORT_Q else BLOCK_Q)
        computed["pieces and short tiles"] += rows * -(-pieces // BLOCK_K) * BLOCK_K
    return {name: useful / lanes for name, lanes in computed.items()}


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_fills_are_counted_right(density: float) -> None:
    shape = SHAPES["toy_joint"]._replace(heads=1, k_clusters=40)
    plan = ragged_plan(shape, density, torch.device("cpu"))
    found = fills(plan)
    for name, value in counted(plan).items():
        assert found[name] == pytest.approx(value, abs=1e-3), name
