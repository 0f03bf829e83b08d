"""Decide for every attention whether it becomes sparse, or for which reason it stays dense."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from sparse_compile.config import Config
from sparse_compile.passes.graph_facts import Length, is_tensor, length, rank, value_of
from sparse_compile.passes.read_mask import mask_form
from sparse_compile.passes.token_parts import Part, all_origins, total
from sparse_compile.passes.token_roles import (
    MIXED,
    UNKNOWN,
    UNNAMED_ROLES,
    Inputs,
    is_visual,
    role_of_input,
    role_of_part,
)
from sparse_compile.passes.trace_tokens import Memo, layout_of, trace_tokens
from sparse_compile.sites import VISUAL_ROLES, MaskForm, Reason, Site, TokenLayout, TokenPart

log = logging.getLogger(__name__)

Refusal = Callable[[Site], Reason | None]
"""Why a strategy leaves a site dense."""

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
MAX_HEAD_DIM, HEAD_DIM_STEP = 256, 8
TEXT_MODULES = ("Refiner", "Connector")
"""Words in the class of a module that attends among text, where nothing else tells what its only input holds."""

SELF, JOINT, CROSS, EXTRA = "self", "joint", "cross", "self+extra"
BY_ROLE = {
    CROSS: Reason.CROSS_ATTENTION,
    "text-self": Reason.TEXT_ONLY,
    "audio-self": Reason.AUDIO_ONLY,
    "image-self": Reason.IMAGE_ONLY,
}
NO_TEXT_NOTE = "taken as all video: this graph has no text input"


def classify_sites(sites: Sequence[Site], config: Config, inputs: Inputs, unsupported_reason: Refusal) -> list[Site]:
    """Give every site its layout, role, mask form and decision.

    Before:
        Site(query=[1, 24, 17776, 128], key=…, layout=None, role="unknown", decision=None)
    After:
        Site(…, layout=text:226+video:17550, role="joint", decision=Decision(None))

    Left alone: sites that were decided before. A site whose analysis fails stays dense and says so; the
    compilation goes on.

    Args:
        sites: what `match_attention` found.
        config: the options.
        inputs: what the placeholders of the graph are.
        unsupported_reason: what the strategy has to say about a site that is completed but undecided.
    """
    memo: Memo = {}
    return [_classified(site, config, inputs, unsupported_reason, memo) for site in sites]


def _classified(site: Site, config: Config, inputs: Inputs, unsupported_reason: Refusal, memo: Memo) -> Site:
    if site.decision is not None:
        return site
    try:
        if site.nested:
            return site.decided(Reason.DENSE_METHOD if config.method == "dense" else Reason.NESTED)
        findings = _read(site, inputs, memo)
        findings = _with_given_text(findings, config)
        return findings.site.decided(_verdict(findings, config, unsupported_reason), _note(findings, config))
    except Exception as error:  # whatever the graph holds, the user's model must still compile
        log.exception("the analysis of %s failed; it stays dense", site.name or site.node.name)
        return site.decided(Reason.ANALYSIS_FAILED, f"{type(error).__name__}: {error}")


# ---------------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Findings:
    """A site completed but undecided, and what the verdict needs besides."""

    site: Site
    reordered: bool
    """Whether the video tokens may lie in another order than in the input."""
    factorised: bool
    """Whether the batch holds frames or space."""
    same_axis: bool
    """Whether queries and keys are equally many."""
    text_may_hide: bool
    """Whether text and video may have been joined before the graph."""


def _read(site: Site, inputs: Inputs, memo: Memo) -> _Findings:
    query, key = trace_tokens(site.query, -2, inputs, memo), trace_tokens(site.key, -2, inputs, memo)
    complete = replace(
        site,
        layout=layout_of(site.query, inputs, memo),
        key_layout=layout_of(site.key, inputs, memo),
        role=_role(query, key, inputs),
        mask_form=mask_form(site, inputs, memo),
    )
    return _Findings(
        complete,
        reordered=_reordered(query, inputs) or _reordered(key, inputs),
        factorised=_factorised(site.query, query, inputs, memo),
        same_axis=site.query_sizes[-2] == site.key_sizes[-2],
        text_may_hide=_text_may_hide(complete, inputs),
    )


def _role(query: Sequence[Part], key: Sequence[Part], inputs: Inputs) -> str:
    """The word for who attends to whom (docs/attention_sites.md, section 3)."""
    roles = [role_of_part(p, inputs) for p in query]
    named = {role for role in roles if role not in UNNAMED_ROLES}
    visual = named & VISUAL_ROLES
    only = next(iter(named)) if len(named) == 1 else ""
    if _same_tokens(query, key):
        if named and named <= VISUAL_ROLES:
            return JOINT if len(roles) > sum(role in VISUAL_ROLES for role in roles) else SELF
        if visual:
            return JOINT
        return f"{only or ('other' if named else UNKNOWN)}-self"
    if _contains(key, query, inputs):
        return EXTRA
    if {UNKNOWN} == named == {role_of_part(p, inputs) for p in key} and total(query).hint == total(key).hint:
        return f"{UNKNOWN}-self"  # behind a graph break they arrive apart: nothing says that they are other tokens
    return CROSS if visual else f"{only or ('other' if named else 'learned')}-cross"


def _same_tokens(query: Sequence[Part], key: Sequence[Part]) -> bool:
    """Whether both are the same tokens: by parts, or at least by length and by what they come from."""
    if [(p.length, p.origins) for p in query] == [(p.length, p.origins) for p in key]:
        return True
    return total(query).hint == total(key).hint and all_origins(query) == all_origins(key)


def _contains(key: Sequence[Part], query: Sequence[Part], inputs: Inputs) -> bool:
    """Whether the keys hold the queries' tokens and more: a reference, a history, a cache."""
    roles = {role_of_part(p, inputs) for p in query}
    shared = (roles | {MIXED}) & {role_of_part(p, inputs) for p in key}
    longer = total(query).hint < total(key).hint
    return bool(roles - UNNAMED_ROLES and shared) and longer and all_origins(query) <= all_origins(key)


