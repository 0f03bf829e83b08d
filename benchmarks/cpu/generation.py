"""A whole generation of a small video transformer with the blocks of Wan and random weights: dense, and sparse."""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import sparse_compile
from benchmarks.cpu.records import Row, threads_of
from benchmarks.cpu.sizes import DTYPES, Sizes, VideoModel
from benchmarks.cpu.timing import CpuTimer
from benchmarks.gpu.schedule import first_steps, phases_of
from benchmarks.gpu.timing import Call
from sparse_compile.config import Config
from sparse_compile.phases import Phase
from sparse_compile.strategies.catalogue import load_strategy

CHANNELS, TEXT_DIM = 16, 256
DENSE, EAGER = "inductor", "eager"
EAGER_EVERY = 4
"""Steps of the eager model that are measured: all of them cost the same."""


def build(size: VideoModel, dtype: torch.dtype) -> nn.Module:
    """The transformer of diffusers, with random weights, some of them in float32 as ``from_pretrained`` leaves them."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    dim = size.heads * size.head_size
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=size.heads,
        attention_head_dim=size.head_size,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=256,
        ffn_dim=4 * dim,
        num_layers=size.layers,
    )
    for name, parameter in model.named_parameters():
        if not set(model._keep_in_fp32_modules) & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


def inputs_of(size: VideoModel, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The arguments of each step; the latents move a little from step to step."""
    noise = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise)

    latents, text = draw(1, CHANNELS, size.frames, size.height, size.width), draw(1, size.text, TEXT_DIM)
    steps = []
    for step in range(size.steps):
        timestep = torch.tensor([1000 * (size.steps - step) // size.steps])
        fixed = {"timestep": timestep, "encoder_hidden_states": text.to(dtype), "return_dict": False}
        steps.append({"hidden_states": latents.to(dtype), **fixed})
        latents = latents + 0.05 * draw(*latents.shape)
    return steps


SCHEDULED: Mapping[str, Mapping[str, object]] = {"adaspa": {"monitor": False}}
"""The phases that are timed are those of the schedule: no search is saved or added by what the probe rows say."""


def expected_phases(options: Mapping[str, Any], steps: int) -> list[Phase]:
    """The phase of each step, from the strategy itself."""
    config = Config.from_options(options, environ={})
    return phases_of(load_strategy(config.method), config, steps)


def measure_generations(dtype: str, sizes: Sizes, timer: CpuTimer, lowering: str) -> list[Row]:
    """A row for each method: all models make the same generation, step by step in turns.

    The first generation of a model compiles: it visits the first step of each phase, and is not timed.

    Args:
        dtype: of the model, by name.
        sizes: which model, and the options of each method.
        timer: measures one step.
        lowering: see the option of this name; ``eager`` for tests.
    """
    size = sizes.model
    inputs = inputs_of(size, DTYPES[dtype])
    eager = build(size, DTYPES[dtype])
    options = {
        method: {"method": method, **sizes.options[method], **SCHEDULED.get(method, {})} for method in sizes.methods
    }
    phases = {method: expected_phases(options[method], size.steps) for method in sizes.methods}
    dense, sparse = copy.deepcopy(eager), {method: copy.deepcopy(eager) for method in sizes.methods}
    calls: dict[str, Callable[..., Any]] = {
        EAGER: eager,
        DENSE: torch.compile(dense, backend="eager" if lowering == "eager" else "inductor", dynamic=False),
    }
    for method, model in sparse.items():
        given = options[method] | ({"lowering": lowering} if lowering == "eager" else {})
        calls[method] = torch.compile(model, backend="sparse_attn", options=given, dynamic=False)
    times: dict[str, list[float]] = {name: [] for name in calls}
    with contextlib.ExitStack() as stack:
        clocks = {}
        for method, model in sparse.items():
            clocks[method] = stack.enter_context(sparse_compile.denoising(model, steps=size.steps))
            stack.enter_context(clocks[method].branch("cond"))
            for step in first_steps(phases[method]).values():
                clocks[method].step(to=step) if step else None
                calls[method](**inputs[step])
            clocks[method].start(size.steps)
        for name in (EAGER, DENSE):
            timer.warm_up(Call(lambda name=name: calls[name](**inputs[0])))  # type: ignore[misc]
        for step, kwargs in enumerate(inputs):
            for name in in_turn([name for name in calls if name != EAGER or step % EAGER_EVERY == 0], step):
                times[name].append(timer.measure(Call(lambda name=name, kw=kwargs: calls[name](**kw))))  # type: ignore[misc]
            for clock in clocks.values():
                clock.step()
        reports = {method: sparse_compile.explain(model) for method, model in sparse.items()}
    return [row_of(m, options[m], sizes, phases[m], times, reports[m]) for m in sizes.methods]


def in_turn(names: list[str], turn: int) -> list[str]:
    """The names from another one on in each turn, so that none always follows the same one's caches."""
    first = turn % len(names)
    return names[first:] + names[:first]


def row_of(
    method: str,
    options: Mapping[str, Any],
    sizes: Sizes,
    phases: list[Phase],
    times: Mapping[str, list[float]],
    report: Any,
) -> Row:
    """One method's row.

    Args:
        method: by name.
        options: that it was compiled with.
        sizes: of the model.
        phases: that were expected.
        times: milliseconds of each step of each model.
        report: what `sparse_compile.explain` gave.

    Raises:
        RuntimeError: a step was in another phase.
    """
    seen = [step.phase for step in report.generations[-1].steps] if report.generations else []
    if seen != [str(phase) for phase in phases]:
        reasons = sorted({f"{site.layer}: {site.detail}" for site in report.sites if site.decision != "sparse"})
        raise RuntimeError(
            f"expected the phases {[str(phase) for phase in phases]}, got {seen}; dense: {'; '.join(reasons)}"
        )
    size = sizes.model
    row: Row = {"method": method, "tokens": size.tokens, "heads": size.heads, "head_size": size.head_size}
    row |= {"layers": size.layers, "steps": size.steps, "options": dict(options), "repeats": 1}
    row |= {"density": report.density, "density_run": report.density_run, "kept_mass": report.kept_mass}
    row["kernels"] = sorted({site.kernel for site in report.sites if site.kernel})
    row["compilations"] = report.compilations
    row |= {"dense_ms": sum(times[DENSE]), "sparse_ms": sum(times[method])}
    row["eager_ms"] = size.steps * statistics.fmean(times[EAGER])
    row |= {"flex_ms": None, "flex_refused": "has no routing"}
    row |= {"speedup": row["dense_ms"] / row["sparse_ms"], "speedup_over_eager": row["eager_ms"] / row["sparse_ms"]}
    row["step_ms"] = {"dense": times[DENSE], "eager": times[EAGER], "sparse": times[method]}
    row["phases"] = [str(phase) for phase in phases]
    by_phase: dict[str, list[float]] = {str(phase): [] for phase in phases}
    for phase, milliseconds in zip(phases, times[method], strict=True):
        by_phase[str(phase)].append(milliseconds)
    row["phase_ms"] = {phase: statistics.median(values) for phase, values in by_phase.items()}
    row["speedup_of_sparse_steps"] = statistics.median(times[DENSE]) / row["phase_ms"][str(Phase.SPARSE)]
    return row


def describe_generation(row: Row) -> str:
    """A row as a few lines."""
    steps = "  ".join(f"{phase} {milliseconds / 1e3:.3f}" for phase, milliseconds in row["phase_ms"].items())
    return (
        f"generation {row['method']:8s} {row['dtype']:8s} {threads_of(row)}, {row['tokens']} tokens,"
        f" {row['layers']} layers, {row['heads']} heads of {row['head_size']}, {row['steps']} steps, density"
        f" {row['density']:.3f}\n             s: eager {row['eager_ms'] / 1e3:.1f}, inductor"
        f" {row['dense_ms'] / 1e3:.1f}, sparse {row['sparse_ms'] / 1e3:.1f}: {row['speedup']:.2f} x"
        f" (over eager {row['speedup_over_eager']:.2f} x); sparse steps {row['speedup_of_sparse_steps']:.2f} x;"
        f" s a step: {steps}, inductor {row['dense_ms'] / row['steps'] / 1e3:.3f}"
    )
