"""The optimiser of the hidden matrices."""

import pytest
import torch

from training.muon import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (32, 32)], ids=str)
def test_singular_values_come_close_to_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(matrix))
    assert values.shape == (min(shape),)
    assert values.min() > 0.4
    assert values.max() < 1.3


@pytest.mark.parametrize("shape", [(48, 16), (16, 48)], ids=str)
def test_it_is_the_optimiser_of_torch_up_to_bfloat16(shape):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = Muon([ours], lr=0.02), torch.optim.Muon([theirs], lr=0.02, weight_decay=0.01)
    for _ in range(4):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    distance = (ours - theirs).norm() / (ours - start).norm()
    assert distance < 0.03


def test_a_parameter_without_gradient_stays():
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    Muon([parameter], lr=0.1).step()
    assert torch.equal(parameter, torch.ones(2, 2))
