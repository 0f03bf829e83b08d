"""What the backend adds to the time that Inductor takes to compile one phase of a model.

    python -m benchmarks.compile_time [--pairs 3] [--models wan hunyuan_video] [--json FILE]

Two figures for each model. *Added* is paired: `backend="inductor"` and this backend in its dense phase, which gives
Inductor the same graph, compile the model in turn, and the median of the ratios is told. *Share* is the time inside our
stages (all but lowering) of each phase, over what Inductor alone took for the model. Every compilation starts with
empty caches and compiles in the process itself; seconds are of the CPU, of this process and of the C++ compiler, so
that other work on the machine hardly counts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn

import sparse_compile
from benchmarks.cpu.records import cpu_name
from sparse_compile.compiler import backend, pipeline
from sparse_compile.phases import Phase

BUDGET = 0.10
"""Most that passes and guards may add to the compile time of one phase."""
OPTIONS = {"min_tokens": 1, "dense_steps": 1, "dense_layers": 0, "kernel": "reference"}
"""One dense step, then a search, then sparse ones; nothing of ours is built from C++."""
PHASES = (Phase.DENSE, Phase.SEARCH, Phase.SPARSE)
"""In the order in which calls meet them."""


class Subject(NamedTuple):
    """A model and the keyword arguments of one call."""

    model: nn.Module
    call: dict[str, Any]


@dataclass(frozen=True)
class Seconds:
    """CPU seconds of one compilation, the call that caused it included."""

    python: float
    """Of this process."""
    compiler: float
    """Of the C++ compiler."""
    stages: float = 0.0
    """Of `python`: in the stages of the backend, without lowering."""

    @property
    def total(self) -> float:
        """Of both processes."""
        return self.python + self.compiler


@dataclass(frozen=True)
class Pair:
    """The same graph compiled by Inductor alone, and by this backend in its dense phase."""

    plain: Seconds
    dense: Seconds


class Figures(NamedTuple):
    """What was measured of one model: pairs, and every phase by this backend with the graphs run as they are."""

    pairs: list[Pair]
    phases: list[dict[str, Seconds]]


def wan(layers: int = 10) -> Subject:
    """A text-to-video Wan with small layers; two attentions in each."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=8,
        out_channels=8,
        text_dim=24,
        freq_dim=32,
        ffn_dim=96,
        num_layers=layers,
        rope_max_seq_len=64,
    )
    call = {
        "hidden_states": torch.randn(1, 8, 3, 16, 16),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 20, 24),
        "return_dict": False,
    }
    return Subject(model, call)


def hunyuan_video(layers: int = 3) -> Subject:
    """A HunyuanVideo with as many blocks of two streams as of one; joint attention behind a mask."""
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=layers,
        num_single_layers=layers,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=2,
        text_embed_dim=24,
        pooled_projection_dim=16,
        rope_axes_dim=(4, 6, 6),
    )
    mask = torch.ones(1, 20, dtype=torch.bool)
    mask[:, 15:] = False
    call = {
        "hidden_states": torch.randn(1, 4, 3, 16, 16),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 20, 24),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(1, 16),
        "guidance": torch.tensor([6000.0]),
        "return_dict": False,
    }
    return Subject(model, call)


def cogvideox(layers: int = 10) -> Subject:
    """A CogVideoX with small layers; text joined in front of the video."""
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=24,
        num_layers=layers,
        sample_width=16,
        sample_height=16,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=18,
    )
    call = {
        "hidden_states": torch.randn(1, 3, 4, 16, 16),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 18, 24),
        "return_dict": False,
    }
    return Subject(model, call)


SUBJECTS: dict[str, Callable[[], Subject]] = {"wan": wan, "hunyuan_video": hunyuan_video, "cogvideox": cogvideox}


@contextlib.contextmanager
def without_caches() -> Iterator[None]:
    """Inductor remembers nothing, and compiles in this process and its children alone."""
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    with config.patch(compile_threads=1), fresh_cache():
        yield


@contextlib.contextmanager
def stage_clock() -> Iterator[list[float]]:
    """CPU seconds of every `compile_graph`, less those of the lowering inside it; one number a graph."""
    spent: list[float] = []
    lowering = 0.0

    def timed_lower(*args: Any) -> Callable[..., Any]:
        nonlocal lowering
        start = time.process_time()
        try:
            return lower(*args)
        finally:
            lowering += time.process_time() - start

    def timed_compile(*args: Any) -> Callable[..., Any]:
        start, before = time.process_time(), lowering
        try:
            return compile_graph(*args)
        finally:
            spent.append(time.process_time() - start - (lowering - before))

    lower, compile_graph = pipeline.lower, backend.compile_graph
    with (
        mock.patch.object(pipeline, "lower", timed_lower),
        mock.patch.object(backend, "compile_graph", timed_compile),
    ):
        yield spent


