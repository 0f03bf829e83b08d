"""All ops of a call after one another, by the Triton kernels and by the reference."""

from __future__ import annotations

import pytest
import torch
from gpu_sites import Site, recorded_calls, searched_site

slow = pytest.mark.slow
each_phase = pytest.mark.parametrize(
    ("method", "phase"),
    [
        pytest.param("svg2", "search", marks=slow),
        pytest.param("svg2", "sparse"),
        pytest.param("adaspa", "search", marks=slow),
        pytest.param("adaspa", "sparse", marks=slow),
        pytest.param("adaspa", "refine"),
    ],
)


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-30))


@each_phase
def test_a_call_gives_what_the_reference_gives_and_leaves_the_state_it_leaves(
    device: str, method: str, phase: str
) -> None:
    sites: list[Site] = []
    outputs = []
    for kernel in ("triton", "reference"):
        site = searched_site(method, device, "reference")
        site.kernel = kernel
        site.draw(1)
        outputs.append(site.call(method, phase))
        sites.append(site)
    assert torch.isfinite(outputs[0]).all()
    assert relative(*outputs) <= 1e-4
    for ours, expected in zip(sites[0].state(), sites[1].state(), strict=True):
        if expected.is_floating_point():
            assert relative(ours.nan_to_num(), expected.nan_to_num()) <= 1e-4
        else:
            assert torch.equal(ours, expected)


@slow
@pytest.mark.parametrize(("method", "phase"), [("svg2", "sparse"), ("adaspa", "search")])
def test_the_ops_of_a_call_keep_the_promises_of_their_fakes(device: str, method: str, phase: str) -> None:
    for op, arguments in recorded_calls(method, phase, device, "triton"):
        results = torch.library.opcheck(op, arguments, test_utils="test_faketensor")
        assert set(results.values()) == {"SUCCESS"}, (op, results)
