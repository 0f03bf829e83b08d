"""``sparse-attn doctor``: is everything there that the backend needs?"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sparse_compile.compiler.kernel_choice import why_not_triton
from sparse_compile.config import ENV_PREFIX, FOREIGN_VARIABLES, Config, belongs, declared_options
from sparse_compile.errors import SparseAttentionError
from sparse_compile.kernels.cpp import build, isa

BACKEND = "sparse_attn"
OLDEST_TORCH = (2, 11)


@dataclass(frozen=True)
class Finding:
    """One line of the report. A problem says what is wrong and what to do."""

    subject: str
    value: str
    problem: str = ""

    def __str__(self) -> str:
        line = f"{'wrong' if self.problem else 'ok':<6} {self.subject:<16} {self.value}"
        return f"{line}\n{'':23} {self.problem}" if self.problem else line


def run(_: argparse.Namespace) -> int:
    """Print every finding; 1 when one is a problem."""
    findings = [
        *check_versions(),
        *check_devices(),
        check_cpp_compiler(os.environ),
        check_backend(),
        *check_environment(os.environ),
    ]
    for finding in findings:
        print(finding)
    problems = sum(bool(finding.problem) for finding in findings)
    print(f"\n{problems} problem(s) found." if problems else "\nEverything the backend needs is there.")
    return 1 if problems else 0


def check_versions() -> list[Finding]:
    """Python and the packages that matter; only torch can be too old."""
    installed = str(torch.__version__)
    major, minor = (int(part) for part in installed.split(".")[:2])
    wanted = ".".join(map(str, OLDEST_TORCH))
    problem = f"torch >= {wanted} is needed: pip install --upgrade torch" if (major, minor) < OLDEST_TORCH else ""
    return [
        Finding("python", platform.python_version()),
        Finding("sparse_compile", _version("sparse_compile")),
        Finding("torch", installed, problem),
        Finding("triton", _version("triton")),
        Finding("diffusers", _version("diffusers")),
    ]


def check_devices() -> list[Finding]:
    """What torch can compute on, and which kernels run there; plain torch is slow, but no problem of the backend."""
    cpu = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)"
    kernels = f"cpu kernels for {isa.detected().name}"
    if torch.cuda.is_available():
        kernels += ", built when a model first needs them"
    elif reason := build.why_not():  # builds them if they were not, as their first use would
        kernels = f"plain torch: {reason}"
    findings = [Finding("cpu", f"{cpu}, {kernels}")]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        reason = why_not_triton(torch.device("cuda", index))
        kernels = f"plain torch: {reason}" if reason else f"triton {_triton_version()} kernels"
        findings.append(Finding(f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}, {kernels}"))
    return findings


def check_cpp_compiler(environ: Mapping[str, str]) -> Finding:
    """Inductor writes C++ for the CPU."""
    candidates = [environ["CXX"]] if environ.get("CXX") else ["g++", "clang++"]
    for name in candidates:
        if path := shutil.which(name.split()[0]):
            return Finding("c++ compiler", path)
    return Finding(
        "c++ compiler",
        f"not found ({', '.join(candidates)})",
        "torch.compile needs one on the CPU: install g++, or set CXX.",
    )


def check_backend() -> Finding:
    """Does ``torch.compile(model, backend="sparse_attn")`` find us?"""
    if BACKEND not in torch.compiler.list_backends():
        return Finding(
            "backend",
            f"{BACKEND!r} is not among torch's backends",
            "The entry point is missing: install the package (pip install -e . in a checkout).",
        )
    (entry_point,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name=BACKEND)
    try:
        entry_point.load()
    except (ImportError, AttributeError) as error:
        return Finding("backend", entry_point.value, f"It does not load: {error}. Install the package again.")
    return Finding("backend", f"{BACKEND} = {entry_point.value}")


def check_environment(environ: Mapping[str, str]) -> list[Finding]:
    """The ``SPARSE_ATTN_*`` variables: unknown names and values that are refused."""
    ours = {name: value for name, value in environ.items() if name.startswith(ENV_PREFIX)}
    known = {ENV_PREFIX + name.upper() for name in declared_options()} | FOREIGN_VARIABLES
    findings = []
    for name in sorted(ours):
        if name not in known:
            findings.append(Finding(name, ours[name], "No such option; see the options table in README.md."))
            continue
        option = declared_options().get(name.removeprefix(ENV_PREFIX).lower())
        # The method may be chosen in the code, so a variable alone is read as its own method reads it.
        method = {} if option is None or option.method is None else {"method": option.method}
        problem = _refusal(method, {name: ours[name]})
        chosen = ours.get(ENV_PREFIX + "METHOD")
        if not problem and chosen is not None and not belongs(name.removeprefix(ENV_PREFIX).lower(), chosen):
            problem = f"Only method {method['method']} reads it, and SPARSE_ATTN_METHOD is {chosen}."
        findings.append(Finding(name, ours[name], problem))
    return findings or [Finding("environment", f"no {ENV_PREFIX}* variable is set")]


def _triton_version() -> str:
    """As the module tells it, which some distributions install under another name."""
    import triton

    return str(triton.__version__)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _refusal(options: Mapping[str, object], environ: Mapping[str, str]) -> str:
    """What the backend says against these options and variables; empty if it takes them."""
    try:
        Config.from_options(options, environ)
    except SparseAttentionError as error:
        return str(error)
    return ""
