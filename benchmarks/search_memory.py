"""Peak extra memory of AdaSpa's search: what it needs besides q, k, v and the state that it fills.

    python benchmarks/search_memory.py [--tokens 8192] [--heads 4]

The high-water mark of the process while the ops of a search run, less its memory before; the output counts. N x N
scores of these sizes would be a gigabyte. Each case runs in a process of its own. Linux with glibc only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
from pathlib import Path

import torch

import sparse_compile.ops
from sparse_compile.plan import BITS_PER_WORD

BUDGET_MIB = 64
HEAD_SIZE, BLOCK = 64, 64
PHASES = ("search", "refine")


def status(field: str) -> float:
    """A size of this process in MiB, from /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measure(phase: str, kernel: str, tokens: int, heads: int) -> float:
    """Extra MiB of one search, dense attention included, or of the search part of a refining call."""
    ops = torch.ops.sparse_compile
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, HEAD_SIZE, generator=generator) for _ in range(3))
    groups = -(-tokens // BLOCK) + 1
    keep = torch.zeros(1, heads, groups, -(-groups // BITS_PER_WORD), dtype=torch.int32)
    lse, ready = torch.zeros(1, heads, tokens), torch.zeros(1, dtype=torch.int32)
    scale = HEAD_SIZE**-0.5

    def search(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lse: torch.Tensor, keep: torch.Tensor) -> None:
        video, fresh = [0, q.shape[2]], phase == "search"
        blocks = ops.token_blocks(q, k, None, None, video, video, BLOCK, BLOCK, kernel)
        if fresh:
            ops.attention_with_lse(q, k, v, None, None, lse, True, scale, True, kernel)
        mass, _ = ops.block_mass(q, k, lse, ready, None, blocks[1], None, blocks[4], BLOCK, scale, 1, fresh, kernel)
        sides = (blocks[1], blocks[2], blocks[4], blocks[5])
        ops.plan_top_k(mass, *sides, keep, ready, 0.8, "paper", "mass", True, 0, kernel)

    small = 2 * BLOCK  # libraries load and threads start here
    search(*(x[:, :, :small].clone() for x in (q, k, v, lse)), keep[:, :, :3, :1].clone())
    if phase == "refine":
        ops.attention_with_lse(q, k, v, None, None, lse, True, scale, True, "cpu")
    ctypes.CDLL(None).malloc_trim(0)  # what is free but held would hide what the search takes
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status("VmRSS")
    search(q, k, v, lse, keep)
    return status("VmHWM") - before


def main() -> int:
    """Measure each case in a fresh process, print, and fail where one is over the budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--kernel", choices=sparse_compile.ops.KERNELS, default="cpu")
    parser.add_argument("--case", choices=PHASES, help="measure one case in this process and print MiB only")
    arguments = parser.parse_args()
    if arguments.case:
        print(measure(arguments.case, arguments.kernel, arguments.tokens, arguments.heads))
        return 0
    figures = {}
    for phase in PHASES:
        sizes = ["--tokens", str(arguments.tokens), "--heads", str(arguments.heads)]
        command = [sys.executable, __file__, "--case", phase, "--kernel", arguments.kernel, *sizes]
        figures[phase] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{phase:6s} {figures[phase]:6.1f} MiB")
    if arguments.json:
        context = {"torch": torch.__version__, "tokens": arguments.tokens, "heads": arguments.heads}
        context |= {
            "kernel": arguments.kernel,
            "head_size": HEAD_SIZE,
            "block_size": BLOCK,
            "threads": torch.get_num_threads(),
            "dtype": "float32",
        }
        arguments.json.write_text(json.dumps({**context, "extra_mib": figures}, indent=1) + "\n")
    within = max(figures.values()) <= BUDGET_MIB
    print(f"{'within' if within else 'OVER'} the budget of {BUDGET_MIB} MiB")
    return 0 if within else 1


if __name__ == "__main__":
    raise SystemExit(main())
