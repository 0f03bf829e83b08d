"""The sections of the report page about single attention calls: one head's Plans as pictures, and figures of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean

from sparse_compile.evaluation.judged_heads import JudgedHead
from sparse_compile.evaluation.method_runs import shown
from sparse_compile.evaluation.page import DataTable, Part, Picture, Section, drawn
from sparse_compile.evaluation.plan_pictures import PairMap, pair_maps
from sparse_compile.evaluation.plots import HeadMap, head_maps
from sparse_compile.evaluation.site_figures import SiteFigures, summary

SPREAD = ("mean", "p5", "minimum", "p95", "maximum")


def plans_section(judged: Sequence[JudgedHead], tokens_per_frame: int) -> Section:
    """True attention of a few heads, and beside it what each method keeps."""
    text = (
        "Rows are queries and columns are keys, in the order in which the model has its tokens: frame after frame, row "
        "after row. Pink lines separate frames. Of all heads at this step these are the two in which the first "
        "method's plan gains most, and least, over a random choice of as many keys.",
    )
    names = ("Most to gain", "Least to gain")
    parts = [
        Part(title=f"{name}: {head}", pictures=head_pictures(head, tokens_per_frame), columns=3)
        for name, head in zip(names, judged, strict=False)
    ]
    return Section("Plans", text, parts)


def head_pictures(head: JudgedHead, tokens_per_frame: int) -> list[Picture]:
    """The attention map of a head and each method's Plan, a picture each."""
    attention, *plans = maps_of(head)
    found = [
        drawn(
            partial(pair_maps, [attention], tokens_per_frame, ""),
            f"Attention map of {head}, {len(head.mass)} tokens by {len(head.mass)}, on a logarithmic scale.",
        )
    ]
    for (method, kept), shown_map in zip(head.kept.items(), plans, strict=True):
        found.append(
            drawn(
                partial(pair_maps, [shown_map], tokens_per_frame, ""),
                f"Pairs that {shown(method)} keeps in {head}: {kept.density:.2f} of all, which hold {kept.recall:.2f} "
                "of the attention.",
            )
        )
    return found


def maps_of(head: JudgedHead) -> list[PairMap]:
    """The attention map of a head, then each method's kept pairs."""
    plans = [
        PairMap(f"{shown(method)}: density {kept.density:.2f}, recall {kept.recall:.2f}", kept.pairs, False)
        for method, kept in head.kept.items()
    ]
    return [PairMap("true attention", head.mass, True), *plans]


def sites_section(figures: Mapping[str, Sequence[SiteFigures]], steps: Sequence[int], reuse_after: int) -> Section:
    """How good single calls are, over all heads, layers, judged steps and branches."""
    first = next(iter(figures.values()))
    calls = f"{len({row.layer for row in first})} layers, {len({(row.layer, row.head) for row in first})} heads"
    text = (
        f"The dense model ran once, and its q, k and v were kept at steps {', '.join(map(str, steps))} ({calls}, both "
        "branches). In each of these calls a plan was made by a search, and sparse attention compared with dense "
        "attention on the same q, k and v: rel_l1 is the sum of the differences over the sum of the values, rel_l2 the "
        "same of their norms. Recall is the share of the attention that the kept pairs hold, over all queries; "
        f"reuse_recall that of the same plan {reuse_after} steps later.",
        "A mean alone hides the few heads that break a video. For recall the low end is the bad one: p5, the 5th "
        "percentile, and the minimum. For errors it is the high end: p95 and the maximum.",
    )
    parts = []
    for method, rows in figures.items():
        spreads = summary(rows)
        table = DataTable(
            "Over heads, layers, steps and branches",
            ("figure", *SPREAD),
            [[name, *(f"{getattr(spread, column):.3f}" for column in SPREAD)] for name, spread in spreads.items()],
        )
        parts.append(Part(title=shown(method), tables=[table]))
    parts.append(Part(pictures=[recall_picture(shown(method), rows) for method, rows in figures.items()]))
    return Section("Single attention calls", text, parts)


def recall_picture(method: str, rows: Sequence[SiteFigures]) -> Picture:
    """Recall and output error by layer and head."""
    maps = [HeadMap("recall", _by_head(rows, "recall")), HeadMap("rel_l1", _by_head(rows, "rel_l1"))]
    weakest = min(rows, key=lambda row: row.recall)
    alt = (
        f"Heat maps over layers and heads for {method}: recall and relative L1 error of single calls, mean over steps "
        f"and branches. The lowest recall is {weakest.recall:.2f}, in {weakest.layer}, head {weakest.head}."
    )
    return drawn(partial(head_maps, maps, f"{method}: single calls"), alt)


def _by_head(rows: Sequence[SiteFigures], name: str) -> dict[str, list[float]]:
    values: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        values.setdefault(row.layer, {}).setdefault(row.head, []).append(getattr(row, name))
    return {layer: [fmean(heads[head]) for head in sorted(heads)] for layer, heads in values.items()}
