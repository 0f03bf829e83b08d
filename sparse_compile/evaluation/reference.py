"""The dense videos that a sweep compares with, kept on disk: they are the same for all configurations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_compile.evaluation import metrics
from sparse_compile.evaluation.comparison import compile_transformer
from sparse_compile.evaluation.demo_model import load_pipeline
from sparse_compile.evaluation.protocol import Protocol, Started
from sparse_compile.evaluation.results import key_of


@dataclass(frozen=True)
class Reference:
    """Dense videos by ``torch.compile`` without our backend, and without ``torch.compile``.

    Both are float32 [seeds * videos, 3, T, H, W] in [0, 1], seed after seed.
    """

    compiled: Tensor
    eager: Tensor

    @property
    def ceiling(self) -> float:
        """Mean PSNR in dB of one against the other: no result can be told from dense above it."""
        return float(metrics.psnr(self.compiled, self.eager).mean())


def dense_reference(protocol: Protocol, folder: Path, started: Started) -> Reference:
    """The dense videos of a protocol: those in the folder, or new ones, which are kept there.

    Args:
        protocol: which videos.
        folder: where the file is, or will be.
        started: see `Started`.
    """
    path = folder / f"dense_{key_of(protocol)}.safetensors"
    if path.exists():
        return Reference(**load_file(path))

    def videos(label: str, *, compiled: bool) -> Tensor:
        told = started(label, len(protocol.seeds))
        pipeline = load_pipeline()
        if compiled:
            compile_transformer(pipeline, "inductor")
        return torch.cat([protocol.generate(pipeline, seed, told) for seed in protocol.seeds])

    eager, compiled = videos("dense, eager", compiled=False), videos("dense, compiled", compiled=True)
    made = Reference(compiled, eager)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    save_file({"compiled": made.compiled, "eager": made.eager}, unfinished)
    unfinished.replace(path)  # whole or not there at all
    return made
