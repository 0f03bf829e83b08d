from __future__ import annotations

import pytest
import torch
from kernel_oracles import IMPLEMENTATIONS, OPS, cluster, fields_of, make_plan, new_log, random_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_compile.call_log import append_row, read_rows
from sparse_compile.errors import SparseAttentionError
from sparse_compile.ops import attention, clusters, recall


def strided(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def kmeans_args(kernel, *, tokens=(40, 50), batch=2, restart=True, masked=True, dtype=torch.float32):
    q = strided(random_tensor(batch, 4, tokens[0], 16, dtype=dtype))
    k = strided(random_tensor(batch, 2, tokens[1], 16, seed=1, dtype=dtype))
    q_valid = torch.arange(tokens[0]).lt(tokens[0] - 3).expand(batch, -1) if masked else None
    k_valid = torch.arange(tokens[1]).lt(tokens[1] - 5).unsqueeze(0) if masked else None
    q_centroids = random_tensor(batch, 4, 5, 16, seed=2, dtype=dtype)
    k_centroids = random_tensor(batch, 2, 7, 16, seed=3, dtype=dtype)
    ready = torch.zeros(1, dtype=torch.int32)
    video = ([0, tokens[0] - 8], [0, 10, 12, tokens[1] - 6])
    return (q, k, q_valid, k_valid, *video, q_centroids, k_centroids, ready, restart, 2, 0, kernel)


def plan_args(kernel, **options):
    args = kmeans_args(kernel, **options)
    _, q_offsets, q_means, _, k_offsets, k_means, _ = OPS.kmeans(*args)
    ready = torch.ones(1, dtype=torch.int32)
    return (q_means, k_means, q_offsets, k_offsets, ready, 0.25, 0.9, 0.1, None, "mass", True, 0, kernel)


def recall_args(kernel, **options):
    *means, ready, scale, _, _, _, rank_by, padded, seed, _ = plan_args(kernel, **options)
    return (*means, ready, torch.full((2, 4), 0.9), scale, 0.8, 0.02, 0.5, rank_by, padded, seed, kernel)


def pooled_args(kernel, coupled, *, orders=True, **options):
    args = kmeans_args(kernel, **options)
    k = args[1]
    v = strided(random_tensor(*k.shape[:3], 24, seed=4, dtype=k.dtype))
    _, _, _, k_order, k_offsets, _, _ = OPS.kmeans(*args)
    return (k, v, k_order if orders else None, k_offsets, [0, 10, 12, 44], coupled, kernel)


def attention_args(kernel, token_major, *, orders=True, tail=None, **options):
    """`tail`: None, "pooled" or "coupled"."""
    args = kmeans_args(kernel, **options)
    q = args[0]
    k, v, *rest = pooled_args(kernel, tail == "coupled", orders=orders, **options)
    q_order, q_offsets, q_means, k_order, k_offsets, k_means, non_finite = OPS.kmeans(*args)
    ready = torch.ones(1, dtype=torch.int32)
    keep = OPS.plan_top_p(q_means, k_means, q_offsets, k_offsets, ready, 0.25, 0.5, 0.1, None, "mass", True, 0, kernel)
    if not orders:
        q_order = k_order = None
    pooled = [None] * 4
    if tail is not None:
        pooled = list(OPS.pooled_keys(k, v, *rest))
        if tail == "pooled":
            pooled[3] = None
    kept_mass, at_bounds = torch.full(q.shape[:2], 0.9), torch.zeros(*q.shape[:2], 2)
    plan = (q_order, q_offsets, k_order, k_offsets, keep)
    figures = (kept_mass, kept_mass, at_bounds, non_finite, new_log())
    return (q, k, v, *plan, *pooled, *figures, 0.25, token_major, kernel)


ATTENTION = {
    "attention-token-major": {"token_major": True},
    "attention-head-major": {"token_major": False},
    "attention-in-place": {"token_major": True, "orders": False},
    "attention-pooled": {"token_major": True, "tail": "pooled"},
    "attention-coupled": {"token_major": False, "tail": "coupled"},
    "attention-coupled-in-place": {"token_major": True, "tail": "coupled", "orders": False},
}
POOLED = {
    "pooled_keys": {"coupled": False},
    "pooled_keys-coupled": {"coupled": True},
    "pooled_keys-in-place": {"coupled": True, "orders": False},
}
CALLS = {
    "kmeans-restart": (OPS.kmeans, kmeans_args, {}),
    "kmeans-warm": (OPS.kmeans, kmeans_args, {"restart": False}),
    "kmeans-unmasked": (OPS.kmeans, kmeans_args, {"masked": False}),
    "plan_top_p": (OPS.plan_top_p, plan_args, {}),
    "plan_estimated_recall": (OPS.plan_estimated_recall, recall_args, {}),
    **{name: (OPS.pooled_keys, pooled_args, options) for name, options in POOLED.items()},
    **{name: (OPS.block_sparse_attention, attention_args, options) for name, options in ATTENTION.items()},
}

each_kernel = pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
each_call = pytest.mark.parametrize("call", CALLS)


@each_kernel
@each_call
def test_opcheck(kernel, call):
    op, make, options = CALLS[call]
    results = torch.library.opcheck(op.default, make(kernel, **options))
    assert set(results.values()) == {"SUCCESS"}, results


def as_tuple(result):
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


@each_kernel
@each_call
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fakes_have_the_shapes_strides_and_dtypes_of_the_results(kernel, call, dtype):
    op, make, options = CALLS[call]
    args = make(kernel, dtype=dtype, **options)
    with FakeTensorMode() as mode:
        fakes = op(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args))
    for fake, real in zip(as_tuple(fakes), as_tuple(op(*args)), strict=True):
        assert fake.shape == real.shape and fake.stride() == real.stride() and fake.dtype == real.dtype


