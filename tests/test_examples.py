"""The examples run as they are."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_the_quickstart_runs_and_shows_sparse_sites(tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / "quickstart.py"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "6 of 12 sites sparse" in done.stdout
    assert (tmp_path / "demo_output" / "quickstart.gif").is_file()
