"""torch.compile(model, backend="sparse_attn") as a user meets it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from families.wan import wan_t2v
from torch._dynamo.exc import BackendCompilerFailed
from toy_models import EAGER, Block, Stack, tokens

import sparse_compile
from sparse_compile.compiler import pipeline
from sparse_compile.errors import StrictModeError
from sparse_compile.runtime.registry import REGISTRY
from sparse_compile.strategies.svg2 import Svg2


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch.compiler.reset()


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="sparse_attn", options={**EAGER, **options})


def run_in_fresh_process(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_backend_is_found_by_name_without_importing_the_package() -> None:
    program = """
import sys, torch
assert "sparse_attn" in torch.compiler.list_backends()
assert "sparse_compile" not in sys.modules
call = torch.compile(torch.nn.Linear(4, 4), backend="sparse_attn", options={"lowering": "eager"})
with torch.no_grad():
    call(torch.randn(2, 4))
assert "sparse_compile.compiler.backend" in sys.modules
assert "triton" not in sys.modules or sys.modules["triton"] is not None
"""
    done = run_in_fresh_process(program)
    assert done.returncode == 0, done.stderr


def test_torch_logs_may_name_the_package() -> None:
    """Torch then imports the package in the middle of `import torch`."""
    program = """
import torch
call = torch.compile(torch.nn.Linear(4, 4), backend="sparse_attn", options={"lowering": "eager"})
with torch.no_grad():
    call(torch.randn(2, 4))
