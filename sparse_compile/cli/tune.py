"""``sparse-attn tune``: time the configurations of the kernels on this GPU, and remember the best ones."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_compile.errors import SparseAttentionError
from sparse_compile.plan import Groups, Plan, pack_bits

SHAPE = (32_760, 12)
"""Tokens and heads of Wan 1.3B at 480p: long enough to fill a GPU, short enough to try everything in a minute."""
TOKENS_OF_GROUPS = {"ragged": (256, 76), "blocks": (64, 64)}
"""Mean queries and keys of a group."""
DENSITY = 0.25
REPEATS = 10
Timer = Callable[[Callable[[], object]], float]


class Trial(NamedTuple):
    """One problem: the key of its measurement, its configurations, and a call with one of them."""

    entry: str
    candidates: Sequence[tuple[Any, ...]]
    call: Callable[[Any], object]


def run(arguments: argparse.Namespace) -> int:
    """Time every configuration, print the table, save the best ones."""
    if not torch.cuda.is_available():
        raise SparseAttentionError(
            "tuning needs a CUDA device", "none", "Run it on the machine that will run the model."
        )
    from sparse_compile.kernels import tuning

    gpu = tuning.gpu_name(torch.cuda.current_device())
    choices = {}
    for size in arguments.sizes:
        for trial in trials(torch.device("cuda", torch.cuda.current_device()), *SHAPE, size):
            timed = measured(trial, milliseconds)
            if not timed:
                continue
            choices[trial.entry] = min(timed, key=timed.__getitem__)
            print(trial.entry)
            for config, time in sorted(timed.items(), key=lambda row: row[1]):
                print(f"  {time:8.3f} ms  {tuple(config)}")
    print(f"\nsaved in {tuning.save(gpu, choices)}")
    return 0


def measured(trial: Trial, timer: Timer) -> dict[tuple[Any, ...], float]:
    """Milliseconds of each configuration; one that does not launch is left out."""
    from triton.errors import TritonError

    times = {}
    for config in trial.candidates:
        try:
            times[config] = timer(lambda config=config: trial.call(config))  # type: ignore[misc]
        except (RuntimeError, ValueError, TritonError) as error:  # out of resources: here it cannot be the best
            print(f"  does not run: {tuple(config)}: {error}")
    return times


def trials(
    device: torch.device, tokens: int, heads: int, size: int, dtype: torch.dtype = torch.bfloat16
) -> Iterator[Trial]:
    """The problems whose configurations are worth a measurement, for one head size."""
    from sparse_compile.kernels import tuning
    from sparse_compile.kernels.block_mass import triton_launch as mass
    from sparse_compile.kernels.block_mass.configs import candidates as mass_candidates
    from sparse_compile.kernels.block_sparse_attention import triton_launch as attention
    from sparse_compile.kernels.block_sparse_attention.configs import candidates
    from sparse_compile.kernels.kmeans import triton_launch as kmeans
    from sparse_compile.kernels.kmeans.configs import assign_candidates
    from sparse_compile.kernels.launching import device_of

    generator = torch.Generator(device).manual_seed(0)

    def random() -> Tensor:
        made = torch.randn(1, tokens, heads, size, generator=generator, device=device)
        return made.to(dtype).transpose(1, 2)

    q, k, v, out = random(), random(), random(), random()
    gpu, scale = device_of(q), size**-0.5
    for kind, (q_group, k_group) in TOKENS_OF_GROUPS.items():
        plan = random_plan(device, tokens, heads, q_group, k_group, ordered=kind == "ragged", generator=generator)
        mean_row = tokens / (plan.keep.shape[2] - 1)
        rows = candidates(gpu, dtype, size, ragged=kind == "ragged", mean_row=mean_row)
        problem = attention.problem(dtype, size, ragged=kind == "ragged", most_queries=rows[0].block_q)

        def attend(config: Any, plan: Plan = plan) -> object:
            return attention.attention(q, k, v, plan, None, scale, out, config)

        yield Trial(tuning.entry("block_sparse_attention", problem), rows, attend)

    ready, lse = torch.ones(1, dtype=torch.int32, device=device), torch.zeros(1, heads, tokens, device=device)
    blocks = random_plan(device, tokens, heads, 64, 64, ordered=False, generator=generator)
    sides = Groups(None, blocks.q_offsets), Groups(None, blocks.k_offsets)
    yield Trial(
        tuning.entry("block_mass", tuning.problem(dtype, size)),
        mass_candidates(gpu, dtype, size),
        lambda config: mass.block_mass(q, k, lse, ready, *sides, 64, scale, 1, True, config=config),
    )
    clusters = [max(2, tokens // count) for count in TOKENS_OF_GROUPS["ragged"]]
    centroids = [torch.randn(1, heads, c, size, generator=generator, device=device).to(dtype) for c in clusters]
    spans = [0, tokens]
    yield Trial(
        tuning.entry("kmeans", tuning.problem(dtype, size)),
        assign_candidates(gpu, dtype, size),
        lambda config: kmeans.cluster_both(
            q, k, None, None, spans, spans, centroids[0], centroids[1], ready, False, 1, 0, assign=config
        ),
    )


def random_plan(
    device: torch.device,
    tokens: int,
    heads: int,
    q_group: int,
    k_group: int,
    *,
    ordered: bool,
    generator: torch.Generator,
) -> Plan:
    """Groups of equal size, of which each row keeps a share at random; in a random order if ``ordered``."""

    def side(size: int) -> tuple[Tensor | None, Tensor]:
        groups = -(-tokens // size)
        bounds = (torch.arange(groups + 2, device=device, dtype=torch.int32) * size).clamp(max=tokens)
        order = torch.rand(1, heads, tokens, generator=generator, device=device).argsort(dim=-1).to(torch.int32)
        return order if ordered else None, bounds.expand(1, heads, groups + 2).contiguous()

    (q_order, q_offsets), (k_order, k_offsets) = side(q_group), side(k_group)
    rows, columns = q_offsets.shape[2] - 1, k_offsets.shape[2] - 1
    kept = torch.rand(1, heads, rows, columns, generator=generator, device=device) < DENSITY
    kept[..., -1] = False
    return Plan(q_order, q_offsets, k_order, k_offsets, pack_bits(kept))


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call on the GPU, compiled and warm."""
    for _ in range(2):
        call()
    times = []
    for _ in range(REPEATS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return float(statistics.median(times))
