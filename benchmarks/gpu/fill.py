"""How much of what the attention kernel computes is of use."""

from __future__ import annotations

from torch import Tensor

from sparse_compile.plan import Plan


def tile_fill_of(q: Tensor, k: Tensor, v: Tensor, plan: Plan, kernel: str) -> float | None:
    """Useful pairs over computed lanes by this plan, for the tiles that the Triton kernel chooses.

    None for another kernel, and where its parts are not as they are known here.
    """
    if kernel != "triton":
        return None
    try:
        from sparse_compile.kernels.block_sparse_attention import triton_launch as attention
        from sparse_compile.kernels.work_lists.triton_launch import tile_fill, work_lists

        config = attention.choose(q, k, v, plan)
        tiling = config.tiling(ragged=attention._is_ragged(k, plan, config))
        lists = work_lists(plan, q.shape[2], k.shape[2], tiling)
        return float(tile_fill(plan, lists, tiling))
    except (ImportError, AttributeError, TypeError):
        return None


def tiles_of(q: Tensor, k: Tensor, v: Tensor, plan: Plan, kernel: str) -> str | None:
    """The configuration that the Triton kernel chooses, as text; None as above."""
    if kernel != "triton":
        return None
    try:
        from sparse_compile.kernels.block_sparse_attention import triton_launch as attention

        return str(attention.choose(q, k, v, plan))
    except (ImportError, AttributeError, TypeError):
        return None
