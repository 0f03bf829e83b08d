"""SVG2 as a planner: phases, state, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy_models import Stack, tokens

from sparse_compile.config import Config
from sparse_compile.phases import Moment, Phase
from sparse_compile.sites import Reason
from sparse_compile.strategies.base import Strategy
from sparse_compile.strategies.svg2 import Svg2, key_clusters, query_clusters
from sparse_compile.testing import capture, find


def test_it_is_a_strategy() -> None:
    assert isinstance(Svg2(), Strategy)


@pytest.mark.parametrize(
    ("step", "searched", "phase"),
    [
        (0, None, Phase.DENSE),
        (9, None, Phase.DENSE),
        (10, None, Phase.SEARCH),
        (11, 10, Phase.SPARSE),
        (30, None, Phase.SEARCH),
    ],
)
def test_phases_of_fifty_steps(step: int, searched: int | None, phase: Phase) -> None:
    assert Svg2().phase(Moment(step, 50), searched, Config()) is phase


@pytest.mark.parametrize(
    ("share", "steps", "count"), [(0.2, 50, 10), (0.3, 35, 11), (0.35, 40, 14), (0.0, 50, 0), (3, 50, 3)]
)
def test_shares_of_steps_round_half_up(share: float, steps: int, count: int) -> None:
    dense = [s for s in range(steps) if Svg2().phase(Moment(s, steps), None, Config(dense_steps=share)) is Phase.DENSE]
    assert len(dense) == count


@pytest.mark.parametrize(
    ("count", "q", "k"),
    [(75_600, 295, 994), (118_800, 400, 1000), (1000, 32, 64), (40, 32, 40), (8192, 32, 107)],
)
def test_cluster_counts_follow_the_tokens(count: int, q: int, k: int) -> None:
    assert (query_clusters(count, Config()), key_clusters(count, Config())) == (q, k)


def test_given_cluster_counts_win_and_never_exceed_the_tokens() -> None:
    config = Config(q_clusters=5, k_clusters=500)
    assert (query_clusters(100, config), key_clusters(100, config)) == (5, 100)


def site(count: int, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    with torch.no_grad():
        return find(capture(Stack(1).to(dtype), tokens(count).to(dtype))[0], **options)[0]


def test_state_has_the_dtype_of_the_query_and_says_whether_it_is_filled() -> None:
    specs = Svg2().state(site(300, torch.bfloat16, min_tokens=1), Config())
    assert {name: (spec.shape, spec.dtype) for name, spec in specs.items()} == {
        "q_centroids": ((1, 2, 32, 16), torch.bfloat16),
        "k_centroids": ((1, 2, 64, 16), torch.bfloat16),
        "ready": ((1,), torch.int32),
    }


@pytest.mark.parametrize(
    ("count", "options", "reason"),
    [
        (255, {}, Reason.TOO_SHORT),
        (256, {}, None),
        (256, {"k_clusters": 65}, Reason.TOO_SHORT),
        (256, {"q_clusters": 65}, Reason.TOO_SHORT),
        (40, {"min_tokens": 40}, None),
        (39, {"min_tokens": 40}, Reason.TOO_SHORT),
    ],
)
def test_short_sites_stay_dense_unless_min_tokens_says_otherwise(
    count: int, options: dict[str, Any], reason: Reason | None
) -> None:
    assert site(count, **options).decision.reason is reason
