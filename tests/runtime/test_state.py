from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from generations import (
    BRANCHES,
    QUICK,
    WAYS,
    assert_same,
    generate,
    layers_of,
    phases,
    regions_of,
    state_tensors,
    whole,
)
from torch import Tensor, nn
from toy_models import Stack, tokens

import sparse_compile
from sparse_compile.call_log import append_row, log_spec, read_heads, read_rows
from sparse_compile.config import Config
from sparse_compile.plan import TensorSpec
from sparse_compile.runtime.clock import Claim, Clock
from sparse_compile.runtime.state import BranchState, Layer, LayerGroup, allocate
from sparse_compile.strategies.base import Planner
from sparse_compile.strategies.svg2 import Svg2

CPU = torch.device("cpu")
LOG = log_spec(CPU, 2)


def a_layer() -> Layer:
    return Layer(Planner(Svg2(), Config()))


def spec(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> TensorSpec:
    return TensorSpec(shape, dtype, torch.device(device))


# ---------------------------------------------------------------------- one layer


def test_state_starts_as_zeros_and_keeps_its_tensors() -> None:
    layer = a_layer()
    state = layer.state("cond", 1)
    tensors, fresh = layer.tensors(state, 0, [spec(2, 3), spec(1, dtype=torch.int32)], LOG)
    assert fresh
    assert [t.any().item() for t in tensors] == [False] * 3
    again, fresh = layer.tensors(layer.state("cond", 1), 0, [spec(2, 3), spec(1, dtype=torch.int32)], LOG)
    assert not fresh
    assert all(one is two for one, two in zip(tensors, again, strict=True))


def test_branches_and_ordinals_have_their_own_tensors() -> None:
    layer = a_layer()
    made = [
        tensor
        for branch in BRANCHES
        for ordinal in (0, 1)
        for tensor in layer.tensors(layer.state(branch, 1), ordinal, [spec(2, 3)], LOG)[0]
    ]
    assert len({tensor.data_ptr() for tensor in made}) == len(made) == 8


def test_a_new_generation_zeroes_in_place_and_forgets_the_search() -> None:
    layer = a_layer()
    state = layer.state("cond", 1)
    (tensor, log), _ = layer.tensors(state, 0, [spec(4)], LOG)
    tensor.fill_(7)
    log[0, 0] = 3
    state.searched = 2
    renewed = layer.state("cond", 2)
    assert renewed is state
    assert renewed.searched is None
    assert not tensor.any()
    assert layer.tensors(renewed, 0, [spec(4)], LOG)[0][0] is tensor
    assert read_rows(log)[0] == 3


@pytest.mark.parametrize(
    "other",
    [spec(5), spec(4, dtype=torch.bfloat16), spec(4, device="meta")],
    ids=["shape", "dtype", "device"],
)
def test_another_shape_dtype_or_device_makes_new_tensors(other: TensorSpec) -> None:
    layer = a_layer()
    state = layer.state("cond", 1)
    old = layer.tensors(state, 0, [spec(4)], LOG)[0][0]
    (new, log), fresh = layer.tensors(state, 0, [other], log_spec(other.device, 2))
    assert fresh
    assert new is not old
    assert (tuple(new.shape), new.dtype, new.device) == other
    assert log.device == other.device


def logged(state: BranchState, heads: int) -> Tensor:
    """The log of a state, with one row."""
    append_row(state.logs[0], torch.full((1, heads), 0.25), torch.full((1, heads), 0.5), None)
    return state.logs[0]


def test_the_call_log_moves_with_the_device_and_keeps_what_it_says() -> None:
    layer = a_layer()
    state = layer.state("cond", 1)
    layer.tensors(state, 0, [spec(4)], LOG)
    log = logged(state, 2)
    state.logs[0] = FakeDevice(log)  # type: ignore[assignment]  # stands for a log on another device
    (_, moved), fresh = layer.tensors(state, 0, [spec(4)], LOG)
    assert not fresh
    assert torch.equal(moved.nan_to_num(-1), log.nan_to_num(-1))
    assert moved.data_ptr() != log.data_ptr()
    assert state.logs[0] is moved


def test_a_site_with_other_heads_gets_another_log_with_the_old_rows() -> None:
    layer = a_layer()
    layer.claim = Claim(Clock(), nn.Linear(1, 1))
    state = layer.state("cond", 1)
    layer.tensors(state, 0, [spec(4)], LOG)
    log, changes = logged(state, 2), layer.claim.changes
    (_, other), fresh = layer.tensors(state, 0, [spec(4)], log_spec(CPU, 3))
    assert not fresh
    assert TensorSpec(tuple(other.shape), other.dtype, other.device) == log_spec(CPU, 3)
    assert read_rows(other) == read_rows(log)
    assert read_heads(other) == []
    assert layer.claim.changes == changes + 1  # what was gathered with the old log is gathered again
    assert layer.tensors(state, 0, [spec(4)], log_spec(CPU, 3))[0][1] is other
    assert layer.claim.changes == changes + 1


class FakeDevice(Tensor):
    """A tensor that says it lies elsewhere."""

    @staticmethod
    def __new__(cls, tensor: Tensor) -> Tensor:
        return tensor.as_subclass(cls)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("meta")


def test_state_made_in_inference_mode_may_be_mutated_outside() -> None:
    with torch.inference_mode():
        tensor = allocate(spec(3))
    assert not tensor.is_inference()
    tensor.add_(1)
    assert not tensor.requires_grad


def test_state_made_under_gradients_takes_none() -> None:
    with torch.enable_grad():
        assert not allocate(spec(3)).requires_grad


def test_a_group_ends_with_any_of_its_parameters() -> None:
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    layers = [a_layer(), a_layer()]
    references = [*map(weakref.ref, layers)]
    group = LayerGroup(parameters, layers)
    assert group.holds(parameters)
    assert not group.holds(parameters[::-1])
    del parameters[1], layers
    gc.collect()
    assert not group.holds([*parameters, object()])
    assert [reference() for reference in references] == [None, None]


def test_recounting_takes_the_rows_from_the_device() -> None:
    layer = a_layer()
    layer.branches = {"cond": BranchState(1, rows=9), "uncond": BranchState(1, rows=9)}
    log = allocate(LOG)
    log[0, 0] = 4
    layer.branches["cond"].logs = {0: allocate(LOG), 1: log}
    layer.recount_rows()
    assert [state.rows for state in layer.branches.values()] == [4, 0]


# ---------------------------------------------------------------------- whole generations


@pytest.mark.parametrize("way", WAYS)
def test_state_stays_at_its_address_over_generations(way: str) -> None:
    model, call = WAYS[way]()
    with sparse_compile.denoising(model, steps=4) as clock:
        generate(call, clock)
        addresses = [tensor.data_ptr() for tensor in state_tensors(model)]
        for _ in range(2):
            clock.start(4)
            generate(call, clock)
        assert [tensor.data_ptr() for tensor in state_tensors(model)] == addresses
    assert len(set(addresses)) == len(addresses) == 2 * len(BRANCHES) * 4


@pytest.mark.parametrize("way", WAYS)
def test_the_second_generation_equals_the_first(way: str) -> None:
    model, call = WAYS[way]()
    with sparse_compile.denoising(model, steps=5) as clock:
        first = generate(call, clock)
        clock.start(5)
        assert_same(generate(call, clock), first)
    with sparse_compile.denoising(model, steps=5) as clock:
        assert_same(generate(call, clock), first)


@pytest.mark.parametrize("way", WAYS)
def test_state_of_inference_mode_serves_no_grad_and_the_reverse(way: str) -> None:
    model, call = WAYS[way]()
    with sparse_compile.denoising(model, steps=4) as clock:
        want = generate(call, clock)
    model, call = WAYS[way]()
    with sparse_compile.denoising(model, steps=4) as clock:
        outputs: list[Tensor] = []
        for step in range(4):
            with torch.inference_mode(step != 2), clock.branch("cond"):
                outputs.append(call(tokens(seed=100 + step)))
            clock.step()
        assert_same({"cond": outputs}, {"cond": want["cond"]})
        clock.start(4)
        assert_same(generate(call, clock), want)
    assert not any(tensor.is_inference() for tensor in state_tensors(model))


@pytest.mark.parametrize("way", WAYS)
def test_a_generation_of_other_length_decides_anew(way: str) -> None:
    model, call = WAYS[way](dense_steps=0.5)
    with sparse_compile.denoising(model, steps=4) as clock:
        generate(call, clock, ["cond"])
        clock.start(6)
        generate(call, clock, ["cond"])
    want = ["dense"] * 2 + ["search", "sparse"] + ["dense"] * 3 + ["search"] + ["sparse"] * 2
    assert phases(model) == [want] * 2


def lost_state(model: Stack, call: Any, change: Any, x: Tensor, steps: int = 5) -> tuple[list[Tensor], Tensor]:
    """Change something before step 3; the outputs of steps 3 and 4, and what the model itself gives."""
    with sparse_compile.denoising(model, steps=steps) as clock, clock.branch("cond"):
        for step in range(3):
            call(tokens(seed=step))
            clock.step()
        change()
        outputs = []
        for _ in range(2):
            outputs.append(call(x))
            clock.step()
    eager = Stack(len(model.blocks))
    eager.load_state_dict(model.state_dict())
    return outputs, eager.to(x.dtype)(x)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", ["length", "batch", "dtype"])
def test_a_call_of_another_shape_or_dtype_attends_to_everything_and_the_next_searches(way: str, what: str) -> None:
    # 100 clusters are more than 96 tokens, so state has another shape; uncorrected, so sparse differs from dense
    model, call = WAYS[way](dense_steps=0, k_clusters=100, correction="none")
    x = {"length": tokens(96, seed=9), "batch": tokens(batch=2, seed=9), "dtype": tokens(seed=9).bfloat16()}[what]

    def change() -> None:
        model.to(x.dtype)

    outputs, dense = lost_state(model, call, change, x)
    rounding = 2e-2 if what == "dtype" else 1e-5
    torch.testing.assert_close(outputs[0], dense, atol=rounding, rtol=rounding)
    assert not torch.allclose(outputs[1], dense, atol=5e-2)
    assert phases(model) == [["search", "sparse", "sparse", "sparse", "search"]] * 2


def test_state_that_another_length_replaced_is_not_used_again() -> None:
    model = Stack(1)
    options = {**QUICK, "dense_steps": 0, "k_clusters": 100, "correction": "none"}
    call = torch.compile(model, backend="sparse_attn", options=options, dynamic=False)
    seen = []
    with sparse_compile.denoising(model, steps=8) as clock, clock.branch("cond"):
        for length in (128, 128, 96, 96, 96, 128, 128, 128):
            x = tokens(length, seed=length)
            seen.append(torch.allclose(call(x), Stack(1)(x), atol=1e-5))
            clock.step()
    assert phases(model) == [["search", "sparse"] + ["sparse", "search", "sparse"] * 2]
    assert seen == [False, False] + [True, False, False] * 2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("block", [0, 1])
def test_a_replaced_parameter_starts_again(way: str, block: int) -> None:
    model, call = WAYS[way](dense_steps=0)
    old: list[Layer] = []
    references = []

    def change() -> None:
        old.extend(layers_of(model))
        linear = model.blocks[block].to_q
        references.append(weakref.ref(linear.weight))
        linear.weight = nn.Parameter(linear.weight * 1.1, requires_grad=False)

    outputs, dense = lost_state(model, call, change, tokens(seed=9))
    gc.collect()
    assert references[0]() is None
    replaced, other = layers_of(model)[block], layers_of(model)[1 - block]
    assert replaced not in old
    assert other in old
    densities = [row.density for row in read_rows(replaced.branches["cond"].logs[0])[1]]
    seen = [call.phase for call in replaced.history]
    if way == "whole":  # the graph of its peers ran, and it attended to everything
        assert (seen, densities[0]) == (["sparse", "search"], 1.0)
    else:
        assert seen == ["search", "sparse"]
    assert densities[-1] < 0.9
    want = ["search", "sparse", "sparse", "sparse", "search" if way == "whole" else "sparse"]
    assert [call.phase for call in other.history] == want
    assert not torch.allclose(outputs[1], dense, atol=1e-2)


def test_a_replaced_first_parameter_keeps_its_place_among_the_dense_layers() -> None:
    model, call = whole(3, dense_layers=1)
    with sparse_compile.denoising(model, steps=4) as clock:
        generate(call, clock, ["cond"])
        linear = model.blocks[0].to_q
        linear.weight = nn.Parameter(linear.weight * 1.1, requires_grad=False)
        gc.collect()
        clock.start(4)
        generate(call, clock, ["cond"])
    assert [set(seen[-4:]) == {"dense"} for seen in phases(model)] == [True, False, False]


class PlannedError(Exception):
    pass


@pytest.mark.parametrize("way", WAYS)
def test_a_failing_search_is_searched_again_and_the_log_stays_in_step(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, call = WAYS[way](dense_steps=0)
    want_model, want_call = WAYS[way](dense_steps=0)
    with sparse_compile.denoising(want_model, steps=4) as clock:
        want = generate(want_call, clock, ["cond"])
    with sparse_compile.denoising(model, steps=4) as clock:
        generate(call, clock, ["cond"])
        clock.start(4)
        lead = layers_of(model)[0]
        region = next(iter(lead.groups))
        compiled = region._compiled  # type: ignore[attr-defined]

        def run_and_fail(*args: Any) -> Any:
            compiled(*args)
            raise PlannedError

        with monkeypatch.context() as patch:
            patch.setattr(region, "_compiled", run_and_fail)
            with pytest.raises(PlannedError), clock.branch("cond"):
                call(tokens(seed=100))
        assert lead.branches["cond"].searched is None
        assert lead.branches["cond"].rows == 5
        assert len(lead.history) == 4
        assert_same(generate(call, clock, ["cond"]), want)
    steps = sparse_compile.explain(model).generations
    assert [step.phase for step in steps[1].steps] == ["search", "sparse", "sparse", "sparse"]
    assert [step.density for step in steps[1].steps] == [step.density for step in steps[0].steps]
    assert len(regions_of(model)) == 2