def whole_call(q, k, v, q_centroids, k_centroids, ready, log, kernel):
    spans = [[0, x.shape[2] - 4] for x in (q, k)]
    q_order, q_offsets, q_means, k_order, k_offsets, k_means, non_finite = OPS.kmeans(
        q, k, None, None, *spans, q_centroids, k_centroids, ready, True, 2, 0, kernel
    )
    keep = OPS.plan_top_p(q_means, k_means, q_offsets, k_offsets, ready, 0.25, 0.9, 0.0, None, "mass", True, 0, kernel)
    pooled = OPS.pooled_keys(k, v, k_order, k_offsets, spans[1], True, kernel)
    plan = (q_order, q_offsets, k_order, k_offsets, keep)
    return OPS.block_sparse_attention(q, k, v, *plan, *pooled, None, None, None, non_finite, log, 0.25, True, kernel)


def call_inputs(tokens):
    q, k, v = (random_tensor(1, 2, tokens, 16, seed=seed) for seed in range(3))
    state = [torch.zeros(1, 2, 5, 16), torch.zeros(1, 2, 7, 16), torch.zeros(1, dtype=torch.int32)]
    return [q, k, v, *state, new_log()]


@each_kernel
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_ops_compile_as_one_graph_also_with_a_dynamic_size(kernel, backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(whole_call, fullgraph=True, backend=backend, dynamic=True)
    for tokens in (40, 65, 101):
        eager_inputs, compiled_inputs = call_inputs(tokens), call_inputs(tokens)
        eager = whole_call(*eager_inputs, kernel)
        for one, other in zip(eager, compiled(*compiled_inputs, kernel), strict=True):
            assert torch.equal(one, other)
        for one, other in zip(eager_inputs, compiled_inputs, strict=True):
            assert torch.equal(one.nan_to_num(), other.nan_to_num()), "state and log are written alike"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def fake_run(function, args):
    """Run a function body on fake tensors: any read of a value raises."""
    with FakeTensorMode() as mode:
        return function(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args))


BODIES = {
    "kmeans-restart": (clusters._kmeans, kmeans_args, {}),
    "kmeans-warm": (clusters._kmeans, kmeans_args, {"restart": False}),
    "plan_top_p": (clusters._plan_top_p, plan_args, {}),
    "plan_estimated_recall": (recall._plan_estimated_recall, recall_args, {}),
    **{name: (attention._pooled_keys, pooled_args, options) for name, options in POOLED.items()},
    **{
        name: (attention._block_sparse_attention, attention_args, ATTENTION[name])
        for name in ("attention-token-major", "attention-in-place", "attention-coupled")
    },
}


@pytest.mark.parametrize("body", BODIES)
def test_the_reference_reads_no_value_on_the_host(body):
    function, make, options = BODIES[body]
    args = make("reference", **options)
    for fake, real in zip(as_tuple(fake_run(function, args)), as_tuple(function(*args)), strict=True):
        assert fake.shape == real.shape and fake.dtype == real.dtype


@pytest.mark.parametrize("rank_by", ["mass", "mass_per_key", "random"])
@pytest.mark.parametrize("density", [None, 0.3])
def test_no_way_of_choosing_reads_a_value_on_the_host(rank_by, density):
    args = list(plan_args("reference"))
    args[8], args[9] = density, rank_by
    assert fake_run(clusters._plan_top_p, args).shape == (2, 4, 7, 1)


@pytest.mark.parametrize("body", BODIES)
def test_the_body_of_the_reference_compiles_as_one_graph(body):
    torch._dynamo.reset()
    function, make, options = BODIES[body]
    compiled = torch.compile(lambda *args: function(*args), fullgraph=True, backend="eager")
    for one, other in zip(
        as_tuple(function(*make("reference", **options))),
        as_tuple(compiled(*make("reference", **options))),
        strict=True,
    ):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


def test_an_unknown_kernel_is_refused_in_words():
    args = list(plan_args("reference"))
    args[-1] = "fast"
    with pytest.raises(SparseAttentionError, match=r"kernel must be one of triton, cpu, reference; got 'fast'"):
        OPS.plan_top_p(*args)


@each_kernel
def test_each_attention_call_appends_its_density_to_the_log(kernel):
    q = random_tensor(1, 2, 60, 16)
    plan = make_plan(cluster(q, q), 0.25)
    log = new_log()
    tail = (None,) * 4
    for count in (3, 0):
        non_finite = torch.tensor([count], dtype=torch.int32)
        OPS.block_sparse_attention(
            q, q, q, *fields_of(plan), *tail, None, None, None, non_finite, log, 0.25, True, kernel
        )
    written, rows = read_rows(log)
    assert written == 2
    assert [row.non_finite for row in rows] == [3, 0]
    assert rows[0].density == pytest.approx(plan.density().mean().item())
    assert rows[0].kept_mass is None


def test_the_log_is_a_ring():
    log = new_log()
    for count in range(600):
        append_row(log, torch.tensor(count / 600), None, None)
    written, rows = read_rows(log)
    assert written == 600 and len(rows) == 512
    assert rows[0].density == pytest.approx(88 / 600) and rows[-1].density == pytest.approx(599 / 600)
