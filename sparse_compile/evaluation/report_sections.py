"""The sections of the report page: what was run, how close it came, the clips, layers, heads, warnings."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

from torch import Tensor

from sparse_compile.evaluation.demo_model import Scene, VideoSize
from sparse_compile.evaluation.method_runs import MethodRun, figure, shown
from sparse_compile.evaluation.page import DataTable, Part, Picture, Section, drawn, from_file
from sparse_compile.evaluation.pictures import DIFFERENCE_GAIN, Comparison, Variant, write_side_by_side_gif
from sparse_compile.evaluation.plots import HeadMap, density_map, head_maps, kept_mass_by_step
from sparse_compile.runtime.call_figures import CallReport
from sparse_compile.runtime.report import Report

QUALITY = {
    "psnr": ("PSNR dB, mean", 1),
    "psnr_min": ("PSNR dB, lowest", 1),
    "ssim": ("SSIM", 3),
    "flicker_gap": ("flicker gap", 3),
    "density": ("density", 3),
    "density_run": ("density_run", 3),
    "kept_mass": ("kept mass", 3),
}
"""The columns of the table of methods: heading, digits."""
GIF_FRAME = 160
"""Pixels that a frame is wide at least."""


@dataclass(frozen=True)
class Measured:
    """What was generated: dense videos, float [N, 3, T, H, W] in [0, 1], and each method's."""

    facts: Sequence[tuple[str, str]]
    """What a reader needs to repeat the run."""
    size: VideoSize
    scenes: Sequence[Scene]
    dense: Tensor
    methods: Mapping[str, MethodRun]


def run_section(measured: Measured) -> Section:
    """Versions, protocol, options."""
    options = [
        (shown(method), ", ".join(f"{name}={value}" for name, value in made.options.items()))
        for method, made in measured.methods.items()
    ]
    return Section("What was run", (), [Part(facts=[*measured.facts, *options])])


def methods_section(measured: Measured) -> Section:
    """How close each method came to dense."""
    header = ("method", *(name for name, _ in QUALITY.values()))
    rows = []
    for method, made in measured.methods.items():
        values = {**made.mean, "psnr_min": min(row["psnr"] for row in made.rows)}
        rows.append([shown(method), *(figure(values[name], digits) for name, (_, digits) in QUALITY.items())])
    each = [
        [f"{shown(method)}, video {number}", *(figure(row[name], QUALITY[name][1]) for name in QUALITY if name in row)]
        for method, made in measured.methods.items()
        for number, row in enumerate(made.rows)
    ]
    text = (
        "Every video is compared with the dense video from the same noise. PSNR (dB) and SSIM: higher is closer. "
        "Flicker gap: by how much the change from frame to frame differs, 0 is best. Density: pairs of query and key "
        "computed in sparse calls; density_run: in all calls, dense ones counted as 1. Kept mass: the share of the "
        "attention that the computed pairs hold, measured on probe rows.",
        "These are tiny videos of a tiny model, and few of them: single videos differ by several decibels. Methods "
        "compare only where density_run is equal.",
    )
    found = DataTable("Sparse against dense, mean over the videos", header, rows)
    names = ["video", *(heading.removesuffix(", mean") for name, (heading, _) in QUALITY.items() if name != "psnr_min")]
    return Section("Methods", text, [Part(tables=[found], details=[DataTable("Each video", names, each)])])


