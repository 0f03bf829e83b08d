"""The programs that README.md and the pages print are run, on tiny models and without Inductor."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import WanPipeline
from tiny_pipelines import run, wan_pipeline
from torch import Tensor
from toy_models import Stack, tokens

import sparse_compile
from sparse_compile.runtime.report import Report

ROOT = Path(__file__).parents[2]
SMALL = {"LOWERING": "eager", "KERNEL": "reference", "MIN_TOKENS": "64", "Q_CLUSTERS": "4", "K_CLUSTERS": "8"}
"""What suits toys, as variables, since what is printed has no such options."""


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setenv(f"SPARSE_ATTN_{name}", value)


def snippets(document: str, heading: str) -> list[str]:
    """The Python blocks below a heading of a document, up to the next heading."""
    _, found, text = (ROOT / document).read_text().partition(f"\n{heading}\n")
    assert found, f"{document} has no {heading!r}"
    blocks = re.findall(
        r"^```python\n(.*?)^```", re.split(r"^##", text, flags=re.MULTILINE)[0], re.DOTALL | re.MULTILINE
    )
    assert blocks, f"{document} has no program below {heading!r}"
    return blocks


class Video(NamedTuple):
    """What a pipeline returns."""

    frames: Tensor


class ByPrompt(WanPipeline):
    """A pipeline without a text encoder that is called with a prompt, and keeps the report of its newest video."""

    report: Report | None = None

    def __call__(self, prompt: str | None = None, **how: Any) -> Any:
        if prompt is None:
            return super().__call__(**how)
        frames = run(self)
        self.report = sparse_compile.explain(self)
        return Video(frames)


def by_prompt() -> ByPrompt:
    pipe = wan_pipeline()
    pipe.__class__ = ByPrompt
    return pipe


@pytest.mark.slow
@pytest.mark.parametrize(
    ("document", "heading"),
    [("docs/quick_start.md", "## A diffusers pipeline"), ("README.md", "## Use it")],
    ids=["quick start", "readme"],
)
def test_what_is_printed_for_a_pipeline_makes_it_sparse(document, heading):
    for block in (block for block in snippets(document, heading) if "pipe" in block):
        pipe = by_prompt()
        exec(block, {"torch": torch, "sparse_compile": sparse_compile, "pipe": pipe, "prompt": "a cat"})
        if pipe.report is None:
            pipe("a cat")
        assert pipe.report.density is not None, block


class Timed(Stack):
    """A model as a loop of one's own calls it."""

    def forward(self, hidden_states: Tensor, timestep: float, encoder_hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states)


@pytest.mark.parametrize(
    ("document", "heading"),
    [("docs/quick_start.md", "## A loop of your own"), ("README.md", "## Use it")],
    ids=["quick start", "readme"],
)
def test_what_is_printed_for_a_loop_makes_it_sparse(document, heading):
    [block] = (block for block in snippets(document, heading) if "clock.step()" in block)
    model = Timed()
    names = {
        "torch": torch,
        "sparse_compile": sparse_compile,
        "model": model,
        "timesteps": [1.0] * 4,
        "x": tokens(),
        "prompt": tokens(7),
        "nothing": tokens(7),
        "update": lambda x, cond, uncond, t: x + 0.1 * (cond - uncond),
    }
    exec(block, names)
    report = sparse_compile.explain(model)
    assert {step.branch for step in report.generations[-1].steps} == {"cond", "uncond"}
    assert report.density is not None
