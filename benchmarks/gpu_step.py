"""A transformer block and a whole denoising step on a GPU, compiled with backend="sparse_attn" and without.

    python -m benchmarks.gpu_step --json FILE [--models wan_720p,hunyuan_720p,wan_480p] [--methods svg2,adaspa]
        [--density 0.25] [--layers 2] [--seconds 20] [--rows block,step] [--device cuda]

Models with the sizes of the real ones and random weights (benchmarks/gpu/models.py); no diffusers, no downloads. The
weights are random, so attention is nearly uniform and top-p would keep almost everything: the density is given instead.

``block`` rows compile ``--layers`` blocks as one graph, with ``dense_layers=0``, and give the time of one block in
each phase. ``step`` rows compile block by block, with the default ``dense_layers`` and as many layers as fit the
device, each with weights of its own, and give the time of a step. Sparse and dense calls take turns in one process;
"dense" is torch.compile(model) with the fastest SDPA kernel of the device first. In each row the projected speed-up of
50 steps with the default schedule, whose phases and counts are asked of the strategy:

    speedup = steps * t_dense / sum over phases of count(phase) * t_phase

In a block row t_phase is that of all layers of the model, of which ``dense_layers`` keeps some dense in every phase;
in a step row it is the measured step, dense layers included. Text encoder, VAE and the scheduler count nowhere.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import sparse_compile
from benchmarks.gpu.models import MODELS, ModelSize, VideoTransformer, build, inputs_of, layers_that_fit
from benchmarks.gpu.results import Results, Row, describe_machine
from benchmarks.gpu.rivals import SDPA_BACKENDS, dense_rivals
from benchmarks.gpu.schedule import FORMULA, first_steps, layers_kept_dense, phases_of, projected_speedup
from benchmarks.gpu.shapes import Shape, random_operands
from benchmarks.gpu.timing import Call, Sample, Timer, interleaved, timer_for
from sparse_compile.config import Config
from sparse_compile.phases import Phase
from sparse_compile.strategies.catalogue import load_strategy

STEPS = 50
DENSE = "dense model"
DENSE_PHASE_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-3}
TOY_OPTIONS: Mapping[str, dict[str, object]] = {
    "svg2": {"min_tokens": 1, "q_clusters": 4, "k_clusters": 12},
    "adaspa": {"min_tokens": 1, "block_size": 16},
}


class Settings(NamedTuple):
    """How long, how much and by what is measured."""

    device: torch.device
    dtype: torch.dtype
    density: float
    kernel: str
    layers: int
    seconds: float
    repeats: int
    lowering: str
    timer: Timer


class Measured(NamedTuple):
    """The model without sparse attention, and the one with it in each phase; what the report says of the latter."""

    samples: dict[str, Sample]
    report: Any


def options_of(size: ModelSize, method: str, settings: Settings) -> dict[str, object]:
    """What ``torch.compile(…, options=…)`` gets."""
    options: dict[str, object] = {"method": method, "kernel": settings.kernel, "lowering": settings.lowering}
    options |= {"density": settings.density} if method == "svg2" else {"sparsity": 1 - settings.density}
    if method == "adaspa":
        options["monitor"] = False  # the phases that are timed are those of the schedule
    return options | (TOY_OPTIONS[method] if size.name.startswith("toy") else {})


def compiled_pair(
    model: VideoTransformer, options: dict[str, object], regional: bool
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The model through the front door, and a twin of it with the same Parameters under plain torch.compile.

    Args:
        model: not compiled yet.
        options: of the backend.
        regional: compile block by block, as ``compile_repeated_blocks`` of diffusers does; else as one graph.
    """
    twin = twin_of(model)
    plain = {"backend": "eager"} if options["lowering"] == "eager" else {}
    if not regional:
        sparse = torch.compile(model, backend="sparse_attn", options=options, fullgraph=True, dynamic=False)
        return sparse, torch.compile(twin, fullgraph=True, dynamic=False, **plain)
    for block in model.blocks:
        block.compile(backend="sparse_attn", options=options, fullgraph=True, dynamic=False)
    for block in twin.blocks:
        block.compile(fullgraph=True, dynamic=False, **plain)
    return model, twin


