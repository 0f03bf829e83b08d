"""``sparse-attn bench``: what there is to measure, and the arguments of each; the work is done in ``bench_*.py``."""

from __future__ import annotations

import argparse
import importlib

from sparse_compile.cli.arguments import Commands, positive


def add_to(commands: Commands) -> None:
    """Add ``bench`` and what it can measure."""
    bench = commands.add_parser("bench", help="measure methods on the demo model")
    bench.set_defaults(needs_extra=True)
    subjects = bench.add_subparsers(dest="subject", required=True)
    _add_quality(subjects)


def run(arguments: argparse.Namespace) -> int:
    """Run what was asked for, from its own module; its exit code."""
    module = importlib.import_module(f"sparse_compile.cli.bench_{arguments.subject}")
    return int(module.run(arguments))


def _add_quality(subjects: Commands) -> None:
    quality = subjects.add_parser(
        "quality",
        help="compare methods and corrections with dense attention",
        description="Generate the same videos densely and with each method and correction; print how close they are.",
    )
    quality.add_argument("--quick", action="store_true", help="4 videos of the smaller size instead of 8 of the larger")
    quality.add_argument("--videos", type=positive, metavar="N", help="how many videos")
    quality.add_argument("--steps", type=positive, default=20, help="denoising steps (default: 20)")
    quality.add_argument("--seed", type=int, default=0, help="of the starting noise and of the prompts (default: 0)")
    quality.add_argument("--json", metavar="FILE", help="write one line of JSON per configuration to FILE")
