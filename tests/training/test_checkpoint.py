"""What is refused when a checkpoint or a state is read, and in which words."""

import json
import os
import shutil

import pytest
import torch

from sparse_compile.errors import SparseAttentionError
from sparse_compile.evaluation.demo_model import CHECKPOINT
from training.checkpoint import CONFIG, TRAINING, WEIGHTS, load_checkpoint, save_checkpoint
from training.model import build
from training.resume import STATE, load_state, save_state


class Trap:
    """A pickle that runs code when it is loaded."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.fixture
def folder(tmp_path, tiny_preset):
    """A whole checkpoint."""
    model = build(tiny_preset.model)
    save_checkpoint(tmp_path / "model", model, model.state_dict(), {"preset": "tiny"})
    return tmp_path / "model"


def change_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_checkpoint_comes_back_in_float32(folder, tiny_preset):
    torch.manual_seed(1)
    model = build(tiny_preset.model)
    save_checkpoint(folder, model, model.state_dict(), {})
    loaded = load_checkpoint(folder)
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, model.state_dict()[name].to(torch.bfloat16).float()), name
    assert not list(folder.glob("*.unfinished"))


def test_the_shipped_checkpoint_loads():
    assert not load_checkpoint(CHECKPOINT).training


def without_folder(folder):
    shutil.rmtree(folder)


def without_weights(folder):
    (folder / WEIGHTS).unlink()


def with_a_pickle_instead(folder):
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")


def cut_short(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])


def cut_in_the_header(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:5])


def of_another_class(folder):
    change_json(folder / CONFIG, _class_name="UNet2DModel")


def with_more_layers(folder):
    change_json(folder / CONFIG, num_layers=3)


def of_another_version(folder):
    change_json(folder / TRAINING, version=2)


def with_a_broken_config(folder):
    (folder / CONFIG).write_text("{")


def with_a_list_for_a_config(folder):
    (folder / CONFIG).write_text("[]")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_folder, "a folder that holds config.json.*Give the folder of a training run"),
        (without_weights, "holds diffusion_pytorch_model.safetensors.*Give the folder"),
        (with_a_pickle_instead, "from safetensors only.*diffusion_pytorch_model.bin.*Convert it"),
        (cut_short, "whole safetensors file.*cut short"),
        (cut_in_the_header, "whole safetensors file.*cut short"),
        (of_another_class, "holds a WanTransformer3DModel; got 'UNet2DModel'"),
        (with_more_layers, "shapes that config.json says.*blocks.2.*same training run"),
        (of_another_version, "of version 1.*version 2.*Train it again"),
        (with_a_broken_config, "config.json is JSON"),
        (with_a_list_for_a_config, "holds a JSON object"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_checkpoint_that_cannot_be_read_says_why(folder, damage, words):
    damage(folder)
    with pytest.raises(SparseAttentionError, match=words):
        load_checkpoint(folder)


def test_a_state_comes_back(tmp_path):
    save_state(tmp_path, {"preset": "cpu"}, {"steps": 3, "weight": torch.ones(2)})
    run, trainer = load_state(tmp_path)
    assert run == {"preset": "cpu"}
    assert trainer["steps"] == 3
    assert torch.equal(trainer["weight"], torch.ones(2))


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path):
    sprung = tmp_path / "sprung"
    torch.save({"version": 1, "run": {}, "trainer": Trap(sprung)}, tmp_path / STATE)
    with pytest.raises(SparseAttentionError, match=r"a pickle can run code.*this program has written"):
        load_state(tmp_path)
    assert not sprung.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "is the state of a run"),
        ({"version": 1, "run": {}}, "is the state of a run"),
        ({"version": 7, "run": {}, "trainer": {}}, "version 7"),
    ],
    ids=["a list", "without a trainer", "of another version"],
)
def test_a_file_that_is_no_state_is_refused(tmp_path, content, words):
    torch.save(content, tmp_path / STATE)
    with pytest.raises(SparseAttentionError, match=words):
        load_state(tmp_path)


@pytest.mark.parametrize("kept", [0, 10, 700], ids=str)
def test_a_state_that_was_cut_short_is_refused(tmp_path, kept):
    save_state(tmp_path, {}, {"weight": torch.ones(100)})
    (tmp_path / STATE).write_bytes((tmp_path / STATE).read_bytes()[:kept])
    with pytest.raises(SparseAttentionError):
        load_state(tmp_path)


def test_a_state_that_is_missing_says_what_to_do(tmp_path):
    with pytest.raises(SparseAttentionError, match="Start it without --resume"):
        load_state(tmp_path)
