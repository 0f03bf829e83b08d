"""``sparse-attn explain``: what becomes of each attention, of a model without its weights or of the demo model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def run(arguments: argparse.Namespace) -> int:
    """Explain a model, or the demo model where none is named; as a table or as JSON."""
    if arguments.model is None:
        from sparse_compile.cli.explain_demo import explain_demo

        report = explain_demo(arguments)
        return _show(str(report), report.to_dict(), arguments.json)
    from sparse_compile.cli.explain_model import explain_model, printed

    explained = explain_model(arguments)
    return _show("\n\n".join(map(printed, explained)), [each.to_dict() for each in explained], arguments.json)


def _show(text: str, data: Any, target: str | None) -> int:
    if target is None:
        print(text)
    elif target == "-":
        print(json.dumps(data, indent=1))
    else:
        Path(target).write_text(json.dumps(data, indent=1) + "\n")
    return 0
