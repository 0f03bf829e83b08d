"""Block-sparse attention alone, without anything that stands for the skipped keys."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cpu.records import Row, threads_of
from benchmarks.cpu.sizes import DTYPES, Sizes
from benchmarks.cpu.timing import CpuTimer
from benchmarks.gpu.plans import ragged_plan, uniform_plan
from benchmarks.gpu.shapes import Shape, random_operands
from benchmarks.gpu.site import Site
from benchmarks.gpu.timing import Call, interleaved
from sparse_compile.plan import Plan

CPU = torch.device("cpu")
KINDS = ("uniform", "ragged")


def plan_of(kind: str, shape: Shape, density: float, block: int) -> Plan:
    """Blocks in place of which each row keeps as many at random; or clusters of tokens from everywhere, cut at random.

    Args:
        kind: one of `KINDS`.
        shape: of the call.
        density: about the share of the pairs that are kept.
        block: tokens of a block of the uniform plan.
    """
    return uniform_plan(shape, block, density, CPU) if kind == "uniform" else ragged_plan(shape, density, CPU)


def flex_mask(plan: Plan, tokens: int, block: int) -> Any:
    """A uniform plan as a BlockMask of full blocks, which cost FlexAttention least."""
    from torch.nn.attention.flex_attention import BlockMask

    kept = plan.kept()[..., :-1, :-1]  # without the padding groups
    full = kept.sum(-1).int()
    indices = kept.int().argsort(dim=-1, descending=True, stable=True).int()
    known = inspect.signature(BlockMask.from_kv_blocks).parameters
    backward = {"compute_q_blocks": False} if "compute_q_blocks" in known else {}
    return BlockMask.from_kv_blocks(
        torch.zeros_like(full),
        torch.zeros_like(indices),
        full,
        indices,
        BLOCK_SIZE=block,
        seq_lengths=(tokens, tokens),
        **backward,
    )


def flex_call(q: Tensor, k: Tensor, v: Tensor, mask: Any, compiled: Any) -> Call:
    """FlexAttention by a mask; compiled by its first run."""
    return Call(lambda: compiled(q, k, v, block_mask=mask))


def flex_calls(
    operands: tuple[Tensor, ...], plans: dict[float, Plan], shape: Shape, block: int
) -> tuple[dict[str, Call], str]:
    """FlexAttention by each plan that leaves something out, and why it does not run, if it does not."""
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()  # each shape is compiled on its own; too many of them, and Dynamo would run it eagerly
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    calls = {}
    try:
        for density, plan in plans.items():
            if density < 1:
                calls[f"flex {density}"] = flex_call(*operands, flex_mask(plan, shape.tokens, block), compiled)
        for call in calls.values():
            call.run()
    except Exception as error:  # noqa: BLE001 - a rival that refuses is left out, and its row says why
        return {}, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"
    return calls, "" if calls else "not measured at this density"


def measure_kernel(tokens: int, head_size: int, dtype: str, sizes: Sizes, timer: CpuTimer) -> list[Row]:
    """The rows of one shape: dense attention, both kinds of plan at each density and FlexAttention take turns.

    Args:
        tokens: of the video.
        head_size: D.
        dtype: of the operands, by name.
        sizes: which densities, how often.
        timer: measures one call.
    """
    shape = sizes.shape_of(tokens, head_size)
    operands = random_operands(shape, CPU, DTYPES[dtype])
    site = Site(shape, operands, "cpu")
    densities = sizes.densities_of(tokens)
    plans = {(kind, d): plan_of(kind, shape, d, sizes.block) for kind in KINDS for d in densities}
    calls = {"dense": Call(lambda: F.scaled_dot_product_attention(*operands))}
    for (kind, density), plan in plans.items():
        calls[f"{kind} {density}"] = Call(lambda plan=plan: site.attention(plan))  # type: ignore[misc]
    uniform = {density: plans["uniform", density] for density in densities}
    flex, refused = flex_calls(operands, uniform, shape, sizes.block)
    calls |= flex
    samples = interleaved(calls, timer, sizes.seconds, sizes.repeats_of(tokens))
    dense = samples["dense"].median
    rows = []
    for (kind, asked), plan in plans.items():
        density = float(plan.density().double().mean())
        sparse = samples[f"{kind} {asked}"]
        row: Row = {"plan": kind, "asked_density": asked, "density": density, "dense_ms": dense}
        row |= {"sparse_ms": sparse.median, "sparse_ms_10_90": [sparse.low, sparse.high], "repeats": sparse.runs}
        row |= flex_columns(samples[f"flex {asked}"].median if f"flex {asked}" in flex else None, kind, asked, refused)
        row |= {"speedup": dense / sparse.median, "efficiency": efficiency(density, dense, sparse.median)}
        if kind == "uniform" and row["flex_ms"] is not None:
            row["flex_efficiency"] = efficiency(density, dense, row["flex_ms"])
        row["dense_gflops"] = shape.dense_flops / dense / 1e6
        rows.append({"tokens": tokens, "heads": shape.heads, "head_size": head_size, **row})
    return rows


def flex_columns(milliseconds: float | None, kind: str, density: float, refused: str) -> Row:
    """What a row says of FlexAttention: its time, or why there is none."""
    if kind != "uniform":
        return {"flex_ms": None, "flex_refused": "a BlockMask has blocks of one size, in place"}
    if density == 1:
        return {"flex_ms": None, "flex_refused": "not measured without anything to leave out"}
    return {"flex_ms": milliseconds, "flex_refused": refused if milliseconds is None else ""}


def efficiency(density: float, dense_ms: float, sparse_ms: float) -> float:
    """How much of the time that is left out is saved: 1 where a pair costs as much as in dense attention."""
    return density * dense_ms / sparse_ms


def describe_kernel(row: Row) -> str:
    """A row as one line."""
    flex = "-" if row["flex_ms"] is None else f"{row['flex_ms']:.1f}"
    return (
        f"kernel     {row['plan']:8s} {row['dtype']:8s} {threads_of(row)}, N {row['tokens']:5d} D"
        f" {row['head_size']:3d} density {row['density']:.3f}  ms: dense {row['dense_ms']:.1f} sparse"
        f" {row['sparse_ms']:.1f} flex {flex}  efficiency {row['efficiency']:.2f}  runs {row['repeats']}"
    )
