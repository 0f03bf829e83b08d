"""Runs of the command: from nothing, from a checkpoint, and interrupted ones."""

import json

import pytest
import torch
from safetensors.torch import load_file

import training.trainer
from sparse_compile.evaluation.demo_model import VideoSize
from training.checkpoint import TRAINING, WEIGHTS, load_checkpoint
from training.model import build
from training.presets import PRESETS
from training.resume import load_state, save_state
from training.train import Run, main, train, trainer_of

STEPS = 6
pytestmark = pytest.mark.usefixtures("tiny_preset")


class InterruptedRunError(Exception):
    """Stands for a machine that goes away."""


def command(folder, *more):
    return main(["--preset", "tiny", "--steps", str(STEPS), "--seed", "5", "--out", str(folder), *more])


def interrupted_after(steps, folder):
    """A run of the same command that stopped in the middle of a step."""
    torch.manual_seed(5)
    run = Run(preset="tiny", minutes=None, steps=STEPS, seed=5, threads=1, compiled=False)
    trainer = trainer_of(run, build(PRESETS["tiny"].model))
    whole_step = trainer.step

    def step():
        if trainer.steps == steps:
            raise InterruptedRunError
        return whole_step()

    trainer.step = step
    with pytest.raises(InterruptedRunError):
        train(run, trainer, folder, save_every=0)


def assert_same(actual, expected, path=""):
    """Bitwise, and all the way down; the clock may differ."""
    assert type(actual) is type(expected), path
    if isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected), path
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), path
        for key in expected.keys() - {"seconds", "minutes"}:
            assert_same(actual[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), path
        for number, pair in enumerate(zip(actual, expected, strict=True)):
            assert_same(*pair, f"{path}[{number}]")
    else:
        assert actual == expected, path


@pytest.mark.parametrize("steps", [1, 4], ids=["in the first stage", "in the second stage"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch, steps):
    monkeypatch.setattr(training.trainer, "LOG_EVERY", 2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command(whole) == 0
    interrupted_after(steps, parts)
    assert load_state(parts)[1]["steps"] == steps
    assert main(["--resume", "--out", str(parts)]) == 0
    (_, expected), (_, actual) = load_state(whole), load_state(parts)
    assert expected["steps"] == STEPS
    assert_same(actual, expected)
    assert_same(load_file(parts / WEIGHTS), load_file(whole / WEIGHTS))


def test_another_seed_is_another_run(tmp_path):
    assert command(tmp_path / "a") == command(tmp_path / "b", "--seed", "6") == 0
    a, b = (load_file(tmp_path / name / WEIGHTS) for name in "ab")
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_a_checkpoint_holds_the_average_in_bfloat16_and_says_how_it_was_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training.trainer, "LOG_EVERY", 3)
    assert command(tmp_path) == 0
    weights = load_file(tmp_path / WEIGHTS)
    average = load_state(tmp_path)[1]["average"]
    assert_same(weights, {name: value.to(torch.bfloat16) for name, value in average.items()})
    told = json.loads((tmp_path / TRAINING).read_text())
    assert (told["preset"], told["seed"], told["steps"], told["continues"]) == ("tiny", 5, STEPS, None)
    assert [row["step"] for row in told["log"]] == [3, 6]
    assert [row["tokens"] for row in told["log"]] == [16, VideoSize(2, 16, 24).tokens]
    assert capsys.readouterr().out.count("loss") == 2


def test_a_continued_run_starts_from_the_weights_and_keeps_their_history(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert command(first) == 0
    assert command(second, "--init", str(first), "--steps", "1") == 0
    before, after = load_checkpoint(first), load_checkpoint(second)
    distances = [(a - b).abs().max() for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert 0 < max(distances) < 0.01
    told = json.loads((second / TRAINING).read_text())
    assert told["continues"] == json.loads((first / TRAINING).read_text())
    assert str(tmp_path) not in (second / TRAINING).read_text()


def test_a_run_by_the_clock_ends(tmp_path):
    assert main(["--preset", "tiny", "--minutes", "0.005", "--out", str(tmp_path)]) == 0
    assert load_state(tmp_path)[1]["seconds"] >= 0.3


def test_a_checkpoint_of_another_shape_is_not_continued(tmp_path, capsys):
    assert command(tmp_path / "tiny") == 0
    assert main(["--preset", "cpu", "--init", str(tmp_path / "tiny"), "--out", str(tmp_path / "out")]) == 2
    assert "has the shape of preset 'cpu'" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"preset": "huge"}, {"colour": "red"}], ids=["preset", "option"])
def test_a_run_of_other_code_is_not_resumed(tmp_path, capsys, change):
    assert command(tmp_path) == 0
    run, state = load_state(tmp_path)
    save_state(tmp_path, {**run, **change}, state)
    assert main(["--resume", "--out", str(tmp_path)]) == 2
    assert "Continue from its checkpoint with --init" in capsys.readouterr().err


def test_a_run_that_is_not_there_is_not_resumed(tmp_path, capsys):
    assert main(["--resume", "--out", str(tmp_path)]) == 2
    assert "Start it without --resume" in capsys.readouterr().err
