"""The CPU benchmark: its plans and arithmetic, and every part of it at toy sizes with a timer that tells times."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted_timer import ScriptedTimer

from benchmarks import cpu_attention
from benchmarks.cpu import generation, kernel, operations, plot, records, tables, targets, timing
from benchmarks.cpu.sizes import FULL, QUICK, TINY
from benchmarks.gpu.shapes import random_operands
from benchmarks.gpu.site import Site
from benchmarks.gpu.timing import Call

EVERY_ROW = {"part", "isa", "threads", "tokens", "heads", "head_size", "dtype", "density", "dense_ms", "sparse_ms"}
EVERY_ROW |= {"flex_ms", "flex_refused", "speedup", "repeats"}


class SteppingTimer(ScriptedTimer):
    """Says that each call took a millisecond, and each stage of one two."""

    def __init__(self, milliseconds: Callable[[Any], float] = lambda call: 1.0) -> None:
        super().__init__(milliseconds)
        self.clock = itertools.count(0, 0.002).__next__


def run(path: Path, *arguments: str, sizes: Any = TINY) -> tuple[int, dict[str, Any]]:
    given = ["--json", str(path), "--lowering", "eager", *arguments]
    status = cpu_attention.main(given, sizes, lambda threads: SteppingTimer())
    return status, json.loads(path.read_text())


# ---------------------------------------------------------------------- plans and arithmetic


@pytest.mark.parametrize("kind", kernel.KINDS)
@pytest.mark.parametrize("density", FULL.densities)
def test_a_plan_has_the_density_asked_for(kind: str, density: float) -> None:
    shape = FULL.shape_of(4096, 64)
    plan = kernel.plan_of(kind, shape, density, FULL.block)
    slack = 0 if kind == "uniform" else 0.02
    assert float(plan.density().mean()) == pytest.approx(density, abs=slack + 1e-6)
    assert plan.q_offsets.shape[-1] - 1 >= 4096 // 256
    assert (plan.q_order is None) == (plan.k_order is None) == (kind == "uniform")


def test_efficiency_is_1_where_a_kept_pair_costs_what_it_costs_in_dense_attention() -> None:
    assert kernel.efficiency(0.25, dense_ms=8.0, sparse_ms=2.0) == 1.0
    assert kernel.efficiency(0.25, dense_ms=8.0, sparse_ms=4.0) == 0.5
    assert kernel.efficiency(1.0, dense_ms=8.0, sparse_ms=4.0) == 2.0


def test_routing_is_everything_but_attention() -> None:
    parts = {"kmeans": 1.0, "plan_top_p": 0.5, "block_sparse_attention": 9.0, "attention_with_lse": 7.0}
    assert operations.routing_share(parts, dense_ms=10.0) == pytest.approx(0.15)


def test_the_flex_mask_holds_the_blocks_of_the_plan() -> None:
    shape = TINY.shape_of(256, 32)
    plan = kernel.plan_of("uniform", shape, 0.5, 32)
    mask = kernel.flex_mask(plan, 256, 32)
    kept = plan.kept()[..., :-1, :-1]
    assert torch.equal(mask.full_kv_num_blocks, kept.sum(-1).int()) and not mask.kv_num_blocks.any()
    listed = torch.zeros_like(kept).scatter_(-1, mask.full_kv_indices[..., :4].long(), True)
    assert torch.equal(listed, kept)


@pytest.mark.slow
def test_flex_attention_gives_what_the_op_gives_by_the_same_plan() -> None:
    shape = FULL.shape_of(512, 32)
    operands = random_operands(shape, torch.device("cpu"), torch.float32)
    plan = kernel.plan_of("uniform", shape, 0.5, FULL.block)
    calls, refused = kernel.flex_calls(operands, {1.0: plan, 0.5: plan}, shape, FULL.block)
    assert list(calls) == ["flex 0.5"] and not refused
    expected, _ = Site(shape, operands, "cpu").attention(plan)
    torch.testing.assert_close(calls["flex 0.5"].run(), expected, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------- timing


def test_one_thread_is_timed_by_what_the_process_computes_more_by_the_wall() -> None:
    assert timing.clock_of(1) is timing.time.process_time
    assert timing.clock_of(2) is timing.time.perf_counter


def test_the_timer_leaves_out_what_comes_before_a_call() -> None:
    now = [0.0]

    def spend(seconds: float) -> None:
        now[0] += seconds

    timer = timing.CpuTimer(lambda: now[0])
    call = Call(lambda: spend(0.25), lambda: spend(7.0))
    assert timer.warm_up(call).milliseconds == timer.measure(call) == 250.0


def test_stages_forget_the_runs_that_warmed_up() -> None:
    ticks = iter([0.0, 9.0, 10.0, 10.001, 20.0, 20.003])
    stages = timing.Stages(lambda: next(ticks))
    assert [stages.run("a", lambda: 5) for _ in range(3)] == [5, 5, 5]
    assert stages.medians(2) == {"a": pytest.approx(2.0)}


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with timing.threads_at_work(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_in_each_round_every_call_has_a_turn_and_another_one_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[int, str] = {}

    def named(calls: dict[str, Call], timer: Any, *rest: Any) -> Any:
        names.update({id(call): name for name, call in calls.items()})
        kept.append(calls)
        return right(calls, timer, *rest)

    kept: list[dict[str, Call]] = []
    right = kernel.interleaved
    monkeypatch.setattr(kernel, "interleaved", named)
    monkeypatch.setattr(kernel, "flex_calls", lambda *rest: ({}, "not here"))
    timer = SteppingTimer()
    rows = kernel.measure_kernel(256, 32, "float32", TINY, timer)
    order = [names[id(call)] for call in timer.measured]
    calls = ["dense", "uniform 1.0", "uniform 0.5", "ragged 1.0", "ragged 0.5"]
    assert order == calls + calls[1:] + calls[:1]
    assert [row["efficiency"] for row in rows] == [row["density"] for row in rows]
    assert rows[1]["flex_refused"] == "not here" and "one size" in rows[3]["flex_refused"]
    assert [generation.in_turn(["a", "b"], turn) for turn in (0, 1, 2)] == [["a", "b"], ["b", "a"], ["a", "b"]]


# ---------------------------------------------------------------------- rows


def test_the_kernel_part_writes_a_row_for_each_plan_and_density(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "flex_calls", lambda *rest: ({"flex 0.5": Call(lambda: None)}, ""))
    status, document = run(tmp_path / "rows.json", "--parts", "kernel")
    rows = document["rows"]
    assert status == 0 and document["machine"]["torch"] == torch.__version__ and document["machine"]["cpu"]
    assert [(row["plan"], row["asked_density"]) for row in rows] == list(itertools.product(kernel.KINDS, [1.0, 0.5]))
    assert all(EVERY_ROW | {"plan", "efficiency"} <= set(row) for row in rows)
    assert [row["flex_ms"] for row in rows] == [None, 1.0, None, None]
    assert rows[1]["flex_efficiency"] == rows[1]["density"] == 0.5


def test_the_op_part_writes_a_row_for_each_phase_and_what_each_op_costs(tmp_path: Path) -> None:
    status, document = run(tmp_path / "rows.json", "--parts", "op")
    rows = {row["call"]: row for row in document["rows"]}
    assert status == 0 and set(rows) == set(plot.CALLS)
    assert all(set(row) >= EVERY_ROW for row in rows.values())
    assert set(rows["svg2 warm"]["parts_ms"]) == {
        *("kmeans", "plan_top_p", "pooled_keys", "kept_mass", "block_sparse_attention")
    }
    assert "pooled_keys" not in rows["svg2 warm, uncorrected"]["parts_ms"]
    assert set(rows["adaspa first search"]["parts_ms"]) == {
        *("token_blocks", "attention_with_lse", "block_mass", "plan_top_k", "kept_mass")
    }
    assert rows["svg2 warm"]["routing_share"] == pytest.approx(8.0)  # four ops of two milliseconds
    assert rows["adaspa sparse"]["density"] == pytest.approx(0.5, abs=0.13)
    assert rows["adaspa first search"]["density"] == 1.0


def test_the_generation_part_has_a_row_for_each_method_by_the_default_schedule(tmp_path: Path) -> None:
    status, document = run(tmp_path / "rows.json", "--parts", "generation")
    svg2, adaspa = document["rows"]
    assert status == 0
    assert svg2["phases"] == ["dense"] * 4 + ["search"] + ["sparse"] * 15
    assert adaspa["phases"] == ["dense"] * 3 + ["search"] + ["sparse"] * 7 + ["refine"] + ["sparse"] * 8
    for row in document["rows"]:
        assert set(row) >= EVERY_ROW
        assert row["dense_ms"] == row["eager_ms"] == row["sparse_ms"] == 20.0
        assert row["speedup"] == row["speedup_of_sparse_steps"] == 1.0 and row["kernels"] == ["cpu"]
        assert [len(times) for times in row["step_ms"].values()] == [20, 5, 20]
        assert 0 < row["density"] < 0.6 and "dense_steps" not in row["options"]
    assert tables.tables(document).count("| 1.00 x | 1.00 x |") == 2


def test_a_model_that_stayed_dense_is_an_error_and_the_next_group_has_its_turn(tmp_path: Path) -> None:
    import dataclasses

    sizes = dataclasses.replace(TINY, options={"svg2": {}, "adaspa": {}})
    status, document = run(tmp_path / "rows.json", "--parts", "generation,op", sizes=sizes)
    failed, *others = document["rows"]
    assert status == 1 and "would not be faster than dense" in failed["error"]
    assert len(others) == 5 and "1 groups of rows failed" in document["summary"]


def test_groups_made_before_a_kill_are_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    kept = records.Records(path, {"cpu": "a"})
    kept.attempt({"part": "kernel"}, lambda: [{"density": 1.0}], str)

    def killed() -> list[records.Row]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept.attempt({"part": "kernel"}, killed, str)
    document = json.loads(path.read_text())
    (made,) = document["rows"]
    assert document["machine"] == {"cpu": "a"} and made.pop("load") == pytest.approx(0, abs=1e3)
    assert made == {"part": "kernel", "density": 1.0}


def test_the_cpu_has_the_name_that_the_system_gives(tmp_path: Path) -> None:
    listed = tmp_path / "cpuinfo"
    listed.write_text("processor\t: 0\nmodel name\t: A CPU @ 2 GHz\nmodel name\t: Another\n")
    assert records.cpu_name(listed) == "A CPU @ 2 GHz"
    assert records.cpu_name(tmp_path / "none")


# ---------------------------------------------------------------------- targets, picture, command line


def row(**changes: Any) -> records.Row:
    sound = {"part": "kernel", "plan": "uniform", "isa": "avx512_bf16", "dtype": "bfloat16", "tokens": 4096}
    return {**sound, "head_size": 64, "threads": 1, "density": 0.25, "efficiency": 1.2, **changes}


def test_a_target_is_reached_when_the_worst_row_does_by_what_the_cpu_multiplies() -> None:
    (line,) = targets.summary([row(), row(efficiency=1.6)])
    assert line.startswith("MISSED") and ">= 1.5" in line and "1 of 2 rows" in line and "worst 1.200" in line
    for other in (row(dtype="float32"), row(isa="avx512"), row(isa="avx2", efficiency=0.85)):
        (line,) = targets.summary([other])
        assert line.startswith("reached") and ">= 0.85" in line
    assert targets.summary([row(tokens=2048)]) == []


def test_routing_has_an_upper_bound_at_long_sequences() -> None:
    op = {"part": "op", "call": "svg2 warm", "speedup": 3.0}
    lines = targets.summary([row(**op, tokens=8192, routing_share=0.1), row(**op, tokens=16384, routing_share=0.2)])
    speedup, routing = lines
    assert speedup.startswith("reached SVG2") and "1 of 1 rows" in speedup
    assert routing.startswith("MISSED") and "worst 0.200" in routing and "N 16384" in routing


def test_the_rows_of_a_run_are_drawn(tmp_path: Path) -> None:
    path = tmp_path / "pictures" / "rows.png"
    status, document = run(tmp_path / "rows.json", "--parts", "op", "--plot", str(path))
    assert status == 0 and path.read_bytes().startswith(b"\x89PNG")
    larger = [{**made, "tokens": tokens} for made in document["rows"] for tokens in (4096, 8192, 16_384)]
    assert {made["tokens"] for made in plot.near_telling(larger)} == {8192}
    assert plot.near_telling([]) == []


def test_the_rows_of_a_run_become_tables(tmp_path: Path) -> None:
    shared = {
        "head_size": 64,
        "threads": 2,
        "tokens": 4096,
        "dtype": "bfloat16",
        "dense_ms": 9.0,
        "asked_density": 0.25,
    }
    made = [{**shared, "part": "kernel", "plan": plan, "efficiency": 1.2} for plan in kernel.KINDS]
    op = {"call": "svg2 warm", "density": 0.25, "sparse_ms": 3.0, "speedup": 3.0, "routing_share": 0.1}
    made += [{**shared, **op, "part": "op", "parts_share": {"kmeans": 0.1}}, {"part": "op", "error": "so"}]
    machine = {"cpu": "A CPU", "isa": "amx", "cores": 2, "torch": "9"}
    text = tables.tables({"machine": machine, "rows": made, "summary": ["reached all"]})
    assert text.startswith("A CPU, amx") and text.endswith("- reached all")
    assert "| bf16, D 64, N 4096 | 9.0 | 1.20 / 1.20 |  |" in text
    assert "| svg2 warm | bf16, D 64, N 4096, 2 threads | 0.25 | 9 | 3 | 3.00 x | 0.100 | kmeans 0.100 |" in text


def test_the_command_line_changes_the_sizes() -> None:
    chosen = cpu_attention.parse(["--threads", "3", "--lengths", "512,1024", "--dtypes", "float32"])
    sizes = cpu_attention.sizes_of(chosen, FULL)
    assert sizes.threads == (3,) and sizes.lengths == sizes.op_lengths == (512, 1024) and sizes.dtypes == ("float32",)
    assert cpu_attention.sizes_of(cpu_attention.parse([]), QUICK) == QUICK
    for wrong in (["--parts", "kernels"], ["--threads", "0"], ["--dtypes", "float16"]):
        with pytest.raises(SystemExit):
            cpu_attention.parse(wrong)