def timed(call: Callable[[], object], stages: Sequence[float] = ()) -> Seconds:
    """CPU seconds of a call; ``stages`` is what a `stage_clock` writes to meanwhile."""
    before, known = os.times(), len(stages)
    call()
    after = os.times()
    python = after.user + after.system - before.user - before.system
    compiler = after.children_user + after.children_system - before.children_user - before.children_system
    return Seconds(python, compiler, sum(stages[known:]))


def compile_plain(subject: Subject, backend: str) -> Seconds:
    """A backend of torch, from nothing."""
    torch.compiler.reset()
    compiled = torch.compile(subject.model, backend=backend)
    with without_caches():
        return timed(lambda: compiled(**subject.call))


def compile_phases(subject: Subject, lowering: str, phases: Sequence[Phase]) -> dict[str, Seconds]:
    """This backend from nothing, one phase after the other.

    Raises:
        RuntimeError: the calls met other phases than these, compiled once each.
    """
    torch.compiler.reset()
    compiled = torch.compile(subject.model, backend="sparse_attn", options={**OPTIONS, "lowering": lowering})
    found: dict[str, Seconds] = {}
    with stage_clock() as stages, sparse_compile.denoising(subject.model, steps=len(PHASES)) as clock:
        for phase in phases:
            with without_caches(), clock.branch("cond"):
                found[str(phase)] = timed(lambda: compiled(**subject.call), stages)
            clock.step()
        met = tuple(step.phase for step in sparse_compile.explain(subject.model).generations[-1].steps)
    if met != tuple(map(str, phases)) or len(stages) != len(phases):
        raise RuntimeError(f"expected one compilation for each of {phases}, but met {met} in {len(stages)}")
    return found


def measure(make: Callable[[], Subject], pairs: int, *, plain: str = "inductor") -> Figures:
    """Pairs in alternating order, each on a model of its own.

    Args:
        make: builds the model.
        pairs: how many.
        plain: the backend to compare with; under ``eager`` this one too runs its graphs as they are.
    """
    figures = Figures([], [])
    with torch.no_grad():
        # What the first compilations of a process do once, is done here.
        compile_plain(Subject(nn.ReLU(), {"input": torch.ones(1)}), plain)
        compile_plain(make(), "eager")
        compile_phases(make(), "eager", PHASES)
        for number in range(pairs):
            subject = make()
            subject.model.eval().requires_grad_(False)

            def alone(subject: Subject = subject) -> Seconds:
                return compile_plain(subject, plain)

            def ours(subject: Subject = subject) -> Seconds:
                return compile_phases(subject, plain, PHASES[:1])["dense"]

            if number % 2:
                second, first = ours(), alone()
            else:
                first, second = alone(), ours()
            figures.pairs.append(Pair(first, second))
            figures.phases.append(compile_phases(subject, "eager", PHASES))
    return figures


def summary(figures: Figures) -> dict[str, Any]:
    """The figures of one model: medians."""
    plain = statistics.median(pair.plain.total for pair in figures.pairs)
    stages = {
        phase: statistics.median(measured[phase].stages for measured in figures.phases) for phase in map(str, PHASES)
    }
    return {
        "inductor_seconds": round(plain, 3),
        "added": round(statistics.median(pair.dense.total / pair.plain.total - 1 for pair in figures.pairs), 4),
        "stage_seconds": {phase: round(seconds, 4) for phase, seconds in stages.items()},
        "share": {phase: round(seconds / plain, 4) for phase, seconds in stages.items()},
        "pairs": [asdict(pair) for pair in figures.pairs],
    }


def describe_machine(arguments: Sequence[str]) -> dict[str, Any]:
    """The header of the results."""
    from importlib.metadata import version

    return {
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "diffusers": version("diffusers"),
        "command": shlex.join(["python", "-m", "benchmarks.compile_time", *arguments]),
    }


def line(name: str, figures: Mapping[str, Any]) -> str:
    """What is printed of a model."""
    shares = ", ".join(f"{phase} {share:.1%}" for phase, share in figures["share"].items())
    return f"{name:14} inductor {figures['inductor_seconds']:6.1f} s  added {figures['added']:+6.1%}  share: {shares}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 where a share or what was added is over the budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    given = sys.argv[1:] if arguments is None else list(arguments)
    parsed = parser.parse_args(given)
    results: dict[str, Any] = {**describe_machine(given), "budget": BUDGET, "models": {}}
    for name in parsed.models:
        results["models"][name] = summary(measure(SUBJECTS[name], parsed.pairs))
        print(line(name, results["models"][name]), flush=True)
        if parsed.json is not None:
            parsed.json.write_text(json.dumps(results, indent=1) + "\n")
    worst = max(max(figures["added"], *figures["share"].values()) for figures in results["models"].values())
    return 1 if worst > BUDGET else 0


if __name__ == "__main__":
    sys.exit(main())
