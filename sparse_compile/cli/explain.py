"""``sparse-attn explain``: what the backend does with each attention of the demo model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import sparse_compile
from sparse_compile.evaluation.comparison import compile_transformer, demo_options
from sparse_compile.evaluation.demo_model import VideoSize, demo_scenes, generate, load_pipeline


def run(arguments: argparse.Namespace) -> int:
    """Generate one video in a few steps and print the report, as a table or as JSON."""
    options = demo_options(dict(arguments.options))
    size = VideoSize(*map(int, arguments.size.split("x")))
    pipeline = load_pipeline()
    compile_transformer(pipeline, "sparse_attn", options, regional=arguments.regional)
    generate(pipeline, demo_scenes(1, arguments.seed), size, steps=arguments.steps, seed=arguments.seed)
    report = sparse_compile.explain(pipeline)
    if arguments.json is None:
        print(report)
        return 0
    text = json.dumps(report.to_dict(), indent=1)
    if arguments.json == "-":
        print(text)
    else:
        Path(arguments.json).write_text(text + "\n")
    return 0
