"""The examples run as they are, and the method of one's own does what its paper says."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_compile
from sparse_compile.evaluation.demo_model import TRAINED_SIZES, demo_scenes, generate, load_pipeline
from sparse_compile.plan import Plan

EXAMPLES = Path(__file__).parents[1] / "examples"
PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
QUICK = {"min_tokens": 64, "dense_layers": 0, "dense_steps": 0, "lowering": "eager"}


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("custom_strategy", EXAMPLES / "custom_strategy.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["custom_strategy"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["custom_strategy"]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield


@pytest.mark.slow
def test_a_strategy_of_ones_own_needs_one_short_file(tmp_path: Path) -> None:
    file = EXAMPLES / "custom_strategy.py"
    done = subprocess.run([sys.executable, file], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "6 of 12 sites sparse" in done.stdout
    assert "density 0.250 in sparse calls" in done.stdout
    assert len(file.read_text().splitlines()) < 100


@pytest.mark.slow
def test_the_quickstart_runs_and_shows_sparse_sites(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / "quickstart.py"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "6 of 12 sites sparse" in done.stdout
    assert (tmp_path / "demo_output" / "quickstart.gif").is_file()


def attended(plan: Plan) -> Tensor:
    """Which token attends to which under a Plan, bool [B, H, S, S]."""
    assert plan.q_order is not None and plan.k_order is not None
    b, h, s = plan.q_order.shape
    shared = h // plan.k_order.shape[1]
    sees = torch.zeros(b, h, s, s, dtype=torch.bool)
    for batch in range(b):
        for head in range(h):
            q_order, k_order = plan.q_order[batch, head].long(), plan.k_order[batch, head // shared].long()
            q_sizes, k_sizes = plan.q_offsets[batch, head].diff(), plan.k_offsets[batch, head // shared].diff()
            kept = plan.kept()[batch, head]
            by_place = kept.repeat_interleave(q_sizes.long(), 0).repeat_interleave(k_sizes.long(), 1)
            sees[batch, head, q_order.unsqueeze(1), k_order] = by_place
    return sees


def sliding_tiles(grid: tuple[int, ...], tile: tuple[int, ...], window: tuple[int, ...]) -> Tensor:
    """The mask of arXiv 2502.04507 token by token: near the centre of the window, which keeps off the borders."""
    place = torch.cartesian_prod(*(torch.arange(size) for size in grid))
    sees = torch.ones(len(place), len(place), dtype=torch.bool)
    for axis, (size, side, reach) in enumerate(zip(grid, tile, window, strict=True)):
        tiles = place[:, axis] // side
        last, half = -(-size // side) - 1, reach // 2
        centre = [min(max(int(at), half), max(last - half, half)) for at in tiles]
        sees &= (torch.tensor(centre).unsqueeze(1) - tiles).abs() <= half
    return sees


GEOMETRIES = [
    pytest.param((9, 8, 8), (1, 2, 4), (3, 3, 3), id="the demo"),
    pytest.param((10, 8, 8), (2, 2, 2), (3, 1, 3), id="whole tiles"),
    pytest.param((5, 7, 9), (2, 3, 2), (3, 3, 5), id="partial tiles at the borders"),
    pytest.param((4, 4, 4), (2, 2, 2), (1, 1, 1), id="own tile only"),
]


@pytest.mark.parametrize(("grid", "tile", "window"), GEOMETRIES)
def test_the_plan_is_the_mask_of_the_paper(example: ModuleType, grid, tile, window) -> None:
    tokens = grid[0] * grid[1] * grid[2]
    x = torch.zeros(2, 3, tokens, 8)
    order, offsets, keep = torch.ops.sliding_tile.plan(x, None, 0, grid, tile, window, True)
    plan = Plan(order, offsets, order, offsets, keep)
    expected = sliding_tiles(grid, tile, window)
    assert torch.equal(attended(plan), expected.expand(2, 3, -1, -1))
    torch.testing.assert_close(plan.density(), expected.float().mean().expand(2, 3))


@pytest.mark.parametrize("padding_attends", [True, False])
def test_text_attends_to_everything_and_nobody_to_padding(example: ModuleType, padding_attends: bool) -> None:
    grid, before, after = (4, 4, 2), 3, 5
    video, tokens = slice(3, 35), 40
    valid = torch.ones(2, tokens, dtype=torch.bool)
    valid[0, -4:] = False
    valid[1, :3] = False
    tile, window = (1, 2, 2), (3, 1, 1)
    q, k = torch.zeros(2, 4, tokens, 8), torch.zeros(2, 2, tokens, 8)
    of_q, of_k = (torch.ops.sliding_tile.plan(x, valid, before, grid, tile, window, padding_attends) for x in (q, k))
    assert of_k[0].shape == (2, 2, tokens) and video.stop + after == tokens
    expected = torch.ones(2, 1, tokens, tokens, dtype=torch.bool)
    expected[..., video, video] = sliding_tiles(grid, tile, window)
    expected &= valid[:, None, None]
    for item in range(2):
        expected[item, :, ~valid[item]] = valid[item] & padding_attends
    assert torch.equal(attended(Plan(*of_q[:2], *of_k[:2], of_q[2])), expected.expand(2, 4, -1, -1))


def test_the_op_is_one_that_torch_compile_can_trace(example: ModuleType) -> None:
    x, valid = torch.zeros(2, 3, 40, 8), torch.ones(1, 40, dtype=torch.bool)
    torch.library.opcheck(torch.ops.sliding_tile.plan.default, (x, valid, 4, [4, 4, 2], [1, 2, 2], [3, 1, 1], True))


class Joint(nn.Module):
    """Video and text in one sequence, with a key-padding mask and fewer key heads than query heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.to_q, self.to_k, self.to_v = nn.Linear(32, 64), nn.Linear(32, 32), nn.Linear(32, 32)
        self.eval().requires_grad_(False)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, mask: Tensor) -> Tensor:
        x = torch.cat([hidden_states.flatten(2).transpose(1, 2), encoder_hidden_states], dim=1)
        q, k, v = (p(x).unflatten(-1, (-1, 16)).transpose(1, 2) for p in (self.to_q, self.to_k, self.to_v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :], enable_gqa=True)