def twin_of(model: VideoTransformer) -> VideoTransformer:
    """Another module with the same tensors."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo=shared)


def measure(
    model: nn.Module,
    sparse: Callable[..., Tensor],
    dense: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    phases: list[Phase],
    settings: Settings,
) -> Measured:
    """Time generations that visit the first step of each phase, a dense call of the twin before each sparse one.

    Args:
        model: whose clock is moved.
        sparse: its compiled call.
        dense: the twin's.
        inputs: of one step.
        phases: expected of each step; checked against what the report says.
        settings: see `Settings`.

    Raises:
        RuntimeError: a phase was another one, no attention became sparse, or a result is wrong.
    """
    at = first_steps(phases)
    times: dict[str, list[float]] = {DENSE: []} | {str(phase): [] for phase in at}
    plain, ours = Call(lambda: dense(**inputs)), Call(lambda: sparse(**inputs))

    with sparse_compile.denoising(model, steps=len(phases)) as clock, clock.branch("cond"):

        def generation(each: Callable[[str, Call], None]) -> None:
            clock.start(len(phases))
            for phase, step in at.items():
                if step:
                    clock.step(to=step)
                each(DENSE, plain)
                each(str(phase), ours)

        results: dict[str, Tensor] = {}
        generation(lambda name, call: results.update({name: call.run()}))  # compiles
        check_results(results)
        report = sparse_compile.explain(model)
        check_phases(report, at)
        for count in range(1, settings.repeats + 1):
            generation(lambda name, call: times[name].append(settings.timer.measure(call)))
            spent = sum(map(sum, times.values())) / 1e3
            if spent * (count + 1) / count > settings.seconds:
                break
        report = sparse_compile.explain(model)
        check_phases(report, at)
    return Measured({name: Sample.of(values) for name, values in times.items()}, report)


def check_results(results: Mapping[str, Tensor]) -> None:
    """Raise where an output is not finite, or the dense phase differs from the dense model.

    Raises:
        RuntimeError: which one.
    """
    for name, out in results.items():
        if not bool(out.isfinite().all()):
            raise RuntimeError(f"the output of {name} is not finite")
    if str(Phase.DENSE) in results:
        exact, other = results[DENSE].double(), results[str(Phase.DENSE)].double()
        error = float((other - exact).norm() / exact.norm())
        if error > DENSE_PHASE_TOLERANCE[results[DENSE].dtype]:
            raise RuntimeError(f"the dense phase differs from the dense model by {error:.2e}")


def check_phases(report: Any, at: Mapping[Phase, int]) -> None:
    """Raise unless the newest generation was in each phase where it was expected.

    Raises:
        RuntimeError: what was expected, and what was.
    """
    seen = {step.step: step.phase for step in report.generations[-1].steps} if report.generations else {}
    expected = {step: str(phase) for phase, step in at.items()}
    if seen != expected:
        reasons = sorted({f"{site.layer}: {site.detail}" for site in report.sites if site.decision != "sparse"})
        raise RuntimeError(f"expected the phases {expected}, got {seen}; dense: {'; '.join(reasons)[:500]}")


@contextlib.contextmanager
def fastest_attention_first(size: ModelSize, settings: Settings, row: Row) -> Iterator[None]:
    """Inside, SDPA takes the kernel that is fastest at this size, wherever it can; the row says which."""
    shape = Shape(size.name, size.video, size.text if size.joint else 0, size.heads, size.dim // size.heads, 1, 1)
    operands = random_operands(shape, settings.device, settings.dtype)
    running, _ = dense_rivals(*operands, shape.scale)
    running = {name: call for name, call in running.items() if name in SDPA_BACKENDS}
    samples = interleaved(running, settings.timer, 2.0, 5) if running else {}
    del operands, running
    ranked = sorted(samples, key=lambda name: samples[name].median)
    row["sdpa_ms"] = {name: samples[name].median for name in ranked}
    order = [SDPA_BACKENDS[name] for name in ranked]
    order += [backend for backend in SDPA_BACKENDS.values() if backend not in order]
    with sdpa_kernel([*order, SDPBackend.MATH], set_priority=True):
        yield


def fill_row(size: ModelSize, method: str, kind: str, settings: Settings, row: Row) -> None:
    """Fill in one row.

    Args:
        size: of the model.
        method: the sparse attention.
        kind: ``block`` or ``step``.
        settings: see `Settings`.
        row: what is filled in.
    """
    torch.compiler.reset()
    if settings.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(settings.device)
    regional = kind == "step"
    layers = layers_that_fit(size, settings.device, settings.dtype) if regional else settings.layers
    options = options_of(size, method, settings) | ({} if regional else {"dense_layers": 0})
    config = Config.from_options(options, environ={})
    phases = phases_of(load_strategy(method), config, STEPS)
    kept_dense = layers_kept_dense(size.layers, Config.from_options({}, environ={}))
    row |= {"layers": layers, "layers_total": size.layers, "options": options, "steps": STEPS}
    row["phases"] = {str(phase): count for phase, count in Counter(phases).items()}
    row["dense_layers"] = layers_kept_dense(layers, config) if regional else kept_dense
    with fastest_attention_first(size, settings, row):
        model = build(size, layers, settings.device, settings.dtype)
        sparse, dense = compiled_pair(model, options, regional)
        inputs = inputs_of(size, settings.device, settings.dtype)
        samples, report = measure(model, sparse, dense, inputs, phases, settings)
    share = 1 if regional else layers
    row["ms"] = {name: sample.median / share for name, sample in samples.items()}
    row["ms_10_90"] = {name: [sample.low / share, sample.high / share] for name, sample in samples.items()}
    row["runs"] = min(sample.runs for sample in samples.values())
    by_phase = {phase: row["ms"][str(phase)] for phase in first_steps(phases)}
    total, aside = (1, 0) if regional else (size.layers, kept_dense)
    row["speedup_50_steps"] = projected_speedup(phases, row["ms"][DENSE], by_phase, total, aside)
    row["speedup_sparse_phase"] = row["ms"][DENSE] / by_phase[Phase.SPARSE]
    row["formula"] = FORMULA if not regional else FORMULA.partition(";")[0] + "; t_phase and t_dense are whole steps"
    row["density"], row["kept_mass"] = report.density, report.kept_mass
    row["compilations"] = report.compilations
    row["implementations"] = sorted({site.kernel for site in report.sites if site.kernel})
    row["sparse_sites"] = sum(site.decision == "sparse" for site in report.sites)
    if settings.device.type == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated(settings.device)


def describe(row: Row) -> str:
    """A row as a few lines."""
    head = f"{row['model']:13s} {row['method']:7s} {row['kind']:5s}"
    if "error" in row:
        return f"{head} FAILED  {row['error']}"[:900]
    unit = "a block" if row["kind"] == "block" else f"a step of {row['layers']} of {row['layers_total']} layers"
    times = "  ".join(f"{name} {value:.2f}" for name, value in row["ms"].items())
    counts = " + ".join(f"{count} {phase}" for phase, count in row["phases"].items())
    return (
        f"{head} density {row['density']:.3f} by {','.join(row['implementations'])}; ms {unit}: {times}\n"
        f"    sparse phase {row['speedup_sparse_phase']:.2f} x, {STEPS} steps ({counts}, {row['dense_layers']} layers"
        f" kept dense) {row['speedup_50_steps']:.2f} x, runs {row['runs']}\n    {row['formula']}"
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file, after each one")
    parser.add_argument("--models", default="wan_720p,hunyuan_720p,wan_480p", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--methods", default="svg2,adaspa")
    parser.add_argument("--rows", default="block,step")
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--layers", type=int, default=2, help="blocks of a block row")
    parser.add_argument("--seconds", type=float, default=20.0, help="about how long a row is timed")
    parser.add_argument("--repeats", type=int, default=20, help="generations, where there is time")
    parser.add_argument("--kernel", default="auto", help="implementation of the ops")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--lowering", default="inductor", choices=["inductor", "eager"])
    parser.add_argument("--device", default="cuda")
    return parser.parse_args(arguments)


def cases(chosen: argparse.Namespace) -> Iterator[tuple[str, ModelSize, str]]:
    """Kind, model and method of each row; of whole steps the quickest model comes first."""
    for kind in chosen.rows.split(","):
        models = [MODELS[name] for name in chosen.models.split(",")]
        if kind == "step":
            models.sort(key=lambda size: size.layers * size.dim * size.video**2)
        for size in models:
            yield from ((kind, size, method) for method in chosen.methods.split(","))


def main(arguments: Sequence[str] | None = None, timer: Timer | None = None) -> int:
    """Measure what the command line names; 1 if a row failed.

    Args:
        arguments: those of the process by default.
        timer: measures in place of the device's own, for tests.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    chosen = parse(given)
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu --models toy_wan,toy_hunyuan runs through the same calls")
        return 2
    settings = Settings(
        device=device,
        dtype=getattr(torch, chosen.dtype),
        density=chosen.density,
        kernel=chosen.kernel,
        layers=chosen.layers,
        seconds=chosen.seconds,
        repeats=chosen.repeats,
        lowering=chosen.lowering,
        timer=timer or timer_for(device),
    )
    results = Results(chosen.json, describe_machine("benchmarks.gpu_step", given, device), device)
    print(f"{results.machine['gpu'] or device}, torch {torch.__version__}\n{FORMULA}", flush=True)
    with torch.no_grad():
        for kind, size, method in cases(chosen):
            row: Row = {"kind": kind, "model": size.name, "method": method, "dtype": chosen.dtype}

            def fill(row: Row, size: ModelSize = size, method: str = method, kind: str = kind) -> None:
                fill_row(size, method, kind, settings, row)

            print(describe(results.attempt(row, fill)), flush=True)
    return 1 if results.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
