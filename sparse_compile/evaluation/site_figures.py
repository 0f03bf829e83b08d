"""Single attention calls judged on real q, k and v: what a Plan keeps, how wrong the output is, how a Plan ages.

All figures are per query head and computed in float64, against dense attention on the *same* q, k and v:

- recall: attention mass inside the kept pairs, mean over queries of the sum over kept t of softmax(scale q k^T)_t
- reuse_recall: recall of the same Plan on q and k of the same layer and branch some steps later
- rel_l1, rel_l2: sum |o - ref| / sum |ref|, and norm(o - ref) / norm(ref)
- density: kept pairs over all pairs

Each Plan is made anew by a search in the judged call, as at the first sparse step of a generation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from sparse_compile.config import Config
from sparse_compile.evaluation.eager_strategy import EagerAttention
from sparse_compile.evaluation.tap import TappedAttention
from sparse_compile.plan import Groups, Plan
from sparse_compile.strategies.catalogue import load_strategy

FIGURES = ("density", "recall", "reuse_recall", "rel_l1", "rel_l2")


@dataclass(frozen=True)
class SiteFigures:
    """One query head of one call."""

    layer: str
    step: int
    branch: str
    head: int
    density: float
    recall: float
    reuse_recall: float | None
    """None where q and k of a later step were not recorded."""
    rel_l1: float
    rel_l2: float


@dataclass(frozen=True)
class Spread:
    """A figure over (layer, head, step, branch). A mean alone hides the few heads that break a video."""

    mean: float
    p5: float
    minimum: float
    p95: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of these values, percentiles interpolated."""
        p5, p95 = (
            torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
        )
        return cls(fmean(values), p5, min(values), p95, max(values))


def site_figures(
    tapped: Sequence[TappedAttention],
    options: Mapping[str, object],
    *,
    reuse_after: int,
    kernel: str = "reference",
    on_call: Callable[[], object] | None = None,
) -> list[SiteFigures]:
    """Judge a method on every recorded call.

    Args:
        tapped: from `tap`.
        options: of the method, as `torch.compile` takes them.
        reuse_after: how many steps later a Plan is judged again, where that step was recorded too.
        kernel: which implementation the ops use.
        on_call: called when a call is judged.

    Raises:
        SparseAttentionError: the method attends by no Plan of ours.
    """
    config = Config.from_options(options)
    at = {(call.layer, call.branch, call.step): call for call in tapped}
    rows: list[SiteFigures] = []
    for call in tapped:
        rows += _of_call(call, at.get((call.layer, call.branch, call.step + reuse_after)), config, kernel)
        if on_call is not None:
            on_call()
    return rows


def _of_call(
    call: TappedAttention, later: TappedAttention | None, config: Config, kernel: str
) -> Iterator[SiteFigures]:
    made = EagerAttention(load_strategy(config.method), config, kernel).searched(call.q, call.k, call.v, call.scale)
    kept = kept_pairs(made.plan)
    mass = attention_mass(call.q, call.k, call.scale)
    dense = mass @ call.v.double()
    error = made.output.double() - dense
    reused = None if later is None else recall(attention_mass(later.q, later.k, later.scale), kept)
    columns = {
        "density": kept.double().mean((2, 3)),
        "recall": recall(mass, kept),
        "rel_l1": error.abs().sum((2, 3)) / dense.abs().sum((2, 3)),
        "rel_l2": error.flatten(2).norm(dim=2) / dense.flatten(2).norm(dim=2),
    }
    for head in range(call.q.shape[1]):
        yield SiteFigures(
            layer=call.layer,
            step=call.step,
            branch=call.branch,
            head=head,
            reuse_recall=None if reused is None else float(reused[:, head].mean()),
            **{name: float(values[:, head].mean()) for name, values in columns.items()},
        )


def summary(figures: Sequence[SiteFigures]) -> dict[str, Spread]:
    """The spread of each figure over all heads, layers, steps and branches that have it."""
    columns = {name: [value for row in figures if (value := getattr(row, name)) is not None] for name in FIGURES}
    return {name: Spread.of(values) for name, values in columns.items() if values}


def attention_mass(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T), float64 [B, H, Sq, Sk]."""
    return torch.softmax(scale * (q.double() @ k.double().transpose(2, 3)), dim=3)


def recall(mass: Tensor, kept: Tensor) -> Tensor:
    """Mass inside the kept pairs, mean over queries: [B, H, Sq, Sk] twice -> [B, H]."""
    return (mass * kept).sum(3).mean(2)


def kept_pairs(plan: Plan) -> Tensor:
    """Which keys each query attends to, in the order in which the model has its tokens: bool [B, H, Sq, Sk].

    For as many key heads as query heads, and sequences of some thousand tokens.
    """
    q_group, k_group = _group_of_each_token(plan.query_side), _group_of_each_token(plan.key_side)
    rows = plan.kept().gather(2, q_group.unsqueeze(3).expand(-1, -1, -1, plan.key_groups))  # [B, H, Sq, Gk]
    return rows.gather(3, k_group.unsqueeze(2).expand(-1, -1, rows.shape[2], -1))


def _group_of_each_token(side: Groups) -> Tensor:
    """[B, H, S], int64."""
    batch, heads = side.offsets.shape[:2]
    tokens = int(side.offsets.max())
    places = torch.arange(tokens, dtype=side.offsets.dtype, device=side.offsets.device)
    grouped = torch.searchsorted(side.offsets[..., 1:].contiguous(), places.repeat(batch, heads, 1), right=True)
    if side.order is None:
        return grouped
    return torch.zeros_like(grouped).scatter_(2, side.order.long(), grouped)
