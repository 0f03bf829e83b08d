"""``sparse-attn bench``: what there is to measure, and the arguments of each; the work is done in ``bench_*.py``."""

from __future__ import annotations

import argparse
import importlib

from sparse_compile.cli.arguments import SIZES, Commands, key_value, positive, share

GRIDS = ("quick", "corrections", "pareto", "selection", "front", "recall", "presets", "paper")
"""What `bench quality` can measure."""


def add_to(commands: Commands) -> None:
    """Add ``bench`` and what it can measure."""
    bench = commands.add_parser("bench", help="measure methods on the demo model")
    bench.set_defaults(needs_extra=True)
    subjects = bench.add_subparsers(dest="subject", required=True)
    _add_quality(subjects)
    _add_report(subjects)


def run(arguments: argparse.Namespace) -> int:
    """Run what was asked for, from its own module; its exit code."""
    module = importlib.import_module(f"sparse_compile.cli.bench_{arguments.subject}")
    return int(module.run(arguments))


def _add_quality(subjects: Commands) -> None:
    quality = subjects.add_parser(
        "quality",
        help="compare methods and corrections with dense attention",
        description="Generate the same videos densely and with each configuration of some grids, and write how close "
        "they are: a line of JSON each, a table and a plot. What is in the folder already is not measured again. "
        "Exit code 1: something was compiled again after the first generation.",
    )
    quality.add_argument(
        "--grid", nargs="+", metavar="NAME", help=f"of {', '.join(GRIDS)} (pareto; quick with --quick)"
    )
    quality.add_argument("--method", metavar="MODULE:CLASS", help="a method of your own, beside the controls")
    quality.add_argument("--quick", action="store_true", help="one seed of noise instead of three")
    quality.add_argument("--warm-up", type=share, nargs="+", metavar="SHARE", help="shares of dense steps to repeat at")
    quality.add_argument("--videos", type=positive, metavar="N", help="scenes, each with each seed (default: 4)")
    quality.add_argument("--seeds", type=positive, metavar="N", help="of the noise (default: 3)")
    quality.add_argument("--steps", type=positive, default=20, help="denoising steps (default: 20)")
    quality.add_argument("--size", choices=SIZES, default=SIZES[1], help=f"of the videos (default: {SIZES[1]})")
    quality.add_argument("--out", default="quality_output", metavar="DIR", help="folder to write to (quality_output)")


def _add_report(subjects: Commands) -> None:
    report = subjects.add_parser(
        "report",
        help="write one page about the methods: clips, layers, heads, plans, single calls",
        description="Generate the same videos densely and with each method, judge single attention calls, and write "
        "one HTML page that holds everything itself. Exit code 1: a method made nothing sparse.",
    )
    report.add_argument("--out", default="report.html", metavar="FILE", help="the page (default: report.html)")
    report.add_argument(
        "--results", nargs="+", default=[], metavar="FILE", help="lines of JSON of `bench quality`, to show too"
    )
    report.add_argument("--pictures", metavar="DIR", help="write some of the pictures as PNG files too")
    report.add_argument("--prompts", type=positive, default=2, metavar="N", help="how many videos (default: 2)")
    report.add_argument("--steps", type=positive, default=20, help="denoising steps (default: 20)")
    report.add_argument("--size", choices=SIZES, default=SIZES[0], help=f"of the videos (default: {SIZES[0]})")
    report.add_argument("--seed", type=int, default=0, help="of the starting noise (default: 0)")
    report.add_argument("--regional", action="store_true", help="compile block by block, not the whole model")
    report.add_argument(
        "--options", nargs="+", default=[], type=key_value, metavar="KEY=VALUE", help="options of the backend"
    )
