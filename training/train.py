"""Train the small video model.

    python -m training.train --preset cpu --minutes 60 --out build/training
    python -m training.train --preset cpu --minutes 60 --init FOLDER --out build/training
    python -m training.train --resume --out build/training

The output folder holds a checkpoint that diffusers loads, replaced every two minutes, and resume.pt for --resume.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from sparse_compile.errors import SparseAttentionError
from training.checkpoint import load_checkpoint, read_training, save_checkpoint
from training.model import build, shape_of
from training.presets import PRESETS
from training.progress import Progress
from training.resume import load_state, save_state
from training.trainer import Length, Trainer


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the command line says about a run; kept in its state, so that --resume goes on with the same."""

    preset: str
    minutes: float | None
    steps: int | None
    seed: int
    threads: int
    compiled: bool
    continues: dict[str, Any] | None = None
    """What is known about the training of the checkpoint that the run began with; None for random weights."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train until the end of the run; exit code 2 for an option or a file that is wrong."""
    parsed = _parser().parse_args(arguments)
    try:
        run, trainer = resumed(parsed.out) if parsed.resume else started(parsed)
        train(run, trainer, parsed.out, save_every=parsed.save_every)
    except SparseAttentionError as error:
        print(f"training.train: {error}", file=sys.stderr)
        return 2
    return 0


def started(options: argparse.Namespace) -> tuple[Run, Trainer]:
    """A run at its start."""
    torch.manual_seed(options.seed)
    shape = PRESETS[options.preset].model
    model = build(shape) if options.init is None else load_checkpoint(options.init)
    if (found := shape_of(model)) != shape:
        raise SparseAttentionError(
            f"a checkpoint to continue has the shape of preset {options.preset!r}, {shape}",
            found,
            f"Other presets: {', '.join(name for name in PRESETS if name != options.preset)}.",
        )
    run = Run(
        preset=options.preset,
        minutes=None if options.steps else options.minutes,
        steps=options.steps,
        seed=options.seed,
        threads=options.threads,
        compiled=options.compile,
        continues=None if options.init is None else read_training(options.init),
    )
    return run, trainer_of(run, model)


def resumed(folder: Path) -> tuple[Run, Trainer]:
    """A run where it was interrupted."""
    options, state = load_state(folder)
    fields = {field.name for field in dataclasses.fields(Run)}
    if options.keys() != fields or options["preset"] not in PRESETS:
        raise SparseAttentionError(
            "a run to resume has the options and presets of this code",
            {name: value for name, value in options.items() if name != "continues"},
            "Continue from its checkpoint with --init instead.",
        )
    run = Run(**options)
    trainer = trainer_of(run, build(PRESETS[run.preset].model))
    trainer.load_state_dict(state)
    return run, trainer


def trainer_of(run: Run, model: WanTransformer3DModel) -> Trainer:
    """A trainer with the options of a run."""
    torch.set_num_threads(run.threads)
    preset = PRESETS[run.preset]
    return Trainer(
        model,
        preset,
        length=Length(run.minutes, run.steps),
        seed=run.seed,
        device=torch.device("cuda" if preset.device == "cuda" and torch.cuda.is_available() else "cpu"),
        continued=run.continues is not None,
        compiled=run.compiled,
    )


def train(run: Run, trainer: Trainer, folder: Path, *, save_every: float = 120.0) -> None:
    """Train to the end, with a checkpoint and a state every ``save_every`` seconds and at the end."""
    saved_at = trainer.seconds

    def save() -> None:
        known = {**asdict(run), "log": [asdict(row) for row in trainer.log]}
        save_checkpoint(folder, trainer.model, trainer.average.values, known)
        save_state(folder, asdict(run), trainer.state_dict())

    with Progress(trainer) as progress:

        def after_step(_: Trainer) -> None:
            nonlocal saved_at
            progress.update()
            if trainer.seconds - saved_at >= save_every:
                saved_at = trainer.seconds
                save()

        trainer.run(after_step)
    save()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="training.train", description="Train the small video model.")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=60.0, help="length of the run by the clock (default: 60)")
    length.add_argument("--steps", type=int, help="length of the run by steps; two such runs are equal")
    parser.add_argument("--seed", type=int, default=0)
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--init", type=Path, metavar="FOLDER", help="continue from the weights of this checkpoint")
    start.add_argument("--resume", action="store_true", help="go on with the run that --out holds, with its options")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--save-every", type=float, default=120.0, metavar="SECONDS")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    parser.add_argument("--compile", action="store_true", help="train with torch.compile(model)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
