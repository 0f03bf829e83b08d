"""AdaSpa over whole generations: four phases, four compilations, plans that hold and that never leak."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from families.wan import wan_t2v
from generations import BRANCHES, assert_same, generate, generate_wan, layers_of, phases, state_tensors
from torch import Tensor, nn
from toy_models import Stack, tokens

import sparse_compile

OPTIONS = {
    "method": "adaspa",
    "lowering": "eager",
    "min_tokens": 1,
    "dense_layers": 0,
    "block_size": 16,
    "monitor": False,  # the schedule alone
}
WHOLE_RUN = ["dense"] * 9 + ["search"] + ["sparse"] * 19 + ["refine"] + ["sparse"] * 20


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def stack(regional: bool = False, layers: int = 2, **options: Any) -> tuple[Stack, Callable[[Tensor], Tensor]]:
    model, how = Stack(layers), {"backend": "sparse_attn", "options": {**OPTIONS, **options}, "fullgraph": True}
    if regional:
        for block in model.blocks:
            block.compile(**how)
        return model, model
    return model, torch.compile(model, **how)


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_fifty_steps_of_two_branches_compile_once_for_each_of_four_phases(regional: bool) -> None:
    model, kwargs = wan_t2v()
    how: dict[str, Any] = {"backend": "sparse_attn", "options": {**OPTIONS, "block_size": 8}, "fullgraph": True}
    call: Callable[..., Any] = model
    if regional:
        model.compile_repeated_blocks(**how)
    else:
        call = torch.compile(model, **how)
    with sparse_compile.denoising(model, steps=50) as clock:
        first = generate_wan(call, kwargs, clock)
        assert sparse_compile.explain(model).compilations == 4
        clock.start(50)
        with torch.compiler.set_stance("fail_on_recompile"):
            second = generate_wan(call, kwargs, clock)
    for branch in BRANCHES:
        assert torch.equal(first[branch], second[branch])
    report = sparse_compile.explain(model)
    assert report.compilations == 4
    for generation in report.generations:
        assert [step.phase for step in generation.steps] == [phase for phase in WHOLE_RUN for _ in BRANCHES]


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_a_search_whose_step_is_skipped_comes_with_the_next_call(regional: bool) -> None:
    model, call = stack(regional)
    with sparse_compile.denoising(model, steps=50) as clock:
        for step in range(50):
            if step != 29:
                call(tokens(seed=step))
            clock.step()
    want = [phase for step, phase in enumerate(WHOLE_RUN) if step != 29]
    want[29] = "refine"
    assert phases(model) == [want] * 2


def test_a_model_that_enters_late_searches_at_once() -> None:
    model, call = stack(layers=1)
    with sparse_compile.denoising(model, steps=50) as clock:
        clock.step(to=20)
        for step in range(20, 23):
            call(tokens(seed=step))
            clock.step()
    assert phases(model) == [["search", "sparse", "sparse"]]


def test_the_output_of_a_search_is_that_of_dense_attention() -> None:
    model, call = stack(dense_steps=1)
    with sparse_compile.denoising(model, steps=4) as clock:
        assert clock.moment.step == 0
        torch.testing.assert_close(call(tokens()), model(tokens()), rtol=1e-5, atol=1e-5)
    assert phases(model) == [["search"]] * 2


@pytest.mark.parametrize("correction", ["none", "pooled", "coupled"])
def test_nothing_to_skip_is_dense_within_rounding(correction: str) -> None:
    model, call = stack(dense_steps=1, sparsity=0, correction=correction)
    with sparse_compile.denoising(model, steps=25) as clock:
        for step in range(25):
            x = tokens(seed=step)
            torch.testing.assert_close(call(x), model(x), rtol=1e-5, atol=1e-5)
            clock.step()
    assert phases(model)[0].count("refine") == 2


def test_sparse_calls_differ_from_dense_ones() -> None:
    model, call = stack(dense_steps=1, sparsity=0.8, correction="none")
    with sparse_compile.denoising(model, steps=3) as clock:
        call(tokens())
        clock.step()
        assert not torch.allclose(call(tokens(seed=1)), model(tokens(seed=1)), atol=1e-3)


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_branches_and_generations_share_nothing(regional: bool) -> None:
    """The second generation repeats the first; a branch alone equals the branch beside another."""
    outputs = []
    for branches in (BRANCHES, BRANCHES[:1]):
        torch.compiler.reset()
        model, call = stack(regional, dense_steps=1)
        with sparse_compile.denoising(model, steps=22) as clock:
            outputs.append(generate(call, clock, branches))
            clock.start(22)
            assert_same(generate(call, clock, branches), outputs[-1])
    assert_same({"cond": outputs[0]["cond"]}, outputs[1])


def test_the_log_sum_exp_of_an_earlier_prompt_is_void() -> None:
    """A new generation zeroes the state: what the old one left can steer nothing."""
    model, call = stack(dense_steps=1)
    with sparse_compile.denoising(model, steps=3) as clock:
        for seed in (50, 51):
            call(tokens(seed=seed))
            clock.step()
        clock.start(3)
        outputs = [call(tokens(seed=0)), (clock.step(), call(tokens(seed=1)))[1]]
    torch.compiler.reset()
    model, call = stack(dense_steps=1)
    with sparse_compile.denoising(model, steps=3) as clock:
        assert torch.equal(outputs[0], call(tokens(seed=0)))
        clock.step()
        assert torch.equal(outputs[1], call(tokens(seed=1)))


def test_another_resolution_in_the_middle_attends_to_everything_and_then_searches() -> None:
    model, call = stack(layers=1, dense_steps=1)
    with sparse_compile.denoising(model, steps=6) as clock:
        for seed, count in enumerate((128, 128, 96, 96, 96)):
            x = tokens(count, seed=seed)
            out = call(x)
            if seed == 2:  # the plan was for another shape: never used
                torch.testing.assert_close(out, model(x), rtol=1e-5, atol=1e-5)
            clock.step()
    assert phases(model) == [["search", "sparse", "sparse", "search", "sparse"]]


def test_a_refining_call_without_state_measures_anew() -> None:
    """The state is wiped behind the clock's back: the plan is then that of a search, not of a log-sum-exp of 0."""
    model, call = stack(layers=1, dense_steps=1, search_steps=(1, 3))
    with sparse_compile.denoising(model, steps=4) as clock, clock.branch("cond"):
        for seed in range(3):
            if seed == 2:
                for tensor in list(state_tensors(model)):
                    tensor.zero_()
            call(tokens(seed=seed))
            clock.step()
        assert phases(model) == [["search", "sparse", "refine"]]
        refined = [tensor.clone() for tensor in state_of(model)]
        clock.start(4)
        call(tokens(seed=2))
        searched = state_of(model)
    for one, other in zip(refined, searched, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def state_of(model: nn.Module) -> list[Tensor]:
    """Bitmap, log-sum-exp, readiness and probe offsets of the first layer."""
    tensors: list[Tensor] = layers_of(model)[0].branches["cond"].tensors[0]
    return tensors


def test_few_step_runs_search_in_their_first_step() -> None:
    model, call = stack()
    with sparse_compile.denoising(model, steps=4) as clock:
        generate(call, clock, ("cond",))
    assert phases(model) == [["search", "sparse", "sparse", "sparse"]] * 2


def test_the_report_has_kept_mass_and_budgets_of_every_head() -> None:
    model, call = stack(dense_steps=1, sparsity=0.5, head_adaptive="paper")
    with sparse_compile.denoising(model, steps=4) as clock:
        generate(call, clock)
        report = sparse_compile.explain(model)
    steps = {step.phase: step for step in report.generations[0].steps}
    assert steps["search"].density == 1 and steps["search"].kept_mass is None
    assert steps["sparse"].kept_mass is not None and 0 < steps["sparse"].kept_mass < 1
    assert report.density == pytest.approx(0.5, abs=0.02)
    assert len(report.heads) == 2 * len(BRANCHES)
    for heads in report.heads:
        assert sum(heads.density) / len(heads.density) == pytest.approx(0.5, abs=0.02)
    assert "newest sparse call, per head" in str(report)


def test_a_count_of_search_steps_behind_the_run_says_so() -> None:
    model, call = stack(search_steps=(2, 30))
    with (
        sparse_compile.denoising(model, steps=8),
        pytest.raises(Exception, match="search_steps must lie within the run; got '30 of 8 steps'"),
    ):
        call(tokens())


def test_a_new_run_that_is_too_short_for_the_search_steps_is_refused_when_it_starts() -> None:
    model, call = stack(search_steps=(2, 30))
    with sparse_compile.denoising(model, steps=40) as clock:
        call(tokens())
        with pytest.raises(sparse_compile.SparseAttentionError, match="30 of 8 steps"):
            clock.start(8)


def test_strict_does_not_take_a_search_for_a_sparse_call() -> None:
    """The output of a search is dense: a run that ends with it has gained nothing."""
    model, call = stack(strict=True, dense_steps=1)
    with sparse_compile.denoising(model, steps=3) as clock:
        clock.step(to=2)
        call(tokens())
        with pytest.raises(sparse_compile.SparseAttentionError, match="must become sparse"):
            clock.step()


def test_symbolic_sizes_share_their_graphs() -> None:
    model = Stack(1)
    call = torch.compile(model, backend="sparse_attn", options={**OPTIONS, "dense_steps": 1}, dynamic=True)
    with sparse_compile.denoising(model, steps=4) as clock:
        for count in (96, 130):
            clock.start(4)
            for seed in range(4):
                x = tokens(count, seed=seed)
                out = call(x)
                assert torch.isfinite(out).all()
                clock.step()
    assert phases(model) == [["search", "sparse", "sparse", "sparse"] * 2]
    assert sparse_compile.explain(model).compilations == 2
    assert len(layers_of(model)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_inductor_gives_what_the_rewritten_graph_gives_as_it_is(regional: bool) -> None:
    outputs = []
    for lowering in ("eager", "inductor"):
        torch.compiler.reset()
        model, call = stack(regional, lowering=lowering, dense_steps=1, search_steps=(1, 3))
        with sparse_compile.denoising(model, steps=5) as clock:
            outputs.append(generate(call, clock))
            clock.start(5)
            with torch.compiler.set_stance("fail_on_recompile"):
                assert_same(generate(call, clock), outputs[-1])
    for branch in BRANCHES:
        for one, other in zip(outputs[0][branch], outputs[1][branch], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_layers_that_stay_dense_keep_no_plan() -> None:
    model, call = stack(regional=True, layers=3, dense_layers="0-0", dense_steps=1)
    with sparse_compile.denoising(model, steps=3) as clock:
        generate(call, clock, ("cond",))
        kept = [bool(layer.branches and layer.branches["cond"].tensors) for layer in layers_of(model)]
    assert phases(model) == [["dense"] * 3, ["search", "sparse", "sparse"], ["search", "sparse", "sparse"]]
    assert kept == [False, True, True]
