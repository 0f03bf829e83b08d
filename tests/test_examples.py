"""The examples run as they are."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_a_strategy_of_ones_own_needs_one_short_file(tmp_path):
    example = EXAMPLES / "custom_strategy.py"
    done = subprocess.run([sys.executable, example], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "6 of 12 sites sparse" in done.stdout
    assert len(example.read_text().splitlines()) < 100


@pytest.mark.slow
def test_the_quickstart_runs_and_shows_sparse_sites(tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / "quickstart.py"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "6 of 12 sites sparse" in done.stdout
    assert (tmp_path / "demo_output" / "quickstart.gif").is_file()
