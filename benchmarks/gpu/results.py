"""Where the rows of a benchmark go: to a file after each of them, with what the machine is."""

from __future__ import annotations

import gc
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparse_compile.compiler.lowering import source_hash

Row = dict[str, Any]

SMI_FIELDS = {"clock_sm_mhz": "clocks.sm", "clock_memory_mhz": "clocks.mem", "power_w": "power.draw"}
SMI_FIELDS |= {"temperature_c": "temperature.gpu"}


def describe_machine(program: str, arguments: list[str], device: torch.device) -> Row:
    """What every row says of the run: the GPU, the versions, the command.

    Args:
        program: module that runs.
        arguments: what it was given.
        device: where it measures.
    """
    cuda = device.type == "cuda"
    capability = torch.cuda.get_device_capability(device) if cuda else None
    return {
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "architecture": f"sm_{capability[0]}{capability[1]}" if capability else None,
        "driver": _smi(device, ["driver_version"])[0] if cuda else None,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "python": platform.python_version(),
        "sources": source_hash(),
        "command": shlex.join(["python", "-m", program, *arguments]),
    }


def describe_state(device: torch.device) -> Row:
    """Clocks, power and temperature as nvidia-smi tells them now; None where it does not."""
    if device.type != "cuda":
        return {}
    return dict(zip(SMI_FIELDS, _smi(device, list(SMI_FIELDS.values())), strict=True))


def _smi(device: torch.device, fields: list[str]) -> list[str | None]:
    if shutil.which("nvidia-smi") is None:
        return [None] * len(fields)
    query = [
        "nvidia-smi",
        f"--query-gpu={','.join(fields)}",
        "--format=csv,noheader,nounits",
        f"--id={_smi_id(device)}",
    ]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
    except (OSError, subprocess.SubprocessError, IndexError):
        return [None] * len(fields)
    return [*values] if len(values) == len(fields) else [None] * len(fields)


def _smi_id(device: torch.device) -> str:
    """The GPU as nvidia-smi counts: torch counts those that CUDA_VISIBLE_DEVICES shows."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    index = device.index or 0
    return visible[index] if index < len(visible) else str(index)


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


class Results:
    """The rows so far. Each is in the file before the next one is measured, so a run that is killed keeps them.

    Args:
        path: the JSON file, a list of rows; None: rows are only printed.
        machine: what goes into every row.
        device: whose clocks are noted beside each row.
    """

    def __init__(self, path: Path | None, machine: Row, device: torch.device) -> None:
        self.rows: list[Row] = []
        self.failed = 0
        self.machine = machine
        self._path, self._device = path, device

    def add(self, row: Row) -> Row:
        """Keep a row and write the file."""
        complete = {**self.machine, **describe_state(self._device), **row}
        self.rows.append(complete)
        if "error" in row or "wrong" in row:
            self.failed += 1
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial = self._path.with_name(self._path.name + ".partial")
            partial.write_text(json.dumps(self.rows, indent=1) + "\n")
            partial.replace(self._path)
        return complete

    def attempt(self, row: Row, measure: Callable[[Row], None]) -> Row:
        """Fill a row in by ``measure``; what fails is written into it, and the next row has its turn.

        Raises:
            RuntimeError: the device itself no longer works, so no later row could be measured.
        """
        try:
            measure(row)
        except Exception as error:  # noqa: BLE001 - a row that fails must not cost the rows behind it
            row["error"] = f"{type(error).__name__}: {str(error)[:2000]}"
            traceback.print_exc(limit=-6, file=sys.stdout)
        complete = self.add(row)
        gc.collect()  # compiled models lie in circles
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
        return complete
