"""The rows of a run as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.cpu.records import Row, threads_of

COLOURS = {"uniform": "#1f77b4", "ragged": "#ff7f0e", "flex": "#7f7f7f", "svg2": "#2ca02c", "adaspa": "#9467bd"}
TELLING = {"tokens": 8192, "head_size": 128, "threads": 1}
CALLS = ("svg2 warm", "svg2 warm, uncorrected", "adaspa sparse", "adaspa later search", "adaspa first search")


def draw(document: dict[str, Any], path: Path) -> None:
    """Draw speed-ups by density, whole ops, and the steps of a generation.

    Args:
        document: what a run wrote.
        path: of the picture; its ending says of which kind.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in document["rows"] if "error" not in row]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure = Figure(figsize=(5.2 * 3, 4.2 * len(dtypes)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(dtypes), 3, squeeze=False)
    for (left, middle, right), dtype in zip(axes, dtypes, strict=True):
        own = [row for row in rows if row["dtype"] == dtype]
        _densities(left, near_telling([row for row in own if row["part"] == "kernel"]), dtype)
        _calls(middle, near_telling([row for row in own if row["part"] == "op"]), dtype)
        _steps(right, [row for row in own if row["part"] == "generation"], dtype)
    machine = document["machine"]
    figure.suptitle(f"{machine['cpu']}, {machine['isa']}, torch {machine['torch']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def near_telling(rows: list[Row]) -> list[Row]:
    """The rows of one length, head size and number of threads: `TELLING`, or what is nearest of what there is."""
    for name, wanted in TELLING.items():
        nearest = min((row[name] for row in rows), key=lambda value, wanted=wanted: abs(value - wanted), default=None)
        rows = [row for row in rows if row[name] == nearest]
    return rows


def _title(rows: list[Row], dtype: str, what: str) -> str:
    where = f"N {rows[0]['tokens']}, D {rows[0]['head_size']}, {threads_of(rows[0])}" if rows else "not measured"
    return f"{what}\n{dtype}, {where}"


def _densities(axes: Any, rows: list[Row], dtype: str) -> None:
    for plan in ("uniform", "ragged"):
        own = sorted((row["density"], row["speedup"]) for row in rows if row["plan"] == plan)
        if own:
            axes.loglog(*zip(*own, strict=True), "o-", color=COLOURS[plan], label=f"{plan} plan")
    flex = sorted((row["density"], row["dense_ms"] / row["flex_ms"]) for row in rows if row["flex_ms"])
    if flex:
        axes.loglog(*zip(*flex, strict=True), "s--", color=COLOURS["flex"], label="FlexAttention, uniform plan")
    ideal = sorted({row["asked_density"] for row in rows})
    if ideal:
        axes.loglog(ideal, [1 / density for density in ideal], ":", color="black", label="1 / density")
        axes.set_xticks(ideal, [f"{density:g}" for density in ideal])
        axes.minorticks_off()
        ticks = [1, 2, 4, 8, 16]
        axes.set_yticks(ticks, [f"{tick} x" for tick in ticks])
        axes.legend()
    axes.set(title=_title(rows, dtype, "attention alone, faster than dense SDPA"), xlabel="density")
    axes.grid(alpha=0.3)


def _calls(axes: Any, rows: list[Row], dtype: str) -> None:
    by_call = {row["call"]: row for row in rows}
    names = [name for name in CALLS if name in by_call][::-1]
    speedups = [by_call[name]["speedup"] for name in names]
    bars = axes.barh(names, speedups, color=[COLOURS[name.split()[0]] for name in names])
    axes.bar_label(bars, [f"{speedup:.2f} x" for speedup in speedups], padding=3)
    axes.axvline(1, color="black", linestyle=":")
    axes.margins(x=0.15)
    axes.set(title=_title(rows, dtype, "all that replaces one attention"), xlabel="times faster than dense SDPA")


def _steps(axes: Any, rows: list[Row], dtype: str) -> None:
    for row in rows:
        if row is rows[0]:
            axes.plot([ms / 1e3 for ms in row["step_ms"]["dense"]], color="black", label="dense, inductor")
        label = f"{row['method']}: {row['speedup']:.2f} x in all"
        axes.plot([ms / 1e3 for ms in row["step_ms"]["sparse"]], ".-", color=COLOURS.get(row["method"]), label=label)
    if rows:
        axes.legend()
        axes.set_ylim(bottom=0)
        axes.set_xticks(range(0, rows[0]["steps"], 5))
    axes.set(title=_title(rows, dtype, "a whole generation"), xlabel="denoising step", ylabel="seconds a step")
    axes.grid(alpha=0.3)
