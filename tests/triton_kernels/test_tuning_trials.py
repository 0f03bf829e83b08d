"""The problems that `sparse-attn tune` times run with each of their configurations."""

from __future__ import annotations

import torch

from sparse_compile.cli import tune


def test_every_problem_runs(device: str) -> None:
    made = list(tune.trials(torch.device(device), 160, 1, 16, torch.float16))
    assert [trial.entry.split("/")[0] for trial in made] == ["block_sparse_attention"] * 2 + ["block_mass", "kmeans"]
    for trial in made:
        assert trial.candidates
        trial.call(trial.candidates[-1])
