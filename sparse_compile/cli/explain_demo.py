"""The demo pipeline, run for a few steps, and what became of its attentions."""

from __future__ import annotations

import argparse

import sparse_compile
from sparse_compile.evaluation.comparison import compile_transformer, demo_options
from sparse_compile.evaluation.demo_model import VideoSize, demo_scenes, generate, load_pipeline
from sparse_compile.runtime.report import Report


def explain_demo(arguments: argparse.Namespace) -> Report:
    """Generate one video in a few steps; what the backend did."""
    options = demo_options(dict(arguments.options))
    size = VideoSize(*map(int, arguments.size.split("x")))
    pipeline = load_pipeline()
    compile_transformer(pipeline, "sparse_attn", options, regional=arguments.regional)
    generate(pipeline, demo_scenes(1, arguments.seed), size, steps=arguments.steps, seed=arguments.seed)
    return sparse_compile.explain(pipeline)
