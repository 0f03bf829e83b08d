"""The held-out loss: repeatable, fair between checkpoints, and low for the shipped model."""

import json

import pytest
import torch

from sparse_compile.evaluation.demo_model import CHECKPOINT, VideoSize
from training.checkpoint import load_checkpoint
from training.held_out import held_out_loss, main
from training.model import build

SMALL = VideoSize(1, 16, 16)


def test_the_loss_is_the_same_every_time_and_leaves_the_global_generator_alone(tiny_preset):
    model = build(tiny_preset.model).eval()
    before = torch.get_rng_state()
    first = held_out_loss(model, SMALL, 3)
    torch.randn(5)
    after = torch.get_rng_state()
    assert held_out_loss(model, SMALL, 3) == first
    assert torch.equal(after, torch.get_rng_state())
    torch.set_rng_state(before)


def test_the_shipped_model_is_far_better_than_one_with_random_weights():
    """It fails, too, if the data are no longer those that the model was trained on."""
    size = VideoSize(9, 32, 32)
    shipped = held_out_loss(load_checkpoint(CHECKPOINT), size, 4).loss
    torch.manual_seed(0)
    model = load_checkpoint(CHECKPOINT)
    torch.nn.init.zeros_(model.proj_out.weight)
    assert shipped < 0.15
    assert held_out_loss(model, size, 2).loss > 4 * shipped


def test_the_command_prints_and_writes_one_loss_a_size(tmp_path, capsys):
    file = tmp_path / "losses.json"
    arguments = ["--model", str(CHECKPOINT), "--sizes", "1x16x16", "2x16x16", "--videos", "2", "--json", str(file)]
    assert main(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(file.read_text())
    assert [(loss["size"], loss["tokens"], loss["videos"]) for loss in told["losses"]] == [
        ("1x16x16", 16, 2),
        ("2x16x16", 32, 2),
    ]


@pytest.mark.parametrize("size", ["12x32", "12x30x32", "0x32x32", "axbxc"])
def test_an_impossible_size_is_refused(size, capsys):
    with pytest.raises(SystemExit):
        main(["--model", str(CHECKPOINT), "--sizes", size])
    assert "argument --sizes" in capsys.readouterr().err


def test_a_missing_checkpoint_is_an_error_of_the_command(tmp_path, capsys):
    assert main(["--model", str(tmp_path / "none")]) == 2
    assert "training.held_out: a checkpoint is a folder" in capsys.readouterr().err
