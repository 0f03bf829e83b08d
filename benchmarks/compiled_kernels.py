"""Compile every shipped kernel for every GPU it is shipped for, without one, and check what came out.

    python -m benchmarks.compiled_kernels [--json FILE] [--known FILE] [--markdown]
        [--architectures 80,90] [--sizes 64,128] [--dtypes bf16,fp32] [--jobs 2]

Checked: shared memory within the limit; for float16 and bfloat16 with head sizes up to 128 no spilled register, and the
matrix instruction of the architecture wherever a kernel multiplies 16-bit tiles. What --known names and holds for these
very sources is not compiled again. Exit status 1 if a rule is broken.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "compiled_kernels.json"
KERNELS = ROOT / "sparse_compile" / "kernels"
MATRIX_INSTRUCTION = {80: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}
MULTIPLIES_16_BIT = ("attend_tiles", "assign", "sum_blocks", "renew_lse")
"""Kernels whose products take tiles of q and k as they are."""
COMPILED_FROM = ("triton_kernels.py", "triton_launch.py", "configs.py", "launching.py", "shipped.py")
SIZES = {"bf16": (64, 128, 256), "fp16": (128,), "fp32": (128, 256)}
"""Head sizes that are compiled; those between are padded to them."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Compile, check, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=None, help="write the results here")
    parser.add_argument(
        "--known", type=Path, default=None, help="results that need not be made again (default: --json)"
    )
    parser.add_argument("--architectures", default="80,89,90,100,120")
    parser.add_argument("--sizes", default="64,128,256", help="head sizes")
    parser.add_argument("--dtypes", default="bf16,fp16,fp32")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/kernels.md")
    chosen = parser.parse_args(arguments)
    known: dict[str, list[Row]] = {}
    before = chosen.known or chosen.json
    if before is not None and before.exists():
        known = json.loads(before.read_text())["compiled"]
    wanted = [
        (architecture, dtype, size)
        for architecture in map(int, chosen.architectures.split(","))
        for dtype in chosen.dtypes.split(",")
        for size in SIZES[dtype]
        if str(size) in chosen.sizes.split(",")
    ]
    missing = [problem for problem in wanted if key_of(*problem) not in known]
    with multiprocessing.get_context("spawn").Pool(chosen.jobs, maxtasksperchild=1) as pool:
        for problem, rows in pool.imap_unordered(compile_problem, missing, chunksize=1):
            known[key_of(*problem)] = rows
            print(f"compiled {len(rows)} kernels for sm_{problem[0]}, {problem[1]}, D {problem[2]}", flush=True)
            if chosen.json is not None:
                write(chosen.json, known)
    rows = [row for problem in wanted for row in known[key_of(*problem)]]
    if chosen.markdown:
        print(markdown(rows))
    broken = [f"{describe(row)}: {rule}" for row in rows for rule in broken_rules(row)]
    print("\n".join(broken) if broken else f"{len(rows)} kernels keep every rule")
    return 1 if broken else 0


def compile_problem(problem: tuple[int, str, int]) -> tuple[tuple[int, str, int], list[Row]]:
    """What ships for one GPU, dtype and head size: every configuration for bf16 up to D 128, else the best ones."""
    from sparse_compile.kernels.launching import ARCHITECTURES, compiled_ahead
    from sparse_compile.kernels.shipped import shipped

    architecture, dtype, size = problem
    rows: dict[tuple[object, ...], Row] = {}
    seen: set[tuple[str, str]] = set()
    for call in shipped(ARCHITECTURES[architecture], DTYPES[dtype], size):
        first = (call.kernel, call.problem) not in seen
        seen.add((call.kernel, call.problem))
        if not first and (dtype != "bf16" or size > 128):
            continue
        with compiled_ahead(architecture) as compilations:
            call.run()
        for made in compilations:
            identity = (made.name, call.kernel, *sorted((key, str(value)) for key, value in made.constants.items()))
            if identity not in rows:
                rows[identity] = {
                    "kernel": made.name,
                    "of": call.kernel,
                    "for": call.problem,
                    "config": list(call.config),
                    "architecture": architecture,
                    "dtype": dtype,
                    "size": size,
                    **resources(made.compiled, architecture),
                }
    return problem, list(rows.values())


