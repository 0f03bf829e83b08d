"""Is a result right? Asked before it is timed, against float64, on a few rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_compile.plan import Groups, Plan, PooledKeys, unpack_bits

HEADS, ROWS = 3, 8
OUTPUT_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
"""Root mean square of the error over that of the exact rows: twice the budget of docs/adaspa.md, section 12."""
LSE_TOLERANCE = {torch.bfloat16: 2e-3, torch.float16: 2e-3, torch.float32: 1e-4}
"""In nats."""


def wrong_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    pooled: PooledKeys | None = None,
    seed: int = 0,
) -> str | None:
    """What is wrong with an attention, or None: random rows of random heads against float64 over exactly the kept keys.

    Args:
        q: [1, H, S, D].
        k: the same.
        v: the same.
        plan: which keys a row attends to; None: all.
        scale: of the softmax.
        out: the result, [1, H, S, D].
        lse: its log-sum-exp, [1, H, S].
        pooled: what stands for skipped groups, or None.
        seed: of the choice of heads and rows.
    """
    generator = torch.Generator().manual_seed(seed)
    heads = torch.randperm(q.shape[1], generator=generator)[:HEADS].tolist()
    errors, sizes, lse_error = [], [], 0.0
    for head in heads:
        rows = torch.randint(q.shape[2], (ROWS,), generator=generator).to(q.device)
        exact, exact_lse = exact_rows(q, k, v, plan, scale, head, rows, pooled)
        errors.append(out[0, head, rows].double() - exact)
        sizes.append(exact)
        lse_error = max(lse_error, float((lse[0, head, rows].double() - exact_lse).abs().max()))
    error = float(torch.cat(errors).square().mean().sqrt() / torch.cat(sizes).square().mean().sqrt())
    if not error <= OUTPUT_TOLERANCE[q.dtype]:  # NaN is wrong too
        return f"output: relative error {error:.2e} of heads {heads}"
    if not lse_error <= LSE_TOLERANCE[q.dtype]:
        return f"log-sum-exp: error {lse_error:.2e} of heads {heads}"
    return None


def exact_rows(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan | None, scale: float, head: int, rows: Tensor, pooled: PooledKeys | None
) -> tuple[Tensor, Tensor]:
    """Rows [n, D] of one head in float64, and their natural log-sum-exp [n] (docs/svg2.md, 9; docs/correction.md)."""
    key, value = k[0, head].double(), v[0, head].double()
    query = q[0, head].index_select(0, rows).double()
    logits = query @ key.t() * scale
    if plan is None:
        return logits.softmax(-1) @ value, logits.logsumexp(-1)
    kept = unpack_bits(plan.keep[0, head], plan.key_groups)  # [Gq, Gk]
    kept = kept.index_select(0, group_of_token(plan.query_side, head, q.shape[2]).index_select(0, rows))
    allowed = kept.index_select(1, group_of_token(plan.key_side, head, k.shape[2]))
    logits = logits.masked_fill(~allowed, -math.inf)
    if pooled is None:
        lse = logits.logsumexp(-1)
        return (logits - lse[:, None]).exp() @ value, lse
    skipped = ~kept & (plan.k_offsets[0, head].diff() > 0)
    skipped[:, -1] = False
    stand_ins = query @ pooled.mean_k[0, head].double().t() * scale + pooled.log_size[0, head].double()
    stand_ins = stand_ins.masked_fill(~skipped, -math.inf)
    lse = torch.cat([logits, stand_ins], -1).logsumexp(-1)
    share = (stand_ins - lse[:, None]).exp()
    result = (logits - lse[:, None]).exp() @ value + share @ pooled.mean_v[0, head].double()
    if pooled.coupling is not None:
        result += share.sum(-1, keepdim=True) * (scale * (query @ pooled.coupling[0, head].double()))
    return result, lse


def group_of_token(side: Groups, head: int, tokens: int) -> Tensor:
    """The group of each token of one head, int64 [S]."""
    positions = torch.arange(tokens, device=side.offsets.device, dtype=torch.int32)
    groups = torch.searchsorted(side.offsets[0, head, 1:].contiguous(), positions, right=True)
    if side.order is None:
        return groups
    return torch.empty_like(groups).scatter_(0, side.order[0, head].long(), groups)


def wrong_groups(side: Groups, tokens: int) -> str | None:
    """What is wrong with one side of a plan, or None: its order must hold every token once, its bounds all of them."""
    ends = side.offsets[..., -1]
    if not bool((ends == tokens).all()) or not bool((side.offsets.diff() >= 0).all()):
        return "bounds that do not rise from 0 to the number of tokens"
    if side.order is None:
        return None
    every = torch.arange(tokens, device=side.order.device, dtype=torch.int32)
    return None if bool((side.order.sort(-1).values == every).all()) else "an order that is no permutation"


def wrong_means(k: Tensor, side: Groups, mean_k: Tensor, head: int = 0) -> str | None:
    """What is wrong with the pooled keys of one head, or None."""
    groups = side.offsets.shape[-1] - 1
    member = group_of_token(side, head, k.shape[2])
    sums = k.new_zeros((groups, k.shape[3]), dtype=torch.float64).index_add_(0, member, k[0, head].double())
    counts = side.offsets[0, head].diff()
    occupied = counts > 0
    occupied[-1] = False
    exact = sums / counts.clamp(min=1)[:, None]
    error = float((mean_k[0, head].double() - exact)[occupied].abs().max())
    return None if error <= 1e-4 * float(exact[occupied].abs().max()) else f"pooled keys: error {error:.2e}"


def wrong_mass(mass: Tensor, side: Groups) -> str | None:
    """What is wrong with block masses, or None: with an exact log-sum-exp, a row of them sums to its tokens."""
    sizes = side.offsets.diff()
    sums = mass.sum(-1, dtype=torch.float64)
    error = float(((sums - sizes) / sizes.clamp(min=1))[..., :-1].abs().max())
    return None if error <= 5e-3 else f"block masses: row sums are off by {error:.2e}"
