"""What the pages quote of the report and of the log is what the package says."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUOTED = {
    "reading_the_report.md": (
        "searched again: the plans of ",
        " had gone stale",
        "attention is nearly uniform in ",
        " calls came again in the same step and branch and attended to everything",
        " compilations of one code",
        "plain torch: ",
        "in a graph without Parameters",
        "compiling a graph with ",
    ),
    "not_faster.md": (
        "every call was dense, since no clock told the denoising step",
        " calls in one step",
        "no scaled_dot_product_attention in what was compiled",
        "plain torch: ",
        "too few video tokens to gain anything",
        "a sparse call would not be faster than dense attention here",
        " ms sparse, ",
        "gradients are needed",
        "the graph does not tell which tokens are video",
        "a mask that is not a key-padding mask",
        "no Parameter above the query",
        "the border between video and text has a symbolic size",
    ),
    "blurry.md": ("taken as all video: this graph has no text input", "attention is nearly uniform in "),
    "recompiles.md": (" compilations of one code: at the limit it runs eagerly", "sparse_attn.phase == "),
}


@pytest.fixture(scope="module")
def said() -> str:
    """Every string of the package, those of one literal in one piece."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "sparse_compile").rglob("*.py")]
    constants = (node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return "\n".join(value for value in constants if isinstance(value, str))


@pytest.mark.parametrize("page", QUOTED)
def test_what_a_page_quotes_is_what_the_package_says(page, said):
    text = re.sub(r"\s+", " ", (ROOT / "docs" / page).read_text())
    assert [quote for quote in QUOTED[page] if quote.strip() not in text] == []
    assert [quote for quote in QUOTED[page] if quote not in said] == []
