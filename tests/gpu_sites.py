"""One attention site with padding and the state of both methods, on any device: what the tests for a GPU call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_compile.ops  # noqa: F401 - registers the ops
from sparse_compile.call_log import log_spec

OPS = torch.ops.sparse_compile
TOKENS, VIDEO, VALID, SIZE, SCALE = 300, [0, 280], 290, 64, 0.125
PHASES = {"svg2": ("search", "sparse"), "adaspa": ("search", "sparse", "refine")}


class Site:
    """q, k and v of joint tokens with padding, and the state of both methods."""

    def __init__(self, device: str, kernel: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.device, self.kernel = device, kernel
        shape = (1, TOKENS, 2, SIZE)
        self.q, self.k, self.v = (torch.empty(shape, device=device, dtype=dtype).transpose(1, 2) for _ in range(3))
        self.draw(seed)
        self.valid = torch.arange(TOKENS, device=device)[None] < VALID
        self.centroids = [torch.zeros(1, 2, count, SIZE, device=device, dtype=dtype) for count in (8, 24)]
        self.ready = torch.zeros(1, dtype=torch.int32, device=device)
        self.keep = torch.zeros(1, 2, 21, 1, dtype=torch.int32, device=device)
        self.lse, self.offset = torch.zeros(1, 2, TOKENS, device=device), torch.zeros(1, 2, device=device)
        self.planned = torch.zeros(1, 2, device=device)
        spec = log_spec(torch.device(device), 2)
        self.log = torch.zeros(spec.shape, dtype=spec.dtype, device=device)

    def draw(self, seed: int) -> None:
        """Other values in the same q, k and v."""
        generator = torch.Generator().manual_seed(seed)
        for x in (self.q, self.k, self.v):
            x.copy_(torch.randn(x.shape, generator=generator))

    def state(self) -> list[Tensor]:
        """Every tensor that calls leave something in."""
        return [*self.centroids, self.ready, self.keep, self.lse, self.offset, self.planned, self.log]

    def snapshot(self) -> list[Tensor]:
        """Copies of the state."""
        return [tensor.clone() for tensor in self.state()]

    def restore(self, snapshot: list[Tensor]) -> None:
        """The state as it was."""
        for tensor, saved in zip(self.state(), snapshot, strict=True):
            tensor.copy_(saved)

    def call(self, method: str, phase: str) -> Tensor:
        """The ops of one call of a layer; the output of its attention."""
        return self.svg2(phase == "search") if method == "svg2" else self.adaspa(phase)

    def attend(self, plan: tuple[Tensor, ...], paired: bool, recall: Tensor | None = None) -> Tensor:
        """Pooled keys, probe rows, attention."""
        mass = OPS.kept_mass(self.q, self.k, self.valid, VIDEO, *plan, SCALE, 64, 0, self.kernel)
        if paired:
            mass = OPS.paired_kept_mass(mass, recall, self.offset, self.planned, self.kernel)
        pooled = OPS.pooled_keys(self.k, self.v, plan[2], plan[3], VIDEO, True, self.kernel)
        operands = (self.q, self.k, self.v)
        out: Tensor = OPS.block_sparse_attention(
            *operands, *plan, *pooled, mass, None, None, None, self.log, SCALE, True, self.kernel
        )[0]
        return out

    def svg2(self, restart: bool) -> Tensor:
        """The ops of SVG2's search or sparse call."""
        masks = (self.valid, self.valid)
        settings = (restart, 2, 0, self.kernel)
        clusters = OPS.kmeans(self.q, self.k, *masks, VIDEO, VIDEO, *self.centroids, self.ready, *settings)
        q_order, q_offsets, q_means, k_order, k_offsets, k_means, _ = clusters
        settings = (SCALE, 0.9, 0.1, None, "mass", True, 0, self.kernel)
        keep = OPS.plan_top_p(q_means, k_means, q_offsets, k_offsets, self.ready, *settings)
        return self.attend((q_order, q_offsets, k_order, k_offsets, keep), paired=False)

    def adaspa(self, phase: str) -> Tensor:
        """The ops of AdaSpa's search, refining or sparse call."""
        q_order, q_offsets, q_video, k_order, k_offsets, k_video = OPS.token_blocks(
            self.q, self.k, self.valid, self.valid, VIDEO, VIDEO, 16, 16, self.kernel
        )
        groups = (q_order, q_offsets, k_order, k_offsets)
        sides = (q_offsets, q_video, k_offsets, k_video)
        if phase == "sparse":
            kept = OPS.kept_blocks(self.keep, self.ready, *sides, True, self.kernel)
            return self.attend((*groups, kept), paired=True)
        if phase == "search":
            out: Tensor = OPS.attention_with_lse(
                self.q, self.k, self.v, self.valid, self.valid, self.lse, True, SCALE, True, self.kernel
            )
        fresh = phase == "search"
        mass, _ = OPS.block_mass(self.q, self.k, self.lse, self.ready, *groups, 16, SCALE, 1, fresh, self.kernel)
        settings = (0.75, "paper", "mass", True, 0, self.kernel)
        recall, _ = OPS.plan_top_k(mass, *sides, self.keep, self.ready, *settings)
        return out if fresh else self.attend((*groups, self.keep), paired=True, recall=recall)


def searched_site(method: str, device: str, kernel: str, dtype: torch.dtype = torch.float32) -> Site:
    """A site whose first search is behind it."""
    site = Site(device, kernel, dtype)
    site.call(method, "search")
    return site


def assert_same_call(site: Site, first: Callable[[], Tensor], second: Callable[[], Tensor]) -> Tensor:
    """Fail unless both ways to call give the same bits, as output and in the state; the output.

    Args:
        site: whose state both find as it is now.
        first: gives the output.
        second: gives it in another way.
    """
    before = site.snapshot()
    out, state = first().clone(), site.snapshot()
    site.restore(before)
    other = second()
    assert torch.isfinite(out).all()
    assert torch.equal(out, other)
    for one, two in zip(state, site.state(), strict=True):
        assert torch.equal(one.nan_to_num(), two.nan_to_num())
    return out


class _Recorder(TorchDispatchMode):
    """Keeps the arguments of every op of the package, as they were before the call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "sparse_compile":
            self.calls.append((func, tuple(x.clone() if isinstance(x, Tensor) else x for x in args)))
        return func(*args, **(kwargs or {}))


def recorded_calls(method: str, phase: str, device: str, kernel: str) -> list[tuple[Any, tuple[Any, ...]]]:
    """Each op that a call of a layer makes, with arguments to call it by."""
    site = searched_site(method, device, kernel)
    with _Recorder() as recorder:
        site.call(method, phase)
    return recorder.calls
