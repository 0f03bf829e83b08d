"""Which implementation a graph gets, and what is said where it is not the best."""

from __future__ import annotations

import sys

import pytest
import torch

from sparse_compile.compiler.kernel_choice import KernelChoice, choose_kernel
from sparse_compile.config import Config
from sparse_compile.errors import SparseAttentionError

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
