"""The command ``sparse-attn``: its subcommands and their arguments. Each does its work in its own module."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence

from sparse_compile.cli import bench
from sparse_compile.cli.arguments import SIZES, key_value, positive
from sparse_compile.errors import SparseAttentionError

DEMO_MODULES = ("diffusers", "transformers", "ftfy", "rich", "PIL", "numpy", "matplotlib", "jinja2")
"""What the extra ``demo`` installs, by import name."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code; 2 for a wrong option or a missing extra."""
    parsed = build_parser().parse_args(arguments)
    try:
        if parsed.needs_extra:
            require_demo_extra()
        module = importlib.import_module(f"sparse_compile.cli.{parsed.command}")
        return int(module.run(parsed))
    except SparseAttentionError as error:
        print(f"sparse-attn {parsed.command}: {error}", file=sys.stderr)
        return 2


def require_demo_extra() -> None:
    """Check that the modules of the extra ``demo`` are there.

    Raises:
        SparseAttentionError: one is missing; the message holds the command that installs it.
    """
    missing = [name for name in DEMO_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise SparseAttentionError(
            "this command needs the packages of the extra 'demo'",
            f"missing: {', '.join(missing)}",
            "Run: pip install 'sparse_compile[demo]'",
        )


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``sparse-attn``."""
    parser = argparse.ArgumentParser(
        prog="sparse-attn", description="Sparse attention for video diffusion transformers."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser(
        "demo",
        help="generate small videos densely and with each method, compare them",
        description="Generate the same small videos with dense attention and with each method, and compare them. "
        "--options method=NAME runs that method alone. Exit code 1: a method made nothing sparse.",
    )
    _add_run_arguments(demo, steps=20, size=SIZES[0])
    demo.add_argument("--prompts", type=positive, default=2, metavar="N", help="how many videos (default: 2)")
    demo.add_argument("--out", default="demo_output", metavar="DIR", help="folder for pictures (demo_output)")
    demo.add_argument("--json", metavar="FILE", help="write all figures to FILE")

    explain = commands.add_parser(
        "explain",
        help="say which attentions of the demo model became sparse, and why the others did not",
        description="Run a few steps of the demo pipeline and print what was done with each attention, by svg2 or by "
        "the method of --options method=NAME.",
    )
    _add_run_arguments(explain, steps=5, size=SIZES[1])
    explain.add_argument("--json", nargs="?", const="-", metavar="FILE", help="JSON, to FILE or to the terminal")

    bench.add_to(commands)

    tune = commands.add_parser(
        "tune",
        help="time the kernels' configurations on this GPU and remember the best",
        description="Time the configurations of the Triton kernels on this GPU. Every process of this user then runs "
        "the best ones.",
    )
    tune.set_defaults(needs_extra=False)
    tune.add_argument("--sizes", type=positive, nargs="+", default=[64, 128], help="head sizes (default: 64 128)")

    doctor = commands.add_parser(
        "doctor",
        help="check the installation",
        description="Print versions and devices, and check what the backend needs. Exit code 1: a problem.",
    )
    doctor.set_defaults(needs_extra=False)
    return parser


def _add_run_arguments(parser: argparse.ArgumentParser, *, steps: int, size: str) -> None:
    parser.set_defaults(needs_extra=True)
    parser.add_argument("--steps", type=positive, default=steps, help=f"denoising steps (default: {steps})")
    parser.add_argument("--size", choices=SIZES, default=size, help=f"frames x height x width (default: {size})")
    parser.add_argument("--seed", type=int, default=0, help="of the starting noise (default: 0)")
    parser.add_argument("--regional", action="store_true", help="compile block by block, not the whole model")
    parser.add_argument(
        "--options",
        nargs="+",
        default=[],
        type=key_value,
        metavar="KEY=VALUE",
        help="options of the backend, for example density=0.5; the table is in README.md",
    )


if __name__ == "__main__":
    sys.exit(main())
