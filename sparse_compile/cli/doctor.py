"""``sparse-attn doctor``: is everything there that the backend needs?"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch

from sparse_compile.cli import caches
from sparse_compile.compiler.kernel_choice import why_not_triton
from sparse_compile.config import ENV_PREFIX, FOREIGN_VARIABLES, Config, belongs, declared_options
from sparse_compile.errors import SparseAttentionError
from sparse_compile.kernels.cpp import build, isa
from sparse_compile.oldest_versions import is_too_old, oldest

BACKEND = "sparse_attn"
PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "torchao", "peft")
"""Whose version matters when something does not work; all but torch may be missing."""
VARIABLES = re.compile(r"TORCH_LOGS|TORCH_COMPILE_DISABLE|TORCHDYNAMO_\w+|TORCHINDUCTOR_\w+|TRITON_\w+|CXX")
"""Variables that change what torch.compile does."""


@dataclass(frozen=True)
class Finding:
    """One line of the report. A problem says what is wrong and what to do."""

    subject: str
    value: str
    problem: str = ""

    def __str__(self) -> str:
        line = f"{'wrong' if self.problem else 'ok':<6} {self.subject:<16} {self.value}"
        return f"{line}\n{'':23} {self.problem}" if self.problem else line


def run(arguments: argparse.Namespace) -> int:
    """Print every finding; 1 when one is a problem."""
    environ = dict(os.environ)  # looking for its cache, Inductor sets a variable of its own
    findings = [
        *check_versions(),
        *check_devices(),
        check_cpp_compiler(environ),
        *check_caches(),
        check_backend(),
        *check_environment(environ),
    ]
    problems = sum(bool(finding.problem) for finding in findings)
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
        return 1 if problems else 0
    for finding in findings:
        print(finding)
    print(f"\n{problems} problem(s) found." if problems else "\nEverything the backend needs is there.")
    return 1 if problems else 0


def check_versions() -> list[Finding]:
    """Python and the packages that matter."""
    python = Finding("python", platform.python_version())
    return [python, Finding("sparse_compile", _version("sparse_compile")), *map(_check_package, PACKAGES)]


def _check_package(name: str) -> Finding:
    installed = str(torch.__version__) if name == "torch" else _version(name)
    if not is_too_old(name, installed):
        return Finding(name, installed)
    return Finding(name, installed, f"{name} >= {oldest(name)} is needed: pip install --upgrade {name}")


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


def check_caches() -> list[Finding]:
    """Where compiled code is kept. A folder of another user, or one without room to write, makes compiling fail."""
    inductor = caches.inductor_folder()
    found = [Finding("inductor cache", str(inductor), inductor.problem)]
    if importlib.util.find_spec("triton") is not None:
        triton = caches.triton_folder()
        found.append(Finding("triton cache", str(triton), triton.problem))
    return found


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
    """The ``SPARSE_ATTN_*`` variables, with unknown names and refused values; and those that steer torch.compile."""
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
    of_torch = [Finding(name, environ[name]) for name in sorted(environ) if VARIABLES.fullmatch(name)]
    return [*(findings or [Finding("environment", f"no {ENV_PREFIX}* variable is set")]), *of_torch]


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
