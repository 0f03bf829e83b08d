"""Record q, k and v of every self-attention of the demo model, as the dense model computes them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanPipeline
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparse_compile.evaluation.demo_model import Scene, VideoSize, generate

BRANCHES = ("cond", "uncond")
"""The model calls of a step, in the order in which `WanPipeline` makes them."""


@dataclass(frozen=True)
class TappedAttention:
    """One self-attention of one model call. Shapes: q, k [B, H, S, D], v [B, H, S, Dv]."""

    layer: str
    """Dotted, as the report names it: ``blocks.0.attn1``."""
    step: int
    branch: str
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float


def tap(
    pipeline: WanPipeline,
    scene: Scene,
    size: VideoSize,
    *,
    steps: int,
    seed: int,
    at: Collection[int],
    on_step: Callable[[int], None] | None = None,
) -> list[TappedAttention]:
    """Generate one video eagerly and densely, and keep what its self-attentions were given.

    Args:
        pipeline: from `load_pipeline`, not compiled.
        scene: the prompt.
        size: frames, height and width.
        steps: denoising steps.
        seed: of the starting noise.
        at: the steps to record; nothing is generated behind the last of them.
        on_step: called with the number of each step that is done.
    """
    recorder = _Recorder(frozenset(at))

    def step_done(step: int) -> None:
        recorder.step, recorder.model_calls = step + 1, 0
        if on_step is not None:
            on_step(step)
        pipeline._interrupt = step >= max(at)  # diffusers' own way to end a run early

    with _named_modules(pipeline.transformer, recorder), recorder:
        generate(pipeline, [scene], size, steps=steps, seed=seed, on_step=step_done)
    return recorder.tapped


@dataclass
class _Recorder(TorchFunctionMode):
    """Copies the operands of each self-attention of the chosen steps on their way to torch."""

    at: frozenset[int]
    step: int = 0
    model_calls: int = 0
    """Calls of the model that began in this step."""
    within: list[str] = field(default_factory=list)
    """The attention modules that are running, outermost first."""
    tapped: list[TappedAttention] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is F.scaled_dot_product_attention and self.step in self.at and self.within:
            self._record(*args, **given)
        return func(*args, **given)

    def _record(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        if query.shape[:3] != key.shape[:3] or attn_mask is not None or is_causal:
            return  # cross-attention, or nothing that the demo model has
        q, k, v = (x.detach().clone() for x in (query, key, value))
        branch = BRANCHES[self.model_calls - 1]
        used_scale = query.shape[-1] ** -0.5 if scale is None else scale
        self.tapped.append(TappedAttention(self.within[-1], self.step, branch, q, k, v, used_scale))


@contextmanager
def _named_modules(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Tell the recorder which attention module runs, and when a call of the model begins."""

    def began(*_: object) -> None:
        recorder.model_calls += 1

    with ExitStack() as hooks:
        hooks.enter_context(_removed(model.register_forward_pre_hook(began)))
        for name, module in model.named_modules():
            if hasattr(module, "to_q"):

                def enter(*_: object, name: str = name) -> None:
                    recorder.within.append(name)

                def leave(*_: object) -> None:
                    recorder.within.pop()

                hooks.enter_context(_removed(module.register_forward_pre_hook(enter)))
                hooks.enter_context(_removed(module.register_forward_hook(leave)))
        yield


@contextmanager
def _removed(hook: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        hook.remove()
