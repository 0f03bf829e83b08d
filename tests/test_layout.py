"""The rules of the layout, read from the sources: who may import whom, and what must not be there."""

import ast
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sparse_compile"
SOURCE_FOLDERS = ("sparse_compile", "tests", "examples", "benchmarks", "training")
LONGEST_FILE = 400

LEAVES = (
    *("budgets", "call_log", "config", "errors", "oldest_versions", "option_values"),
    *("phases", "plan", "presets", "sites"),
)
MAY_IMPORT = {
    "errors": (),
    "phases": (),
    "plan": (),
    "oldest_versions": (),
    "option_values": (),
    "presets": (),
    "budgets": (),
    "config": ("budgets", "errors", "option_values", "presets"),
    "call_log": ("plan",),
    "sites": ("errors", "phases", "plan"),
    "kernels": ("call_log", "kernels", "plan"),
    "ops": ("call_log", "errors", "kernels", "ops", "plan"),
    "strategies": (*LEAVES, "strategies"),
    "passes": (*LEAVES, "passes", "strategies.base"),
    "runtime": (*LEAVES, "runtime", "strategies.base"),
    "compiler": (*LEAVES, "compiler", "kernels.cpp", "ops", "passes", "runtime", "strategies"),
    "integrations": (*LEAVES, "integrations", "runtime"),
    "enabling": (*LEAVES, "compiler.in_place", "integrations", "runtime"),
    "api": (*LEAVES, "enabling", "integrations", "runtime"),
    "evaluation": (
        *LEAVES,
        "api",
        "evaluation",
        "kernels.block_map",
        "ops",
        "runtime.call_figures",
        "runtime.report",
        "strategies",
    ),
}
"""What a module or folder of the package may import of the rest of it."""
MAY_IMPORT_DIFFUSERS = ("integrations", "evaluation", "cli")
PRIVATE_TORCH_HOMES = ("compiler/torch_internals.py", "kernels/cpp/torch_internals.py")
PUBLIC_BY_CUSTOM = (
    "torch._dynamo.config",
    "torch._dynamo.reset",
)
"""What PyTorch's documentation tells users to use."""


class Import(NamedTuple):
    """One import: the dotted name, and whether it runs when the module is imported."""

    file: str
    name: str
    at_module_level: bool


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room(path: Path) -> str:
    """The folder, or the module at the top of the package, that a file belongs to."""
    return relative(path).split("/")[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[Import]:
    def visit(node: ast.AST, in_function: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(relative(path), alias.name, not in_function)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{relative(path)}: imports are absolute"
                for alias in child.names:
                    yield Import(relative(path), f"{child.module}.{alias.name}", not in_function)
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from visit(child, in_function or function)

    yield from visit(parsed(path), False)


@functools.cache
def all_imports() -> list[tuple[Path, Import]]:
    return [(path, found) for path in sources() for found in imports_of(path)]


def within(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def dotted(node: ast.AST) -> str | None:
    """``torch._dynamo.config`` for such an attribute chain, None for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)) is not None:
        return f"{owner}.{node.attr}"
    return None


@pytest.mark.parametrize("place", MAY_IMPORT)
def test_imports_go_down_the_layers_only(place):
    allowed = tuple(f"sparse_compile.{name}" for name in MAY_IMPORT[place])
    wrong = [
        found
        for path, found in all_imports()
        if room(path) == place and within(found.name, "sparse_compile") and not within(found.name, *allowed)
    ]
    assert not wrong


def test_ops_import_kernels_when_called_only():
    kernels = [found for path, found in all_imports() if room(path) == "ops" and "kernels" in found.name]
    assert kernels
    assert not [found for found in kernels if found.at_module_level]


def test_kernels_know_torch_triton_and_a_file_lock_only():
    standard = tuple(sys.stdlib_module_names)
    for path, found in all_imports():
        if room(path) == "kernels":
            assert within(found.name, "torch", "triton", "filelock", "sparse_compile", *standard), found
            assert not within(found.name, "torch.fx"), found


def test_passes_and_strategies_never_import_triton():
    for path, found in all_imports():
        if room(path) in ("passes", "strategies"):
            assert not within(found.name, "triton"), found


def test_triton_is_never_imported_with_a_module_outside_triton_kernels():
    for path, found in all_imports():
        if path.name != "triton_kernels.py" and within(found.name, "triton"):
            assert not found.at_module_level, found


def test_diffusers_is_imported_where_it_belongs_only():
    for path, found in all_imports():
        if within(found.name, "diffusers"):
            assert room(path) in MAY_IMPORT_DIFFUSERS, found


def test_private_torch_names_live_in_two_files():
    wrong = []
    for path in sources():
        if relative(path) in PRIVATE_TORCH_HOMES:
            continue
        names = [found.name for found in imports_of(path)]
        names += [name for node in ast.walk(parsed(path)) if (name := dotted(node)) is not None]
        for name in names:
            first, *rest = name.split(".")
            private = any(part.startswith("_") and not part.startswith("__") for part in rest)
            on_the_way = any(public == name or public.startswith(name + ".") for public in PUBLIC_BY_CUSTOM)
            if first == "torch" and private and not on_the_way and not within(name, *PUBLIC_BY_CUSTOM):
                wrong.append((relative(path), name))
    assert not wrong


def test_nothing_is_printed_outside_the_commands():
    for path in sources():
        if room(path) == "cli":
            continue
        calls = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)]
        assert "print" not in [dotted(call.func) for call in calls], relative(path)


@pytest.mark.parametrize("name", ["passes", "kernels"])
def test_passes_and_kernels_are_namespace_folders_and_links_at_the_top(name):
    assert not (PACKAGE / name / "__init__.py").exists()
    assert (ROOT / name).is_symlink()
    assert (ROOT / name).readlink() == Path("sparse_compile") / name


def test_no_module_is_named_utils():
    named = [path for folder in SOURCE_FOLDERS for path in (ROOT / folder).rglob("utils*")]
    assert not [path for path in named if path.stem == "utils"]


def test_no_source_file_is_too_long():
    files = [
        path for folder in SOURCE_FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cpp", ".h")
    ]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FILE}


def modules_after(statement: str, **environment: str) -> set[str]:
    """The modules of a fresh process that ran one statement."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_imports_nothing_heavy():
    modules = modules_after("import sparse_compile")
    assert not modules & {"torch", "triton", "diffusers", "sparse_compile.compiler", "sparse_compile.ops"}


def test_torch_can_import_the_package_for_its_logs():
    modules = modules_after("import torch", TORCH_LOGS="+sparse_compile")
    assert "sparse_compile" in modules
    assert not modules & {
        "diffusers",
        "sparse_compile.compiler.backend",
        "sparse_compile.evaluation.demo_model",
    }
