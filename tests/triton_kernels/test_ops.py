"""The ops with the Triton kernels: what their schemas and fakes promise is what comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_oracles import OPS, fields_of, random_plan, random_tensor
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import test_attention_with_lse, test_ops, test_recall_plans, test_token_blocks

MADE_BY = "reference"
"""What makes the arguments."""
RECALL = ("plan_measured_recall", "calibrate_recall", "keep_weak_heads_whole")
"""Ops of tests/kernels/test_recall_plans.py that the other files do not call."""
Op = Any
Call = tuple[Op, tuple[Any, ...]]


def top_k_arguments() -> tuple[Any, ...]:
    mass = random_tensor(1, 4, 6, 35).exp()
    q_offsets, k_offsets = (torch.arange(n, dtype=torch.int32).expand(1, 4, n).contiguous() for n in (7, 36))
    q_is_video, k_is_video = (torch.arange(n) < n - 2 for n in (6, 35))
    keep, ready = torch.zeros(1, 4, 6, 2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    return (mass, q_offsets, q_is_video, k_offsets, k_is_video, keep, ready, 0.8, "paper", "mass", True, 0, MADE_BY)


def kept_mass_arguments() -> tuple[Any, ...]:
    q, k = random_tensor(2, 4, 50, 16), random_tensor(2, 2, 60, 16, seed=1)
    valid = (torch.arange(50) < 45).expand(2, -1)
    return (q, k, valid, [0, 40], *fields_of(random_plan(2, 4, 2, 50, 60)), 0.25, 8, 0, MADE_BY)


def block_mass_arguments(fresh: bool) -> tuple[Any, ...]:
    """With a fresh log-sum-exp by blocks in place, with a kept one by ordered groups."""
    q, k = random_tensor(1, 2, 20, 16), random_tensor(1, 1, 30, 16, seed=1)
    lse, ready = torch.zeros(1, 2, 20), torch.ones(1, dtype=torch.int32)
    plan = random_plan(1, 2, 1, 20, 30, 3, 3)
    query, key = (side._replace(order=None) if fresh else side for side in (plan.query_side, plan.key_side))
    return (q, k, lse, ready, *query, *key, 32, 0.25, 2, fresh, MADE_BY)


def calls() -> dict[str, Call]:
    """Every op, with arguments on the CPU."""
    top_k = top_k_arguments()
    paired = (torch.full((2, 4), 0.7), torch.full((2, 4), 0.5), torch.zeros(2, 4), torch.zeros(2, 4), MADE_BY)
    return {
        **{name: (op, make(MADE_BY, **options)) for name, (op, make, options) in test_ops.CALLS.items()},
        "attention_with_lse": (OPS.attention_with_lse, test_attention_with_lse.op_args(MADE_BY, False)),
        "attention_with_lse-masked": (OPS.attention_with_lse, test_attention_with_lse.op_args(MADE_BY, True, False)),
        "token_blocks": (OPS.token_blocks, test_token_blocks.op_args(MADE_BY, "text-last", False)),
        "token_blocks-masked": (OPS.token_blocks, test_token_blocks.op_args(MADE_BY, "text-last", True)),
        "block_mass-fresh": (OPS.block_mass, block_mass_arguments(True)),
        "block_mass-kept": (OPS.block_mass, block_mass_arguments(False)),
        "plan_top_k": (OPS.plan_top_k, top_k),
        "kept_blocks": (OPS.kept_blocks, (*top_k[5:7], *top_k[1:5], False, MADE_BY)),
        "kept_mass": (OPS.kept_mass, kept_mass_arguments()),
        "paired_kept_mass": (OPS.paired_kept_mass, paired),
        **{op: (getattr(OPS, op), test_recall_plans.arguments_of(op, MADE_BY)) for op in RECALL},
    }


CALLS = calls()
each_call = pytest.mark.parametrize("call", CALLS)
CALL_OF_EACH_KERNEL = (
    "kmeans-restart",
    "plan_top_p",
    "pooled_keys-coupled",
    "attention-coupled-in-place",
    "attention_with_lse-masked",
    "block_mass-kept",
    "plan_top_k",
    "plan_measured_recall",
    "kept_mass",
)


def arguments(call: str, device: str) -> tuple[Any, ...]:
    """For the Triton kernels, on a device."""

    def placed(x: Any) -> Any:
        return x.to(device, copy=True, memory_format=torch.preserve_format) if isinstance(x, Tensor) else x

    return (*(placed(x) for x in CALLS[call][1][:-1]), "triton")


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result or ())  # an op may only write


def test_every_op_is_called() -> None:
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("sparse_compile::")}
    assert {op.default.name() for op, _ in CALLS.values()} == registered


@each_call
def test_what_comes_back_is_laid_out_as_a_fake_of_a_gpu_says(device: str, call: str) -> None:
    op = CALLS[call][0]
    given = arguments(call, device)
    with FakeTensorMode():
        fakes = op(
            *(
                torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") if isinstance(x, Tensor) else x
                for x in given
            )
        )
    for fake, real in zip(as_tuple(fakes), as_tuple(op(*given)), strict=True):
        assert fake.device.type == "cuda" and real.device.type == device
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("call", CALL_OF_EACH_KERNEL)
def test_opcheck(device: str, call: str) -> None:
    results = torch.library.opcheck(CALLS[call][0].default, arguments(call, device))
    assert set(results.values()) == {"SUCCESS"}, results
