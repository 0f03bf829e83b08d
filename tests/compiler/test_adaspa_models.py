"""AdaSpa on the tiny diffusers models: all four phases of two branches, exact where nothing is skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from attention_blocks import TEXT, TOKENS, Joint, text, video
from families.table import case_of
from generations import BRANCHES
from torch import Tensor, nn

import sparse_compile
from sparse_compile.runtime.clock import Clock

Inputs = dict[str, Any]
Outputs = dict[tuple[int, str], Tensor]
"""By step and branch."""

OPTIONS = {
    "method": "adaspa",
    "lowering": "eager",
    "min_tokens": 1,
    "dense_layers": 0,
    "block_size": 8,
    "dense_steps": 2,
    "search_steps": (2, 4),
}
PHASES = ("dense", "search", "sparse", "refine", "sparse")
"""What five steps are under these options."""
DENSE_OUTPUT = ("dense", "search")
TOLERANCE = 2e-4
"""Of the largest output: what one attention may differ by, which the layers behind it enlarge."""
SKIPPING: Inputs = {"sparsity": 0.7, "correction": "none"}

SLOW = pytest.mark.slow
QUICK_EXACT = (("wan_t2v", False), ("hunyuan_video", True), ("ltx", True))
QUICK_SKIPPING = (("cogvideox", False), ("ltx", True))
GATHERS_TEXT = "mochi"
"""Its number of text tokens depends on data, so the plan's state would: no AdaSpa."""
NAMES = (
    *("wan_t2v", "wan_ti2v_per_token_time", "wan_i2v", "wan_vace", "hunyuan_video", "cogvideox", "cogvideox_rope"),
    *("ltx", "mochi", "cosmos", "allegro", "latte", "flux", "sd3"),
)
"""One family of each layout, and some more."""
GOES_SPARSE = {name for name in NAMES if case_of(name).goes_sparse()} - {GATHERS_TEXT}


def cases(names: set[str], quick: tuple[tuple[str, bool], ...]) -> list[Any]:
    """Whole models, and regional ones where they have repeated blocks."""
    return [
        pytest.param(
            name,
            regional,
            id=f"{'regional' if regional else 'whole'}-{name}",
            marks=() if (name, regional) in quick else SLOW,
        )
        for name in NAMES
        for regional in (False, True)
        if name in names and (not regional or case_of(name).regional is not None)
    ]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield


def compiled(model: Any, regional: bool, fullgraph: bool = False, **options: Any) -> Callable[..., Any]:
    how: Inputs = {"backend": "sparse_attn", "options": {**OPTIONS, **options}}
    if regional:
        model.compile_repeated_blocks(**how)
        return model
    return torch.compile(model, fullgraph=fullgraph, **how)


def at(kwargs: Inputs, step: int, branch: str) -> Inputs:
    """The inputs of one call: the video moves from step to step, and differs between the branches."""
    scale = 1.0 if branch == "cond" else 0.9
    return {**kwargs, "hidden_states": kwargs["hidden_states"] * scale + 0.05 * step, "return_dict": False}


def dense(model: nn.Module, kwargs: Inputs) -> Outputs:
    """What the model gives as it is. To be asked before it is compiled."""
    return {(step, branch): model(**at(kwargs, step, branch))[0] for step in range(len(PHASES)) for branch in BRANCHES}


def generate(call: Callable[..., Any], clock: Clock, kwargs: Inputs) -> Outputs:
    outputs: Outputs = {}
    for step in range(len(PHASES)):
        for branch in BRANCHES:
            with clock.branch(branch):
                outputs[step, branch] = call(**at(kwargs, step, branch))[0]
        clock.step()
    return outputs


def largest_error(got: Tensor, want: Tensor) -> float:
    """Of the largest value wanted."""
    return float((got - want).abs().max() / want.abs().max())


def run(name: str, regional: bool, **options: Any) -> tuple[sparse_compile.Report, Outputs, Outputs]:
    """One generation of a tiny model: its report, its outputs, and those of dense attention."""
    model, kwargs = case_of(name).build()
    wanted = dense(model, kwargs)
    call = compiled(model, regional, fullgraph=case_of(name).fullgraph, **options)
    with sparse_compile.denoising(model, steps=len(PHASES)) as clock:
        outputs = generate(call, clock, kwargs)
        return sparse_compile.explain(model), outputs, wanted


