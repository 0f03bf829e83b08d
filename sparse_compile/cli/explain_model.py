"""A model without its weights: its attentions, what each becomes and why, and the graphs that show them."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from sparse_compile.cli.call_arguments import CallFound, Sizes, described, find_call, parse_input
from sparse_compile.cli.model_source import ModelSource, sources_of
from sparse_compile.compiler.examine import Examination, ExaminedSite, examine
from sparse_compile.compiler.torch_internals import fake_mode
from sparse_compile.config import Config
from sparse_compile.errors import SparseAttentionError
from sparse_compile.integrations.repeated_blocks import parts_to_compile
from sparse_compile.runtime.report import table

MEBIBYTE = 2**20
MOST_NAMES = 8


@dataclass(frozen=True)
class Explained:
    """What is known of one model."""

    name: str
    parameters: int
    call: CallFound
    choice: str
    """What `enable` compiles, and why."""
    whole: Examination
    blocks: Examination | None
    """The same with the repeated blocks compiled one by one; None where the model names none."""

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        views = {"whole": self.whole} if self.blocks is None else {"whole": self.whole, "blocks": self.blocks}
        return {
            "model": self.name,
            "parameters": self.parameters,
            "arguments": described(self.call.arguments),
            "needs_values": self.call.needs_values,
            "enable": self.choice,
            **{name: _plain(view) for name, view in views.items()},
        }


def _plain(found: Examination) -> dict[str, Any]:
    sites = [
        {**asdict(site.record), "key_groups": site.key_groups, "state_bytes": site.state_bytes} for site in found.sites
    ]
    return {
        "graphs": [asdict(piece) for piece in found.pieces],
        "sites": sites,
        "attentions_of_an_eager_call": dict(found.eager),
        "hidden": found.hidden,
        "failure": found.failure,
    }


def explain_model(arguments: argparse.Namespace) -> list[Explained]:
    """Examine each model that the arguments name.

    Raises:
        SparseAttentionError: there is no such model, or no arguments for a call of it.
    """
    config = Config.from_options(dict(arguments.options))
    frames, height, width = arguments.latents
    sizes = Sizes(frames, height, width, arguments.text)
    return [_explained(source, sizes, arguments, config) for source in sources_of(arguments.model, arguments.config)]


def _explained(source: ModelSource, sizes: Sizes, arguments: argparse.Namespace, config: Config) -> Explained:
    with fake_mode(), torch.no_grad():
        model, known = source.build()
        given = {name: parse_input(value) for name, value in arguments.input}
        call = find_call(model, sizes, given, known)
        whole = examine(model, call.arguments, config, call.eager, fullgraph=bool(call.needs_values))
        return Explained(
            source.name,
            sum(parameter.numel() for parameter in model.parameters()),
            call,
            parts_to_compile(model, None).choice,
            whole,
            None if call.needs_values else _by_blocks(model, call, config),
        )


def _by_blocks(model: nn.Module, call: CallFound, config: Config) -> Examination | None:
    try:
        parts = parts_to_compile(model, True)
    except SparseAttentionError:  # it names no blocks, which `choice` says
        return None
    return examine(model, call.arguments, config, call.eager, parts=parts.modules)


# ---------------------------------------------------------------------- for the terminal


def printed(explained: Explained) -> str:
    """The table of the sites, and what the graphs hide."""
    lines = [
        f"{explained.name}, {explained.parameters / 1e6:,.1f} M parameters",
        f"called with {described(explained.call.arguments)}",
        f"enable would compile {explained.choice}",
        "",
        *_site_table(explained.whole.sites),
        "",
        *_graph_lines("the whole model", explained.whole),
    ]
    if explained.call.needs_values:
        lines += [
            f"the model reads values of tensors, and none has values here ({explained.call.needs_values}): shown is the"
            " one graph of fullgraph=True; without fullgraph=True, graph breaks may hide attention",
        ]
    if explained.blocks is not None:
        lines += _graph_lines("block by block", explained.blocks)
        if _rows(explained.blocks.sites) != _rows(explained.whole.sites):
            lines += ["", "block by block, the sites are", "", *_site_table(explained.blocks.sites)]
    return "\n".join(lines)


def _graph_lines(title: str, found: Examination) -> Iterator[str]:
    shared = sum(piece.runs for piece in found.pieces)
    sparse = sum(site.record.decision == "sparse" for site in found.sites)
    yield (
        f"{title}: {len(found.pieces)} graph(s), run {shared} time(s) in a call, with {len(found.sites)} attention(s),"
        f" {sparse} sparse"
    )
    for reason, count in Counter(piece.ended for piece in found.pieces if piece.ended).items():
        yield f"  {count} graph(s) ended early: {reason}"
    if found.hidden:
        names = layer_ranges(list(found.hidden))
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        shown = ", ".join(name or "the model itself" for name in names[:MOST_NAMES])
        yield f"  no graph shows {sum(found.hidden.values())} of {found.eager.total()} attention(s): {shown}{more}"
    if found.failure:
        yield f"  the call failed: {found.failure}"


Row = tuple[str, ...]


def _row(site: ExaminedSite) -> Row:
    """All of a site but its name."""
    record = site.record
    groups = "" if site.key_groups is None else str(site.key_groups)
    state = f"{site.state_bytes / MEBIBYTE:.1f} MiB" if site.state_bytes else ""
    mask = "" if record.mask == "none" else record.mask
    return (record.role, record.layout, mask, record.decision, groups, state, record.detail)


def _rows(sites: Sequence[ExaminedSite]) -> Counter[tuple[str, Row]]:
    return Counter((site.record.layer, _row(site)) for site in sites)


def _site_table(sites: Sequence[ExaminedSite]) -> list[str]:
    """One line for all layers of which the same is to be said."""
    if not sites:
        return ["no attention was seen: the model makes none by scaled_dot_product_attention, or no graph holds it"]
    groups: dict[tuple[str, Row], list[str]] = {}
    for site in sites:
        groups.setdefault((re.sub(r"\d+", "*", site.record.layer), _row(site)), []).append(site.record.layer)
    header = ("layers", "role", "layout", "mask", "decision", "key groups", "state (float32)", "reason")
    return table(header, [(" ".join(layer_ranges(layers)), *row) for (_, row), layers in groups.items()])


def layer_ranges(layers: Sequence[str]) -> list[str]:
    """``blocks.0.attn, blocks.1.attn, …`` as ``blocks.0-1.attn``: runs of names that differ in one number."""
    runs: dict[tuple[str, str], list[int]] = {}
    names: list[str] = []
    for layer in dict.fromkeys(layers):
        number = re.search(r"(?<![^.])\d+(?![^.])", layer)
        if number is None:
            names.append(layer)
        else:
            runs.setdefault((layer[: number.start()], layer[number.end() :]), []).append(int(number[0]))
    return names + [f"{before}{_numbers(found)}{after}" for (before, after), found in runs.items()]


def _numbers(found: Sequence[int]) -> str:
    ordered = sorted(found)
    runs: list[list[int]] = []
    for number in ordered:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
