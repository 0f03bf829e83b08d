"""``sparse-attn doctor``: each problem is found, named, and changes the exit code."""

import json
import tomllib
from pathlib import Path

import pytest
import torch

from sparse_compile.cli import caches, doctor
from sparse_compile.cli.main import main
from sparse_compile.kernels.cpp import build
from sparse_compile.kernels.cpp.isa import detected
from sparse_compile.oldest_versions import OLDEST


def test_a_sound_installation_has_no_problem(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for subject in ("python", "torch", "triton", "diffusers", "cpu", "backend"):
        assert f"ok     {subject} " in printed
    assert str(torch.__version__) in printed


def test_an_unknown_variable_is_a_problem(monkeypatch, capsys):
    monkeypatch.setenv("SPARSE_ATTN_TOPP", "0.5")
    assert main(["doctor"]) == 1
    assert "wrong  SPARSE_ATTN_TOPP" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({}, ""),
        ({"SPARSE_ATTN_TOP_P": "0.8"}, ""),
        ({"SPARSE_ATTN_BACKEND": "xformers"}, ""),
        ({"UNRELATED": "1"}, ""),
        ({"SPARSE_ATTN_TOP_P": "1.5"}, "must be none or a number in (0, 1]"),
        ({"SPARSE_ATTN_DENSTY": "0.5"}, "No such option"),
        ({"SPARSE_ATTN_PRESET": "best"}, "quality, balanced or fast"),
        ({"SPARSE_ATTN_SPARSITY": "0.5"}, ""),
        ({"SPARSE_ATTN_METHOD": "adaspa", "SPARSE_ATTN_SPARSITY": "0.5"}, ""),
        ({"SPARSE_ATTN_METHOD": "svg2", "SPARSE_ATTN_SPARSITY": "0.5"}, "Only method adaspa reads it"),
    ],
    ids=[
        "none",
        "known",
        "another project's",
        "another prefix",
        "bad value",
        "unknown",
        "later",
        "of a method chosen in the code",
        "of the method chosen",
        "of the other method",
    ],
)
def test_variables_are_checked_by_name_and_value(variables, problem):
    problems = [finding.problem for finding in doctor.check_environment(variables) if finding.problem]
    assert bool(problems) == bool(problem)
    assert all(problem in found for found in problems)


def test_a_missing_backend_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(torch.compiler, "list_backends", lambda: ["inductor"])
    assert "pip install -e ." in doctor.check_backend().problem


def test_the_backend_loads():
    assert not doctor.check_backend().problem


def test_a_missing_compiler_is_a_problem(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert "install g++" in doctor.check_cpp_compiler({}).problem
    assert "my-cxx" in doctor.check_cpp_compiler({"CXX": "my-cxx -O2"}).value


def test_the_findings_are_printed_as_json_too(capsys):
    assert main(["doctor", "--json"]) == 0
    findings = {finding["subject"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert findings["torch"] == {"subject": "torch", "value": str(torch.__version__), "problem": ""}
    assert "MiB" in findings["inductor cache"]["value"]


def test_the_least_versions_are_those_of_the_package():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["diffusers"]]
    for name, version in OLDEST.items():
        assert f"{name}>={'.'.join(map(str, version))}" in requirements


def test_a_missing_package_is_none_and_an_old_diffusers_is_a_problem(monkeypatch):
    installed = {"diffusers": "0.35.2"}
    monkeypatch.setattr(doctor, "_version", lambda name: installed.get(name, "not installed"))
    problems = {finding.subject: finding.problem for finding in doctor.check_versions() if finding.problem}
    assert problems == {"diffusers": "diffusers >= 0.42 is needed: pip install --upgrade diffusers"}


def test_variables_that_steer_torch_compile_are_shown():
    shown = doctor.check_environment({"TORCH_COMPILE_DISABLE": "1", "TORCHINDUCTOR_FREEZING": "1", "PATH": "/bin"})
    assert [finding.subject for finding in shown[1:]] == ["TORCHINDUCTOR_FREEZING", "TORCH_COMPILE_DISABLE"]


def test_a_cache_of_ones_own_is_sound_and_measured(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "kernel.so").write_bytes(bytes(3 * caches.MEBIBYTE))
    folder = caches.examine_cache(lambda: tmp_path, "SOME_DIR")
    assert not folder.problem and folder.mebibytes == pytest.approx(3, abs=0.1)
    assert str(folder).endswith(f" of {folder.owner}, 3 MiB")


def test_a_cache_that_is_not_there_yet_is_made_later(tmp_path):
    folder = caches.examine_cache(lambda: tmp_path / "a" / "b", "SOME_DIR")
    assert not folder.problem and str(folder).endswith("b, not there yet")


def test_a_cache_that_cannot_be_used_is_a_problem(tmp_path, monkeypatch):
    def refused():
        raise PermissionError(13, "Permission denied", "/somewhere")

    assert "It cannot be made: Permission denied" in caches.examine_cache(refused, "SOME_DIR").problem
    (tmp_path / "file").write_text("")
    assert "It is no folder" in caches.examine_cache(lambda: tmp_path / "file", "SOME_DIR").problem
    monkeypatch.setattr(caches, "_owner", lambda path: ("someone", False))
    foreign = caches.examine_cache(lambda: tmp_path, "SOME_DIR")
    assert "another user" in foreign.problem and "someone" in str(foreign)
    monkeypatch.setattr(caches.os, "access", lambda path, mode: False)
    for path in (tmp_path, tmp_path / "new"):
        problem = caches.examine_cache(lambda path=path: path, "SOME_DIR").problem
        assert "cannot be written to. Set SOME_DIR to a folder of your own." in problem


def test_a_cpu_without_its_kernels_has_the_reason_and_no_problem(monkeypatch):
    monkeypatch.setattr(build, "why_not", lambda: "g++ failed, out of memory: set CXX")
    cpu = doctor.check_devices()[0]
    assert cpu.value.endswith(" thread(s), plain torch: g++ failed, out of memory: set CXX")
    assert not cpu.problem


def test_an_old_torch_is_a_problem(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.1")
    assert [finding.subject for finding in doctor.check_versions() if finding.problem] == ["torch"]


def test_each_gpu_is_listed_with_the_kernels_that_run_there(monkeypatch):
    capabilities = [(9, 0), (7, 5)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    number = {0: 0, 1: 1, torch.device("cuda", 0): 0, torch.device("cuda", 1): 1}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[number[device]])
    monkeypatch.setattr("triton.__version__", "3.6.0")
    cpu, new, old = doctor.check_devices()
    assert cpu.value.endswith(f"cpu kernels for {detected().name}, built when a model first needs them")
    assert new.subject == "cuda:0" and new.value == "Some GPU, sm_90, triton 3.6.0 kernels"
    assert old.value.startswith("Some GPU, sm_75, plain torch: ") and "kernels need sm_80 or newer" in old.value
    assert not any(finding.problem for finding in (new, old))
