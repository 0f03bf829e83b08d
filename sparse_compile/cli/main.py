"""The command ``sparse-attn``: its subcommands and their arguments. Each does its work in its own module."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence

from sparse_compile.cli import bench
from sparse_compile.cli.arguments import SIZES, Commands, frames_height_width, key_value, positive
from sparse_compile.errors import SparseAttentionError

DEMO_MODULES = ("diffusers", "transformers", "ftfy", "rich", "PIL", "numpy", "matplotlib", "jinja2")
"""What the extra ``demo`` installs, by import name."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code; 2 for a wrong option or a missing extra."""
    parsed = build_parser().parse_args(arguments)
    try:
        if parsed.command == "explain" and parsed.model is not None:
            require("diffusers", ("diffusers",))
        elif parsed.needs_extra:
            require("demo", DEMO_MODULES)
        module = importlib.import_module(f"sparse_compile.cli.{parsed.command}")
        return int(module.run(parsed))
    except SparseAttentionError as error:
        print(f"sparse-attn {parsed.command}: {error}", file=sys.stderr)
        return 2


def require(extra: str, modules: Sequence[str]) -> None:
    """Check that the modules of an extra are there.

    Raises:
        SparseAttentionError: one is missing; the message holds the command that installs it.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise SparseAttentionError(
            f"this command needs the packages of the extra {extra!r}",
            f"missing: {', '.join(missing)}",
            f"Run: pip install 'sparse_compile[{extra}]'",
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

    _add_explain(commands)

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
        description="Print versions, devices and what runs on them, the compiler, caches and their owners, and the "
        "environment, and check what the backend needs. Exit code 1: a problem.",
    )
    doctor.set_defaults(needs_extra=False)
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser


def _add_explain(commands: Commands) -> None:
    explain = commands.add_parser(
        "explain",
        help="say which attentions of a model become sparse, and why the others do not",
        description="Build a model without weights, trace one call, and print what becomes of each attention, which "
        "graphs there are and what they hide. MODEL is a model class of diffusers, a config.json, the folder of a "
        "model or pipeline, or package.module:callable, which returns a module or (module, keyword arguments of one "
        "call). Without MODEL: run a few steps of the demo pipeline and print what was done.",
    )
    explain.add_argument("model", nargs="?", metavar="MODEL", help="what to explain (default: the demo model)")
    explain.add_argument(
        "--latents",
        type=frames_height_width,
        default=(21, 60, 104),
        metavar="FxHxW",
        help="frames x height x width of the latent video that the transformer gets: pixels over what the VAE "
        "compresses by, often 4 and 8 (default: 21x60x104, 81 frames of 480x832)",
    )
    explain.add_argument("--text", type=positive, default=512, metavar="N", help="text tokens (default: 512)")
    explain.add_argument(
        "--input",
        action="append",
        default=[],
        type=key_value,
        metavar="NAME=VALUE",
        help="an argument of the call, where the guess is wrong: a shape (1x16x21x60x104, 1x512:int64; with commas a "
        "tuple of tensors) or a value",
    )
    explain.add_argument(
        "--config",
        action="append",
        default=[],
        type=key_value,
        metavar="NAME=VALUE",
        help="change the model's configuration, for example num_layers=2",
    )
    explain.add_argument("--json", nargs="?", const="-", metavar="FILE", help="JSON, to FILE or to the terminal")
    _add_run_arguments(explain, steps=5, size=SIZES[1], subject="demo: ")


def _add_run_arguments(parser: argparse.ArgumentParser, *, steps: int, size: str, subject: str = "") -> None:
    parser.set_defaults(needs_extra=True)
    parser.add_argument("--steps", type=positive, default=steps, help=f"{subject}denoising steps (default: {steps})")
    parser.add_argument(
        "--size", choices=SIZES, default=size, help=f"{subject}frames x height x width (default: {size})"
    )
    parser.add_argument("--seed", type=int, default=0, help=f"{subject}of the starting noise (default: 0)")
    parser.add_argument("--regional", action="store_true", help=f"{subject}compile block by block, not the whole model")
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
