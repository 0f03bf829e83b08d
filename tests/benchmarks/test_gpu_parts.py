"""The parts of the GPU benchmarks: plans, checks, timing, results, projections."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
from scripted_timer import ScriptedTimer

from benchmarks.gpu import checks, models, results, rivals, schedule, timing
from benchmarks.gpu.plans import KINDS, block_of, make_plan
from benchmarks.gpu.shapes import SHAPES, clustered_operands, random_operands
from benchmarks.gpu.site import Site
from sparse_compile.config import Config
from sparse_compile.phases import Phase
from sparse_compile.strategies.catalogue import load_strategy

CPU = torch.device("cpu")
JOINT = SHAPES["toy_joint"]
each_kind = pytest.mark.parametrize("kind", KINDS)


# ---------------------------------------------------------------------- plans


@each_kind
@pytest.mark.parametrize("density", [1.0, 0.5, 0.2])
def test_a_plan_has_about_the_density_asked_for_and_keeps_all_text(kind: str, density: float) -> None:
    plan = make_plan(kind, JOINT, density, CPU)
    kept, k_sizes, q_sizes = plan.kept(), plan.k_offsets.diff(), plan.q_offsets.diff()
    assert int(plan.q_offsets[..., -1].min()) == int(plan.k_offsets[..., -1].min()) == JOINT.tokens
    assert not kept[..., -1].any() and int(q_sizes[..., -1].sum()) == 0
    text_keys = JOINT.k_clusters if kind == "ragged" else -(-JOINT.video // block_of(kind, JOINT))
    text_rows = JOINT.q_clusters if kind == "ragged" else text_keys
    assert int(k_sizes[0, 0, text_keys:].sum()) == int(q_sizes[0, 0, text_rows:].sum()) == JOINT.text
    assert kept[..., :-1, text_keys:-1].all() and kept[..., text_rows:-1, :-1].all()
    largest = float(k_sizes[..., :-1].max()) / JOINT.tokens
    text_share = 1 - (JOINT.video / JOINT.tokens) ** 2
    expected = density * (1 - text_share) + text_share
    assert float(plan.density().mean()) == pytest.approx(expected, abs=0.6 * largest)


@pytest.mark.parametrize("kind", ["uniform64", "uniform128"])
def test_every_row_of_a_uniform_plan_keeps_equally_many_blocks(kind: str) -> None:
    plan = make_plan(kind, JOINT, 0.4, CPU)
    video = -(-JOINT.video // block_of(kind, JOINT))
    counts = plan.kept()[0, :, :video, :video].sum(-1)
    assert int(counts.min()) == int(counts.max()) == round(0.4 * video)
    assert plan.q_order is None and int(plan.k_offsets.diff().max()) == block_of(kind, JOINT)


def test_a_ragged_plan_orders_every_token_once_and_repeats_itself() -> None:
    plan, again, other = (make_plan("ragged", JOINT, 0.4, CPU, seed) for seed in (0, 0, 1))
    for side in (plan.query_side, plan.key_side):
        assert checks.wrong_groups(side, JOINT.tokens) is None
    assert torch.equal(plan.keep, again.keep) and not torch.equal(plan.k_order, other.k_order)
    assert plan.k_offsets.diff().unique().numel() > 4


# ---------------------------------------------------------------------- checks


def joint_site() -> tuple[Site, tuple[torch.Tensor, ...]]:
    operands = random_operands(JOINT, CPU, torch.float32)
    return Site(JOINT, operands, "cpu"), operands


@each_kind
@pytest.mark.parametrize("coupled", [None, False, True])
def test_a_right_attention_passes_and_a_wrong_one_does_not(kind: str, coupled: bool | None) -> None:
    site, (q, k, v) = joint_site()
    plan = make_plan(kind, JOINT, 0.4, CPU)
    pooled = None if coupled is None else site.pooled_keys(plan, coupled)
    out, lse = site.attention(plan, pooled)

    def verdict(out: torch.Tensor, lse: torch.Tensor, plan=plan, pooled=pooled) -> str | None:
        return checks.wrong_attention(q, k, v, plan, JOINT.scale, out, lse, pooled)

    assert verdict(out, lse) is None
    assert "output" in str(verdict(out * 1.01, lse))
    assert "output" in str(verdict(torch.full_like(out, math.nan), lse))
    assert "log-sum-exp" in str(verdict(out, lse + 1e-2))
    assert verdict(out, lse, plan=make_plan(kind, JOINT, 0.4, CPU, seed=1)) is not None
    assert (verdict(out, lse, pooled=None) is None) == (coupled is None)


def test_dense_attention_is_checked_without_a_plan() -> None:
    site, (q, k, v) = joint_site()
    out = site.attention_with_lse()
    assert checks.wrong_attention(q, k, v, None, JOINT.scale, out, site.lse) is None
    assert checks.wrong_attention(q, k, v, None, JOINT.scale, out.roll(1, 2), site.lse) is not None


def test_groups_means_and_masses_are_checked() -> None:
    operands = clustered_operands(JOINT, CPU, torch.float32)
    site = Site(JOINT, operands, "cpu")
    plan = site.plan_top_p(site.kmeans(restart=True), 0.4)
    pooled = site.pooled_keys(plan)
    assert checks.wrong_means(site.k, plan.key_side, pooled.mean_k) is None
    assert checks.wrong_means(site.k, plan.key_side, pooled.mean_k + 0.01) is not None
    assert checks.wrong_groups(plan.key_side, JOINT.tokens + 1) is not None
    assert plan.k_order is not None
    plan.k_order[0, 0, 0] = plan.k_order[0, 0, 1]
    assert checks.wrong_groups(plan.key_side, JOINT.tokens) is not None
    site.attention_with_lse()
    side, mass = site.block_plan(site.keep).query_side, site.block_mass(fresh=True)
    assert checks.wrong_mass(mass, side) is None
    assert checks.wrong_mass(mass * 1.02, side) is not None


# ---------------------------------------------------------------------- rivals


def test_the_dense_kernels_that_run_here_give_the_attention() -> None:
    q, k, v = random_operands(JOINT, CPU, torch.float32)
    running, refused = rivals.dense_rivals(q, k, v, 0.3)
    assert set(running) | set(refused) == set(rivals.SDPA_BACKENDS) and running
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)
    for call in running.values():
        torch.testing.assert_close(call.run(), expected)


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1])
def test_rows_of_the_flex_mask_keep_equally_many_different_blocks_and_the_last(density: float) -> None:
    mask = rivals.flex_mask(2, 1000, density, CPU)
    count = max(1, round(density * 8))
    assert mask.full_kv_num_blocks.unique().tolist() == [count] and not mask.kv_num_blocks.any()
    kept = mask.full_kv_indices[..., :count]
    assert bool((kept.diff(dim=-1) > 0).all()) and bool((kept[..., -1] == 7).all())


@pytest.mark.slow
def test_flex_attention_attends_by_its_mask() -> None:
    q, k, v = random_operands(JOINT, CPU, torch.float32)
    mask = rivals.flex_mask(JOINT.heads, JOINT.tokens, 0.6, CPU)
    allowed = torch.zeros(JOINT.heads, JOINT.tokens, JOINT.tokens, dtype=torch.bool)
    for head in range(JOINT.heads):
        for row in range(3):
            count = int(mask.full_kv_num_blocks[0, head, row])
            for column in mask.full_kv_indices[0, head, row, :count].tolist():
                allowed[head, 128 * row : 128 * row + 128, 128 * column : 128 * column + 128] = True
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=0.3)
    torch.testing.assert_close(rivals.flex_rival(q, k, v, 0.3, 0.6).run(), expected)


# ---------------------------------------------------------------------- timing


def test_calls_take_turns_and_none_always_follows_the_same_one() -> None:
    calls = {name: timing.Call(lambda: None) for name in "abc"}
    timer = ScriptedTimer()
    samples = timing.interleaved(calls, timer, seconds=10, repeats=6)
    names = {id(call): name for name, call in calls.items()}
    order = "".join(names[id(call)] for call in timer.measured)
    assert order == "abcbcacab" * 2
    assert all(sample.runs == 6 for sample in samples.values())


def test_long_calls_are_repeated_as_often_as_the_seconds_allow() -> None:
    calls = {"slow": timing.Call(lambda: None)}
    slow = ScriptedTimer(lambda call: 500.0)
    assert timing.interleaved(calls, slow, seconds=4, repeats=30)["slow"].runs == 8
    assert timing.interleaved(calls, slow, seconds=1, repeats=30)["slow"].runs == timing.FEWEST_ROUNDS
    assert timing.interleaved(calls, slow, seconds=1, repeats=2)["slow"].runs == 2


def test_a_sample_is_the_median_and_a_range_that_leaves_out_the_ends() -> None:
    sample = timing.Sample.of([*map(float, range(1, 21)), 1000.0])
    assert sample == (11.0, 3.0, 19.0, 21)
    assert timing.Sample.of([2.0]) == (2.0, 2.0, 2.0, 1)


def test_what_comes_before_a_call_is_not_timed_and_comes_before_each_run() -> None:
    seen: list[str] = []
    call = timing.Call(lambda: seen.append("run"), lambda: seen.append("before"))
    timing.HostTimer().warm_up(call)
    assert seen == ["before", "run"] * 2
    assert timing.peak_extra_bytes(call, CPU) is None


class FakeEvent:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    def elapsed_time(self, other: FakeEvent) -> float:
        return 3.0


def test_the_cuda_timer_gives_the_host_a_head_start_and_reads_events(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(timing, "FLUSH_BYTES", 16)
    runs: list[int] = []
    call = timing.Call(lambda: runs.append(1))
    timer = timing.CudaTimer(CPU)
    assert timer.warm_up(call).milliseconds == 3.0
    assert len(runs) == 3
    assert timer.measure(call, head_start=2.0) == 3.0
    assert slept[-1] == 2 * timing.CYCLES_PER_MILLISECOND


def test_peak_memory_counts_what_a_call_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1700)
    assert timing.peak_extra_bytes(timing.Call(lambda: None), torch.device("cuda")) == 700


# ---------------------------------------------------------------------- results


def test_rows_are_in_the_file_as_soon_as_they_are_made_also_failed_ones(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.json"
    kept = results.Results(path, {"gpu": None}, CPU)
    kept.attempt({"shape": "a"}, lambda row: row.update(value=1))
    assert json.loads(path.read_text()) == [{"gpu": None, "shape": "a", "value": 1}]
    row = kept.attempt({"shape": "b"}, lambda row: row.update(value=1 / 0))
    assert row["error"].startswith("ZeroDivisionError")
    assert [row["shape"] for row in json.loads(path.read_text())] == ["a", "b"]
    assert kept.failed == 1


def test_the_machine_is_described_with_what_nvidia_smi_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text('#!/bin/sh\ncase "$1" in *driver*) echo 580.1;; *) echo "1980, 3201, 512.5, 60";; esac\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    machine = results.describe_machine("benchmarks.gpu_kernels", ["--json", "x y"], torch.device("cuda"))
    assert machine["gpu"] == "A GPU" and machine["architecture"] == "sm_90" and machine["driver"] == "580.1"
    assert machine["command"] == "python -m benchmarks.gpu_kernels --json 'x y'"
    state = results.describe_state(torch.device("cuda"))
    assert state == {"clock_sm_mhz": "1980", "clock_memory_mhz": "3201", "power_w": "512.5", "temperature_c": "60"}
    script.write_text("#!/bin/sh\nexit 9\n")
    assert set(results.describe_state(torch.device("cuda")).values()) == {None}


# ---------------------------------------------------------------------- projections and models


def test_the_projection_of_adaspa_is_the_cost_that_its_document_states() -> None:
    phases = schedule.phases_of(load_strategy("adaspa"), Config.from_options({"method": "adaspa"}, environ={}), 50)
    assert schedule.first_steps(phases) == {Phase.DENSE: 0, Phase.SEARCH: 9, Phase.SPARSE: 10, Phase.REFINE: 29}
    units = {Phase.DENSE: 1.0, Phase.SEARCH: 1.5, Phase.SPARSE: 0.2, Phase.REFINE: 0.7}  # docs/adaspa.md, section 11
    assert schedule.projected_speedup(phases, 1.0, units, 40, 0) == pytest.approx(50 / 19)
    assert schedule.projected_speedup(phases, 1.0, units, 40, 40) == pytest.approx(1.0)


def test_svg2_searches_once_and_layers_kept_dense_cost_the_dense_time() -> None:
    config = Config.from_options({}, environ={})
    phases = schedule.phases_of(load_strategy("svg2"), config, 50)
    assert [phases.count(phase) for phase in (Phase.DENSE, Phase.SEARCH, Phase.SPARSE)] == [10, 1, 39]
    assert [schedule.layers_kept_dense(layers, config) for layers in (30, 40, 60)] == [0, 1, 1]
    by_phase = {Phase.DENSE: 2.0, Phase.SEARCH: 4.0, Phase.SPARSE: 1.0}
    total = 10 * 4 * 2 + (3 * 4 + 2) + 39 * (3 * 1 + 2)
    assert schedule.projected_speedup(phases, 2.0, by_phase, 4, 1) == pytest.approx(50 * 4 * 2 / total)


def test_as_many_layers_as_fit_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    size, device = models.MODELS["wan_720p"], torch.device("cuda")
    for gib, least, most in ((139, 40, 40), (40, 20, 39), (2, 0, 0)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, gib=gib: (gib * 2**30, 2**40))
        assert least <= models.layers_that_fit(size, device, torch.bfloat16) <= most


@pytest.mark.parametrize("name", ["wan_720p", "hunyuan_720p", "wan_480p"])
def test_models_have_the_sizes_of_the_real_ones_and_trace_at_full_length(name: str) -> None:
    size, meta = models.MODELS[name], torch.device("meta")
    with meta:
        model = models.VideoTransformer(size, 1)
    inputs = {"hidden_states": (1, size.video, 64), "encoder_hidden_states": (1, size.text, 128), "timestep": (1, 256)}
    out = model(**{key: torch.empty(shape, device=meta) for key, shape in inputs.items()})
    assert out.shape == (1, size.video, 64)
    shape = SHAPES[name]
    assert (size.heads, size.dim // size.heads) == (shape.heads, shape.size)
    assert size.video + (size.text if size.joint else 0) == shape.tokens


# ---------------------------------------------------------------------- the script


def run_script(*parts: str, **variables: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    environment = {"PATH": "/usr/bin:/bin", **variables}
    command = ["bash", str(root / "benchmarks" / "run_on_gpu.sh"), *parts]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_the_script_goes_on_after_a_part_that_failed_and_fails_at_the_end(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *gpu_step*) echo measured; exit 0;; *gpu_kernels*) exit 3;; esac\n')
    python.chmod(0o755)
    out = tmp_path / "out"
    done = run_script("kernels", "step", PYTHON=str(python), OUT=str(out))
    assert done.returncode == 1
    assert "kernels: exit status 3" in done.stdout and "step: exit status 0" in done.stdout
    assert "failed: kernels" in done.stdout
    assert (out / "step.txt").read_text() == "measured\n"
    assert run_script("step", PYTHON=str(python), OUT=str(out)).returncode == 0


def test_the_script_refuses_parts_that_it_does_not_know(tmp_path: Path) -> None:
    done = run_script("kernel", OUT=str(tmp_path))
    assert done.returncode == 2 and "unknown part 'kernel'" in done.stderr