def _reordered(parts: Sequence[Part], inputs: Inputs) -> bool:
    if any(is_visual(p, inputs) for p in parts):
        return any(p.reordered for p in parts if is_visual(p, inputs))
    mixed = all_origins([p for p in parts if role_of_part(p, inputs) == MIXED])
    return any(role_of_input(origin, inputs) in VISUAL_ROLES for origin in mixed)


def _factorised(query: fx.Node, tokens: Sequence[Part], inputs: Inputs, memo: Memo) -> bool:
    """Whether another axis of the input that the tokens come from was folded into the batch.

    The batch of an input is its first axis; of one whose tokens come first, it is the one axis that is left.
    """
    along = {axis for p in tokens if is_visual(p, inputs) for axis in p.axes if axis is not None}
    batch = {axis for p in trace_tokens(query, 0, inputs, memo) for axis in p.axes if axis is not None}
    for source in {node for node, _ in along}:
        others = {dim for node, dim in batch if node is source} - {0}
        if len(others) > ((source, 0) in along):
            return True
    return False


# ---------------------------------------------------------------------- what the user says


def _with_given_text(findings: _Findings, config: Config) -> _Findings:
    """The split that ``text_tokens`` and ``text_position`` give, where the graph does not tell."""
    site, text = findings.site, config.text_tokens
    if text is None or not findings.same_axis or not _split_is_open(findings):
        return findings
    size = length(site.query, -2)
    if text >= size.hint:
        return findings
    layout = _given_layout(text, size, first=config.text_position == "first")
    role = SELF if text == 0 else JOINT
    return replace(findings, site=replace(site, layout=layout, key_layout=layout, role=role), reordered=False)


def _given_layout(text: int, size: Length, *, first: bool) -> TokenLayout:
    video = TokenPart("video", size.hint - text, size.hint - text if size.static else None)
    words = (TokenPart("text", text, text),) if text else ()
    return TokenLayout((*words, video) if first else (video, *words))


def _split_is_open(findings: _Findings) -> bool:
    """Whether text may hide among the tokens: unknown tokens, or video in a graph that has no text input."""
    role = findings.site.role
    if role == SELF:
        return findings.text_may_hide
    return role.endswith("-self") and role not in BY_ROLE


def _text_may_hide(site: Site, inputs: Inputs) -> bool:
    """Whether text and video may have been joined before the graph: one packed stream, no text beside it."""
    parts = site.layout.parts if site.layout is not None else ()
    sequences = [n for n, known in inputs.items() if is_tensor(n) and rank(n) > 1 and not known.owned]
    no_text = all(role_of_input(sequence, inputs) != "text" for sequence in sequences)
    return len(parts) == 1 and not parts[0].grid and no_text


