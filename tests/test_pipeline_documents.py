from __future__ import annotations

from pathlib import Path

from video_pipeline_cases import CASES

DOCUMENT = Path(__file__).parents[1] / "docs" / "pipelines.md"
HEADER = "| pipeline | calls in a step | branches | |"


def rows() -> list[str]:
    found = [HEADER, "|---|---|---|---|"]
    for name, case in CASES.items():
        branches = ", ".join(f"`{branch}`" for branch in case.branches)
        found.append(f"| {name} | {len(case.branches)} | {branches}: {case.told_apart} | {case.note} |")
    return found


def test_the_documented_pipelines_are_those_that_the_tests_run() -> None:
    text = DOCUMENT.read_text()
    table = text.split("<!-- pipelines: begin -->\n")[1].split("\n<!-- pipelines: end -->")[0]
    assert table.splitlines() == rows()
