"""AdaSpa as a planner: schedule, state, what it leaves alone, and the ops it writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy_models import Stack, tokens

from sparse_compile.config import Config
from sparse_compile.errors import SparseAttentionError
from sparse_compile.phases import Moment, Phase
from sparse_compile.sites import Reason, TokenLayout, TokenPart
from sparse_compile.strategies.adaspa import AdaSpa, block_groups, search_steps
from sparse_compile.strategies.base import Strategy
from sparse_compile.testing import capture, count_ops, find, rewrite

QUICK = {"method": "adaspa", "min_tokens": 1, "block_size": 16}


def schedule(steps: int, skipped: tuple[int, ...] = (), first: int = 0, **options: Any) -> list[Phase]:
    """The phases of a site's calls in one generation, from its first call on."""
    config, searched, phases = Config(**{"method": "adaspa", **options}), None, []
    for step in range(first, steps):
        if step in skipped:
            continue
        phase = AdaSpa().phase(Moment(step, steps), searched, config)
        if phase in (Phase.SEARCH, Phase.REFINE):
            searched = step
        phases.append(phase)
    return phases


def test_it_is_a_strategy() -> None:
    assert isinstance(AdaSpa(), Strategy)


def test_of_fifty_steps_ten_are_dense_and_the_tenth_and_the_thirtieth_search() -> None:
    phases = schedule(50)
    assert phases == [Phase.DENSE] * 9 + [Phase.SEARCH] + [Phase.SPARSE] * 19 + [Phase.REFINE] + [Phase.SPARSE] * 20


def test_a_search_whose_step_was_skipped_happens_at_the_next_call() -> None:
    phases = schedule(50, skipped=(29, 30))
    assert [place for place, phase in enumerate(phases) if phase is Phase.REFINE] == [29]
    assert len(phases) == 48


def test_a_site_first_called_late_starts_with_a_search() -> None:
    phases = schedule(50, first=20)
    assert phases[:2] == [Phase.SEARCH, Phase.SPARSE]
    assert phases[9] is Phase.REFINE


@pytest.mark.parametrize(
    ("steps", "dense", "searches"),
    [(4, 0, [0]), (5, 0, [0]), (8, 1, [1]), (19, 3, [3]), (20, 3, [3, 11]), (35, 6, [6, 20])],
)
def test_short_runs_search_once(steps: int, dense: int, searches: list[int]) -> None:
    phases = schedule(steps)
    assert phases[:dense] == [Phase.DENSE] * dense
    assert [step for step, phase in enumerate(phases) if phase in (Phase.SEARCH, Phase.REFINE)] == searches


@pytest.mark.parametrize(
    "options",
    [{"dense_steps": 0}, {"dense_steps": 1}, {"dense_steps": 0.1}, {"search_steps": "0.6"}],
    ids=["none dense", "one dense", "a tenth dense", "a late share"],
)
@pytest.mark.parametrize("steps", [4, 8, 12, 19])
def test_no_share_names_a_second_search_in_a_short_run(options: dict[str, Any], steps: int) -> None:
    phases = schedule(steps, **options)
    assert Phase.REFINE not in phases and phases.count(Phase.SEARCH) == 1


@pytest.mark.parametrize(
    ("options", "searches"),
    [
        ({"search_steps": "10,20,30,40"}, [9, 19, 29, 39]),
        ({"search_steps": (0, 30), "dense_steps": 0}, [0, 29]),
        ({"search_steps": "0.5"}, [9, 24]),
        ({"search_steps": (5, 30)}, [9, 29]),
        ({"search_steps": 50}, [9, 49]),
        ({"dense_steps": 20}, [19, 29]),
        ({"dense_steps": 40}, [39]),
    ],
)
def test_the_user_says_when_to_search(options: dict[str, Any], searches: list[int]) -> None:
    phases = schedule(50, **options)
    assert [step for step, phase in enumerate(phases) if phase in (Phase.SEARCH, Phase.REFINE)] == searches


@pytest.mark.parametrize("dense_steps", [50, 60, 1.0])
def test_all_steps_dense_never_search(dense_steps: float | int) -> None:
    assert set(schedule(50, dense_steps=dense_steps)) == {Phase.DENSE}


def test_a_count_behind_the_run_is_refused_with_the_remedy() -> None:
    with pytest.raises(SparseAttentionError, match=r"within the run; got '30 of 8 steps'\. Give shares"):
        search_steps(Moment(0, 8), Config(method="adaspa", search_steps="2,30"))


@pytest.mark.parametrize("value", ["0.6,0.2", "10,10", "0.2,30", "", (), "1.2", (-1,), "ten", None, True])
def test_search_steps_that_do_not_rise_or_lie_outside_are_refused(value: object) -> None:
    with pytest.raises(SparseAttentionError, match="'search_steps' must be rising shares"):
        Config(method="adaspa", search_steps=value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("sparsity", 1, r"\[0, 1\)"),
        ("sparsity", 1.0, r"\[0, 1\)"),
        ("sparsity", -0.1, r"\[0, 1\)"),
        ("block_size", 0, "an integer >= 1"),
        ("block_size", 1.5, "an integer >= 1"),
        ("head_adaptive", "on", "paper, guarded or off"),
        ("correction", "mean", "auto, none, pooled or coupled"),
        ("probe_rows", -1, "an integer >= 0"),
        ("search_row_stride", 0, "an integer >= 1"),
    ],
)
def test_bad_options_are_refused_with_the_rule(name: str, value: object, rule: str) -> None:
    with pytest.raises(SparseAttentionError, match=f"option '{name}' must be .*{rule}"):
        Config.from_options({"method": "adaspa", name: value}, environ={})


