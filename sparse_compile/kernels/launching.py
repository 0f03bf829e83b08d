"""How Triton kernels are launched: on the device of their tensors, in the interpreter, or compiled and not run.

`compiled_ahead` makes every launch inside of it a compilation for a GPU that need not be there. The host functions
around the kernels then run unchanged on tensors without memory, so that what is compiled is what would be launched.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

KIB = 1024


class Device(NamedTuple):
    """What a launch has to know of a GPU.

    architecture: compute capability as one number, 90 for sm_90.
    multiprocessors: their number.
    shared_memory: bytes that one block may use.
    """

    architecture: int
    multiprocessors: int
    shared_memory: int


ARCHITECTURES = {
    80: Device(80, 108, 163 * KIB),
    89: Device(89, 128, 99 * KIB),
    90: Device(90, 132, 227 * KIB),
    100: Device(100, 148, 227 * KIB),
    120: Device(120, 188, 99 * KIB),
}
"""The GPUs that kernels are shipped for: A100, RTX 4090, H100, B200, RTX PRO 6000 Blackwell."""
INTERPRETER = Device(80, 2, 163 * KIB)
"""What the Triton interpreter stands for. Two programs, so that a persistent kernel has to come around."""


@dataclass(frozen=True)
class Compilation:
    """One kernel compiled for one GPU: its name, its constants, and Triton's compiled kernel."""

    name: str
    constants: Mapping[str, object]
    compiled: Any


@dataclass
class _Ahead:
    device: Device
    compilations: list[Compilation] = field(default_factory=list)


_AHEAD: ContextVar[_Ahead | None] = ContextVar("compiled_ahead", default=None)


def device_of(x: Tensor) -> Device:
    """The GPU that kernels on ``x`` run on; for a CPU tensor, the interpreter."""
    ahead = _AHEAD.get()
    if ahead is not None:
        return ahead.device
    return INTERPRETER if x.device.type == "cpu" else _cuda_device(x.device.index)


def is_compiling_ahead() -> bool:
    """Whether launches compile and run nothing."""
    return _AHEAD.get() is not None


def is_aligned(x: Tensor) -> bool:
    """Whether memory begins at a multiple of 16 bytes, as wide loads and TMA want it."""
    return is_compiling_ahead() or x.data_ptr() % 16 == 0


def architecture_family(architecture: int) -> int:
    """The newest architecture of `ARCHITECTURES` that is no newer than this one: 86 is tuned as 80, 103 as 100."""
    return max((known for known in ARCHITECTURES if known <= architecture), default=min(ARCHITECTURES))


def lanes(size: int, least: int = 16) -> int:
    """The least power of two that holds ``size`` elements, and no less than ``least``: the side of a tile."""
    return max(least, 1 << max(0, size - 1).bit_length())


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: object, warps: int, stages: int, **constants: object
) -> None:
    """Launch a kernel on the device of its first tensor. A grid without programs launches nothing.

    Args:
        kernel: a function under ``triton.jit``.
        grid: number of programs along each axis.
        arguments: tensors, tensor descriptors and numbers, in the kernel's order; the first one is a tensor.
        warps: warps of a program.
        stages: loads in flight in a pipelined loop.
        constants: the kernel's ``tl.constexpr`` arguments, by name.
    """
    ahead = _AHEAD.get()
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    if ahead is not None:
        compiled = kernel.warmup(*(_stand_in(x) for x in arguments), grid=grid, **constants, **options)
        ahead.compilations.append(Compilation(kernel.__name__, {**constants, **options}, compiled))
        return
    if not all(grid):
        return
    first = arguments[0]
    assert isinstance(first, Tensor), "the first argument of a launch is a tensor"
    on_device = first.device.type == "cuda" and first.device.index != torch.cuda.current_device()
    with torch.cuda.device(first.device) if on_device else contextlib.nullcontext():
        kernel[grid](*arguments, **constants, **options)


@contextlib.contextmanager
def compiled_ahead(architecture: int) -> Iterator[list[Compilation]]:
    """Compile for one of `ARCHITECTURES` whatever is launched inside, and run nothing. Needs no GPU and no driver.

    For tensors without memory, on the device ``meta``. Yields the list that the compilations are added to.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    ahead = _Ahead(ARCHITECTURES[architecture])
    token = _AHEAD.set(ahead)
    driver.set_active(_AbsentDriver(GPUTarget("cuda", architecture, 32), architecture))
    try:
        yield ahead.compilations
    finally:
        _AHEAD.reset(token)
        with contextlib.suppress(RuntimeError):  # without a GPU there is no other driver
            driver.reset_active()


class _AbsentDriver:
    """What Triton asks of a GPU's driver in order to compile. Each architecture is a device of its own number."""

    def __init__(self, target: Any, number: int) -> None:
        self.target, self.number = target, number

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def _stand_in(argument: object) -> object:
    """What Triton takes for a tensor that has no memory: aligned to 16 bytes, as memory from torch is."""
    from triton.runtime.jit import MockTensor

    return MockTensor(argument.dtype, list(argument.shape)) if isinstance(argument, Tensor) else argument


@functools.cache
def _cuda_device(index: int) -> Device:
    from triton.runtime import driver

    properties = driver.active.utils.get_device_properties(index)
    major, minor = torch.cuda.get_device_capability(index)
    return Device(major * 10 + minor, properties["multiprocessor_count"], properties["max_shared_mem"])
