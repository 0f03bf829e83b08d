"""The average of the weights."""

import pytest
import torch

from training.moving_average import LONGEST_DECAY, MovingAverage


def model_of(value):
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(value)
    return model


def set_to(model, value):
    with torch.no_grad():
        model.weight.fill_(value)


def test_the_average_is_that_of_the_formula():
    model = model_of(2.0)
    average = MovingAverage(model)
    expected = 2.0
    for step, value in enumerate((5.0, -1.0, 4.0)):
        set_to(model, value)
        average.update(model, step)
        decay = (1 + step) / (10 + step)
        expected = decay * expected + (1 - decay) * value
    assert average.values["weight"].item() == pytest.approx(expected, rel=1e-6)


def test_late_in_a_run_the_average_moves_slowly():
    model = model_of(0.0)
    average = MovingAverage(model)
    set_to(model, 1.0)
    average.update(model, 1_000_000)
    assert average.values["weight"].item() == pytest.approx(1 - LONGEST_DECAY, rel=1e-4)


def test_the_average_is_a_copy():
    model = model_of(1.0)
    average = MovingAverage(model)
    set_to(model, 3.0)
    assert average.values["weight"].item() == 1.0


def test_it_goes_on_from_saved_values():
    average = MovingAverage(model_of(1.0))
    average.load({"weight": torch.full((1, 1), 7.0)})
    assert average.values["weight"].item() == 7.0
