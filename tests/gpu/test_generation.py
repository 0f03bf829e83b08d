"""On a device: whole generations of a toy transformer through torch.compile, with the kernels that auto chooses."""

from __future__ import annotations

import pytest
import torch
from gpu_generations import assert_keeping_everything_is_dense, assert_repeats_without_recompiling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

each_method = pytest.mark.parametrize("method", ["svg2", "adaspa"])


@each_method
@pytest.mark.parametrize("lowering", ["inductor", "eager"])
def test_a_second_generation_repeats_the_first_and_compiles_nothing(method: str, lowering: str) -> None:
    assert_repeats_without_recompiling(method, "cuda", steps=50, tokens=600, lowering=lowering)


@each_method
def test_a_generation_that_keeps_everything_is_the_dense_one(method: str) -> None:
    assert_keeping_everything_is_dense(method, "cuda", steps=50, tokens=600)
