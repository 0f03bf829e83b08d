"""Pipelines that cannot tell the time: an error when they are attached; dense, and one line in the log, when found."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import diffusers
import pytest
import torch
import video_pipelines as tiny
from tiny_pipelines import FOUR, OPTIONS, cog_pipeline, expected, steps_of, wan_pipeline
from toy_models import Stack
from toy_pipeline import ToyTransformer, toy_pipeline
from toy_pipelines import bare_pipeline, compiled_stack
from video_pipeline_cases import wan_call
from video_pipelines import embeds

import sparse_compile
from sparse_compile.errors import SparseAttentionError
from sparse_compile.integrations.diffusers import LEAST_VERSION
from sparse_compile.runtime.registry import REGISTRY


@pytest.mark.parametrize("version", ["0.41.2", "0.9.0"])
def test_an_old_diffusers_is_named_beside_the_one_that_is_needed(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = bare_pipeline()
    monkeypatch.setattr(diffusers, "__version__", version)
    with pytest.raises(SparseAttentionError, match=f"from diffusers {LEAST_VERSION} on; got '{version}'.*Upgrade"):
        sparse_compile.attach(pipe)
    assert REGISTRY.clocks() == []


@pytest.mark.parametrize("version", ["0.42.0", "0.43.0.dev0", "1.0"])
def test_newer_versions_of_diffusers_are_taken(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers, "__version__", version)
    sparse_compile.attach(bare_pipeline())


def test_the_least_version_of_diffusers_is_that_of_the_extra() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["project"]["optional-dependencies"]["diffusers"] == [f"diffusers>={LEAST_VERSION}"]


@pytest.mark.parametrize("missing", ["step", "set_timesteps"])
def test_a_scheduler_needs_the_methods_that_tell_the_time(missing: str) -> None:
    methods = {name: lambda self: None for name in ("step", "set_timesteps") if name != missing}
    pipe = bare_pipeline(scheduler=type("Sampler", (), methods)())
    with pytest.raises(SparseAttentionError, match=r"with a scheduler and a transformer.*Sampler.*denoising"):
        sparse_compile.attach(pipe)


def test_transformers_that_two_pipelines_drive_are_not_driven_by_a_third() -> None:
    pipe = wan_pipeline(second=True)
    others = [bare_pipeline(model) for model in (pipe.transformer, pipe.transformer_2)]
    for other in others:
        sparse_compile.attach(other)
    with pytest.raises(SparseAttentionError, match=r"driven by one clock; got '2 clocks.*disable"):
        sparse_compile.attach(pipe)


def test_a_second_transformer_joins_the_clock_of_the_first() -> None:
    pipe = wan_pipeline(second=True)
    other = bare_pipeline(pipe.transformer)
    clock = sparse_compile.attach(other)
    assert sparse_compile.attach(pipe) is clock
    assert REGISTRY.attached_clock(pipe.transformer_2) is clock


def test_an_attach_that_fails_claims_no_model_for_the_clock_it_found() -> None:
    pipe = toy_pipeline(second=ToyTransformer())
    third = ToyTransformer()
    pipe.register_modules(transformer_3=third)
    other = bare_pipeline(pipe.transformer)
    clock = sparse_compile.attach(other)
    with sparse_compile.denoising(third, steps=4), pytest.raises(SparseAttentionError, match="one clock at a time"):
        sparse_compile.attach(pipe)
    assert REGISTRY.attached_clock(pipe.transformer) is clock
    with sparse_compile.denoising(pipe.transformer_2, steps=4):
        pass


def test_a_pipeline_that_cannot_be_attached_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(diffusers, "__version__", "0.41.0")
    pipe = bare_pipeline(compiled_stack())
    with caplog.at_level(logging.WARNING, "sparse_compile"):
        latents = pipe(4)
    torch.testing.assert_close(latents, bare_pipeline(Stack(2))(4))
    assert sum("BarePipeline is not attached" in record.getMessage() for record in caplog.records) == 1


WITHOUT_MODULAR_PIPELINES = """
import sys
sys.modules["diffusers.modular_pipelines"] = None
import diffusers, torch, sparse_compile
from toy_models import Stack, tokens
from toy_pipelines import bare_pipeline
diffusers.__version__ = "0.30.0"
with torch.no_grad():
    found = torch.compile(Stack(1), backend="sparse_attn", options={"lowering": "eager", "min_tokens": 16})(tokens(64))
    assert torch.allclose(found, Stack(1)(tokens(64)), atol=1e-5)
try:
    sparse_compile.attach(bare_pipeline())
except sparse_compile.SparseAttentionError as error:
    print(error)
"""


def test_a_diffusers_that_is_too_old_to_have_modular_pipelines_hinders_nobody_who_attaches_none() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MODULAR_PIPELINES], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"from diffusers {LEAST_VERSION} on; got '0.30.0'" in done.stdout


def test_a_component_that_was_registered_later_hinders_nothing() -> None:
    pipe = toy_pipeline()
    pipe.register_modules(extra=Stack(1))
    with pytest.raises(ValueError, match="incorrectly initialized"):
        pipe.components  # noqa: B018
    want = pipe(4)
    pipe.transformer.compile(backend="sparse_attn", options=OPTIONS)
    assert not torch.equal(pipe(4), want)
    assert steps_of(pipe) == expected(*FOUR, branches=("0",))
    sparse_compile.disable(pipe)
    pipe = toy_pipeline()
    pipe.register_modules(extra=Stack(1))
    sparse_compile.enable(pipe, **OPTIONS)
    pipe(4)
    assert steps_of(pipe) == expected(*FOUR, branches=("0",))
    sparse_compile.disable(pipe)
    assert torch.equal(pipe(4), want)


def test_text_without_any_token_gives_what_eager_gives() -> None:
    def generate(pipe: diffusers.WanPipeline) -> torch.Tensor:
        empty = {"prompt_embeds": embeds(1, 0, 24), "negative_prompt_embeds": embeds(1, 0, 24)}
        call = {**wan_call(), **empty, "num_inference_steps": 2, "output_type": "latent", "return_dict": False}
        found: torch.Tensor = pipe(**call, generator=torch.Generator().manual_seed(0))[0]
        return found

    pipe = tiny.wan()
    pipe.transformer.compile(backend="sparse_attn", options={**OPTIONS, "top_p": 1.0})
    torch.testing.assert_close(generate(pipe), generate(tiny.wan()), rtol=2e-4, atol=2e-4)


def test_pipelines_of_one_scheduler_and_one_transformer_share_the_hooks_on_both() -> None:
    pipe = cog_pipeline()
    clock = sparse_compile.attach(pipe)
    hook = vars(pipe.scheduler)["step"]
    other = diffusers.CogVideoXVideoToVideoPipeline(**pipe.components)
    assert sparse_compile.attach(other) is clock
    assert vars(pipe.scheduler)["step"] is hook
