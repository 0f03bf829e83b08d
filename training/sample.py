"""Draw a contact sheet of videos as the data has them next to videos that a checkpoint makes of the same prompts.

    python -m training.sample --model FOLDER --out sheet.png

Only the prompt is shared: where the shapes are and where they go is drawn anew, by the data and by the model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

from sparse_compile.errors import SparseAttentionError
from sparse_compile.evaluation.demo_model import SHIFT, TRAINED_SIZES, demo_scenes, generate
from training.checkpoint import load_checkpoint
from training.command_line import video_size
from training.contact_sheet import Row, write_sheet
from training.data import render


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the sheet; exit code 2 for an option or a file that is wrong."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        pipeline = pipeline_of(load_checkpoint(options.model))
    except SparseAttentionError as error:
        print(f"training.sample: {error}", file=sys.stderr)
        return 2
    scenes = demo_scenes(options.videos, options.seed)
    attributes = torch.tensor([scene.attributes for scene in scenes])
    data = render(attributes, options.size, torch.Generator().manual_seed(options.seed))
    made = generate(pipeline, scenes, options.size, steps=options.steps, guidance=options.guidance, seed=options.seed)
    rows = []
    for scene, real, sampled in zip(scenes, data, made, strict=True):
        rows += [Row(f"data: {scene}", real), Row("model", sampled)]
    write_sheet(rows, options.out)
    return 0


def pipeline_of(model: WanTransformer3DModel) -> WanPipeline:
    """A model in the pipeline in which the shipped one is used."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    pipeline = WanPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=model, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="training.sample", description="Draw data next to samples.")
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="a checkpoint")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    parser.add_argument("--size", type=video_size, default=TRAINED_SIZES[0], help=f"default: {TRAINED_SIZES[0]}")
    parser.add_argument("--videos", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
