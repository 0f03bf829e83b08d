"""The CPU path against dense attention and FlexAttention: the kernel, whole ops with routing, whole generations.

    python -m benchmarks.cpu_attention --json FILE [--parts kernel,op,generation] [--threads 1,2] [--quick]
        [--plot FILE]

``kernel`` rows time `block_sparse_attention` by random plans: uniform (blocks of 128 tokens in place, each row keeps
as many at random) and ragged (clusters of about 256 queries and 64 keys from everywhere, cut at random).

    efficiency = density * (time of dense attention / time of sparse attention)

where density is that of the plan at hand and dense is ``F.scaled_dot_product_attention`` on the same operands.
FlexAttention is compiled and has a BlockMask of the very blocks of the uniform plan.

``op`` rows time all that a method puts in the place of one attention, with default options but for the density; a row
says what each op costs in times of dense attention. Routing is everything but the attention.

``generation`` rows time 20 denoising steps of a transformer with the blocks of Wan and random weights, by the default
schedule, against the same model under ``torch.compile`` and without it. They have the most threads asked for.

In each group all calls take turns in one process, and medians are compared. With one thread the time is what this
process computed, which others cannot take from; with more it is the time on the wall. ``ATEN_CPU_CAPABILITY=avx2``
in the environment holds torch and the kernels to AVX2.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.cpu.generation import describe_generation, measure_generations
from benchmarks.cpu.kernel import describe_kernel, measure_kernel
from benchmarks.cpu.operations import describe_op, measure_ops
from benchmarks.cpu.plot import draw
from benchmarks.cpu.records import Records, Row, common_of, describe_machine
from benchmarks.cpu.sizes import DTYPES, FULL, PARTS, QUICK, Sizes
from benchmarks.cpu.targets import summary
from benchmarks.cpu.timing import CpuTimer, clock_of, threads_at_work
from benchmarks.gpu_kernels import comma_separated

MakeTimer = Callable[[int], CpuTimer]


def timer_of(threads: int) -> CpuTimer:
    """What measures calls with so many threads."""
    return CpuTimer(clock_of(threads))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count = comma_separated(lambda word: int(word) if word.isdigit() and int(word) else None)
    parser.add_argument("--json", type=Path, help="write the rows to this file, after each group of them")
    parser.add_argument("--plot", type=Path, help="draw the rows into this file; needs matplotlib")
    parser.add_argument("--parts", default=list(PARTS), type=comma_separated({name: name for name in PARTS}.get))
    parser.add_argument("--quick", action="store_true", help="a minute: one length, one density, one thread")
    parser.add_argument("--threads", type=count, help="default: 1,2")
    parser.add_argument("--lengths", type=count, help="tokens of the kernel and op rows")
    parser.add_argument("--head-sizes", type=count)
    parser.add_argument("--dtypes", type=comma_separated({name: name for name in DTYPES}.get))
    parser.add_argument("--seconds", type=float, help="about how long a group of quick calls is measured")
    parser.add_argument("--repeats", type=int, help="rounds of a group, where there is time for them")
    parser.add_argument("--lowering", default="inductor", choices=["inductor", "eager"], help="of the generations")
    return parser.parse_args(arguments)


def sizes_of(chosen: argparse.Namespace, sizes: Sizes) -> Sizes:
    """The sizes, with what the command line changes."""
    given = {name: getattr(chosen, name) for name in ("threads", "head_sizes", "dtypes", "seconds", "repeats")}
    changes = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if value}
    if chosen.lengths:
        changes |= {"lengths": tuple(chosen.lengths), "op_lengths": tuple(chosen.lengths)}
    return dataclasses.replace(sizes, **changes)


def measure_shapes(part: str, sizes: Sizes, records: Records, make_timer: MakeTimer) -> None:
    """The rows of ``kernel`` or ``op``: every length, head size, dtype and number of threads.

    Args:
        part: which of them.
        sizes: what is measured.
        records: where rows go.
        make_timer: gives what measures calls with so many threads.
    """
    measure, describe = (measure_kernel, describe_kernel) if part == "kernel" else (measure_ops, describe_op)
    for tokens in sizes.lengths if part == "kernel" else sizes.op_lengths:
        for threads in sizes.threads:
            if part == "op" and threads != sizes.threads[0] and tokens >= sizes.long:
                continue
            for dtype in sizes.dtypes:
                for head_size in sizes.head_sizes:
                    common = common_of(part, threads, dtype, records.machine["isa"])
                    common |= {"tokens": tokens, "heads": sizes.heads, "head_size": head_size}
                    with threads_at_work(threads):
                        rows = functools.partial(measure, tokens, head_size, dtype, sizes, make_timer(threads))
                        records.attempt(common, rows, describe)


def measure_models(sizes: Sizes, records: Records, make_timer: MakeTimer, lowering: str) -> None:
    """The rows of ``generation``.

    Args:
        sizes: what is measured.
        records: where rows go.
        make_timer: gives what measures calls with so many threads.
        lowering: of the models; ``eager`` for tests.
    """
    threads = max(sizes.threads)
    for dtype in sizes.dtypes:
        common: Row = common_of("generation", threads, dtype, records.machine["isa"])
        with threads_at_work(threads):
            rows = functools.partial(measure_generations, dtype, sizes, make_timer(threads), lowering)
            records.attempt(common, rows, describe_generation)


def main(arguments: Sequence[str] | None = None, sizes: Sizes | None = None, make_timer: MakeTimer = timer_of) -> int:
    """Measure what the command line names; 1 if a group failed.

    Args:
        arguments: those of the process by default.
        sizes: in place of those that the command line names, for tests.
        make_timer: gives what measures calls with so many threads.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    chosen = parse(given)
    sizes = sizes_of(chosen, sizes or (QUICK if chosen.quick else FULL))
    records = Records(chosen.json, describe_machine(given))
    machine = records.machine
    print(f"{machine['cpu']}, {machine['isa']}, torch {machine['torch']}; {machine['without_cpp'] or 'C++ kernels'}")
    with torch.no_grad():
        for part in chosen.parts:
            if part == "generation":
                measure_models(sizes, records, make_timer, chosen.lowering)
            else:
                measure_shapes(part, sizes, records, make_timer)
    records.summary = summary(records.rows)
    records.write()
    print("\n".join(["", *records.summary]), flush=True)
    if chosen.plot is not None:
        draw({"machine": records.machine, "rows": records.rows}, chosen.plot)
    return 1 if records.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