def _note(findings: _Findings, config: Config) -> str:
    untold = findings.text_may_hide and (config.text_tokens is None or not findings.same_axis)
    return NO_TEXT_NOTE if findings.site.role in (SELF, EXTRA) and untold else ""


# ---------------------------------------------------------------------- the verdict


def _verdict(findings: _Findings, config: Config, unsupported_reason: Refusal) -> Reason | None:
    """The first reason that applies, or None. The order is that of docs/attention_sites.md, section 3."""
    if config.method == "dense":
        return Reason.DENSE_METHOD
    return next(_reasons(findings, config, unsupported_reason), None)


def _reasons(findings: _Findings, config: Config, unsupported_reason: Refusal) -> Iterator[Reason]:
    """Every reason in order of precedence; each is looked for only when those before it do not apply."""
    site = findings.site
    yield from _by_role(findings)
    if findings.reordered:
        yield Reason.TOKEN_ORDER
    if site.role == EXTRA and not _video_among_more_video(site):
        yield Reason.EXTRA_KEYS
    if site.role not in (SELF, JOINT, EXTRA):
        yield Reason.NO_PARAMETER if site.owner is None else Reason.UNKNOWN_TOKENS
    if findings.factorised:
        yield Reason.FACTORISED
    yield from _outside_the_kernels(site)
    if site.owner is None:
        yield Reason.NO_PARAMETER
    layout = site.layout or TokenLayout(())
    if config.min_tokens is not None and layout.video_tokens < config.min_tokens:
        yield Reason.TOO_SHORT
    refusal = unsupported_reason(site)
    if refusal is not None:
        yield refusal
    if site.mask_form is MaskForm.KEY_BIAS:
        yield Reason.KEY_BIAS
    if site.mask_form is MaskForm.GENERAL:
        yield Reason.MASK
    if not (_borders_are_known(layout) and _borders_are_known(site.key_layout or layout)):
        yield Reason.DYNAMIC_SPLIT


def _by_role(findings: _Findings) -> Iterator[Reason]:
    site = findings.site
    if site.role in BY_ROLE:
        yield BY_ROLE[site.role]
    if site.role.endswith("-cross"):
        yield Reason.CROSS_ATTENTION
    if findings.text_may_hide and any(word in kind for _, kind in site.modules for word in TEXT_MODULES):
        yield Reason.TEXT_ONLY


def _video_among_more_video(site: Site) -> bool:
    """Whether video attends to itself and to more: what is not video among the keys is kept whole."""
    query, key = (layout or TokenLayout(()) for layout in (site.layout, site.key_layout))
    return 0 < query.video_tokens <= key.video_tokens


def _outside_the_kernels(site: Site) -> Iterator[Reason]:
    """What the ops do not compute, whatever the strategy."""
    if site.is_causal:
        yield Reason.CAUSAL
    if site.dropout_p != 0:
        yield Reason.DROPOUT
    if not _four_dimensional(site):
        yield Reason.RANK
    tensors = [value_of(node) for node in (site.query, site.key, site.value)]
    if site.dtype not in DTYPES or not all(tensor.dtype.is_floating_point for tensor in tensors):
        yield Reason.DTYPE
    head_dims = {site.query_sizes[-1], site.key_sizes[-1], site.value_sizes[-1]}
    if len(head_dims) > 1 or not all(d <= MAX_HEAD_DIM and d % HEAD_DIM_STEP == 0 for d in head_dims):
        yield Reason.HEAD_DIM
    heads, key_heads = site.query_sizes[1], site.key_sizes[1]
    if heads % key_heads or (heads != key_heads and not site.enable_gqa) or site.value_sizes[1] != key_heads:
        yield Reason.GQA
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1 or any(device.type == "meta" for device in devices):
        yield Reason.DEVICE


def _four_dimensional(site: Site) -> bool:
    """Whether all are [B, H, S, D], of one batch size."""
    operands = (site.query_sizes, site.key_sizes, site.value_sizes)
    return all(len(operand) == 4 for operand in operands) and len({operand[0] for operand in operands}) == 1


def _borders_are_known(layout: TokenLayout) -> bool:
    """Whether the graph can compute every border of the video, from the left or back from the right."""
    sizes = [part.size for part in layout.parts]
    visual = [False, *(part.visual for part in layout.parts), False]
    borders = [at for at in range(len(sizes) + 1) if visual[at] != visual[at + 1]]
    return all(None not in sizes[:at] or None not in sizes[at:] for at in borders)
