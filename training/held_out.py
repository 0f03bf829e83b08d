"""The loss of a checkpoint on videos that no run has seen, as JSON.

    python -m training.held_out --model FOLDER

Scenes, noise and times are fixed by size and seed, so that the numbers of two checkpoints compare: their difference
is far more exact than the standard error of either. Every video has its prompt.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from sparse_compile.errors import SparseAttentionError
from sparse_compile.evaluation.demo_model import VideoSize
from training.checkpoint import load_checkpoint
from training.command_line import video_size
from training.objective import Randomness, draw_batch, velocity_loss

SIZES = (VideoSize(9, 32, 32), VideoSize(12, 32, 48), VideoSize(16, 32, 48))
SEED = 2_000_000_011
"""Of scenes, noise and times; a run whose seed it is would train on them."""


@dataclass(frozen=True)
class HeldOutLoss:
    """The mean squared error of the velocity over some videos of one size."""

    size: str
    tokens: int
    videos: int
    loss: float
    standard_error: float
    """Of the mean, over videos."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the losses; exit code 2 for an option or a file that is wrong."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        model = load_checkpoint(options.model)
    except SparseAttentionError as error:
        print(f"training.held_out: {error}", file=sys.stderr)
        return 2
    losses = [held_out_loss(model, size, options.videos) for size in options.sizes]
    text = json.dumps({"seed": SEED, "losses": [asdict(loss) for loss in losses]}, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")
    return 0


@torch.no_grad()
def held_out_loss(model: WanTransformer3DModel, size: VideoSize, videos: int) -> HeldOutLoss:
    """The loss on the first ``videos`` (two or more) held-out videos of a size."""
    random = Randomness.of(SEED, next(model.parameters()).device)
    # One video a batch: the first ones are then the same for every count, and each has a loss of its own.
    batches = (draw_batch(1, size, random, null_share=0.0) for _ in range(videos))
    losses = torch.stack([velocity_loss(model, batch) for batch in batches]).double()
    return HeldOutLoss(
        size=str(size),
        tokens=size.tokens,
        videos=videos,
        loss=round(losses.mean().item(), 5),
        standard_error=round((losses.std() / videos**0.5).item(), 5),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="training.held_out", description="The held-out loss of a checkpoint.")
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="a checkpoint")
    parser.add_argument("--sizes", type=video_size, nargs="+", default=SIZES, metavar="FRAMESxHEIGHTxWIDTH")
    parser.add_argument("--videos", type=int, default=64, help="of each size (default: 64)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here too")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
