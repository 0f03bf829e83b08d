"""A mask is known by its node and shape; what is no key padding keeps its site dense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_blocks import BATCH, TOKENS, SelfAttention, reason_of, site_of, video
from torch import Tensor

from sparse_compile.config import Config
from sparse_compile.sites import MaskForm, Reason


def valid() -> Tensor:
    return torch.arange(TOKENS).expand(BATCH, -1) < TOKENS - 5


def outer(m: Tensor) -> Tensor:
    rows = m.view(BATCH, 1, 1, TOKENS).repeat(1, 1, TOKENS, 1)
    return (rows & rows.transpose(2, 3)).bool()


def shown(m: Tensor) -> Tensor:
    return m[:, None, None, :].expand(-1, 1, TOKENS, -1)


def causal_in_place(m: Tensor) -> Tensor:
    copy = shown(m).contiguous()
    copy.masked_fill_(torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1), False)
    return copy


def part_in_place(m: Tensor) -> Tensor:
    copy = shown(m).clone()
    copy[:, :, TOKENS // 2 :, : TOKENS // 2] = False
    return copy


def view_in_place(m: Tensor) -> Tensor:
    copy = shown(m).contiguous()
    copy[:, :, TOKENS // 2 :].logical_and_(m.flip(1)[:, None, None, :])
    return copy


def anded_in_place(m: Tensor) -> Tensor:
    copy = kept = shown(m).clone()
    copy &= torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    return kept


def product_in_place(m: Tensor) -> Tensor:
    product = m[:, None, None, :] & m[:, None, :, None]
    product[:, :, TOKENS // 2 :, : TOKENS // 2] = False
    return product


def base_in_place_between(m: Tensor) -> Tensor:
    base = m.clone()
    rows = base[:, None, None, :].clone()
    base[:, : TOKENS // 2] = False
    return rows & base[:, None, :, None]


def base_in_place_before(m: Tensor) -> Tensor:
    base = m.clone()
    base[:, : TOKENS // 2] = False
    return base[:, None, None, :] & base[:, None, :, None]


MASKS: list[tuple[str, Any, MaskForm, Reason | None]] = [
    ("per key", lambda m: m[:, None, None, :], MaskForm.KEY_PADDING, None),
    ("one for the batch", lambda m: m[:1, None, None, :], MaskForm.KEY_PADDING, None),
    ("one row", lambda m: m[:1], MaskForm.KEY_PADDING, None),
    ("shown to heads and queries", lambda m: m[:, None, None].expand(-1, 2, TOKENS, -1), MaskForm.KEY_PADDING, None),
    ("shown and cast", lambda m: m.long()[:, None, None].expand(-1, 2, TOKENS, -1).bool(), MaskForm.KEY_PADDING, None),
    (
        "one per head, shown to queries",
        lambda m: m[:, None, None].repeat(1, 2, 1, 1).expand(-1, 2, TOKENS, -1),
        MaskForm.GENERAL,
        Reason.MASK,
    ),
    (
        "shown to heads, one per query",
        lambda m: m[:, None, :, None].repeat(1, 1, 1, TOKENS).expand(-1, 2, -1, -1),
        MaskForm.GENERAL,
        Reason.MASK,
    ),
    ("outer product", outer, MaskForm.OUTER, None),
    ("outer product by broadcast", lambda m: m[:, None, None, :] & m[:, None, :, None], MaskForm.OUTER, None),
    (
        "rows twice",
        lambda m: (a := m[:, None, None, :].expand(-1, 1, TOKENS, -1)) & a,
        MaskForm.GENERAL,
        Reason.MASK,
    ),
    (
        "product of two tensors",
        lambda m: m[:, None, None, :] & m.flip(1)[:, None, :, None],
        MaskForm.GENERAL,
        Reason.MASK,
    ),
    (
        "product of other elements",
        lambda m: torch.cat([m, m], 1)[:, None, None, :TOKENS] & torch.cat([m, m], 1)[:, None, TOKENS:, None],
        MaskForm.GENERAL,
        Reason.MASK,
    ),
    ("shown and copied", lambda m: shown(m).contiguous(), MaskForm.KEY_PADDING, None),
    ("a copy made causal in place", causal_in_place, MaskForm.GENERAL, Reason.MASK),
    ("a copy of which a part is written", part_in_place, MaskForm.GENERAL, Reason.MASK),
    ("a copy of which a view is written", view_in_place, MaskForm.GENERAL, Reason.MASK),
    ("a copy that an operator writes", anded_in_place, MaskForm.GENERAL, Reason.MASK),
    ("a product written in place", product_in_place, MaskForm.GENERAL, Reason.MASK),
    ("a product of a tensor before and after a write", base_in_place_between, MaskForm.GENERAL, Reason.MASK),
    ("a product of a tensor written before", base_in_place_before, MaskForm.OUTER, None),
    ("sum", lambda m: m[:, None, None, :] | m[:, None, :, None], MaskForm.GENERAL, Reason.MASK),
    (
        "square with its transpose",
        lambda m: (a := m[:1].repeat(TOKENS, 1).tril()) & a.mT,
        MaskForm.GENERAL,
        Reason.MASK,
    ),
    ("per query", lambda m: m[:, None, :, None].expand(-1, -1, -1, TOKENS), MaskForm.GENERAL, Reason.MASK),
    ("per head", lambda m: m[:, None, None, :].repeat(1, 2, 1, 1), MaskForm.GENERAL, Reason.MASK),
    ("square", lambda m: m[0].expand(TOKENS, -1).tril(), MaskForm.GENERAL, Reason.MASK),
    ("bias per key", lambda m: m[:, None, None, :].float(), MaskForm.KEY_BIAS, Reason.KEY_BIAS),
    ("bias per pair", lambda m: m[0].expand(TOKENS, -1).float(), MaskForm.GENERAL, Reason.MASK),
]


@pytest.mark.parametrize(("make", "form", "reason"), [case[1:] for case in MASKS], ids=[case[0] for case in MASKS])
def test_a_mask_is_known_by_its_node_and_shape(make: Any, form: MaskForm, reason: Reason | None) -> None:
    block = SelfAttention()

    def forward(hidden_states: Tensor, m: Tensor) -> Tensor:
        return block(hidden_states, mask=make(m))

    site = site_of(forward, video(), valid())
    assert site.decision is not None
    assert (site.mask_form, site.decision.reason) == (form, reason)


def test_too_few_tokens_are_named_before_a_mask() -> None:
    square = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    assert reason_of(SelfAttention(), video(), square, config=Config(min_tokens=1000)) is Reason.TOO_SHORT
