"""What was measured is used, and nothing else."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from sparse_compile.cli import tune
from sparse_compile.errors import SparseAttentionError
from sparse_compile.kernels import tuning

GPU = "some GPU"


class Row(NamedTuple):
    """A configuration."""

    block: int
    deep: bool = False


ROWS = (Row(128), Row(64, True), Row(32))


class OnGpu:
    """As much of a tensor on a GPU as the choice looks at."""

    device = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tuning, "path", lambda: tmp_path / "cache" / tuning.FILE)
    monkeypatch.setattr(tuning, "gpu_name", lambda index: GPU)
    tuning.measurements.cache_clear()
    return tmp_path / "cache" / tuning.FILE


def pick() -> Row:
    return tuning.chosen("kmeans", "bf16, 64", ROWS, OnGpu())  # type: ignore[arg-type]


def test_without_a_measurement_the_first_of_the_table_is_used(one_gpu: Path) -> None:
    assert pick() == ROWS[0] and not one_gpu.exists()


def test_a_measurement_is_used_and_kept_beside_others() -> None:
    tuning.save(GPU, {tuning.entry("kmeans", "bf16, 64"): ROWS[1]})
    tuning.save(GPU, {tuning.entry("kmeans", "bf16, 128"): ROWS[2]})
    assert pick() == ROWS[1]


def test_on_a_cpu_nothing_is_read(one_gpu: Path) -> None:
    tuning.save(GPU, {tuning.entry("kmeans", "bf16, 64"): ROWS[1]})
    assert tuning.chosen("kmeans", "bf16, 64", ROWS, torch.empty(1)) == ROWS[0]


@pytest.mark.parametrize("text", ["", "[]", "{broken", json.dumps({GPU: 3})])
def test_a_file_that_cannot_be_read_is_no_measurement(one_gpu: Path, text: str) -> None:
    one_gpu.parent.mkdir()
    one_gpu.write_text(text)
    assert pick() == ROWS[0]
    tuning.save(GPU, {tuning.entry("kmeans", "bf16, 64"): ROWS[2]})
    assert pick() == ROWS[2]


def test_other_sources_another_gpu_and_another_triton_make_it_void(monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.save(GPU, {tuning.entry("kmeans", "bf16, 64"): ROWS[1]})
    for name, value in (("sources_of", "other"), ("gpu_name", "another GPU"), ("identity", "another triton")):
        with monkeypatch.context() as patched:
            patched.setattr(tuning, name, lambda argument, value=value: value)
            tuning.measurements.cache_clear()
            assert pick() == ROWS[0], name
        tuning.measurements.cache_clear()
    assert pick() == ROWS[1]


def test_a_configuration_that_left_the_table_is_not_used() -> None:
    tuning.save(GPU, {tuning.entry("kmeans", "bf16, 64"): Row(16)})
    assert pick() == ROWS[0]


def test_the_fastest_configuration_that_runs_wins(capsys: pytest.CaptureFixture[str]) -> None:
    from triton.runtime.errors import OutOfResources

    def call(config: Row) -> None:
        if config == ROWS[0]:
            raise OutOfResources(2, 1, "shared memory")

    def timer(run: object) -> float:
        run()  # type: ignore[operator]
        return float(next(times))

    times = iter((3, 2))
    found = tune.measured(tune.Trial("entry", ROWS, call), timer)
    assert found == {ROWS[1]: 3.0, ROWS[2]: 2.0}
    assert "does not run: (128, False): out of resource: shared memory" in capsys.readouterr().out


def test_tuning_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SparseAttentionError, match="tuning needs a CUDA device"):
        tune.run(argparse.Namespace(sizes=[64]))