def test_the_test_that_the_page_prints_passes_and_can_fail(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    [program] = re.findall(r"^```python\n(import torch\n.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    names: dict[str, object] = {}
    exec(program, names)
    names["test_the_attention_is_replaced"]()
    monkeypatch.setattr(example.SlidingTile, "write", lambda self, build, site, phase: build.attention())
    with pytest.raises(AssertionError):
        names["test_the_attention_is_replaced"]()


def test_masks_text_and_grouped_heads_go_through(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "WINDOW", (9, 9, 9))
    model, video, text = Joint(), torch.randn(2, 32, 3, 6, 8), torch.randn(2, 9, 32)
    mask = torch.arange(144 + 9) < torch.tensor([[150], [145]])
    options = {**QUICK, "method": "custom_strategy:SlidingTile"}
    compiled = torch.compile(model, backend="sparse_attn", options=options, fullgraph=True)
    with sparse_compile.denoising(model, steps=1):
        out = compiled(video, text, mask)
    assert [site.decision for site in sparse_compile.explain(model).sites] == ["sparse"]
    torch.testing.assert_close(out, model(video, text, mask), rtol=1e-4, atol=1e-5)


def test_the_demo_keeps_a_quarter_where_the_grid_is_known(example: ModuleType) -> None:
    options = {**QUICK, "method": "custom_strategy:SlidingTile"}
    pipe = load_pipeline()
    pipe.transformer.compile(backend="sparse_attn", options=options)
    generate(pipe, demo_scenes(1, seed=0), TRAINED_SIZES[1], steps=1)
    report = sparse_compile.explain(pipe).to_dict()
    assert report["generations"][-1]["density"] == pytest.approx(0.25)


def test_a_block_alone_stays_dense_for_want_of_a_grid(example: ModuleType) -> None:
    pipe = load_pipeline()
    pipe.transformer.compile_repeated_blocks(
        backend="sparse_attn", options={**QUICK, "method": "custom_strategy:SlidingTile"}
    )
    generate(pipe, demo_scenes(1, seed=0), TRAINED_SIZES[1], steps=1)
    reasons = {site.reason for site in sparse_compile.explain(pipe).sites if site.layer.endswith("attn1")}
    assert reasons == {"unknown_grid"}
