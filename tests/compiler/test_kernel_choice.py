"""Which implementation a graph gets, and what is said where it is not the best."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cpp_sources import cache, use_compiler
from toy_models import EAGER, Stack, tokens

import sparse_compile
from sparse_compile.compiler.kernel_choice import KernelChoice, choose_kernel, ready_to_run
from sparse_compile.config import Config
from sparse_compile.errors import SparseAttentionError
from sparse_compile.kernels.cpp import build

__all__ = ["cache", "use_compiler"]

ON_CPU = [torch.empty(1), 3]
ELSEWHERE = [torch.empty(1), torch.empty(1, device="meta")]


class OnCuda(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The inputs of a graph on an sm_90 GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    return [torch.empty(1).as_subclass(OnCuda)]


def test_cpu_tensors_get_the_cpu_kernels_and_a_gpu_triton(gpu: list[torch.Tensor]) -> None:
    assert choose_kernel(Config(), ON_CPU) == KernelChoice("cpu")
    assert choose_kernel(Config(), gpu) == KernelChoice("triton")
    assert choose_kernel(Config(), [*gpu, torch.empty(())]) == KernelChoice("triton")
    assert choose_kernel(Config(kernel="triton"), gpu) == KernelChoice("triton")
    assert choose_kernel(Config(kernel="reference"), gpu) == KernelChoice("reference")


@pytest.fixture
def without_compiler(cache: Path, use_compiler: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has no CPU kernels yet, and no compiler that works."""
    monkeypatch.setattr(build, "failure", functools.cache(build.failure.__wrapped__))
    use_compiler("false")


@pytest.mark.usefixtures("without_compiler")
def test_without_a_compiler_the_cpu_gets_plain_torch_and_the_reason() -> None:
    name, reason = ready_to_run(choose_kernel(Config(), ON_CPU), Config())
    assert name == "reference"
    assert "No working C++ compiler" in reason and "set CXX to a C++20 compiler" in reason
    with pytest.raises(
        SparseAttentionError, match=r"kernel='cpu' cannot run: No working .*; got 'cpu'. Use kernel='au"
    ):
        ready_to_run(KernelChoice("cpu"), Config(kernel="cpu"))
    assert choose_kernel(Config(kernel="reference"), ON_CPU) == KernelChoice("reference")


@pytest.mark.usefixtures("without_compiler")
def test_without_a_compiler_a_model_runs_and_its_report_says_why_it_is_slow() -> None:
    torch.compiler.reset()
    model = Stack()
    with torch.no_grad():
        out = torch.compile(model, backend="sparse_attn", options={**EAGER, "top_p": 1.0})(tokens())
        assert torch.allclose(out, model(tokens()), atol=1e-5)
    sites = sparse_compile.explain(model).sites
    assert len(sites) == 2
    for site in sites:
        assert (site.decision, site.kernel) == ("sparse", "reference")
        assert "plain torch: No working C++ compiler" in site.detail and "set CXX" in site.detail


@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_a_graph_that_needs_no_cpu_kernels_builds_none(
    gpu: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    monkeypatch.setattr(build, "why_not", lambda: pytest.fail("it would build"))
    config = Config(kernel=kernel)
    chosen = choose_kernel(config, ON_CPU if kernel == "reference" else gpu)
    assert ready_to_run(chosen, config) == KernelChoice(kernel)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (torch.nn.Linear(32, 32), {}),
        (Stack(), {"min_tokens": 1000}),
        (Stack(), {"min_tokens": "auto", "q_clusters": 4, "k_clusters": 8}),
        (Stack(), {"method": "dense"}),
    ],
    ids=["no attention", "too short", "no gain", "dense"],
)
def test_a_model_without_a_sparse_site_builds_none(
    monkeypatch: pytest.MonkeyPatch, model: torch.nn.Module, options: dict[str, object]
) -> None:
    monkeypatch.setattr(build, "why_not", lambda: pytest.fail("it would build"))
    torch.compiler.reset()
    config = {"lowering": "eager", "dense_layers": 0, **options}
    with torch.no_grad():
        torch.compile(model, backend="sparse_attn", options=config)(tokens())


def test_a_kernel_of_another_device_is_refused_where_nothing_is_sparse_too() -> None:
    torch.compiler.reset()
    compiled = torch.compile(Stack(), backend="sparse_attn", options={**EAGER, "min_tokens": 1000, "kernel": "triton"})
    with torch.no_grad(), pytest.raises(Exception, match="kernel='triton' needs tensors on a CUDA device"):
        compiled(tokens())


def test_an_old_gpu_gets_plain_torch_and_the_reason(gpu: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    reason = "some GPU is sm_75, and kernels need sm_80 or newer"
    assert choose_kernel(Config(), gpu) == KernelChoice("reference", reason)
    with pytest.raises(SparseAttentionError, match=f"{reason}; got 'cuda'. Use kernel='auto'"):
        choose_kernel(Config(kernel="triton"), gpu)


@pytest.mark.parametrize(("version", "reason"), [("3.5.1", "triton 3.5.1 is older than 3.6"), ("3.6.0", "")])
def test_an_old_triton_gets_plain_torch_and_the_reason(
    gpu: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch, version: str, reason: str
) -> None:
    monkeypatch.setattr("triton.__version__", version)
    assert choose_kernel(Config(), gpu).reason == reason


def test_without_triton_it_is_plain_torch(gpu: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert choose_kernel(Config(), gpu) == KernelChoice("reference", "triton is not installed")


def test_rocm_and_other_devices_get_plain_torch(gpu: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "and this is meta" in choose_kernel(Config(), ELSEWHERE).reason
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "and this is ROCm" in choose_kernel(Config(), gpu).reason


def test_a_kernel_of_another_device_is_refused() -> None:
    with pytest.raises(SparseAttentionError, match="needs tensors on the CPU; got 'cpu, meta'"):
        choose_kernel(Config(kernel="cpu"), ELSEWHERE)
    with pytest.raises(SparseAttentionError, match="needs tensors on a CUDA device; got 'cpu'"):
        choose_kernel(Config(kernel="triton"), ON_CPU)
