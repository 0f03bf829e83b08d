"""What share of the pairs that an attention kernel computes was asked for, by how it cuts ragged plans. Needs no GPU.

    python -m benchmarks.tile_fill [--json FILE]

One head of random clusters (sizes of Dirichlet(1), as in `benchmarks.gpu_kernels`) at the sizes of Wan 2.1 and
HunyuanVideo. Ways to cut: every kept cluster on its own into chunks; runs of touching clusters into chunks; and runs
into pieces of 16 that share chunks. Queries in tiles of 128 within a cluster; last, with what is left of a cluster, if
64 or fewer, in tiles of 64: that is what the kernel does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.plans import ragged_plan
from benchmarks.gpu.shapes import SHAPES
from sparse_compile.plan import Plan

DENSITIES = (0.3, 0.2, 0.1)
BLOCK_Q, SHORT_Q, BLOCK_K, PIECE = 128, 64, 64, 16


def main(arguments: list[str] | None = None) -> None:
    """Print the table; write it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows here")
    chosen = parser.parse_args(arguments)
    rows = []
    for name in ("wan_720p", "hunyuan_720p", "wan_480p"):
        shape = SHAPES[name]._replace(heads=1)
        for density in DENSITIES:
            plan = ragged_plan(shape, density, torch.device("cpu"))
            rows.append({"shape": name, "density": round(float(plan.density()), 4), **fills(plan)})
            print(", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    if chosen.json is not None:
        command = "python -m benchmarks.tile_fill --json benchmarks/results/tile_fill.json"
        chosen.json.write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")


def fills(plan: Plan) -> dict[str, float]:
    """Asked-for pairs over computed pairs by each way, and what the tiles of queries alone cost."""
    kept, sizes = plan.kept()[0, 0], plan.k_offsets[0, 0].diff()
    queries = plan.q_offsets[0, 0].diff()
    useful = (queries * torch.where(kept, sizes, 0).sum(-1)).sum().double()
    tiles = -(-queries // BLOCK_Q) * BLOCK_Q
    rest = queries % BLOCK_Q
    short = torch.where((rest > 0) & (rest <= SHORT_Q), tiles - BLOCK_Q + SHORT_Q, tiles)

    def fill(keys_of_row: Tensor, tiles: Tensor = tiles) -> float:
        return round(float(useful / (tiles * keys_of_row).sum()), 3)

    runs = run_lengths(kept, sizes)
    pieces = (-(-runs // PIECE)).sum(-1)
    return {
        "clusters": fill(torch.where(kept, -(-sizes // BLOCK_K) * BLOCK_K, 0).sum(-1)),
        "runs": fill((-(-runs // BLOCK_K) * BLOCK_K).sum(-1)),
        "pieces": fill(-(-pieces * PIECE // BLOCK_K) * BLOCK_K),
        "pieces and short tiles": fill(-(-pieces * PIECE // BLOCK_K) * BLOCK_K, short),
    }


def run_lengths(kept: Tensor, sizes: Tensor) -> Tensor:
    """Keys of each run of kept groups, at its last group; 0 elsewhere: [rows, groups]. Empty groups end no run."""
    within = kept | (sizes == 0)
    within[:, -1] = False
    before = torch.where(within, sizes, 0).cumsum(-1)
    ends = within & ~torch.nn.functional.pad(within, (0, 1))[:, 1:]
    at_end = torch.where(ends, before, 0)
    last = at_end.cummax(-1).values
    return torch.where(ends, before - torch.nn.functional.pad(last, (1, 0))[:, :-1], 0)


if __name__ == "__main__":
    main()
