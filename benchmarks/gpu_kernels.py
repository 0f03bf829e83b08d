"""The kernels on a GPU, against every dense kernel that runs and FlexAttention.

    python -m benchmarks.gpu_kernels --json FILE [--shapes wan_720p,hunyuan_720p,wan_480p]
        [--densities 1,0.5,0.3,0.2,0.1] [--plans uniform,ragged] [--repeats 30] [--seconds 8] [--device cuda]

Calls are timed in turns in one process, by CUDA events, with a cold L2 cache; medians are compared. *Dense* is the
fastest dense kernel of the same row. There are two kinds of row: ``attention``, one for each shape, plan and density,
and ``ops``, one for each shape, with every op of both methods. A result is compared with float64 before it is timed,
and is not timed when it is wrong. Rows are written as they are made, the most telling ones first. Exits with 1 if a
row failed.

    efficiency    = density / (sparse time / dense time): 1 where a skipped pair costs nothing
    routing_share = (warm k-means + top-p plan + pooled keys + kept mass) / dense time: of each sparse call of SVG2
    search_share  = (block mass with a kept log-sum-exp + top-k plan) / dense time: of each refining call of AdaSpa
    workspace_share = most memory that an attention call holds beside operands and results / (q, k, v and out)

Warm k-means begins at the centroids of a search, moved by noise, as the operands of a model move from step to step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu import checks
from benchmarks.gpu.fill import tile_fill_of, tiles_of
from benchmarks.gpu.plans import KINDS, make_plan
from benchmarks.gpu.results import Results, Row, describe_machine
from benchmarks.gpu.rivals import dense_rivals, flex_rival
from benchmarks.gpu.shapes import LARGE, SHAPES, Shape, clustered_operands, random_operands
from benchmarks.gpu.site import Site
from benchmarks.gpu.timing import Call, Sample, Timer, interleaved, peak_extra_bytes, timer_for
from sparse_compile.plan import PooledKeys

DENSITIES = (1.0, 0.5, 0.3, 0.2, 0.1)
TELLING_DENSITY = 0.25
"""The density nearest to this one is measured first."""
RIVALS_LATER = 2
"""Dense kernels that are timed again in later rows of a shape: the fastest of its first one."""
CORRECTIONS = ("none", "pooled", "coupled")
PLANS = {kind: (kind,) for kind in KINDS} | {"uniform": tuple(kind for kind in KINDS if kind != "ragged")}


class Settings(NamedTuple):
    """How long and by what is measured."""

    device: torch.device
    dtype: torch.dtype
    kernel: str
    seconds: float
    repeats: int
    flex: bool
    timer: Timer


class Case(NamedTuple):
    """One row: of attention by a kind of plan at a density, or (with ``ops`` as plan) of every op."""

    shape: Shape
    plan: str
    density: float


def cases(shapes: Sequence[Shape], kinds: Sequence[str], densities: Sequence[float]) -> Iterator[Case]:
    """The rows, the most telling ones first: every plan of every shape near one density, then the ops, then the rest.

    Shapes and plans stay in the order given.
    """
    first, *rest = sorted(densities, key=lambda density: abs(density - TELLING_DENSITY))
    for shape in shapes:
        yield from (Case(shape, kind, first) for kind in kinds)
        yield Case(shape, "ops", first)
    for density in rest:
        for shape in shapes:
            yield from (Case(shape, kind, density) for kind in kinds)


def measure_attention(case: Case, settings: Settings, fastest: dict[str, list[str]], row: Row) -> None:
    """Fill in a row: one attention call by a plan, with each correction, against dense.

    Args:
        case: shape, plan and density.
        settings: see `Settings`.
        fastest: of each shape seen, its dense kernels from the fastest on; the first row of a shape adds it.
        row: what is filled in.
    """
    shape = case.shape
    q, k, v = random_operands(shape, settings.device, settings.dtype)
    site = Site(shape, (q, k, v), settings.kernel)
    plan = make_plan(case.plan, shape, case.density, settings.device)
    row["density"] = density = float(plan.density().double().mean())
    row["tile_fill"] = tile_fill_of(q, k, v, plan, settings.kernel)
    row["config"] = tiles_of(q, k, v, plan, settings.kernel)
    tails: dict[str, PooledKeys | None] = {"none": None}
    tails |= {name: site.pooled_keys(plan, name == "coupled") for name in CORRECTIONS[1:]}
    calls: dict[str, Call] = {}
    for name, tail in tails.items():
        out, lse = site.attention(plan, tail)
        if wrong := checks.wrong_attention(q, k, v, plan, shape.scale, out, lse, tail):
            row["wrong"] = f"correction {name}: {wrong}"
            return
        del out, lse
        calls[f"sparse_{name}"] = Call(lambda tail=tail: site.attention(plan, tail))  # type: ignore[misc]
    running, row["refused"] = dense_rivals(q, k, v, shape.scale)
    kept_up = fastest.get(shape.name, list(running))
    dense = {name: call for name, call in running.items() if name in kept_up}
    calls |= dense
    if settings.flex and case.plan.startswith("uniform"):
        try:
            calls["flex"] = flex_rival(q, k, v, shape.scale, density)
            calls["flex"].run()
        except Exception as error:  # noqa: BLE001 - a rival that does not compile here is left out
            calls.pop("flex", None)
            row["refused"]["flex"] = f"{type(error).__name__}: {str(error)[:200]}"
    samples = interleaved(calls, settings.timer, settings.seconds, settings.repeats)
    ranked = sorted(dense, key=lambda name: samples[name].median)
    fastest.setdefault(shape.name, ranked[:RIVALS_LATER])
    _add_times(row, samples)
    if ranked:
        row["dense"], row["dense_ms"] = ranked[0], samples[ranked[0]].median
        row["dense_tflops"] = shape.dense_flops / row["dense_ms"] / 1e9
        row["speedup"] = row["dense_ms"] / row["sparse_ms"]
        row["efficiency"] = density * row["speedup"]
        if row["tile_fill"]:
            row["efficiency_of_lanes"] = row["efficiency"] / row["tile_fill"]
    row["useful_tflops"] = density * shape.dense_flops / row["sparse_ms"] / 1e9
    extra = peak_extra_bytes(calls["sparse_coupled"], settings.device)
    if extra is not None:
        operands = 4 * q.numel() * q.element_size()
        row["workspace_bytes"] = extra - operands // 4 - q[..., 0].numel() * torch.float32.itemsize
        row["workspace_share"] = row["workspace_bytes"] / operands


def measure_ops(case: Case, settings: Settings, row: Row) -> None:
    """Fill in a row: each op of both methods, and their whole sparse calls, against dense; on clustered operands."""
    shape, density = case.shape, case.density
    q, k, v = clustered_operands(shape, settings.device, settings.dtype)
    site = Site(shape, (q, k, v), settings.kernel)
    clusters = site.kmeans(restart=True)
    site.keep_centroids()
    plan = site.plan_top_p(clusters, density)
    pooled = site.pooled_keys(plan)
    attended = site.attention(plan, pooled)
    wrongs = [
        checks.wrong_groups(plan.query_side, shape.tokens),
        checks.wrong_groups(plan.key_side, shape.tokens),
        checks.wrong_means(k, plan.key_side, pooled.mean_k),
        checks.wrong_attention(q, k, v, plan, shape.scale, *attended, pooled),
        checks.wrong_attention(q, k, v, None, shape.scale, site.attention_with_lse(), site.lse),
    ]
    del attended
    mass = site.block_mass(fresh=True)
    wrongs += [checks.wrong_mass(mass, site.block_plan(site.keep).query_side)]
    held = site.plan_top_k(mass, density)
    wrongs += [checks.wrong_mass(site.block_mass(fresh=False), held.query_side)]
    wrongs += [checks.wrong_attention(q, k, v, held, shape.scale, *site.attention(held))]
    if any(wrongs):
        row["wrong"] = "; ".join(wrong for wrong in wrongs if wrong)
        return
    row["density"] = float(plan.density().double().mean())
    row["density_adaspa"] = float(held.density().double().mean())
    row["tile_fill"] = tile_fill_of(q, k, v, plan, settings.kernel)
    row["config"] = tiles_of(q, k, v, plan, settings.kernel)
    running, row["refused"] = dense_rivals(q, k, v, shape.scale)
    calls = {
        "kmeans_restart": Call(lambda: site.kmeans(restart=True)),
        "kmeans_warm": Call(lambda: site.kmeans(restart=False), site.restore_centroids),
        "plan_top_p": Call(lambda: site.plan_top_p(clusters, density)),
        "pooled_keys": Call(lambda: site.pooled_keys(plan)),
        "kept_mass": Call(lambda: site.kept_mass(plan)),
        "sparse_none": Call(lambda: site.attention(plan)),
        "sparse_coupled": Call(lambda: site.attention(plan, pooled)),
        "svg2_call": Call(lambda: site.svg2_call(density), site.restore_centroids),
        "attention_with_lse": Call(site.attention_with_lse),
        "block_mass_fresh": Call(lambda: site.block_mass(fresh=True)),
        "block_mass_kept": Call(lambda: site.block_mass(fresh=False)),
        "plan_top_k": Call(lambda: site.plan_top_k(mass, density)),
        "adaspa_call": Call(site.adaspa_call),
    }
    samples = interleaved(calls | running, settings.timer, 2 * settings.seconds, settings.repeats)
    _add_times(row, samples)
    ranked = sorted(running, key=lambda name: samples[name].median)
    if not ranked:
        return
    row["dense"], row["dense_ms"] = ranked[0], samples[ranked[0]].median
    row["speedup"] = row["dense_ms"] / row["sparse_ms"]
    row["efficiency"] = row["density"] * row["speedup"]
    row["routing_share"] = _share(row, "kmeans_warm", "plan_top_p", "pooled_keys", "kept_mass")
    row["search_share"] = _share(row, "block_mass_kept", "plan_top_k")
    row["svg2_call_speedup"] = row["dense_ms"] / row["ms"]["svg2_call"]
    row["adaspa_call_speedup"] = row["dense_ms"] / row["ms"]["adaspa_call"]


def _add_times(row: Row, samples: dict[str, Sample]) -> None:
    row["ms"] = {name: sample.median for name, sample in samples.items()}
    row["ms_10_90"] = {name: [sample.low, sample.high] for name, sample in samples.items()}
    row["runs"] = min(sample.runs for sample in samples.values())
    row["sparse_ms"] = samples["sparse_none"].median


def _share(row: Row, *names: str) -> float:
    return float(sum(row["ms"][name] for name in names) / row["dense_ms"])


def describe(row: Row) -> str:
    """A row as one line, or a few."""
    head = f"{row['shape']:13s} {row['plan']:10s}"
    if "error" in row or "wrong" in row:
        return f"{head} FAILED  {row.get('wrong') or row['error']}"[:600]

    def number(name: str, form: str, unit: str = "") -> str:
        value = row.get(name)
        return f"{name} -" if value is None else f"{name} {value:{form}}{unit}"

    columns = [number("density", ".3f"), number("sparse_ms", "8.2f"), number("dense_ms", "8.2f")]
    columns += [str(row.get("dense", "no dense kernel")), number("speedup", ".2f"), number("efficiency", ".3f")]
    columns += [number("tile_fill", ".2f"), number("workspace_share", ".2f"), f"runs {row['runs']}"]
    shares = [number(name, ".3f") for name in ("routing_share", "search_share") if name in row]
    times = "  ".join(f"{name} {value:.2f}" for name, value in row["ms"].items())
    return f"{head} {'  '.join(columns + shares)}\n    ms: {times}"


def run(settings: Settings, chosen: Sequence[Case], results: Results) -> int:
    """Measure all cases; 1 if a row failed."""
    fastest: dict[str, list[str]] = {}
    for case in chosen:
        row: Row = {"kind": "ops" if case.plan == "ops" else "attention", "shape": case.shape.name, "plan": case.plan}
        row |= {"tokens": case.shape.tokens, "heads": case.shape.heads, "head_size": case.shape.size}
        row |= {"dtype": str(settings.dtype).removeprefix("torch."), "kernel": settings.kernel}
        row |= {"asked_density": case.density}

        def fill(row: Row, case: Case = case) -> None:
            if case.plan == "ops":
                measure_ops(case, settings, row)
            else:
                measure_attention(case, settings, fastest, row)

        print(describe(results.attempt(row, fill)), flush=True)
    return 1 if results.failed else 0


def comma_separated(read: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """What argparse takes as type of a list; ``read`` gives a value for a word, or None where it knows none."""

    def values(text: str) -> list[Any]:
        found = [read(word) for word in text.split(",")]
        if None in found:
            raise argparse.ArgumentTypeError(f"unknown name in {text!r}")
        return found

    return values


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file, after each one")
    shapes = {"type": comma_separated(SHAPES.get), "help": f"of {', '.join(SHAPES)}"}
    parser.add_argument("--shapes", default=",".join(LARGE), **shapes)
    parser.add_argument("--densities", default=",".join(map(str, DENSITIES)), type=comma_separated(float))
    plans = {"type": comma_separated(PLANS.get), "help": f"of {', '.join(PLANS)}; uniform is both sizes"}
    parser.add_argument("--plans", default="ragged,uniform", **plans)
    parser.add_argument("--repeats", type=int, default=30, help="runs of each call, where there is time")
    parser.add_argument("--seconds", type=float, default=8.0, help="about how long a row is timed")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kernel", help="default: triton on a GPU, cpu elsewhere")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument(
        "--no-flex", action="store_true", help="leave FlexAttention out, which takes a while to compile"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, timer: Timer | None = None) -> int:
    """Measure what the command line names.

    Args:
        arguments: those of the process by default.
        timer: measures in place of the device's own, for tests.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(given)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu runs through the same calls")
        return 2
    settings = Settings(
        device=device,
        dtype=getattr(torch, options.dtype),
        kernel=options.kernel or ("triton" if device.type == "cuda" else "cpu"),
        seconds=options.seconds,
        repeats=options.repeats,
        flex=not options.no_flex,
        timer=timer or timer_for(device),
    )
    kinds = list(dict.fromkeys(kind for names in options.plans for kind in names))
    chosen = list(cases(options.shapes, kinds, options.densities))
    results = Results(options.json, describe_machine("benchmarks.gpu_kernels", given, device), device)
    print(f"{results.machine['gpu'] or device}, torch {torch.__version__}: {len(chosen)} rows", flush=True)
    with torch.no_grad():
        return run(settings, chosen, results)


if __name__ == "__main__":
    raise SystemExit(main())
