"""Attention over the kept key groups for CPU tensors: the C++ kernel `cpu.cpp` (docs/cpu.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.kernels.block_sparse_attention import reference
from sparse_compile.kernels.cpp.build import library
from sparse_compile.kernels.cpp.operands import dense_rows
from sparse_compile.kernels.token_blocks.valid_first import dense_plan
from sparse_compile.plan import Plan, PooledKeys


def attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, pooled: PooledKeys | None, scale: float, out: Tensor
) -> Tensor:
    """Write softmax(scale q k^T) v over kept keys and pooled keys into ``out``; see `reference.attention`.

    Source: SVG2 (arXiv 2505.18875), SVG-EAR (arXiv 2603.08982) and docs/correction.md; the online softmax is that of
        FlashAttention-2 (arXiv 2307.08691).
    Shapes: q [B, H, Sq, D]; k [B, Hkv, Sk, D]; v [B, Hkv, Sk, Dv]; out [B, H, Sq, Dv], dense in its last dimension, any
        other strides; pooled: Hkv heads.
    Dtypes: float32, float16 or bfloat16, summed in float32. With AVX512-BF16 or AMX the weights of bfloat16 inputs, and
        pooled arrays, are rounded to bfloat16. float64 is for tests, and goes through the reference.
    Returns: natural log-sum-exp over kept and pooled keys, float32 [B, H, Sq]; a row without any gives 0 and -inf.

    Raises:
        RuntimeError: the plan does not fit the tensors, or these differ in dtype.

    A tile of queries is one thread's work from end to end, so that no result depends on the number of threads.
    """
    if q.dtype is torch.float64:
        return reference.attention(q, k, v, plan, pooled, scale, out)
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    if not lse.numel():
        return lse
    arrays: tuple[Tensor | None, ...] = (None, None, None, None)
    if pooled is not None:
        means = (pooled.mean_k, pooled.mean_v, pooled.log_size)
        coupling = None if pooled.coupling is None else pooled.coupling.contiguous()
        arrays = (*(x.contiguous() for x in means), coupling)
    library().attention(
        *(dense_rows(x) for x in (q, k, v)),
        *(None if x is None else x.contiguous() for x in (plan.q_order, plan.q_offsets, plan.k_order, plan.k_offsets)),
        plan.keep.contiguous(),
        *arrays,
        scale,
        out,
        lse,
    )
    return lse


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_valid: Tensor | None,
    k_valid: Tensor | None,
    padded_queries_attend: bool,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Dense attention that keeps its log-sum-exp, as `block_mass.reference.attention_with_lse`.

    But for a valid value that is infinite: here it gives NaN in its channel, as in sparse attention.

    Source: the first search of AdaSpa (arXiv 2502.21079).
    Shapes: q_valid bool [B or 1, Sq] and k_valid bool [B or 1, Sk], or None; lse float32 [B, H, Sq], written; the
        others as `attention`.
    """
    plan = dense_plan(q, k, q_valid, k_valid, padded_queries_attend)
    lse.copy_(attention(q, k, v, plan, None, scale, out))
