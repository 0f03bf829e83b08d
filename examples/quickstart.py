"""Sparse attention in one line, on the small model that ships with the package. Runs on a CPU.

    python examples/quickstart.py

With a model of your own, only the line with torch.compile is needed, and no options.
"""

from pathlib import Path

import torch

import sparse_compile
from sparse_compile.evaluation.demo_model import TRAINED_SIZES, demo_scenes, generate, load_pipeline
from sparse_compile.evaluation.metrics import to_unit_range
from sparse_compile.evaluation.pictures import write_gif

# The defaults are made for long videos; this one has 1,152 tokens.
SMALL_VIDEO = {"min_tokens": 64, "density": 0.3, "q_clusters": 24, "k_clusters": 72}


def main() -> None:
    """Compile, generate one video, say what became sparse."""
    pipeline = load_pipeline()
    pipeline.transformer = torch.compile(pipeline.transformer, backend="sparse_attn", options=SMALL_VIDEO)

    video = generate(pipeline, demo_scenes(1, seed=0), TRAINED_SIZES[0], steps=10)

    print(sparse_compile.explain(pipeline))
    folder = Path("demo_output")
    folder.mkdir(exist_ok=True)
    write_gif(to_unit_range(video)[0], folder / "quickstart.gif")
    print(f"\nWrote {folder}/quickstart.gif")


if __name__ == "__main__":
    main()
