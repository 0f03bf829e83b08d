"""The benchmarks are no part of the package: they are found from the root of the repository."""

import sys
from pathlib import Path

from fresh_process import fresh_process

ROOT = str(Path(__file__).parents[2])
if ROOT not in sys.path:
    sys.path.append(ROOT)

__all__ = ["fresh_process"]
