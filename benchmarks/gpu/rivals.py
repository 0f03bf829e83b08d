"""What block-sparse attention is compared with: every dense kernel that runs, and FlexAttention at equal density."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.timing import Call

SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FLASH_3 = "flash_attention_3"
FLEX_BLOCK = 128


def dense_rivals(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[dict[str, Call], dict[str, str]]:
    """The dense kernels that run on these operands, and for the others why they do not.

    Args:
        q: [B, H, S, D].
        k: the same.
        v: the same.
        scale: of the softmax.
    """
    candidates = {name: _sdpa(backend, q, k, v, scale) for name, backend in SDPA_BACKENDS.items()}
    if q.device.type == "cuda" and importlib.util.find_spec("flash_attn_interface") is not None:
        candidates[FLASH_3] = functools.partial(_flash_3, q, k, v, scale)
    running, refused = {}, {}
    for name, run in candidates.items():
        try:
            run()
        except (RuntimeError, ImportError) as error:
            refused[name] = str(error).strip().splitlines()[0][:200]
        else:
            running[name] = Call(run)
    return running, refused


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, scale=scale)

    return run


def _flash_3(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Any:
    """FlashAttention 3, where its package is installed; it takes [B, S, H, D]."""
    from flash_attn_interface import flash_attn_func

    return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale)


@functools.cache
def _flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_rival(q: Tensor, k: Tensor, v: Tensor, scale: float, density: float, seed: int = 0) -> Call:
    """FlexAttention, compiled, over random blocks of 128 x 128: in each row the share ``density`` of them.

    Args:
        q: [1, H, S, D].
        k: the same.
        v: the same.
        scale: of the softmax.
        density: share of the blocks, rounded to whole ones.
        seed: of the choice.
    """
    mask = flex_mask(q.shape[1], q.shape[2], density, q.device, seed)
    attend = _flex()
    return Call(lambda: attend(q, k, v, block_mask=mask, scale=scale))


def flex_mask(heads: int, tokens: int, density: float, device: torch.device, seed: int = 0) -> Any:
    """The block mask of `flex_rival`.

    Every kept block is a full one, which costs FlexAttention least. The last column, which may be shorter, is kept in
    each row, so that all rows are equally long.
    """
    from torch.nn.attention.flex_attention import BlockMask

    blocks = -(-tokens // FLEX_BLOCK)
    count = min(blocks, max(1, round(density * blocks)))
    generator = torch.Generator(device).manual_seed(seed)
    draw = torch.rand(1, heads, blocks, blocks, generator=generator, device=device)
    draw[..., -1] = -1
    ranked = draw.argsort(-1)
    listed = torch.where(torch.arange(blocks, device=device) < count, ranked, blocks).sort(-1).values
    indices = listed.clamp(max=blocks - 1).int()
    none = torch.zeros(1, heads, blocks, dtype=torch.int32, device=device)
    known = inspect.signature(BlockMask.from_kv_blocks).parameters
    sizes = {"seq_lengths": (tokens, tokens)} if "seq_lengths" in known else {}
    backward = {"compute_q_blocks": False} if "compute_q_blocks" in known else {}
    return BlockMask.from_kv_blocks(
        none, torch.zeros_like(indices), none + count, indices, BLOCK_SIZE=FLEX_BLOCK, **sizes, **backward
    )
