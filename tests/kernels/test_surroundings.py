"""Ops give the same bits wherever they are called: under autocast, with gradients on, in inference mode."""

from __future__ import annotations

import contextlib

import pytest
import torch
from kernel_oracles import IMPLEMENTATIONS, OPS, assert_same_bits, inputs, new_log


@contextlib.contextmanager
def default_dtype():
    """A process that makes its tensors in half precision unless told otherwise."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SURROUNDINGS = {
    "default dtype": default_dtype,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "gradients": torch.enable_grad,
    "inference mode": torch.inference_mode,
}
SPAN, SCALE = [0, 120], 0.25


def attend(q, k, v, plan, kernel):
    """Probe rows, pooled keys and attention by a plan: everything that they return."""
    measured = OPS.kept_mass(q, k, None, SPAN, *plan, SCALE, 16, 0, kernel)
    pooled = OPS.pooled_keys(k, v, plan[2], plan[3], SPAN, True, kernel)
    log = new_log()
    return [
        measured,
        *pooled,
        *OPS.block_sparse_attention(q, k, v, *plan, *pooled, measured, None, None, None, log, SCALE, True, kernel),
    ]


def svg2(q, k, v, kernel):
    state = [torch.zeros(1, 2, 8, 16, dtype=torch.float32), torch.zeros(1, 1, 12, 16, dtype=torch.float32)]
    state.append(torch.zeros(1, dtype=torch.int32))
    made = OPS.kmeans(q, k, None, None, SPAN, SPAN, *state, True, 4, 0, kernel)
    q_order, q_offsets, q_means, k_order, k_offsets, k_means, _ = made
    settings = (SCALE, 0.5, 0.0, None, "mass", True, 0, kernel)
    keep = OPS.plan_top_p(q_means, k_means, q_offsets, k_offsets, state[2], *settings)
    return [*made, keep, *attend(q, k, v, (q_order, q_offsets, k_order, k_offsets, keep), kernel)], state


def adaspa(q, k, v, kernel):
    lse, offset = torch.zeros(1, 2, 130, dtype=torch.float32), torch.zeros(1, 2, dtype=torch.float32)
    ready = torch.zeros(1, dtype=torch.int32)
    cut = OPS.token_blocks(q, k, None, None, SPAN, SPAN, 16, 16, kernel)
    plan, sides = (None, cut[1], None, cut[4]), (cut[1], cut[2], cut[4], cut[5])
    keep = torch.zeros(1, 2, cut[2].numel(), 1, dtype=torch.int32)
    found = [OPS.attention_with_lse(q, k, v, None, None, lse, True, SCALE, True, kernel)]
    for fresh in (True, False):
        mass, spread = OPS.block_mass(q, k, lse, ready, *plan, 16, SCALE, 1, fresh, kernel)
        recall, counts = OPS.plan_top_k(mass, *sides, keep, ready, 0.6, "paper", "mass", True, 0, kernel)
        found += [mass, spread, recall, counts, lse.clone()]
    kept = OPS.kept_blocks(keep, ready, *sides, True, kernel)
    found += [keep, kept, *attend(q, k, v, (*plan, kept), kernel)]
    found.append(OPS.paired_kept_mass(found[-7], recall, offset, torch.zeros_like(offset), kernel))
    return found, [lse, offset]


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
@pytest.mark.parametrize("method", [svg2, adaspa])
@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_ops_give_the_same_bits_in_any_surroundings(surroundings, method, kernel):
    q, k, v = inputs(130, 130, 0)
    with torch.no_grad():
        expected, expected_state = method(q, k, v, kernel)
    for x in (q, k, v):
        x.requires_grad_(surroundings == "gradients")
    with SURROUNDINGS[surroundings]():
        found, state = method(q, k, v, kernel)
        assert_same_bits([*found, *state], [*expected, *expected_state])
    assert not any(x.requires_grad for x in state), "state keeps no graph alive"