def assert_equals_dense(outputs: Outputs, wanted: Outputs) -> None:
    for call, want in wanted.items():
        assert largest_error(outputs[call], want) <= TOLERANCE, f"step and branch {call}"


def assert_all_phases(report: sparse_compile.Report) -> None:
    found = [step.phase for step in report.generations[-1].steps]
    assert found == [phase for phase in PHASES for _ in BRANCHES]


# ---------------------------------------------------------------------- exact, and able to fail


@pytest.mark.parametrize(("name", "regional"), cases(set(NAMES), QUICK_EXACT))
def test_a_full_plan_equals_dense_in_every_phase(name: str, regional: bool) -> None:
    report, outputs, wanted = run(name, regional, sparsity=0, correction="coupled")
    assert_equals_dense(outputs, wanted)
    assert any(site.decision == "sparse" for site in report.sites) == (name in GOES_SPARSE)
    if name in GOES_SPARSE:
        assert_all_phases(report)
        assert report.density == 1.0


@pytest.mark.parametrize("correction", ["none", "pooled"])
@pytest.mark.parametrize(("name", "regional"), [("ltx", True), pytest.param("hunyuan_video", True, marks=SLOW)])
def test_a_full_plan_equals_dense_under_the_other_corrections(name: str, regional: bool, correction: str) -> None:
    report, outputs, wanted = run(name, regional, sparsity=0, correction=correction)
    assert_equals_dense(outputs, wanted)
    assert_all_phases(report)


@pytest.mark.parametrize(("name", "regional"), cases(GOES_SPARSE, QUICK_SKIPPING))
def test_skipped_blocks_move_the_output_of_sparse_phases_alone(name: str, regional: bool) -> None:
    report, outputs, wanted = run(name, regional, **SKIPPING)
    assert_all_phases(report)
    for (step, branch), want in wanted.items():
        error = largest_error(outputs[step, branch], want)
        assert (error <= TOLERANCE) == (PHASES[step] in DENSE_OUTPUT), f"{PHASES[step]}, {branch}: {error:.1e}"
    assert report.density is not None and report.density < 0.6
    assert report.kept_mass is not None and report.density < report.kept_mass < 1


def test_text_whose_length_depends_on_data_keeps_a_model_dense_with_a_reason() -> None:
    report, outputs, wanted = run(GATHERS_TEXT, False, **SKIPPING)
    assert_equals_dense(outputs, wanted)
    joint = [site for site in report.sites if site.role == "joint"]
    assert {site.reason for site in joint} == {"dynamic_split"}


# ---------------------------------------------------------------------- compilations

GRAPHS = [
    pytest.param("wan_t2v", False, 1, 0, id="whole-wan_t2v"),
    pytest.param("hunyuan_video", True, 3, 2, id="regional-hunyuan_video"),
    pytest.param("flux", True, 2, 1, id="regional-flux", marks=SLOW),
    pytest.param("wan_vace", True, 3, 0, id="regional-wan_vace", marks=SLOW),
]


@pytest.mark.parametrize(("name", "regional", "sparse", "others"), GRAPHS)
def test_each_sparse_graph_is_compiled_once_a_phase_and_never_again(
    name: str, regional: bool, sparse: int, others: int
) -> None:
    model, kwargs = case_of(name).build()
    call = compiled(model, regional, **SKIPPING)
    expected = sparse * len(set(PHASES)) + others
    with sparse_compile.denoising(model, steps=len(PHASES)) as clock:
        first = generate(call, clock, kwargs)
        assert sparse_compile.explain(model).compilations == expected
        clock.start(len(PHASES))
        with torch.compiler.set_stance("fail_on_recompile"):
            second = generate(call, clock, kwargs)
    for place, output in first.items():
        assert torch.equal(output, second[place]), place
    report = sparse_compile.explain(model)
    assert (report.compilations, report.other_compilations) == (expected, 0)
    assert_all_phases(report)