def resources(compiled: Any, architecture: int) -> Row:
    """Registers and spilled bytes of a thread, shared memory of a block, matrix instructions."""
    from triton.backends.nvidia.compiler import get_ptxas

    text = compiled.asm["ptx"]
    target = re.search(r"\.target (sm_\w+)", text)
    assert target is not None, "PTX names its target"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(text)
        command = [
            get_ptxas(architecture).path,
            "-v",
            f"--gpu-name={target[1]}",
            source,
            "-o",
            source.with_suffix(".o"),
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert registers is not None and spilled is not None, said
    return {
        "registers": int(registers[1]),
        "spilled_bytes": int(spilled[1]),
        "shared_bytes": int(compiled.metadata.shared),
        "matrix": [name for name in ("mma.sync", "wgmma", "tcgen05.mma") if name in text],
        "tma": "cp.async.bulk.tensor" in text,
    }


def broken_rules(row: Row) -> Iterator[str]:
    """What a compiled kernel must not do."""
    from sparse_compile.kernels.launching import ARCHITECTURES

    limit = ARCHITECTURES[row["architecture"]].shared_memory
    if row["shared_bytes"] > limit:
        yield f"{row['shared_bytes']} bytes of shared memory, of {limit}"
    if row["dtype"] == "fp32" or row["size"] > 128:
        return
    if row["spilled_bytes"]:
        yield f"{row['spilled_bytes']} bytes of registers spilled"
    instruction = MATRIX_INSTRUCTION[row["architecture"]]
    if row["kernel"] in MULTIPLIES_16_BIT and instruction not in row["matrix"]:
        yield f"no {instruction}"


def key_of(architecture: int, dtype: str, size: int) -> str:
    """What a result holds for: the sources of all kernels and the version of Triton, too."""
    return f"{sources()} sm_{architecture} {dtype} D{size}"


@functools.cache
def sources() -> str:
    """Identity of what is compiled, as it was when the program began."""
    import triton

    digest = hashlib.sha256()
    for file in sorted(KERNELS.rglob("*.py")):
        if file.name in COMPILED_FROM:
            digest.update(file.relative_to(KERNELS).as_posix().encode() + file.read_bytes())
    return f"{digest.hexdigest()[:16]} triton {triton.__version__}"


def write(file: Path, known: dict[str, list[Row]]) -> None:
    """Results of these sources alone; older ones hold for nothing."""
    current = {key: rows for key, rows in sorted(known.items()) if key.startswith(sources())}
    command = "python -m benchmarks.compiled_kernels --json benchmarks/results/compiled_kernels.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"command": command, "compiled": current}, indent=None) + "\n")


def describe(row: Row) -> str:
    """A row in words."""
    machine = f"sm_{row['architecture']} {row['dtype']} D {row['size']}"
    return f"{row['kernel']} ({row['for']}, {tuple(row['config'])}) {machine}"


def markdown(rows: list[Row]) -> str:
    """The attention kernel as it is used, in bf16 with pooled keys and coupling; and whatever spills."""
    lines = ["| GPU | D | plan | queries, keys, warps, stages | registers | shared KiB |", "|---|---|---|---|---|---|"]
    seen = set()
    for row in rows:
        plan, _, tail = row["for"].partition(", ")
        place = row["architecture"], row["size"], plan
        if row["kernel"] != "attend_tiles" or tail != "coupled" or row["dtype"] != "bf16" or place in seen:
            continue
        seen.add(place)
        sizes = ", ".join(map(str, row["config"][:4])) + (", TMA" if row["tma"] else "")
        shared = f"{row['shared_bytes'] / 1024:.0f}"
        lines.append(f"| sm_{place[0]} | {place[1]} | {plan} | {sizes} | {row['registers']} | {shared} |")
    lines += ["", "| what spills | dtype, D | most bytes, by GPU |", "|---|---|---|"]
    spilled: dict[tuple[str, str], dict[int, int]] = {}
    for row in rows:
        if row["spilled_bytes"]:
            of = spilled.setdefault((row["kernel"], f"{row['dtype']}, {row['size']}"), {})
            of[row["architecture"]] = max(row["spilled_bytes"], of.get(row["architecture"], 0))
    for (kernel, problem), of in sorted(spilled.items()):
        most = ", ".join(f"sm_{architecture}: {of[architecture]}" for architecture in sorted(of))
        lines.append(f"| {kernel} | {problem} | {most} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
