"""What one method made of the demo's scenes: its videos, its report, and the figures of each video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from sparse_compile.evaluation.comparison import Run
from sparse_compile.evaluation.demo_model import Scene
from sparse_compile.runtime.report import Report


@dataclass(frozen=True)
class MethodRun:
    """What one method made: its options, videos and report, and the figures of each video."""

    options: dict[str, object]
    run: Run
    report: Report
    rows: list[dict[str, Any]]

    @property
    def nothing_sparse(self) -> bool:
        """Whether no attention became sparse although the method is a sparse one."""
        return self.options["method"] != "dense" and all(row["density"] is None for row in self.rows)

    @property
    def mean(self) -> dict[str, float | None]:
        """The mean of each figure over the videos that have it."""
        known = {
            name: [row[name] for row in self.rows if row[name] is not None] for name in self.rows[0] if name != "prompt"
        }
        return {name: fmean(values) if values else None for name, values in known.items()}


def video_rows(
    scenes: Sequence[Scene], measured: Sequence[Mapping[str, float]], report: Report
) -> list[dict[str, Any]]:
    """One row a video: prompt, figures of its own generation where the report has them, metrics."""
    generations: list[Any] = report.generations[-len(scenes) :]
    if len(generations) < len(scenes):
        generations = [report] * len(scenes)
    return [
        {
            "prompt": str(scene),
            "density": generation.density,
            "density_run": generation.density_run,
            "kept_mass": generation.kept_mass,
            **figures,
        }
        for scene, figures, generation in zip(scenes, measured, generations, strict=True)
    ]


def shown(method: str) -> str:
    """What people read: the class of a plug-in; the method that makes everything dense apart from the dense run."""
    return "method dense" if method == "dense" else method.rpartition(":")[2]


def figure(value: float | None, digits: int) -> str:
    """A number as a table shows it."""
    return "-" if value is None else f"{value:.{digits}f}"
