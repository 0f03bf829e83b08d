"""Sparse attention beside what else people do to a pipeline: as near to eager as alone, or dense with a reason."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from families.wan import wan_t2v
from generations import QUICK
from integrations.compositions import COMPOSITIONS, Composition, add_lora, cast_layerwise
from tiny_pipelines import FOUR, OPTIONS, expected, run, steps_of, wan_pipeline
from toy_pipeline import toy_pipeline

import sparse_compile

EXACT = {**OPTIONS, "top_p": 1.0}
PAGE = Path(__file__).parents[2] / "docs" / "composition.md"
slow = pytest.mark.slow

ORDERS = [
    pytest.param(
        composition,
        when,
        marks=() if composition.quick and when == "before" else slow,
        id=f"{composition.title.replace(' ', '_')}-{when}",
    )
    for composition in COMPOSITIONS
    for when in (("before", "after") if composition.either_order else ("before",))
]


@pytest.fixture(autouse=True)
def attention_backend_of_others() -> Iterator[None]:
    """`set_attention_backend` sets one for the whole process, too."""
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(before)


def assert_near(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(actual, wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(("composition", "when"), ORDERS)
def test_nothing_skipped_equals_eager(composition: Composition, when: str) -> None:
    twin, pipe = wan_pipeline(), wan_pipeline()
    composition.apply(twin)
    wanted = run(twin)
    if when == "before":
        composition.apply(pipe)
    sparse_compile.enable(pipe, **EXACT)
    if when == "after":
        composition.apply(pipe)
    assert_near(run(pipe), wanted)
    report = sparse_compile.explain(pipe)
    if not composition.found:
        assert not report.sites
        assert any("no scaled_dot_product_attention in what was compiled" in warning for warning in report.warnings)
    elif composition.reason is not None:
        assert composition.reason in {site.reason for site in report.sites}
        assert "sparse" not in {site.decision for site in report.sites}
    else:
        assert [site.role for site in report.sites if site.decision == "sparse"] == ["self"] * 2
        assert steps_of(pipe) == expected(*FOUR)
        assert report.compilations == 3
        sparse_compile.enable(pipe, **OPTIONS)
        assert not torch.allclose(run(pipe), wanted, atol=1e-3)


@slow
def test_under_layerwise_casting_the_option_text_tokens_makes_it_sparse() -> None:
    twin, pipe = wan_pipeline(), wan_pipeline()
    for pipeline in (twin, pipe):
        cast_layerwise(pipeline)
    sparse_compile.enable(pipe, text_tokens=0, **EXACT)
    assert_near(run(pipe), run(twin))
    assert steps_of(pipe) == expected(*FOUR)


def test_the_page_has_a_row_for_each_composition() -> None:
    rows = [line.split("|")[1].strip() for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert not {composition.title for composition in COMPOSITIONS} - set(rows)


# ---------------------------------------------------------------------- things that come and go


@slow
def test_loras_come_go_and_are_fused_between_runs() -> None:
    twin, pipe = wan_pipeline(), wan_pipeline()
    sparse_compile.enable(pipe, **EXACT)
    plain = run(twin)
    for pipeline in (twin, pipe):
        add_lora(pipeline)
    first = run(twin)
    assert_near(run(pipe), first)
    for pipeline in (twin, pipe):
        add_lora(pipeline, "second", seed=2)
        pipeline.transformer.set_adapter("second")
    second = run(twin)
    assert not torch.allclose(first, second, atol=1e-3)
    assert_near(run(pipe), second)
    for pipeline in (twin, pipe):
        pipeline.transformer.fuse_lora(adapter_names=["second"])
    assert_near(run(pipe), run(twin))
    for pipeline in (twin, pipe):
        pipeline.transformer.unfuse_lora()
        pipeline.transformer.unload_lora()
    assert_near(run(pipe), plain)
    report = sparse_compile.explain(pipe)
    assert steps_of(pipe) == expected(*FOUR)
    assert {site.decision for site in report.sites if site.role == "self"} == {"sparse"}


@slow
def test_a_lora_is_hot_swapped_without_compiling_again() -> None:
    from peft.utils import get_peft_model_state_dict

    weights = []
    for seed in (1, 2):
        donor = wan_pipeline()
        add_lora(donor, seed=seed)
        state = get_peft_model_state_dict(donor.transformer, adapter_name="first")
        weights.append({f"transformer.{name}": value for name, value in state.items()})
    twin, pipe = wan_pipeline(), wan_pipeline()
    for pipeline in (twin, pipe):
        pipeline.load_lora_weights(dict(weights[0]), adapter_name="first")
    sparse_compile.enable(pipe, **EXACT)
    first = run(twin)
    assert_near(run(pipe), first)
    for pipeline in (twin, pipe):
        pipeline.load_lora_weights(dict(weights[1]), adapter_name="first", hotswap=True)
    second = run(twin)
    assert not torch.allclose(first, second, atol=1e-3)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_near(run(pipe), second)


def test_disabling_gives_a_pipeline_back_that_got_a_lora_since() -> None:
    twin, pipe = wan_pipeline(), wan_pipeline()
    sparse_compile.enable(pipe, **OPTIONS)
    for pipeline in (twin, pipe):
        add_lora(pipeline)
    sparse_compile.disable(pipe)
    for mine, plain in zip(pipe.transformer.modules(), twin.transformer.modules(), strict=True):
        assert vars(mine).keys() == vars(plain).keys()
    assert torch.equal(run(pipe), run(twin))


@pytest.mark.parametrize("when", ["before", "after"])
def test_disabling_leaves_the_hooks_of_others(when: str) -> None:
    offload = next(c for c in COMPOSITIONS if c.title == "Group offload, block level")
    twin, pipe = wan_pipeline(), wan_pipeline()
    offload.apply(twin)
    if when == "before":
        offload.apply(pipe)
    sparse_compile.enable(pipe, **OPTIONS)
    if when == "after":
        offload.apply(pipe)
    sparse_compile.disable(pipe)
    for mine, plain in zip(pipe.transformer.modules(), twin.transformer.modules(), strict=True):
        assert vars(mine).keys() == vars(plain).keys()
        if hasattr(mine, "_diffusers_hook"):
            kinds = [[type(ref.forward) for ref in m._diffusers_hook._fn_refs] for m in (mine, plain)]
            assert kinds[0] == kinds[1]
    assert torch.equal(run(pipe), run(twin))


# ---------------------------------------------------------------------- stances


def test_under_force_eager_the_model_runs_as_it_is_and_the_clock_moves_on() -> None:
    twin, pipe = toy_pipeline(), toy_pipeline()
    clock = sparse_compile.enable(pipe, **QUICK)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(pipe(), twin())
    assert (clock.moment.step, sparse_compile.explain(pipe).compilations) == (4, 0)
    assert not torch.allclose(pipe(), twin(), atol=1e-3)


def test_a_warm_pipeline_runs_under_fail_on_recompile() -> None:
    pipe = toy_pipeline()
    sparse_compile.enable(pipe, **QUICK)
    first = pipe()
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(pipe(), first)


def test_under_eager_on_recompile_a_new_size_is_dense() -> None:
    twin, pipe = toy_pipeline(), toy_pipeline()
    sparse_compile.enable(pipe, **QUICK)
    pipe()
    with torch.compiler.set_stance("eager_on_recompile"):
        assert torch.equal(pipe(size=96), twin(size=96))


def test_under_autocast_state_has_its_dtype() -> None:
    twin, pipe = toy_pipeline(), toy_pipeline()
    sparse_compile.enable(pipe, **{**QUICK, "top_p": 1.0})
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(pipe(), twin(), rtol=2e-2, atol=2e-2)
    assert {site.decision for site in sparse_compile.explain(pipe).sites} == {"sparse"}


# ---------------------------------------------------------------------- copies and files


def test_a_deep_copy_of_an_enabled_model_runs_as_the_model_did() -> None:
    pipe, twin = toy_pipeline(), toy_pipeline()
    sparse_compile.enable(pipe, **QUICK)
    pipe()
    plain = toy_pipeline(copy.deepcopy(pipe.transformer))
    with torch.no_grad():
        plain.transformer.blocks[0].to_q.weight.mul_(2)
        twin.transformer.blocks[0].to_q.weight.mul_(2)
    assert torch.equal(plain(), twin())


def test_an_enabled_model_is_pickled_as_the_model_was(tmp_path: Path) -> None:
    pipe, twin = toy_pipeline(), toy_pipeline()
    sparse_compile.enable(pipe, **QUICK)
    torch.save(pipe.transformer, tmp_path / "model.pt")
    plain = toy_pipeline(torch.load(tmp_path / "model.pt", weights_only=False))
    assert torch.equal(plain(), twin())


def test_an_enabled_pipeline_is_saved_as_the_pipeline_was(tmp_path: Path) -> None:
    pipe = wan_pipeline()
    sparse_compile.enable(pipe, **OPTIONS)
    pipe.transformer.save_pretrained(tmp_path / "model")
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "model")
    for name, value in wan_t2v()[0].state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    wanted: dict[str, Any] = wan_pipeline().config
    pipe.save_pretrained(tmp_path / "pipeline")
    assert {key for key in WanPipeline.load_config(tmp_path / "pipeline") if key[0] != "_"} == {
        key for key in wanted if key[0] != "_"
    }
