"""How much of what the attention kernel computes is of use."""

from __future__ import annotations

from torch import Tensor

from sparse_compile.plan import Plan


def tile_fill_of(q: Tensor, k: Tensor, v: Tensor, plan: Plan, kernel: str) -> float | None:
    """Useful pairs over computed lanes by this plan, for the tiles that the Triton kernel chooses; None for another."""
    if kernel != "triton":
        return None
    from sparse_compile.kernels.block_sparse_attention.triton_launch import configured
    from sparse_compile.kernels.work_lists.triton_launch import tile_fill, work_lists

    tiling = configured(q, k, v, plan).tiling
    return float(tile_fill(plan, work_lists(plan, q.shape[2], k.shape[2], tiling), tiling))


def tiles_of(q: Tensor, k: Tensor, v: Tensor, plan: Plan, kernel: str) -> str | None:
    """The configuration that the Triton kernel chooses, as text; None for another kernel."""
    if kernel != "triton":
        return None
    from sparse_compile.kernels.block_sparse_attention.triton_launch import configured

    found = configured(q, k, v, plan)
    return str(found.config) if found.short is None else f"{found.config} and {found.short}"