"""
    done = run_in_fresh_process(program, TORCH_LOGS="+sparse_compile")
    assert done.returncode == 0, done.stderr
    assert "compiling a graph" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topp": 0.5}, "Did you mean 'top_p'"),
        ({"top_p": 0.0}, r"'top_p' must be none or a number in \(0, 1\]; got 0.0"),
        ({"min_kept": 2}, "'min_kept' must be a number in"),
        ({"method": "nothing"}, "must name an installed strategy"),
        ({"method": "no_such_module:Method"}, "must be importable"),
        ({"method": "builtins:dict"}, "must give a Strategy"),
        ({"preset": "best"}, "quality, balanced or fast"),
        ({"sparsity": 0.5}, "belongs to method .adaspa."),
    ],
)
def test_bad_options_are_refused_at_the_first_call(options: dict[str, Any], message: str) -> None:
    call = torch.compile(Stack(1), backend="sparse_attn", options=options)
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match=message):
        call(tokens())


def test_options_are_checked_although_the_graph_has_no_attention() -> None:
    call = torch.compile(torch.nn.Linear(4, 4), backend="sparse_attn", options={"topp": 1})
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="topp"):
        call(torch.randn(2, 4))


def test_a_mode_is_the_option_compile_mode() -> None:
    with pytest.raises(RuntimeError):
        torch.compile(Stack(1), backend="sparse_attn", mode="max-autotune", options={"top_p": 1.0})
    call = torch.compile(Stack(1), backend="sparse_attn", mode="no-such-mode")
    with torch.no_grad(), pytest.raises((BackendCompilerFailed, RuntimeError), match="no-such-mode"):
        call(tokens())


def test_gradients_make_the_graph_dense_and_are_right() -> None:
    model = Stack(2)
    model.requires_grad_(True)
    x = tokens()
    call = compiled(model, dense_steps=0)
    with sparse_compile.denoising(model, steps=2):
        call(x).square().sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    for grad, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad)
    report = sparse_compile.explain(model)
    assert {site.reason for site in report.sites} == {"gradients"}
    assert "no_grad" in str(report)


def test_no_grad_after_training_is_sparse() -> None:
    model = Stack(1)
    model.requires_grad_(True)
    call = compiled(model, dense_steps=0)
    call(tokens())
    with torch.no_grad(), sparse_compile.denoising(model, steps=2):
        call(tokens())
    assert [site.decision for site in sparse_compile.explain(model).sites] == ["sparse"]


def test_all_dense_is_bitwise_what_inductor_gives() -> None:
    model, x = Stack(2), tokens()
    options = {"min_tokens": 10_000}
    with torch.no_grad(), sparse_compile.denoising(model, steps=1):
        ours = torch.compile(model, backend="sparse_attn", options=options)(x)
        torch.compiler.reset()
        plain = torch.compile(model, backend="inductor")(x)
    assert torch.equal(ours, plain)


def test_strict_names_the_unsupported_site_and_the_remedy() -> None:
    class Causal(Block):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            q, k, v = (
                p(hidden_states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for p in (self.to_q, self.to_k, self.to_v)
            )
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="causal attention"):
        compiled(Causal().eval(), strict=True)(tokens())


def test_strict_raises_when_nothing_became_sparse() -> None:
    model = Stack(1)
    call = compiled(model, strict=True, min_tokens=10_000)
    with torch.no_grad(), sparse_compile.denoising(model, steps=2) as clock:
        call(tokens())
        clock.step()
        call(tokens())
        with pytest.raises(StrictModeError, match="must become sparse"):
            clock.step()


def test_more_clusters_than_tokens_is_dense_with_a_reason_unless_forced() -> None:
    model, x = Stack(1), tokens(96)
    with torch.no_grad(), sparse_compile.denoising(model, steps=1):
        compiled(model, min_tokens="auto", k_clusters=1000, dense_steps=0)(x)
        assert [s.reason for s in sparse_compile.explain(model).sites] == ["too_short"]
    torch.compiler.reset()
    with torch.no_grad(), sparse_compile.denoising(model, steps=1):
        call = compiled(model, min_tokens=1, k_clusters=1000, q_clusters=1000, dense_steps=0, top_p=1.0)
        torch.testing.assert_close(call(x), model(x), rtol=1e-4, atol=1e-5)
    assert [s.decision for s in sparse_compile.explain(model).sites] == ["sparse"]


def test_one_token_is_exact() -> None:
    model, x = Stack(1), tokens(1)
    with torch.no_grad(), sparse_compile.denoising(model, steps=1):
        torch.testing.assert_close(compiled(model, dense_steps=0)(x), model(x), rtol=1e-4, atol=1e-5)


def test_nan_tokens_stay_in_their_rows_and_later_calls_are_right() -> None:
    model = Stack(1)
    call = compiled(model, dense_steps=0, top_p=0.5)
    bad = tokens()
    bad[0, 5] = float("nan")
    with torch.no_grad(), sparse_compile.denoising(model, steps=4) as clock:
        for x in (tokens(), bad, tokens()):
            with clock.branch("cond"):
                out = call(x)
            clock.step()
    assert torch.isfinite(out).all()
    steps = sparse_compile.explain(model).generations[0].steps
    assert [step.non_finite > 0 for step in steps] == [False, True, False]


def test_the_global_random_state_is_left_alone() -> None:
    model = Stack(1)
    before = torch.get_rng_state()
    with torch.no_grad(), sparse_compile.denoising(model, steps=1):
        compiled(model, dense_steps=0)(tokens())
    assert torch.equal(before, torch.get_rng_state())


def test_precompiled_caches_make_it_dense_and_say_so() -> None:
    model = Stack(1)
    with (
        torch.no_grad(),
        sparse_compile.denoising(model, steps=1),
        torch._dynamo.config.patch(caching_precompile=False),
    ):
        from unittest import mock

        with mock.patch("sparse_compile.compiler.torch_internals.precompiles", return_value=True):
            compiled(model, dense_steps=0)(tokens())
    assert [site.reason for site in sparse_compile.explain(model).sites] == ["caching_precompile"]


def test_reset_of_dynamo_empties_the_registry() -> None:
    model = Stack(1)
    with torch.no_grad():
        compiled(model)(tokens())
    assert sparse_compile.explain(model).compilations == 1
    torch.compiler.reset()
    assert sparse_compile.explain(model).compilations == 0
    assert not REGISTRY.unowned


def test_an_export_is_the_model_as_it_was() -> None:
    """torch.export asks no backend; README says so."""
    exported = torch.export.export(compiled(Stack(1)), (tokens(),))
    assert "scaled_dot_product_attention" in str(exported.graph)
    assert "sparse_compile" not in str(exported.graph)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dense", "svg2"])
def test_dense_phases_of_a_diffusers_model_are_bitwise_what_inductor_gives(method: str) -> None:
    model, kwargs = wan_t2v()
    options = {"method": method, "min_tokens": 64, "dense_steps": 1}
    with torch.no_grad(), sparse_compile.denoising(model, steps=2):
        ours = torch.compile(model, backend="sparse_attn", options=options)(**kwargs, return_dict=False)[0]
        torch.compiler.reset()
        plain = torch.compile(model, backend="inductor")(**kwargs, return_dict=False)[0]
    assert torch.equal(ours, plain)


def test_a_graph_that_cannot_be_read_is_compiled_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise KeyError("no such fact")

    model, x = Stack(1), tokens()
    monkeypatch.setattr(pipeline, "match_attention", fail)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(x), model(x))


def test_a_strategy_that_fails_on_a_site_leaves_it_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise KeyError("no such size")

    model, x = Stack(1), tokens()
    monkeypatch.setattr(Svg2, "state", fail)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(x), model(x))
    (site,) = sparse_compile.explain(model).sites
    assert site.reason == "analysis_failed"
    assert "no such size" in site.detail