def clips_section(measured: Measured) -> Section:
    """Dense, sparse and their difference, moving."""
    text = (f"Left dense, middle sparse, right their difference, {DIFFERENCE_GAIN} times brighter.",)
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.gif"
        for number, scene in enumerate(measured.scenes):
            clips = []
            for method, made in measured.methods.items():
                variant = Variant(shown(method), made.run.videos[number])
                comparison = Comparison(str(scene), measured.dense[number], (variant,))
                write_side_by_side_gif(comparison, path, -(-GIF_FRAME // measured.size.width))
                row = made.rows[number]
                figures = f"PSNR {figure(row['psnr'], 1)} dB, density_run {figure(row['density_run'], 3)}"
                alt = f"Moving picture: {scene}; dense, {shown(method)}, difference."
                clips.append(from_file(path, alt, f"{shown(method)}: {figures}"))
            parts.append(Part(title=f"Video {number}: {scene}", pictures=clips))
    return Section("Clips", text, parts)


def layers_section(measured: Measured) -> Section:
    """Density and kept mass of each layer at each step."""
    text = (
        "Mean over the videos and both branches (with and without the prompt). Yellow is dense. A step that searches "
        "densely counts as dense.",
    )
    parts = []
    for method, made in measured.methods.items():
        calls = newest_calls(made.report, len(measured.scenes))
        if not any(call.sparse for call in calls):
            parts.append(Part(title=shown(method), text=["Nothing was sparse."]))
            continue
        pictures = [density_picture(shown(method), calls)]
        if any(call.kept_mass is not None for call in calls):
            pictures.append(kept_mass_picture(shown(method), calls))
        notes = monitor_notes(made.report, len(measured.scenes))
        parts.append(Part(title=shown(method), text=notes, pictures=pictures, details=[layer_table(calls)]))
    return Section("Layers and steps", text, parts)


def heads_section(measured: Measured) -> Section:
    """Kept mass and density of each head, in the newest sparse calls."""
    text = (
        "In the newest sparse call of each layer, mean over the branches. A head whose kept mass is hardly above its "
        "density attends almost uniformly: what it skips matters as much as what it keeps.",
    )
    found = (heads_picture(shown(method), made.report) for method, made in measured.methods.items())
    pictures = [picture for picture in found if picture is not None]
    return Section("Heads", text, [Part(pictures=pictures, text=[] if pictures else ["No head ran sparsely."])])


def warnings_section(measured: Measured) -> Section:
    """What the reports warn of."""
    parts = []
    for method, made in measured.methods.items():
        found = made.report.warnings
        parts.append(Part(title=shown(method), warnings=found, text=[] if found else ["None."]))
    return Section("Warnings", (), parts)


# ---------------------------------------------------------------------- pictures


def density_picture(method: str, calls: Sequence[CallReport]) -> Picture:
    """Density by layer and step, told in words too."""
    sparse = [call.density for call in calls if call.sparse]
    alt = (
        f"Heat map of density for {method}: {_count(calls)}. Sparse calls compute {min(sparse):.2f} to "
        f"{max(sparse):.2f} of the pairs, {fmean(sparse):.2f} on average; the first sparse step is "
        f"{min(call.step for call in calls if call.sparse)}."
    )
    return drawn(partial(density_map, calls, f"{method}: density"), alt)


def kept_mass_picture(method: str, calls: Sequence[CallReport]) -> Picture:
    """Kept mass by step, one line a layer, told in words too."""
    masses = [call.kept_mass for call in calls if call.kept_mass is not None]
    alt = (
        f"Lines of kept attention mass for {method}: {_count(calls)}, between {min(masses):.2f} and {max(masses):.2f}, "
        f"{fmean(masses):.2f} on average."
    )
    return drawn(partial(kept_mass_by_step, calls, f"{method}: kept mass"), alt)


def heads_picture(method: str, report: Report) -> Picture | None:
    """Kept mass and density of each head side by side, or None where nothing was measured."""
    maps = head_maps_of(report)
    if not maps:
        return None
    parts = []
    for each in maps:
        values = [value for row in each.values.values() for value in row]
        parts.append(f"{each.title} {min(values):.2f} to {max(values):.2f}, mean {fmean(values):.2f}")
    alt = f"Heat maps over layers and heads for {method}: {'; '.join(parts)}."
    return drawn(partial(head_maps, maps, f"{method}: newest sparse calls"), alt)


def head_maps_of(report: Report) -> list[HeadMap]:
    """Kept mass (where it was measured) and density by layer, mean over the branches."""
    masses: dict[str, list[Sequence[float]]] = {}
    densities: dict[str, list[Sequence[float]]] = {}
    for heads in report.heads:
        name = f"{heads.layer}, attention {heads.ordinal + 1}" if heads.ordinal else heads.layer
        densities.setdefault(name, []).append(heads.density)
        if heads.kept_mass is not None:
            masses.setdefault(name, []).append(heads.kept_mass)
    if masses.keys() == densities.keys():
        maps = [HeadMap("kept mass", _means(masses)), HeadMap("density", _means(densities))]
    else:
        maps = [HeadMap("density", _means(densities))]
    return [each for each in maps if each.values]


def newest_calls(report: Report, generations: int) -> list[CallReport]:
    """The calls of the newest generations: a first one, which compiles, is left out."""
    newest = sorted({call.generation for call in report.calls})[-generations:]
    return [call for call in report.calls if call.generation in newest]


def monitor_notes(report: Report, generations: int) -> list[str]:
    """What the monitor of held plans decided in the newest generations, one sentence each."""
    return [
        f"Video {number}, step {step.step}: {step.note}."
        for number, generation in enumerate(report.generations[-generations:])
        for step in generation.steps
        if step.note
    ]


def layer_table(calls: Sequence[CallReport]) -> DataTable:
    """The figures of each layer's sparse calls as numbers."""
    rows = []
    for layer in dict.fromkeys(call.layer for call in calls):
        sparse = [call for call in calls if call.layer == layer and call.sparse]
        masses = [call.kept_mass for call in sparse if call.kept_mass is not None]
        density = fmean(call.density for call in sparse) if sparse else None
        mass = fmean(masses) if masses else None
        rows.append(
            [layer, str(len(sparse)), *(figure(value, 3) for value in (density, mass, min(masses, default=None)))]
        )
    header = ("layer", "sparse calls", "density", "kept mass", "lowest kept mass")
    return DataTable("Sparse calls of each layer", header, rows)


def _means(values: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, list[float]]:
    return {name: [fmean(column) for column in zip(*rows, strict=True)] for name, rows in values.items()}


def _count(calls: Iterable[CallReport]) -> str:
    found = list(calls)
    layers, steps = ({getattr(call, name) for call in found} for name in ("layer", "step"))
    return f"{len(layers)} layers, {len(steps)} steps"
