#!/usr/bin/env bash
# Everything that needs a GPU, in one go, on a machine with torch (CUDA), triton and pytest. Nothing is installed. With
# pytest-xdist the tests run in several processes, most of their time being that of Triton's compiler.
#
#     benchmarks/run_on_gpu.sh [tests] [sanitizer] [tune] [kernels] [step]
#
# Without arguments: all but tune, in this order. After tune, which keeps its choices in Triton's cache, the benchmarks
# measure the configurations that were best on this GPU; without it the first ones of the tables.
#
# Results are written to $OUT where it is set, else to benchmarks/results: gpu_kernels.json and gpu_step.json row by row,
# and the output of each part as <part>.txt. A part that fails, or runs out of its time, does not keep the next one from
# running; the exit status is 1 then. The most telling rows come first, so a benchmark that runs out of time has made
# them. Variables: PYTHON; OUT; SECONDS_TESTS, SECONDS_SANITIZER, SECONDS_TUNE, SECONDS_KERNELS and SECONDS_STEP limit the
# parts, by default to 25 minutes in all and each to less than ten; KERNELS_ARGS and STEP_ARGS are passed on to the
# benchmarks.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

PYTHON=${PYTHON:-python3}
results=${OUT:-benchmarks/results}
known="tests sanitizer tune kernels step"
parts=("$@")
[ ${#parts[@]} -eq 0 ] && parts=(tests sanitizer kernels step)
for part in "${parts[@]}"; do
  case " $known " in
  *" $part "*) ;;
  *)
    echo "unknown part '$part'; known: $known" >&2
    exit 2
    ;;
  esac
done
mkdir -p "$results"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

# torch finds the backend, and the package its methods, by entry points: metadata that an installation would have left.
metadata=$(mktemp -d)
trap 'rm -rf "$metadata"' EXIT
"$PYTHON" - "$metadata" <<'PYTHON'
import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
folder = Path(sys.argv[1]) / f"{project['name']}-{project['version']}.dist-info"
folder.mkdir()
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
groups = project["entry-points"].items()
lines = [line for group, names in groups for line in (f"[{group}]", *(f"{n} = {v}" for n, v in names.items()))]
(folder / "entry_points.txt").write_text("\n".join(lines) + "\n")
PYTHON
export PYTHONPATH="$metadata:$PYTHONPATH"

failed=()

# run PART SECONDS COMMAND...: run a part within its time, show and keep its output, remember whether it failed.
run() {
  local part=$1 seconds=$2
  shift 2
  echo "=== $part (at most $seconds s): $*"
  local began=$SECONDS
  timeout -k 20 "$seconds" "$@" 2>&1 | tee "$results/$part.txt"
  local status=${PIPESTATUS[0]}
  echo "=== $part: exit status $status after $((SECONDS - began)) s"
  [ "$status" -eq 0 ] || failed+=("$part")
}

environment() {
  command -v nvidia-smi >/dev/null && nvidia-smi
  git rev-parse HEAD 2>/dev/null
  "$PYTHON" - <<'PYTHON'
import importlib.metadata
import platform

import torch

print("python", platform.python_version(), "torch", torch.__version__, "CUDA", torch.version.cuda)
for name in ("triton", "numpy", "pytest", "hypothesis", "pytest-timeout", "diffusers"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "is not there")
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0))
from sparse_compile.compiler.lowering import source_hash

print("sources", source_hash(), "backends", "sparse_attn" in torch._dynamo.list_backends(exclude_tags=()))
PYTHON
}

environment 2>&1 | tee "$results/environment.txt"

for part in "${parts[@]}"; do
  case $part in
  tests) # these folders need no diffusers
    processes=()
    "$PYTHON" -c "import xdist" 2>/dev/null && processes=(-n 8)
    run tests "${SECONDS_TESTS:-360}" "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider \
      --continue-on-collection-errors --durations=15 "${processes[@]}" tests/gpu tests/triton_kernels
    ;;
  sanitizer)
    if command -v compute-sanitizer >/dev/null; then
      cases=tests/gpu/test_no_synchronisation.py::test_a_site_of
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 run sanitizer "${SECONDS_SANITIZER:-180}" compute-sanitizer --tool memcheck \
        --error-exitcode 9 --print-limit 20 "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider \
        "${cases}_svg2_never_waits_for_the_device[sparse-triton]" \
        "${cases}_adaspa_never_waits_for_the_device[search-triton]" \
        "${cases}_adaspa_never_waits_for_the_device[refine-triton]"
    else
      echo "=== sanitizer: compute-sanitizer is not there"
    fi
    ;;
  tune)
    run tune "${SECONDS_TUNE:-300}" "$PYTHON" -m sparse_compile.cli.main tune
    ;;
  kernels)
    # shellcheck disable=SC2086 # several arguments
    run kernels "${SECONDS_KERNELS:-500}" "$PYTHON" -m benchmarks.gpu_kernels --json "$results/gpu_kernels.json" \
      ${KERNELS_ARGS:-}
    ;;
  step)
    # shellcheck disable=SC2086
    run step "${SECONDS_STEP:-460}" "$PYTHON" -m benchmarks.gpu_step --json "$results/gpu_step.json" ${STEP_ARGS:-}
    ;;
  esac
done

if [ ${#failed[@]} -gt 0 ]; then
  echo "=== failed: ${failed[*]}"
  exit 1
fi
echo "=== all parts passed"
