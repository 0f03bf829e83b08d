"""On a device: a planned call is captured in a CUDA graph and replayed with other inputs."""

from __future__ import annotations

import pytest
import torch
from gpu_generations import outputs_of_steps
from gpu_sites import assert_same_call, searched_site
from torch._dynamo.utils import counters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "phase"), [("svg2", "sparse"), ("adaspa", "sparse"), ("adaspa", "refine")])
def test_a_captured_call_replays_with_other_inputs_as_it_runs_eagerly(
    method: str, phase: str, dtype: torch.dtype
) -> None:
    site = searched_site(method, "cuda", "triton", dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        site.call(method, phase)  # compiles kernels and sets up libraries
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = site.call(method, phase)

    def replay() -> torch.Tensor:
        graph.replay()
        return captured

    outputs = []
    for seed in (1, 2):
        site.draw(seed)
        outputs.append(assert_same_call(site, replay, lambda: site.call(method, phase)))
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("method", ["svg2", "adaspa"])
def test_reduce_overhead_gives_the_eager_result(method: str) -> None:
    """Of the four sparse steps, Inductor warms up in the first, records in the second and replays in the others."""
    options = {"dense_steps": 1, "device": "cuda", "steps": 6, "tokens": 600}
    counters["inductor"].clear()
    captured, phases = outputs_of_steps(method, compile_mode="reduce-overhead", **options)
    assert counters["inductor"]["cudagraph_skips"] == 0
    torch.compiler.reset()
    eager, eager_phases = outputs_of_steps(method, lowering="eager", **options)
    assert phases == eager_phases and phases.count("sparse") >= 3
    for one, other in zip(captured, eager, strict=True):
        assert torch.isfinite(one).all()
        assert (one - other).norm() <= 1e-3 * other.norm()
