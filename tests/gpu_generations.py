"""Generations of a toy video transformer on any device, through the front door."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from toy_models import Stack

import sparse_compile

DIM, HEADS = 128, 2
SMALL: dict[str, dict[str, object]] = {
    "svg2": {"method": "svg2", "density": 0.4, "q_clusters": 6, "k_clusters": 20},
    "adaspa": {"method": "adaspa", "sparsity": 0.7, "block_size": 32},
    "dense": {"method": "dense"},
}
"""Options that make a small model sparse."""
EXACT: dict[str, dict[str, object]] = {"svg2": {"density": None, "top_p": 1.0}, "adaspa": {"sparsity": 0.0}}
"""What makes a method keep everything."""

Call = Callable[[Tensor], Tensor]


def compiled(method: str, device: str, dtype: torch.dtype = torch.float32, **options: object) -> tuple[Stack, Call]:
    """Two layers with fixed weights, and their compiled call."""
    model = Stack(2, DIM, HEADS).to(device, dtype)
    given = {"min_tokens": 1, "dense_layers": 0, **SMALL[method], **options}
    return model, torch.compile(model, backend="sparse_attn", options=given, fullgraph=True)


def noise(tokens: int, device: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Where a generation starts."""
    return torch.randn(1, tokens, DIM, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def generate(model: Stack, call: Call, x: Tensor, steps: int, scale: float = 2.0) -> Tensor:
    """All steps of a generation with classifier-free guidance; what it ends with."""
    empty = torch.zeros_like(x)
    empty[..., 0] = 1
    with sparse_compile.denoising(model, steps=steps) as clock:
        for _ in range(steps):
            with clock.branch("cond"):
                cond = call(x).clone()
            with clock.branch("uncond"):
                uncond = call(x + empty).clone()
            change = uncond + scale * (cond - uncond) - x
            x = x - change / steps
            clock.step()
    return x


def assert_repeats_without_recompiling(method: str, device: str, steps: int, tokens: int, **options: object) -> None:
    """Two generations: finite, sparse, the same bits, and nothing compiled in the second."""
    model, call = compiled(method, device, **options)
    start = noise(tokens, device, torch.float32)
    first = generate(model, call, start, steps)
    compilations = sparse_compile.explain(model).compilations
    second = generate(model, call, start, steps)
    report = sparse_compile.explain(model)
    assert torch.isfinite(first).all()
    assert report.density is not None and report.density < 0.8
    assert all(site.decision == "sparse" for site in report.sites)
    assert torch.equal(first, second)
    assert report.compilations == compilations


def assert_keeping_everything_is_dense(method: str, device: str, steps: int, tokens: int, **options: object) -> None:
    """A generation that keeps everything is, to within rounding, the dense one."""
    start = noise(tokens, device, torch.float32)
    exact_model = Stack(2, DIM, HEADS).to(device, torch.float64)
    exact = generate(exact_model, exact_model, start.double(), steps)
    plain = Stack(2, DIM, HEADS).to(device)
    low = generate(plain, plain, start, steps)
    model, call = compiled(method, device, **{**EXACT[method], **options})
    out = generate(model, call, start, steps)
    report = sparse_compile.explain(model)
    assert report.density is not None and report.density > 0.999

    def error(result: Tensor) -> float:
        return float((result.double() - exact).norm() / exact.norm())

    assert error(out) <= 10 * error(low) + 1e-5


def outputs_of_steps(
    method: str, device: str, steps: int, tokens: int, **options: object
) -> tuple[list[Tensor], list[str]]:
    """The outputs of a generation in which each step has an input of its own, and the phases."""
    model, call = compiled(method, device, **options)
    outputs = []
    with sparse_compile.denoising(model, steps=steps) as clock, clock.branch("cond"):
        for step in range(steps):
            torch.compiler.cudagraph_mark_step_begin()
            outputs.append(call(noise(tokens, device, torch.float32, step)).clone())
            clock.step()
    return outputs, [step.phase for step in sparse_compile.explain(model).generations[-1].steps]
