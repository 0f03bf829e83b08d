"""``sparse-attn explain MODEL``: what is printed of models without weights, and what wrong input says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from families.table import case_of
from torch import nn
from toy_models import Stack, tokens

from sparse_compile.cli.call_arguments import Sizes, described, find_call, parse_input
from sparse_compile.cli.explain_model import layer_ranges
from sparse_compile.cli.main import main
from sparse_compile.compiler.examine import examine
from sparse_compile.compiler.torch_internals import fake_mode
from sparse_compile.config import Config

LATENTS = ["--latents", "3x8x12", "--text", "20", "--options", "min_tokens=64"]
GUESSED = (
    "wan_t2v",
    "wan_i2v",
    "wan_vace",
    "hunyuan_video",
    "cogvideox",
    "cogvideox_rope",
    "ltx",
    "mochi",
    "cosmos",
    "latte",
    "flux",
    "sd3",
)
"""Families of whose calls every argument is guessed from names and configuration."""


def folder_of(path: Path, *, case: str = "wan_t2v") -> Path:
    """The configuration of a tiny model, as diffusers saves it."""
    model, _ = case_of(case).build()
    model.save_config(path)
    return path


def a_stack() -> tuple[nn.Module, dict[str, Any]]:
    return Stack(2), {"hidden_states": tokens()}


def just_a_stack() -> nn.Module:
    return Stack(2)


def nothing() -> None:
    return None


def test_a_folder_with_a_configuration_is_explained(tmp_path, capsys):
    assert main(["explain", str(folder_of(tmp_path)), *LATENTS]) == 0
    printed = capsys.readouterr().out
    assert "called with hidden_states=1x8x3x8x12, timestep=1:int64, encoder_hidden_states=1x20x24" in printed
    assert "enable would compile the repeated blocks (2 WanTransformerBlock), which hold all attention" in printed
    rows = [line.split() for line in printed.splitlines()]
    assert ["blocks.0-1.attn1", "self", "video:72", "sparse", "64", "0.0", "MiB"] in rows
    assert ["blocks.0-1.attn2", "cross", "video:72", "dense"] in [row[:4] for row in rows]
    assert "the whole model: 1 graph(s), run 1 time(s) in a call, with 4 attention(s), 2 sparse" in printed
    assert "block by block: 1 graph(s), run 2 time(s) in a call, with 4 attention(s), 2 sparse" in printed


def test_every_transformer_of_a_pipeline_is_explained_as_json(tmp_path, capsys):
    index = {"_class_name": "WanPipeline", "transformer": [], "transformer_2": [], "vae": []}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for name in ("transformer", "transformer_2"):
        folder_of(tmp_path / name)
    changes = ["--config", "num_layers=1"]
    assert main(["explain", str(tmp_path), *LATENTS, *changes, "--json"]) == 0
    models = json.loads(capsys.readouterr().out)
    assert [model["model"] for model in models] == ["transformer", "transformer_2"]
    for model in models:
        sites = {site["layer"]: site for site in model["whole"]["sites"]}
        assert sites["blocks.0.attn1"]["decision"] == "sparse"
        assert sites["blocks.0.attn2"]["reason"] == "cross_attention"
        assert model["whole"]["hidden"] == {} and model["blocks"]["hidden"] == {}


@pytest.mark.parametrize(
    ("function", "inputs"), [("a_stack", []), ("just_a_stack", ["--input", "hidden_states=1x128x32"])]
)
def test_a_family_of_ones_own_is_explained(function, inputs, capsys):
    assert main(["explain", f"{__name__}:{function}", *inputs, "--options", "min_tokens=64"]) == 0
    assert "with 2 attention(s), 2 sparse" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["NoSuchModel"], "explain needs a model"),
        (["FlowMatchEulerDiscreteScheduler"], "explain needs a model"),
        (["missing.json"], "It does not read"),
        (["no_such_module:build"], "It does not: No module named 'no_such_module'"),
        ([f"{__name__}:nothing"], "returned NoneType"),
        (
            [f"{__name__}:just_a_stack"],
            "got 'hidden_states'. nothing is known of it. Give them: --input hidden_states=",
        ),
        ([f"{__name__}:a_stack", "--input", "hidden=3"], "Known: hidden_states"),
        ([f"{__name__}:a_stack", "--input", "hidden_states=1x8x5"], "called with hidden_states=1x8x5"),
        ([f"{__name__}:a_stack", "--input", "hidden_states=1x8:word"], "must be a dtype"),
        ([f"{__name__}:a_stack", "--config", "num_layers=2"], "--config changes a configuration of diffusers"),
        (["WanTransformer3DModel", "--config", "layers=2"], "must name a setting of WanTransformer3DModel"),
        (["WanTransformer3DModel", "--options", "topp=1"], "Did you mean 'top_p'?"),
    ],
)
def test_what_cannot_be_explained_says_why(arguments, message, capsys):
    assert main(["explain", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_no_configuration_of_a_model_is_refused(tmp_path, capsys):
    for text, message in (("[]", "must be a JSON object"), ("{}", "_class_name"), ("{", "does not read")):
        (tmp_path / "config.json").write_text(text)
        assert main(["explain", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err


def test_inputs_are_shapes_with_a_dtype_tuples_of_them_or_values():
    mask = parse_input("1x20:bool")
    assert mask.shape == (1, 20) and mask.dtype == torch.bool
    assert parse_input("2:int64").shape == (2,)
    assert [table.shape for table in parse_input("16x8,16x8")] == [(16, 8), (16, 8)]
    assert [parse_input(text) for text in ("3", "none", "2.5", "[(1, 2)]", "word")] == [3, None, 2.5, [(1, 2)], "word"]
    assert described({"a": mask, "b": torch.ones(3), "c": 3}) == "a=1x20:bool, b=3:float32, c=3"


def test_layers_that_differ_in_one_number_are_named_as_a_range():
    names = ["blocks.0.attn", "blocks.1.attn", "blocks.3.attn", "refiner.attn", "blocks.0.attn2"]
    assert layer_ranges(names) == ["refiner.attn", "blocks.0-1,3.attn", "blocks.0.attn2"]


def test_a_large_model_is_built_without_memory():
    with fake_mode(), torch.no_grad():
        from diffusers import WanTransformer3DModel

        model = WanTransformer3DModel(num_layers=2, num_attention_heads=40, ffn_dim=13824).eval()
        call = find_call(model, Sizes(21, 60, 104, 512), {})
    assert call.eager.total() == 4
    assert described(call.arguments).startswith("hidden_states=1x16x21x60x104")


@pytest.mark.slow
@pytest.mark.parametrize("name", GUESSED)
def test_a_configuration_alone_shows_the_sites_that_the_table_of_families_lists(name):
    case = case_of(name)
    built, _ = case.build()
    with fake_mode(), torch.no_grad():
        model = type(built).from_config(dict(built.config)).eval()
        call = find_call(model, Sizes(5, 16, 24, 20), {})
        found = examine(model, call.arguments, Config(min_tokens=64), call.eager, fullgraph=bool(call.needs_values))
    expected: Counter[tuple[str, str]] = Counter()
    for row, count in case.whole.items():
        expected[row.role, row.verdict] += count
    assert Counter((site.record.role, site.record.reason or "sparse") for site in found.sites) == expected
    assert not found.hidden and not found.failure
