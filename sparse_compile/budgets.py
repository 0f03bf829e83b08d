"""Options that say how much is kept: one at a time, and what holds where none is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BUDGETS = ("target_recall", "density", "top_p", "sparsity")
"""Options that say how much is kept: a method goes by one of them."""
DEFAULT_DENSITY = 0.25
"""Of svg2, where no budget is given (docs/quality.md)."""
DEFAULT_SPARSITY = 0.8
"""Of adaspa, where no budget is given: that of arXiv 2502.21079."""


def overlaid(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Options with others put over them: a budget among the upper ones replaces all below."""
    budgets = BUDGETS if any(upper.get(name) not in (None, "none") for name in BUDGETS) else ()
    given = {name: value for name, value in upper.items() if name not in BUDGETS or value not in (None, "none")}
    return {**{name: value for name, value in lower.items() if name not in budgets}, **given}
