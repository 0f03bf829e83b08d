"""Which sites the cost model of the CPU leaves dense, and what the report says of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from attention_blocks import SelfAttention, site_of, video
from toy_models import EAGER, Stack, tokens

import sparse_compile
from sparse_compile.compiler import pipeline
from sparse_compile.compiler.cpu_cost import EFFICIENCY, MULTIPLIES_PAIRS, Estimate, estimate
from sparse_compile.config import Config
from sparse_compile.kernels.cpp import isa
from sparse_compile.sites import Site
from sparse_compile.strategies.adaspa import AdaSpa
from sparse_compile.strategies.base import Effort, ExpectsEffort
from sparse_compile.strategies.svg2 import EXPECTED_DENSITY, Svg2, key_clusters, query_clusters

SHORT_OF_A_GAIN = 400
"""Video tokens: more than the method's floor, and too few for the CPU."""


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch.compiler.reset()


@pytest.fixture
def site() -> Site:
    return site_of(SelfAttention(), video())


def of_length(site: Site, tokens: int, size: int = 64) -> Site:
    sizes = (1, 2, tokens, size)
    return dataclasses.replace(site, query_sizes=sizes, key_sizes=sizes, value_sizes=sizes)


def gain(figures: Estimate) -> float:
    return figures.dense / figures.sparse


def test_every_instruction_set_has_its_constants() -> None:
    assert set(EFFICIENCY) == set(isa.LEVELS) and set(MULTIPLIES_PAIRS) < set(isa.LEVELS)


def test_a_gain_grows_with_length_and_falls_with_density(site: Site) -> None:
    lengths = [gain(estimate(of_length(site, tokens), Effort(0.25, 0, 64), "avx2", 1)) for tokens in (256, 2048, 16384)]
    assert lengths == sorted(lengths) and lengths[0] < 1 < 2.5 < lengths[-1]
    densities = [gain(estimate(of_length(site, 8192), Effort(d, 0, 64), "avx2", 1)) for d in (0.1, 0.5, 1.0)]
    assert densities == sorted(densities, reverse=True) and densities[-1] < 1


def test_planning_costs_and_threads_leave_what_is_done_once(site: Site) -> None:
    long = of_length(site, 8192)
    cheap, dear = (estimate(long, Effort(0.25, compared, 64), "avx2", 1) for compared in (0, 8192 * 400))
    assert dear.dense == cheap.dense and dear.sparse > cheap.sparse
    short = of_length(site, 1024)
    alone, shared = (estimate(short, Effort(0.25, 0, 64), "avx2", threads) for threads in (1, 8))
    assert shared.dense == pytest.approx(alone.dense / 8) and shared.sparse > alone.sparse / 8


def test_bfloat16_is_faster_where_its_products_have_an_instruction(site: Site) -> None:
    half = site_of(SelfAttention(dtype=torch.bfloat16), video())
    effort = Effort(0.25, 0, 64)
    for level in isa.LEVELS:
        ratio = gain(estimate(of_length(half, 16384), effort, level, 1)) / gain(
            estimate(of_length(site, 16384), effort, level, 1)
        )
        assert ratio > 1.3 if level in MULTIPLIES_PAIRS else ratio == 1


MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu_attention.json"


def test_the_estimate_is_near_what_was_measured() -> None:
    rows = json.loads(MEASURED.read_text())["rows"]
    steps = [row for row in rows if row.get("call") == "svg2 warm" and row["threads"] == 1]
    assert len(steps) == 12
    for row in steps:
        own = site_of(SelfAttention(dtype=getattr(torch, row["dtype"])), video())
        own = of_length(own, row["tokens"], row["head_size"])
        q_groups, k_groups = (int(count(row["tokens"], Config())) for count in (query_clusters, key_clusters))
        effort = Effort(row["density"], 2 * row["tokens"] * (q_groups + k_groups), k_groups)
        assert 0.8 <= estimate(own, effort, row["isa"], 1).sparse / row["sparse_ms"] <= 1.3


def test_methods_expect_what_their_options_say(site: Site) -> None:
    svg2, adaspa = Svg2(), AdaSpa()
    assert isinstance(svg2, ExpectsEffort) and isinstance(adaspa, ExpectsEffort)
    assert svg2.effort(site, Config(density=0.15)).density == 0.15
    assert svg2.effort(site, Config()).density == Config().density_at_work == 0.25
    assert svg2.effort(site, Config(top_p=0.9)).density == EXPECTED_DENSITY
    for method, strategy in (("svg2", svg2), ("adaspa", adaspa)):
        bounds = ({}, EXPECTED_DENSITY), ({"max_density": 0.2}, 0.2), ({"min_density": 0.6}, 0.6)
        for given, density in bounds:
            config = Config(method=method, target_recall=0.9, **given)
            assert strategy.effort(site, config).density == pytest.approx(density)
    one, two = (svg2.effort(site, Config(kmeans_iters=n)).compared for n in (1, 2))
    assert two == 2 * one > 0
    effort = adaspa.effort(site, Config(method="adaspa", sparsity=0.75, block_size=16))
    assert effort == Effort(0.25, 0, site.key_sizes[2] // 16)


def report_of(count: int, **options: object) -> sparse_compile.Report:
    model = torch.compile(Stack(), backend="sparse_attn", options={**EAGER, "dense_layers": 0, **options})
    with torch.no_grad():
        model(tokens(count))
    return sparse_compile.explain(model)


def test_the_report_tells_the_estimate_of_a_site_that_cannot_win() -> None:
    options = {"min_tokens": "auto", "q_clusters": 16, "k_clusters": 32}
    sites = report_of(SHORT_OF_A_GAIN, **options).sites
    assert sites and {(site.decision, site.reason, site.by_design) for site in sites} == {("dense", "no_gain", True)}
    assert all(
        "ms sparse" in site.detail and "Setting min_tokens to a number forces it" in site.detail for site in sites
    )


def test_a_number_of_tokens_takes_what_the_model_would_leave() -> None:
    options = {"min_tokens": SHORT_OF_A_GAIN, "q_clusters": 16, "k_clusters": 32}
    assert {site.decision for site in report_of(SHORT_OF_A_GAIN, **options).sites} == {"sparse"}


def test_one_graph_for_all_lengths_is_not_judged_by_the_first() -> None:
    model = torch.compile(
        Stack(), backend="sparse_attn", dynamic=True, options={**EAGER, "min_tokens": "auto", "q_clusters": 16}
    )
    with torch.no_grad():
        model(tokens(SHORT_OF_A_GAIN))
    assert {site.decision for site in sparse_compile.explain(model).sites} == {"sparse"}


class Careless(Svg2):
    """A method whose effort fails."""

    def effort(self, site: Site, config: Config) -> Effort:
        raise KeyError(site.name)


def test_a_method_that_cannot_say_what_it_costs_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "load_strategy", lambda name: Careless())
    options = {"min_tokens": "auto", "q_clusters": 16, "k_clusters": 32}
    assert {site.decision for site in report_of(SHORT_OF_A_GAIN, **options).sites} == {"sparse"}


def test_plain_torch_is_not_judged() -> None:
    options = {"min_tokens": "auto", "q_clusters": 16, "k_clusters": 32, "kernel": "reference"}
    assert {site.decision for site in report_of(SHORT_OF_A_GAIN, **options).sites} == {"sparse"}
