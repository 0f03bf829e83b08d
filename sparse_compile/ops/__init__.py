"""The ops that a rewritten graph calls: schemas, fakes, and dispatch to the kernels by device.

Opaque to Inductor (`Library.define/impl`), so that one body serves every device and nothing is decomposed. What an op
writes is marked in its schema; everything it returns is fresh. Tensors may have any strides. The last argument names
the implementation: ``triton`` (CUDA tensors; CPU tensors under Triton's interpreter), ``cpu`` or ``reference`` (plain
torch, any device). No op reads a device value on the host, but for the CPU implementation: there host and device are
one.

Notation: B batch, H query heads, Hkv key/value heads, S tokens, D head size, Gq and Gk groups of queries and keys, the
last of which is padding (`sparse_compile.plan.Plan`).

| module | ops |
| --- | --- |
| clusters | kmeans, plan_top_p |
| blocks | token_blocks, block_mass, plan_top_k, kept_blocks |
| recall | plan_estimated_recall, plan_measured_recall, calibrate_recall, keep_weak_heads_whole |
| attention | attention_with_lse, pooled_keys, kept_mass, paired_kept_mass, block_sparse_attention |
"""

from __future__ import annotations

from sparse_compile.ops import attention, blocks, clusters, recall
from sparse_compile.ops.library import KERNELS

__all__ = ["KERNELS", "attention", "blocks", "clusters", "recall"]
