"""Nothing skipped: the output of every family is that of the model as it is, on every step and branch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from families.case import Case, Inputs
from families.table import CASES, GROUPS
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import sparse_compile

OPTIONS = {"lowering": "eager", "min_tokens": 64, "dense_steps": 0, "dense_layers": 0}
NOTHING_SKIPPED = {"top_p": 1.0}
SKIPPING = {"density": 0.25, "min_kept": 0.05, "correction": "none"}
BRANCHES = {"cond": 1.0, "uncond": 0.8}
"""The branches of guidance, and what scales their video."""
STEPS = 2
TOLERANCE = 2e-4
"""Of the largest value of an output."""

Outputs = dict[tuple[int, str], list[Tensor]]
"""By step and branch."""


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield
    torch.compiler.reset()


def ways() -> list[Any]:
    """Whole models, and regional ones where they have repeated blocks."""
    return [
        pytest.param(
            case,
            regional,
            id=f"{'regional' if regional else 'whole'}-{case.name}",
            marks=() if case.quick else pytest.mark.slow,
        )
        for case in CASES
        for regional in (False, True)
        if not regional or case.regional is not None
    ]


def one_of_each_group() -> list[Any]:
    """The first case of each group that goes sparse."""
    first = [next((case for case in cases if case.goes_sparse()), None) for cases in GROUPS.values()]
    cases = [case for case in first if case is not None]
    return [pytest.param(case, id=case.name, marks=() if case is cases[0] else pytest.mark.slow) for case in cases]


def at(case: Case, kwargs: Inputs, step: int, branch: str) -> Inputs:
    """The inputs of one call: the video moves from step to step, and differs between the branches."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor * BRANCHES[branch] + 0.05 * step

    return {**kwargs, **{name: pytree.tree_map_only(Tensor, moved, kwargs[name]) for name in case.video}}


def outputs_of(run: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
    """Every tensor that a model returns."""
    return [leaf for leaf in pytree.tree_leaves(run(**inputs)) if isinstance(leaf, Tensor)]


def eager(case: Case, model: nn.Module, kwargs: Inputs) -> Outputs:
    """What the model gives as it is. To be asked before it is compiled."""
    return {
        (step, branch): outputs_of(model, at(case, kwargs, step, branch))
        for step in range(STEPS)
        for branch in BRANCHES
    }


def compiled(case: Case, model: Any, regional: bool, **options: Any) -> Callable[..., Any]:
    how: Inputs = {"backend": "sparse_attn", "options": {**OPTIONS, **options}, "fullgraph": case.fullgraph}
    if regional:
        model.compile_repeated_blocks(**how)
        return model  # type: ignore[no-any-return]
    return torch.compile(model, **how)


def largest_error(got: list[Tensor], want: list[Tensor]) -> float:
    """Of the largest value wanted."""
    assert [tensor.shape for tensor in got] == [tensor.shape for tensor in want]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True))


def errors_of(case: Case, regional: bool, **options: Any) -> tuple[sparse_compile.Report, dict[tuple[int, str], float]]:
    """One generation: its report, and how far each output is from the eager one."""
    model, kwargs = case.build()
    wanted = eager(case, model, kwargs)
    run = compiled(case, model, regional, **options)
    errors: dict[tuple[int, str], float] = {}
    with sparse_compile.denoising(model, steps=STEPS) as clock:
        for step in range(STEPS):
            for branch in BRANCHES:
                with clock.branch(branch):
                    got = outputs_of(run, at(case, kwargs, step, branch))
                errors[step, branch] = largest_error(got, wanted[step, branch])
            clock.step()
        return sparse_compile.explain(model), errors


@pytest.mark.parametrize(("case", "regional"), ways())
def test_nothing_skipped_equals_the_model_as_it_is(case: Case, regional: bool) -> None:
    report, errors = errors_of(case, regional, **NOTHING_SKIPPED)
    assert max(errors.values()) <= TOLERANCE, errors
    sparse = any(site.decision == "sparse" for site in report.sites)
    assert sparse == case.goes_sparse(regional)
    if sparse:
        assert report.density == 1.0
        assert {step.phase for step in report.generations[0].steps} == {"search", "sparse"}


@pytest.mark.parametrize("case", one_of_each_group())
def test_skipped_keys_show_in_the_output(case: Case) -> None:
    """The control: weights and tolerance are such that a wrong attention is seen."""
    report, errors = errors_of(case, regional=False, **SKIPPING)
    assert min(errors.values()) > 5 * TOLERANCE, errors
    assert report.density is not None and report.density < 0.7
