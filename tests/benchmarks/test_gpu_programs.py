"""The GPU benchmarks run through at toy sizes on a CPU, with a timer that says what each call took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted_timer import ScriptedTimer

from benchmarks import gpu_kernels, gpu_step
from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.site import Site

TOY = ["--device", "cpu", "--dtype", "float32", "--repeats", "2", "--seconds", "0.01"]


def kernel_rows(path: Path, *arguments: str, timer: Any = None) -> tuple[int, list[dict[str, Any]]]:
    given = ["--json", str(path), "--no-flex", "--densities", "0.3", *TOY, *arguments]
    status = gpu_kernels.main(given, timer or ScriptedTimer())
    return status, json.loads(path.read_text())


def test_the_most_telling_rows_come_first_and_every_row_comes_once() -> None:
    shapes = [SHAPES["wan_720p"], SHAPES["hunyuan_720p"]]
    kinds = ["ragged", "uniform64"]
    made = list(gpu_kernels.cases(shapes, kinds, [1.0, 0.3, 0.1]))
    assert [(case.shape.name, case.plan, case.density) for case in made[:4]] == [
        ("wan_720p", "ragged", 0.3),
        ("wan_720p", "uniform64", 0.3),
        ("wan_720p", "ops", 0.3),
        ("hunyuan_720p", "ragged", 0.3),
    ]
    assert len(made) == len(set(made)) == 2 * 2 * 3 + 2


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_the_kernel_benchmark_writes_a_row_for_each_plan_and_the_ops(tmp_path: Path, kernel: str) -> None:
    status, rows = kernel_rows(tmp_path / "rows.json", "--shapes", "toy_joint", "--kernel", kernel)
    assert status == 0
    assert [row["plan"] for row in rows] == ["ragged", "uniform64", "uniform128", "ops"]
    for row in rows:
        assert row["torch"] == torch.__version__ and "--shapes toy_joint" in row["command"]
        assert row["ms"]["sparse_none"] == row["dense_ms"] == row["speedup"] == 1.0
        assert row["efficiency"] == row["density"]
        assert 0.2 < row["density"] < 0.5
    assert {"sparse_none", "sparse_pooled", "sparse_coupled", "flash"} == set(rows[0]["ms"])
    ops = rows[-1]
    assert ops["routing_share"] == 4.0 and ops["search_share"] == 2.0
    timed = {"kmeans_restart", "kmeans_warm", "plan_top_p", "plan_top_k", "block_mass_fresh", "block_mass_kept"}
    timed |= {"attention_with_lse", "pooled_keys", "kept_mass", "svg2_call", "adaspa_call"}
    assert timed <= set(ops["ms"])


def test_a_wrong_result_is_reported_and_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Site.attention

    def wrong(self: Site, plan: Any, pooled: Any = None, mass: Any = None) -> Any:
        out, lse = right(self, plan, pooled, mass)
        return (out, lse) if pooled is None else (out * 1.1, lse)

    monkeypatch.setattr(Site, "attention", wrong)
    timer = ScriptedTimer()
    status, rows = kernel_rows(tmp_path / "rows.json", "--shapes", "toy", timer=timer)
    assert status == 1 and not timer.measured
    assert all("output: relative error" in row["wrong"] and "ms" not in row for row in rows)


def test_rows_made_before_a_kill_are_in_the_file(tmp_path: Path) -> None:
    timer = ScriptedTimer()

    def killed_in_the_second_row(call: Any) -> float:
        if len(timer.measured) > 12:
            raise KeyboardInterrupt
        return 1.0

    timer.milliseconds = killed_in_the_second_row
    path = tmp_path / "rows.json"
    with pytest.raises(KeyboardInterrupt):
        kernel_rows(path, "--shapes", "toy", timer=timer)
    assert [row["plan"] for row in json.loads(path.read_text())] == ["ragged"]


def test_later_rows_of_a_shape_time_only_its_fastest_dense_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.gpu.timing import Call

    speeds = {name: Call(lambda: None) for name in ("a", "b", "c")}
    monkeypatch.setattr(gpu_kernels, "dense_rivals", lambda *operands: (speeds, {"d": "not here"}))
    slow = {id(speeds["a"]): 9.0, id(speeds["b"]): 2.0, id(speeds["c"]): 4.0}
    timer = ScriptedTimer(lambda call: slow.get(id(call), 1.0))
    _, rows = kernel_rows(tmp_path / "rows.json", "--shapes", "toy", "--plans", "uniform", timer=timer)
    first, second, _ = rows
    assert first["dense"] == "b" and first["dense_ms"] == 2.0 and "a" in first["ms"]
    assert "a" not in second["ms"] and "c" in second["ms"] and second["refused"] == {"d": "not here"}


def test_unknown_names_are_refused() -> None:
    for wrong in (["--shapes", "wan"], ["--plans", "regular"], ["--densities", "half"]):
        with pytest.raises(SystemExit):
            gpu_kernels.main(wrong)


def test_without_a_gpu_both_programs_say_so(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_kernels.main([]) == gpu_step.main([]) == 2
    assert capsys.readouterr().out.count("no CUDA device") == 2


def step_rows(path: Path, *arguments: str, timer: Any = None) -> tuple[int, list[dict[str, Any]]]:
    given = ["--json", str(path), "--lowering", "eager", *TOY, *arguments]
    status = gpu_step.main(given, timer or ScriptedTimer())
    return status, json.loads(path.read_text())


@pytest.mark.parametrize("model", ["toy_wan", pytest.param("toy_hunyuan", marks=pytest.mark.slow)])
def test_blocks_of_both_models_are_measured_in_every_phase(tmp_path: Path, model: str) -> None:
    status, rows = step_rows(tmp_path / "rows.json", "--models", model, "--rows", "block")
    assert status == 0
    svg2, adaspa = rows
    assert svg2["phases"] == {"dense": 10, "search": 1, "sparse": 39}
    assert adaspa["phases"] == {"dense": 9, "search": 1, "sparse": 39, "refine": 1}
    for row in rows:
        assert set(row["ms"]) == {"dense model", *row["phases"]}
        assert row["ms"]["sparse"] == 0.5  # of one block of two
        assert row["speedup_50_steps"] == pytest.approx(1.0)
        assert row["sparse_sites"] == 2 and row["implementations"] == ["cpu"]
        assert 0.2 < row["density"] < 0.4


def test_a_whole_step_is_measured_block_by_block_with_the_default_dense_layers(tmp_path: Path) -> None:
    status, (row,) = step_rows(tmp_path / "rows.json", "--models", "toy_wan", "--rows", "step", "--methods", "adaspa")
    assert status == 0
    assert row["layers"] == row["layers_total"] == row["sparse_sites"] == 5
    assert row["dense_layers"] == 0 and "dense_layers" not in row["options"]
    assert row["ms"]["refine"] == 1.0


def test_a_model_that_did_not_become_sparse_is_an_error_and_not_a_row_of_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_step, "TOY_OPTIONS", {"adaspa": {}})
    status, (row,) = step_rows(tmp_path / "rows.json", "--models", "toy_wan", "--rows", "block", "--methods", "adaspa")
    assert status == 1
    assert "expected the phases" in row["error"] and "too few video tokens" in row["error"] and "ms" not in row


def test_whole_steps_of_small_models_come_first() -> None:
    chosen = gpu_step.parse(["--methods", "svg2"])
    order = [(kind, size.name) for kind, size, _ in gpu_step.cases(chosen)]
    assert order[:3] == [("block", name) for name in ("wan_720p", "hunyuan_720p", "wan_480p")]
    assert order[3] == ("step", "wan_480p")


def test_the_twin_of_a_model_shares_its_tensors_and_nothing_else() -> None:
    size = gpu_step.MODELS["toy_wan"]
    model = gpu_step.build(size, 2, torch.device("cpu"), torch.float32)
    twin = gpu_step.twin_of(model)
    assert twin is not model and twin.blocks[0] is not model.blocks[0]
    pairs = zip(model.state_dict(keep_vars=True).items(), twin.state_dict(keep_vars=True).items(), strict=True)
    assert (
        all(one == other for (_, one), (_, other) in pairs if one is not other) and twin.rotary_cos is model.rotary_cos
    )
