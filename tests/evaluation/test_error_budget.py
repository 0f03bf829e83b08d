"""SVG2 that ranks pairs of clusters by the error of pooling them: the formula, its budgets, and a whole model."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from kernel_oracles import Clustered, cluster, random_tensor
from torch import Tensor
from toy_models import EAGER, Stack, tokens

import sparse_compile
from sparse_compile.config import Config
from sparse_compile.errors import SparseAttentionError
from sparse_compile.evaluation.error_budget import NAMESPACE, ErrorBudget, budget, choose, moments, pair_errors
from sparse_compile.phases import Phase
from sparse_compile.plan import Plan
from sparse_compile.strategies.base import Strategy
from sparse_compile.testing import capture, count_ops, find, rewrite

SCALE = 0.25
METHOD = "sparse_compile.evaluation.error_budget:ErrorBudget"


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield


def plan(
    q: Tensor, k: Tensor, v: Tensor, made: Clustered, density: float | None, top_p: float = 1.0, pad: bool = True
) -> Plan:
    keep = getattr(torch.ops, NAMESPACE).plan(q, k, v, *made.outputs[:6], made.ready, SCALE, density, top_p, pad)
    return Plan(made.q_order, made.q_offsets, made.k_order, made.k_offsets, keep)


def inputs(queries: int = 60, keys: int = 80, heads: tuple[int, int] = (2, 1), batch: int = 2) -> tuple[Tensor, ...]:
    """Keys and values of very unequal spread, so that mass and error rank differently."""
    q = random_tensor(batch, heads[0], queries, 8, seed=1)
    uneven = torch.linspace(0.05, 3, keys).view(1, 1, keys, 1)
    k = random_tensor(batch, heads[1], keys, 8, seed=2) * uneven
    return q, k, random_tensor(batch, heads[1], keys, 5, seed=3) * uneven.flip(2)


def members(made: Clustered, side: str, batch: int, head: int, group: int) -> Tensor:
    order, offsets = getattr(made, f"{side}_order")[batch, head], getattr(made, f"{side}_offsets")[batch, head]
    return order[offsets[group] : offsets[group + 1]].long()


def oracle(q: Tensor, k: Tensor, v: Tensor, made: Clustered, batch: int, head: int, key_head: int) -> Tensor:
    """e_ij as the formula has it, one number after the other, in float64."""
    rows, columns = made.q_means.shape[2], made.k_means.shape[2]
    error = torch.zeros(rows, columns, dtype=torch.float64)
    for i in range(rows):
        own = q[batch, head, members(made, "q", batch, head, i)].double()
        weights, harm = [], []
        for j in range(columns):
            there = members(made, "k", batch, key_head, j)
            keys, values = k[batch, key_head, there].double(), v[batch, key_head, there].double()
            weights.append(len(there) * math.exp(SCALE * float(own.mean(0) @ keys.mean(0))))
            logit_variance = SCALE**2 * sum(
                (float(column.mean()) ** 2 + float(column.var(correction=0))) * float(keys[:, d].var(correction=0))
                for d, column in enumerate(own.t())
            )
            value_variance = sum(float(values[:, d].var(correction=0)) for d in range(v.shape[-1]))
            harm.append(math.sqrt(logit_variance) * math.sqrt(value_variance))
        error[i] = torch.tensor([w / sum(weights) * h for w, h in zip(weights, harm, strict=True)])
    return error


def test_it_is_svg2_with_another_plan() -> None:
    assert isinstance(ErrorBudget(), Strategy)
    captured = capture(Stack(1), tokens(300))[0]
    strategy = ErrorBudget()
    assert [site.sparse for site in find(captured, strategy, method=METHOD, min_tokens=1)] == [True]
    graph = rewrite(captured, Phase.SPARSE, strategy, method=METHOD, min_tokens=1).graph_module
    assert (count_ops(graph, "kmeans"), count_ops(graph, "plan_top_p")) == (1, 0)
    assert count_ops(graph, "block_sparse_attention") == count_ops(graph, "pooled_keys") == 1


def test_errors_are_those_of_the_formula() -> None:
    q, k, v = inputs()
    made = cluster(q, k, 4, 6)
    for batch, head in ((0, 0), (1, 1)):
        q_side = (made.q_order[batch, head], made.q_offsets[batch, head], 4)
        k_side = (made.k_order[batch, 0], made.k_offsets[batch, 0], 6)
        similarity = SCALE * made.q_means[batch, head].double() @ made.k_means[batch, 0].double().t()
        sizes = made.k_offsets[batch, 0].diff()[:6]
        stats = moments(q[batch, head], *q_side), moments(k[batch, 0], *k_side), moments(v[batch, 0], *k_side)
        found = pair_errors(similarity, sizes, *stats, SCALE)
        torch.testing.assert_close(found, oracle(q, k, v, made, batch, head, 0), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("density", [0.1, 0.3, 0.6])
def test_a_row_keeps_what_errs_most_per_key_up_to_its_density(density: float) -> None:
    q, k, v = inputs()
    made = cluster(q, k, 4, 12)
    kept = plan(q, k, v, made, density).kept()
    for batch in range(2):
        for head in range(2):
            error = oracle(q, k, v, made, batch, head, 0)
            sizes = made.k_offsets[batch, 0].diff()[:12].double()
            for row in range(4):
                mine = kept[batch, head, row, :12]
                rates = error[row] / sizes
                assert rates[mine].min() > rates[~mine & (sizes > 0)].max()
                share = float(sizes[mine].sum() / sizes.sum())
                assert abs(share - density) <= float(sizes.max() / sizes.sum())


def test_the_order_is_not_that_of_mass() -> None:
    q, k, v = inputs()
    made = cluster(q, k, 4, 12)
    by_mass = torch.ops.sparse_compile.plan_top_p(
        made.q_means, made.k_means, made.q_offsets, made.k_offsets, made.ready, SCALE, 1.0, 0.0, 0.3, "mass_per_key",
        True, 0, "cpu",
    )  # fmt: skip
    assert not torch.equal(by_mass, plan(q, k, v, made, 0.3).keep)


def test_a_larger_top_p_keeps_a_superset_and_leaves_no_more_than_its_share() -> None:
    q, k, v = inputs()
    made = cluster(q, k, 4, 12)
    error = oracle(q, k, v, made, 0, 0, 0)
    spread = float(v[0, 0].double().var(0, correction=0).sum().sqrt())
    smaller = torch.zeros(4, 12, dtype=torch.bool)
    counts = []
    for top_p in (0.2, 0.8, 0.95, 0.99, 1.0):
        kept = plan(q, k, v, made, None, top_p).kept()[0, 0, :4, :12]
        assert (kept | ~smaller).all()
        assert (torch.where(kept, 0, error).sum(-1) <= (1 - top_p) * spread + 1e-9).all()
        smaller = kept
        counts.append(int(kept.sum()))
    assert counts[0] < counts[2] < counts[-1] == int((made.k_offsets[0, 0].diff()[:12] > 0).sum()) * 4


def test_what_is_left_is_counted_to_the_last_pair() -> None:
    error = torch.tensor([[4.0, 3.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    sizes, spread = torch.ones(4, dtype=torch.int32), torch.tensor(10.0, dtype=torch.float64)
    kept = {p: choose(error, sizes, None, p, spread).tolist() for p in (0.01, 0.65, 0.75, 0.95)}
    assert kept[0.01] == [[True, False, False, False]] * 2, "a pair a row at least"
    assert kept[0.65] == [[True, True, False, False], [True, False, False, False]]
    assert kept[0.75] == [[True, True, True, False], [True, False, False, False]]
    assert kept[0.95] == [[True, True, True, True], [True, False, False, False]]


def test_the_budget_does_not_depend_on_the_size_of_the_values() -> None:
    q, k, v = inputs()
    made = cluster(q, k, 4, 12)
    assert torch.equal(plan(q, k, v, made, None, 0.9).keep, plan(q, k, 1000 * v, made, None, 0.9).keep)


@pytest.mark.parametrize("padded_queries_attend", [True, False])
@pytest.mark.parametrize(("density", "top_p"), [(0.1, 1.0), (None, 0.5)])
def test_text_is_kept_always_and_padding_never(
    density: float | None, top_p: float, padded_queries_attend: bool
) -> None:
    q, k, v = inputs(80, 80, (2, 2))
    valid = torch.ones(2, 80, dtype=torch.bool)
    valid[0, 76:] = False
    k[0, :, 76:], v[0, :, 76:] = math.nan, math.inf
    made = cluster(q, k, 4, 6, q_valid=valid, k_valid=valid, q_video=[5, 70], k_video=[5, 70])
    made_plan = plan(q, k, v, made, density, top_p, padded_queries_attend)
    kept, sizes = made_plan.kept(), made.k_offsets.diff()
    assert kept[:, :, :5, 6].all(), "everyone attends to text"
    assert torch.equal(kept[:, :, 4, :6], sizes[..., :6] > 0), "text attends to everything"
    assert not kept[..., 7].any()
    assert bool(kept[0, :, 5, :7].any()) is padded_queries_attend
    assert kept[:, :, :4, :6].any(-1).all() and not kept[:, :, :4, :6].all()


def test_nothing_is_skipped_before_the_clusters_are_ready() -> None:
    q, k, v = inputs()
    made = cluster(q, k, 4, 6)
    made.ready.zero_()
    assert (plan(q, k, v, made, 0.1).density() == 1).all()


def test_a_cluster_that_holds_a_value_without_a_number_is_kept() -> None:
    q, k, v = inputs(batch=1)
    made = cluster(q, k, 4, 6)
    broken = int(torch.nonzero(made.k_offsets[0, 0].diff()[:6])[0])
    v[0, 0, members(made, "k", 0, 0, broken)[0]] = math.nan
    for density, top_p in ((0.2, 1.0), (None, 0.5)):
        assert plan(q, k, v, made, density, top_p).kept()[0, :, :4, broken].all()


def test_the_op_is_one_that_torch_compile_can_trace() -> None:
    q, k, v = inputs()
    made = cluster(q, k, 4, 6)
    op = getattr(torch.ops, NAMESPACE).plan.default
    torch.library.opcheck(op, (q, k, v, *made.outputs[:6], made.ready, SCALE, None, 0.9, True))


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, (0.25, 1.0)), ({"density": 0.4}, (0.4, 1.0)), ({"top_p": 0.8}, (None, 0.8))],
)
def test_the_budget_is_a_density_unless_top_p_is_given(
    options: dict[str, float], expected: tuple[float | None, float]
) -> None:
    assert budget(Config(method=METHOD, **options)) == expected


def test_a_recall_target_is_refused() -> None:
    with pytest.raises(SparseAttentionError, match=r"goes by density or top_p; got 'target_recall=0\.5'"):
        budget(Config(method=METHOD, target_recall=0.5))


@pytest.mark.parametrize("options", [{"density": 0.3}, {"top_p": 0.9}, {"density": 1.0}], ids=str)
def test_a_model_runs_with_it(options: dict[str, float]) -> None:
    model, x = Stack(2), tokens(256)
    chosen = {**EAGER, "method": METHOD, "q_clusters": 4, "k_clusters": 16, "dense_steps": 0, **options}
    compiled = torch.compile(model, backend="sparse_attn", options=chosen, fullgraph=True)
    with sparse_compile.denoising(model, steps=3) as clock:
        for _ in range(3):
            out = compiled(x)
            clock.step()
    generation = sparse_compile.explain(model).to_dict()["generations"][-1]
    assert torch.isfinite(out).all()
    assert [step["phase"] for step in generation["steps"]] == ["search", "sparse", "sparse"]
    assert 0 < generation["kept_mass"] <= 1
    if "density" in options:
        assert generation["density"] == pytest.approx(options["density"], abs=0.1)
    if options.get("density") == 1.0:
        torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)