@pytest.mark.parametrize(
    ("method", "name", "value"), [("adaspa", "density", 0.2), ("adaspa", "top_p", 0.5), ("svg2", "sparsity", 0.5)]
)
def test_an_option_of_the_other_method_is_refused(method: str, name: str, value: float) -> None:
    with pytest.raises(SparseAttentionError, match=rf"'{name}' belongs to method .*, and method is '{method}'"):
        Config.from_options({"method": method, name: value}, environ={})


def test_a_plug_in_may_read_the_options_of_any_method() -> None:
    config = Config.from_options({"method": "module:Own", "density": 0.2, "sparsity": 0.5}, environ={})
    assert (config.density, config.sparsity) == (0.2, 0.5)


# ---------------------------------------------------------------------- sites


def layout(*parts: tuple[str, int]) -> TokenLayout:
    return TokenLayout(tuple(TokenPart(role, length, length) for role, length in parts))


@pytest.mark.parametrize(
    ("parts", "block", "groups"),
    [
        ([("video", 64)], 16, 4),
        ([("video", 65)], 16, 5),
        ([("text", 13), ("video", 210)], 32, 1 + 7),
        ([("video", 210), ("text", 13)], 32, 7 + 1),
        ([("video", 10), ("control", 10), ("text", 4), ("video", 9)], 8, 3 + 1 + 2),
        ([("video", 5)], 64, 1),
    ],
)
def test_blocks_are_counted_per_stretch_of_text_or_video(parts: list[tuple[str, int]], block: int, groups: int) -> None:
    own = layout(*parts)
    assert block_groups(own, sum(length for _, length in parts), block) == groups + 1, "and one group of padding"


def site(count: int, **options: Any) -> Any:
    with torch.no_grad():
        return find(capture(Stack(1), tokens(count))[0], **{"method": "adaspa", **options})[0]


def test_state_holds_a_bitmap_a_log_sum_exp_and_what_ties_the_probes() -> None:
    config = Config(method="adaspa", block_size=8)
    specs = AdaSpa().state(site(300, min_tokens=1, block_size=8), config)
    assert {name: (spec.shape, spec.dtype) for name, spec in specs.items()} == {
        "keep": ((1, 2, 39, 2), torch.int32),
        "lse": ((1, 2, 300), torch.float32),
        "ready": ((1,), torch.int32),
        "probe_offset": ((1, 2), torch.float32),
        "planned_mass": ((1, 2), torch.float32),
    }
    assert "probe_offset" not in AdaSpa().state(site(300, min_tokens=1), Config(method="adaspa", probe_rows=0))


@pytest.mark.parametrize(
    ("count", "options", "reason"),
    [
        (4096, {}, None),
        (4095, {}, Reason.TOO_SHORT),
        (4096, {"block_size": 256}, None),
        (4096, {"block_size": 512}, Reason.TOO_SHORT),
        (40, {"min_tokens": 1}, Reason.ONE_BLOCK),
        (40, {"min_tokens": 1, "block_size": 41}, Reason.ONE_BLOCK),
        (40, {"min_tokens": 1, "block_size": 39}, None),
        (40, {"min_tokens": 41, "block_size": 8}, Reason.TOO_SHORT),
    ],
)
def test_sites_without_blocks_to_skip_stay_dense_and_say_why(
    count: int, options: dict[str, Any], reason: Reason | None
) -> None:
    assert site(count, **options).decision.reason is reason


# ---------------------------------------------------------------------- what it writes

ALL = ("token_blocks", "attention_with_lse", "block_mass", "plan_top_k", "kept_blocks", "pooled_keys", "kept_mass")


@pytest.mark.parametrize(
    ("phase", "options", "counts"),
    [
        (Phase.SEARCH, {}, (1, 1, 1, 1, 0, 0, 1, 0)),
        (Phase.SPARSE, {}, (1, 0, 0, 0, 1, 1, 1, 1)),
        (Phase.REFINE, {}, (1, 0, 1, 1, 0, 1, 1, 1)),
        (Phase.SPARSE, {"correction": "none", "probe_rows": 0}, (1, 0, 0, 0, 1, 0, 0, 1)),
        (Phase.SPARSE, {"correction": "pooled"}, (1, 0, 0, 0, 1, 1, 1, 1)),
    ],
)
def test_each_phase_writes_its_ops(phase: Phase, options: dict[str, Any], counts: tuple[int, ...]) -> None:
    graph = capture(Stack(1), tokens(64))[0]
    rewritten = rewrite(graph, phase, **{**QUICK, **options}).graph_module
    assert tuple(count_ops(rewritten, op) for op in (*ALL, "block_sparse_attention")) == counts