# ---------------------------------------------------------------------- masks

WORDS = {"hunyuan_video": (9, 5), "ltx": (15, 22)}
"""How many text tokens two prompts have; the models take them padded to one length."""


def prompts(name: str) -> tuple[nn.Module, Inputs, list[Inputs]]:
    """A model, two prompts padded into one batch, and each of them alone without padding."""
    model, kwargs = case_of(name).build()
    words = WORDS[name]
    batched = {
        key: value if not isinstance(value, Tensor) else value.repeat(2, *[1] * (value.ndim - 1))[:2]
        for key, value in kwargs.items()
    }
    noise = torch.randn(batched["encoder_hidden_states"].shape, generator=torch.Generator().manual_seed(5))
    mask = torch.arange(noise.shape[1]).expand(2, -1) < torch.tensor(words).unsqueeze(1)
    batched |= {"encoder_hidden_states": noise, "encoder_attention_mask": mask.to(torch.float32)}
    alone = [
        {
            **{key: value[item : item + 1] if isinstance(value, Tensor) else value for key, value in batched.items()},
            "encoder_hidden_states": noise[item : item + 1, :count],
            "encoder_attention_mask": torch.ones(1, count),
        }
        for item, count in enumerate(words)
    ]
    return model, batched, alone


@SLOW
@pytest.mark.parametrize("correction", ["none", "coupled"])
@pytest.mark.parametrize("name", WORDS)
def test_padded_prompts_in_one_batch_equal_each_prompt_alone(name: str, correction: str) -> None:
    """Padding changes neither the blocks of the video, nor what they keep, nor their stand-ins."""
    model, batched, alone = prompts(name)
    call = compiled(model, regional=True, sparsity=0.7, correction=correction)
    with sparse_compile.denoising(model, steps=len(PHASES)) as clock:
        together = generate(call, clock, batched)
        for item, kwargs in enumerate(alone):
            clock.start(len(PHASES))
            for place, output in generate(call, clock, kwargs).items():
                assert largest_error(together[place][item : item + 1], output) <= TOLERANCE, (item, place)
    assert_all_phases(sparse_compile.explain(model))


WORDS_LEFT = 4


def outer(valid: Tensor) -> Tensor:
    return valid[:, None, None, :] & valid[:, None, :, None]


def key_padding(valid: Tensor) -> Tensor:
    return valid[:, None, None, :]


@pytest.mark.parametrize("correction", ["none", "coupled"])
@pytest.mark.parametrize("mask_of", [outer, key_padding])
def test_masked_text_equals_text_cut_off(mask_of: Callable[[Tensor], Tensor], correction: str) -> None:
    """Both kinds of mask that are supported; the rows of padding themselves are left out."""
    torch.manual_seed(0)
    model, hidden, words = Joint().eval().requires_grad_(False), video(), text()
    padded = torch.ones(len(hidden), TOKENS + TEXT, dtype=torch.bool)
    padded[:, TOKENS + WORDS_LEFT :] = False

    def masked(hidden_states: Tensor, encoder_hidden_states: Tensor, valid: Tensor | None) -> Tensor:
        return model(hidden_states, encoder_hidden_states, None if valid is None else mask_of(valid))

    outputs = []
    for prompt, valid in ((words, padded), (words[:, :WORDS_LEFT], None)):
        torch.compiler.reset()
        call = compiled(masked, regional=False, fullgraph=True, sparsity=0.7, correction=correction)
        with sparse_compile.denoising(model, steps=len(PHASES)) as clock:
            made = []
            for step in range(len(PHASES)):
                made.append(call(hidden + 0.1 * step, prompt, valid)[:, :, : TOKENS + WORDS_LEFT])
                clock.step()
        outputs.append(made)
        (site,) = sparse_compile.explain(model).sites
        assert (site.decision, site.mask) == ("sparse", "none" if valid is None else mask_of.__name__)
    for step, (one, other) in enumerate(zip(*outputs, strict=True)):
        assert largest_error(one, other) <= TOLERANCE, PHASES[step]
