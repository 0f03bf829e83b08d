"""Which implementation of the ops a graph calls: the best for the device of its tensors, or the reason why not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from sparse_compile.config import Config
from sparse_compile.errors import SparseAttentionError
from sparse_compile.kernels.cpp import build

OLDEST_TRITON = (3, 6)
"""What torch 2.11, the oldest that is supported, comes with."""
OLDEST_CAPABILITY = (8, 0)
"""Asynchronous copies and bfloat16 begin here."""


class KernelChoice(NamedTuple):
    """The last argument of every op of a graph.

    name: ``triton``, ``cpu`` or ``reference``.
    reason: why it is plain torch on a device that could have kernels; empty otherwise.
    """

    name: str
    reason: str = ""


def choose_kernel(config: Config, inputs: Iterable[Any]) -> KernelChoice:
    """The implementation for the device of a graph's tensors: asked for, or the best there is. Builds nothing.

    Args:
        config: the options.
        inputs: the example inputs of the graph.

    Raises:
        SparseAttentionError: ``kernel`` names one that does not run on these tensors.
    """
    devices = {value.device for value in inputs if isinstance(value, torch.Tensor)}
    types = ", ".join(sorted({device.type for device in devices}))
    on_cpu = all(device.type == "cpu" for device in devices)
    if config.kernel == "cpu" and not on_cpu:
        raise SparseAttentionError("kernel='cpu' needs tensors on the CPU", types, "Use kernel='auto'.")
    if config.kernel == "triton" and on_cpu:
        raise SparseAttentionError("kernel='triton' needs tensors on a CUDA device", types, "Use kernel='auto'.")
    if config.kernel == "reference":
        return KernelChoice("reference")
    if on_cpu:
        return KernelChoice("cpu")
    reason = next((why for device in devices if (why := why_not_triton(device))), "")
    return _or_plain_torch("triton", reason, types, config)


def ready_to_run(choice: KernelChoice, config: Config) -> KernelChoice:
    """A choice that a graph may call: where it is the CPU kernels, they are built by now, or it is plain torch.

    The first time on a machine this takes half a minute, so it is for graphs that have a sparse site.

    Raises:
        SparseAttentionError: ``kernel`` asks for the CPU kernels, and they cannot be built.
    """
    return _or_plain_torch("cpu", build.why_not(), "cpu", config) if choice.name == "cpu" else choice


def _or_plain_torch(name: str, reason: str, devices: str, config: Config) -> KernelChoice:
    """An implementation, or plain torch where there is a reason why not; an error where it was asked for by name."""
    if reason and config.kernel == name:
        raise SparseAttentionError(f"kernel={name!r} cannot run: {reason}", devices, "Use kernel='auto'.")
    return KernelChoice("reference", reason) if reason else KernelChoice(name)


def why_not_triton(device: torch.device) -> str:
    """Why the Triton kernels cannot run on a device; empty if they can."""
    if device.type == "cpu":
        return ""  # a number or an offset among tensors on a GPU
    if device.type != "cuda" or torch.version.hip is not None:
        name = "ROCm" if torch.version.hip is not None else device.type
        return f"there are Triton kernels for NVIDIA GPUs alone, and this is {name}"
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    if not torch.cuda.is_available():
        return "there is no CUDA device here"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return "{} is sm_{}{}, and kernels need sm_{}{} or newer".format(
            torch.cuda.get_device_name(device), *capability, *OLDEST_CAPABILITY
        )
    return ""
