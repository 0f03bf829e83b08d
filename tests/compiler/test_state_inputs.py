"""State reaches the ops as inputs of Inductor's code, without a copy, and stays where it is."""

from __future__ import annotations

import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from toy_models import EAGER, Stack, tokens

import sparse_compile
from sparse_compile.runtime.registry import REGISTRY

OPTIONS = {**EAGER, "lowering": "inductor", "dense_steps": 0}


def search_code() -> str:
    """What Inductor wrote for a search: the body of its `call`."""
    torch.compiler.reset()
    counters.clear()
    model = Stack(1)
    call = torch.compile(model, backend="sparse_attn", options=OPTIONS, fullgraph=True)
    with (
        torch.no_grad(),
        torch.compiler.config.patch(force_disable_caches=True),
        sparse_compile.denoising(model, steps=2),
    ):
        _, (code,) = run_and_get_code(call, tokens())
    return code[code.index("def call") :]


def test_ops_mutate_the_graphs_own_inputs() -> None:
    body = search_code()
    inputs = body.split(" = args", 1)[0]
    for op, mutated in (("kmeans", 3), ("block_sparse_attention", 1)):
        (line,) = [n for n in body.splitlines() if f"torch.ops.sparse_compile.{op}.default(" in n]
        own = [word for word in line.replace("(", " ").replace(",", " ").split() if word.startswith("arg")]
        assert len(own) >= mutated
        assert all(word in inputs for word in own), (own, inputs)
    assert "auto_functionalized" not in body
    missed = {k: v for k, v in counters["inductor"].items() if "missed_reinplacing" in k and v}
    assert not missed
    assert "copy_" not in body


def test_strided_views_reach_the_ops_without_a_copy() -> None:
    """diffusers hands over transposed [B, S, H, D] views."""
    (line,) = [n for n in search_code().splitlines() if "torch.ops.sparse_compile.kmeans.default(" in n]
    assert line.count("reinterpret_tensor") >= 2, line


def test_addresses_stay_over_steps_and_generations() -> None:
    torch.compiler.reset()
    model = Stack(2)
    call = torch.compile(model, backend="sparse_attn", options=OPTIONS)

    def addresses() -> dict[object, list[int]]:
        layers = [layer for p in model.parameters() for layer in REGISTRY.layers_of(p)]
        return {
            (i, branch): [t.data_ptr() for tensors in (*state.tensors.values(), state.logs.values()) for t in tensors]
            for i, layer in enumerate(layers)
            for branch, state in layer.branches.items()
        }

    seen = []
    with torch.no_grad(), sparse_compile.denoising(model, steps=3) as clock:
        for _ in range(2):
            clock.start(3)
            for _ in range(3):
                for branch in ("cond", "uncond"):
                    with clock.branch(branch):
                        call(tokens())
                clock.step()
            seen.append(addresses())
    assert seen[0] == seen[1]
    flat = [address for addresses in seen[0].values() for address in addresses]
    assert len(set(flat)) == len(flat) == 2 * 2 * 4
