"""The monitor over whole generations: a planted scene cut is noticed, a quiet clip raises nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import pytest
import torch
import torch.nn.functional as F
from generations import phases
from moving_objects import CUT_AT, SIZE, MovingObjects
from torch import Tensor, nn

import sparse_compile
from sparse_compile.runtime.report import Report

OBJECT_HEADS = (2, 3)
"""Heads of `MovingObjects` that attend by object more than by place: a cut changes what they attend to."""
HEADS = len(OBJECT_HEADS)
GRID = (4, 8, 12)
OPTIONS: dict[str, Any] = {
    "method": "adaspa",
    "lowering": "eager",
    "min_tokens": 1,
    "dense_layers": 0,
    "block_size": 16,
    "sparsity": 0.75,
    "dense_steps": 5,
    "search_steps": "5,29",
    "head_adaptive": "off",
}
STEPS = 30
QUIET = MovingObjects(drift="small", grid=GRID, gain=1.8)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield


class Given(nn.Module):
    """Attention whose q, k and v are given: hidden states [1, tokens, 3 x heads x SIZE]."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(3 * HEADS * SIZE, HEADS * SIZE, bias=False) for _ in range(3))
        for place, projection in enumerate((self.to_q, self.to_k, self.to_v)):
            with torch.no_grad():
                projection.weight.zero_()
                projection.weight[:, place * HEADS * SIZE : (place + 1) * HEADS * SIZE].fill_diagonal_(1)
        self.eval().requires_grad_(False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        q, k, v = self.to_q(hidden_states), self.to_k(hidden_states), self.to_v(hidden_states)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


class Clip(Protocol):
    """What attention is given, step by step."""

    def at(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Float32 q, k and v of one step, [1, heads, tokens, SIZE]."""


def hidden_states(clip: Clip, step: int) -> Tensor:
    """q, k and v of one step, side by side."""
    return torch.cat([t[:, OBJECT_HEADS].transpose(1, 2).flatten(-2) for t in clip.at(step)], dim=-1)


@dataclass(frozen=True)
class CutClip:
    """Each stretch of 16 tokens attends to one other; which one changes at the cut."""

    seed: int = 0

    def at(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Float32 q, k and v, [1, heads, tokens, SIZE], as `MovingObjects.at` gives them."""
        generator = torch.Generator().manual_seed(self.seed)
        codes = torch.randn(24, SIZE, generator=generator)
        likes = [torch.randperm(24, generator=generator) for _ in range(2)][step >= CUT_AT]
        shape = (1, max(OBJECT_HEADS) + 1, 24 * 16, SIZE)
        noise = torch.Generator().manual_seed(step)
        q, k, v = (0.3 * torch.randn(shape, generator=noise) for _ in range(3))
        return q + codes[likes].repeat_interleave(16, dim=0), k + codes.repeat_interleave(16, dim=0), v


def watched(clip: Clip, **options: object) -> tuple[list[str], Report]:
    """The phases of one generation, and its report."""
    model = Given()
    call = torch.compile(model, backend="sparse_attn", options={**OPTIONS, **options}, fullgraph=True)
    with sparse_compile.denoising(model, steps=STEPS) as clock:
        for step in range(STEPS):
            call(hidden_states(clip, step))
            clock.step()
    (found,) = phases(model)
    return found, sparse_compile.explain(model)


def test_a_planted_scene_cut_is_noticed_within_two_probes() -> None:
    found, report = watched(CutClip())
    assert found.index("refine") == CUT_AT + 3
    (generation,) = report.generations
    told = {step.step: step.note for step in generation.steps if step.note}
    assert told[CUT_AT + 3].startswith("searched again: the plans of 1 layer and branch had gone stale, most in ")
    assert f"step {CUT_AT + 3}: searched again" in str(report)
    kept = [step.kept_mass for step in generation.steps]
    assert kept[CUT_AT] is not None and kept[CUT_AT - 1] is not None and kept[CUT_AT + 3] is not None
    assert kept[CUT_AT] < kept[CUT_AT - 1] - 0.05
    assert kept[CUT_AT + 3] > kept[CUT_AT] + 0.05


def test_a_quiet_clip_raises_nothing_and_saves_the_search_that_is_due() -> None:
    found, report = watched(QUIET)
    assert "refine" not in found
    told = {step.step: step.note for step in report.generations[0].steps if step.note}
    assert list(told) == [28]
    assert told[28].startswith("no search: the plans of 1 layer and branch ")


def test_without_the_monitor_the_schedule_alone_decides() -> None:
    found, report = watched(CutClip(), monitor=False)
    assert [step for step, phase in enumerate(found) if phase == "refine"] == [28]
    assert not any(step.note for step in report.generations[0].steps)


def test_a_head_below_min_recall_attends_to_everything_and_the_report_says_so() -> None:
    _, report = watched(QUIET, min_recall=0.5, sparsity=0.9)
    (heads,) = report.heads
    whole = [density == 1.0 for density in heads.density]
    assert any(whole) and not all(whole)
    assert heads.kept_mass is not None
    assert all(mass >= 0.45 for mass in heads.kept_mass)
    (warning,) = [line for line in report.warnings if "min_recall" in line]
    assert warning.startswith(f"{sum(whole)} heads attend to everything")


@pytest.mark.parametrize("method", ["svg2", "adaspa"])
def test_a_target_that_the_ceiling_forbids_stays_dense_and_is_reported(method: str) -> None:
    groups = {"svg2": {"q_clusters": 8, "k_clusters": 24}, "adaspa": {"block_size": 16}}
    options = {"method": method, "lowering": "eager", "min_tokens": 1, "dense_layers": 0, **groups[method]}
    options |= {"target_recall": 0.95, "max_density": 0.1}
    clip, model = MovingObjects(drift="small", grid=GRID, gain=0.2), Given()
    call = torch.compile(model, backend="sparse_attn", options=options, fullgraph=True)
    with sparse_compile.denoising(model, steps=8) as clock:
        for step in range(8):
            x = hidden_states(clip, step)
            torch.testing.assert_close(call(x), model(x), rtol=1e-4, atol=1e-4)
            clock.step()
    report = sparse_compile.explain(model)
    assert report.generations[0].at_ceiling == 1.0
    assert report.density == 1.0
    assert any("max_density keeps up to 100% of the queries below target_recall" in line for line in report.warnings)
