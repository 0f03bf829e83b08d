"""What each preset sets, by method: points of the measured front of quality over density (docs/quality.md)."""

from __future__ import annotations

from collections.abc import Mapping

PRESET_NAMES = ("quality", "balanced", "fast")

PRESETS: Mapping[str, Mapping[str, Mapping[str, object]]] = {
    "svg2": {
        "quality": {"density": 0.17, "dense_steps": 0.1},
        "balanced": {"density": 0.12, "dense_steps": 0.1},
        "fast": {"density": 0.08, "dense_steps": 0.1},
    },
    "adaspa": {
        "quality": {"sparsity": 0.65, "dense_steps": 0.2},
        "balanced": {"sparsity": 0.75, "dense_steps": 0.2},
        "fast": {"sparsity": 0.85, "dense_steps": 0.1},
    },
}
"""Options by method and preset. They give way to whatever is given, by option or by variable."""
