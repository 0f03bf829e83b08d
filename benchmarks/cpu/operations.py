"""All that a method does in place of one attention, in each of its phases, beside dense attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cpu.records import Row, threads_of
from benchmarks.cpu.sizes import DTYPES, Sizes
from benchmarks.cpu.timing import CpuTimer, Stages
from benchmarks.gpu.shapes import clustered_operands
from benchmarks.gpu.site import OPS, Site
from benchmarks.gpu.timing import Call, interleaved
from sparse_compile.plan import Plan

ATTENTION = ("block_sparse_attention", "attention_with_lse")
"""What is no routing."""
SEARCHES = ("adaspa first search", "adaspa later search")


class Phases:
    """The ops of one attention in each phase of both methods, as the strategies write them with default options.

    Args:
        site: q, k, v and state, after a search of both methods.
        density: share of the keys that SVG2 keeps, and 1 - ``sparsity`` of AdaSpa.
    """

    def __init__(self, site: Site, density: float) -> None:
        self.site, self.density = site, density
        site.kmeans(restart=True)
        site.keep_centroids()
        site.attention_with_lse()
        site.plan_top_k(site.block_mass(fresh=True), density)

    def density_of(self, name: str) -> float:
        """Of the plan that a phase attends by; 1 in a first search."""
        site = self.site
        if name == "adaspa first search":
            return 1.0
        if name.startswith("adaspa"):
            return float(site.block_plan(site.keep).density().mean())
        site.restore_centroids()
        return float(site.plan_top_p(site.kmeans(restart=False), self.density).density().mean())

    def svg2(self, stages: Stages, corrected: bool) -> None:
        """A warm step: k-means goes on from centroids that are near, not from its own result."""
        site = self.site
        clusters = stages.run("kmeans", lambda: site.kmeans(restart=False))
        plan = stages.run("plan_top_p", lambda: site.plan_top_p(clusters, self.density))
        self._attend(stages, plan, corrected, lambda: site.kept_mass(plan))

    def adaspa(self, stages: Stages) -> None:
        """A sparse step."""
        site = self.site
        site.blocks = stages.run("token_blocks", site.token_blocks)
        sides = tuple(site.blocks[place] for place in (1, 2, 4, 5))
        kept = stages.run("kept_blocks", lambda: OPS.kept_blocks(site.keep, site.ready, *sides, True, site.kernel))
        plan = site.block_plan(kept)
        self._attend(stages, plan, True, lambda: self._paired(plan, None))

    def adaspa_search(self, stages: Stages, first: bool) -> None:
        """The first search, which attends densely, or a later one, which attends by the plan that it makes."""
        site = self.site
        site.blocks = stages.run("token_blocks", site.token_blocks)
        if first:
            stages.run("attention_with_lse", site.attention_with_lse)
        mass = stages.run("block_mass", lambda: site.block_mass(fresh=first))
        sides = tuple(site.blocks[place] for place in (1, 2, 4, 5))
        config = site.config
        settings = (1 - self.density, config.head_adaptive, config.rank_by, True, config.seed, site.kernel)
        chosen = stages.run("plan_top_k", lambda: OPS.plan_top_k(mass, *sides, site.keep, site.ready, *settings))
        plan = site.block_plan(site.keep)
        if first:
            stages.run("kept_mass", lambda: self._paired(plan, chosen[0]))
        else:
            self._attend(stages, plan, True, lambda: self._paired(plan, chosen[0]))

    def _paired(self, plan: Plan, recall: Tensor | None) -> Tensor:
        site = self.site
        mass: Tensor = OPS.paired_kept_mass(site.kept_mass(plan), recall, site.offset, site.planned, site.kernel)
        return mass

    def _attend(self, stages: Stages, plan: Plan, corrected: bool, kept_mass: Callable[[], Tensor]) -> None:
        site = self.site
        pooled = stages.run("pooled_keys", lambda: site.pooled_keys(plan)) if corrected else None
        mass = stages.run("kept_mass", kept_mass)
        stages.run("block_sparse_attention", lambda: site.attention(plan, pooled, mass))


def measure_ops(tokens: int, head_size: int, dtype: str, sizes: Sizes, timer: CpuTimer) -> list[Row]:
    """The rows of one shape: dense attention and each phase of the methods take turns.

    Args:
        tokens: of the video.
        head_size: D.
        dtype: of the operands, by name.
        sizes: which density, how often.
        timer: measures one call.
    """
    shape = sizes.shape_of(tokens, head_size)
    q, k, v = clustered_operands(shape, torch.device("cpu"), DTYPES[dtype])
    phases = Phases(Site(shape, (q, k, v), "cpu"), sizes.op_density)
    restore = phases.site.restore_centroids
    bodies: dict[str, tuple[Callable[[Stages], None], Callable[[], Any]]] = {
        "svg2 warm": (lambda stages: phases.svg2(stages, True), restore),
        "svg2 warm, uncorrected": (lambda stages: phases.svg2(stages, False), restore),
        "adaspa sparse": (phases.adaspa, lambda: None),
    }
    if tokens < sizes.long:
        bodies["adaspa first search"] = (lambda stages: phases.adaspa_search(stages, True), lambda: None)
        bodies["adaspa later search"] = (lambda stages: phases.adaspa_search(stages, False), lambda: None)
    stages = {name: Stages(timer.clock) for name in bodies}
    calls = {"dense": Call(lambda: F.scaled_dot_product_attention(q, k, v))}
    for name, (body, before) in bodies.items():
        calls[name] = Call(lambda body=body, name=name: body(stages[name]), before)  # type: ignore[misc]
    samples = interleaved(calls, timer, sizes.seconds, sizes.repeats_of(tokens))
    dense = samples["dense"].median
    rows = []
    for name in bodies:
        sample = samples[name]
        parts = stages[name].medians(sample.runs)
        row: Row = {"call": name, "asked_density": sizes.op_density, "density": phases.density_of(name)}
        row |= {"dense_ms": dense, "sparse_ms": sample.median, "sparse_ms_10_90": [sample.low, sample.high]}
        row |= {"flex_ms": None, "flex_refused": "has no routing"}
        row |= {"speedup": dense / sample.median, "repeats": sample.runs, "parts_ms": parts}
        row["parts_share"] = {part: milliseconds / dense for part, milliseconds in parts.items()}
        row["routing_share"] = routing_share(parts, dense)
        rows.append({"tokens": tokens, "heads": shape.heads, "head_size": head_size, **row})
    return rows


def routing_share(parts: dict[str, float], dense_ms: float) -> float:
    """What everything but the attention costs, in times of dense attention."""
    return sum(milliseconds for part, milliseconds in parts.items() if part not in ATTENTION) / dense_ms


def describe_op(row: Row) -> str:
    """A row as one line."""
    shares = " ".join(f"{part} {share:.3f}" for part, share in row["parts_share"].items())
    return (
        f"op         {row['call']:22s} {row['dtype']:8s} {threads_of(row)}, N {row['tokens']:5d} D"
        f" {row['head_size']:3d} density {row['density']:.3f}  ms: dense {row['dense_ms']:.1f} all"
        f" {row['sparse_ms']:.1f}  {row['speedup']:.2f} x  routing {row['routing_share']:.3f} of dense"
        f"  runs {row['repeats']}\n             of dense: {shares}"
    )
