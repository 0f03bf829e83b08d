"""One head's attention as pictures of tokens by tokens: the true map, and the pairs that a Plan keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from sparse_compile.evaluation.plots import COLOUR_MAP, LIGHT, Theme, dressed, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.2, 3.7
"""Inches of one map, its colours included."""
MOST_CELLS = 400
"""Cells a side of a picture; longer sequences are averaged over squares of tokens."""
DECADES = 4
"""Of the colours of a true map: what is weaker than its strongest pair by more gets the darkest one."""
BORDER = "#ff6db6"
"""Lines between frames: seen on both ends of the colour map."""


class PairMap(NamedTuple):
    """One picture. Values [Sq, Sk]: shares of attention, or whether a pair is kept."""

    title: str
    values: Tensor
    is_attention: bool
    """Drawn on a logarithmic scale; otherwise from 0 (skipped) to 1 (kept)."""


def pair_maps(maps: Sequence[PairMap], tokens_per_frame: int, title: str = "", theme: Theme = LIGHT) -> Figure:
    """Draw maps of the same tokens side by side, in the order in which the model has them, with borders of frames."""
    from matplotlib.colors import LogNorm, Normalize

    figure = new_figure(HEIGHT + (0.3 if title else 0), theme, WIDTH * len(maps))
    if title:
        figure.suptitle(title)
    for number, (axes, shown) in enumerate(zip(figure.subplots(1, len(maps), squeeze=False)[0], maps, strict=True)):
        tokens_q, tokens_k = shown.values.shape
        cells = _averaged(shown.values)
        norm: Normalize = Normalize(0, 1)
        label = "kept (1) or skipped (0)"
        if shown.is_attention:
            top = float(cells.max())
            norm, label = LogNorm(top * 10.0**-DECADES, top, clip=True), "share of attention (log)"
        picture = axes.imshow(
            cells.numpy(), norm=norm, cmap=COLOUR_MAP, interpolation="nearest", extent=(0, tokens_k, tokens_q, 0)
        )
        for border in range(tokens_per_frame, max(tokens_q, tokens_k), tokens_per_frame):
            axes.axvline(border, color=BORDER, linewidth=0.4, alpha=0.7)
            axes.axhline(border, color=BORDER, linewidth=0.4, alpha=0.7)
        axes.set_title(shown.title)
        axes.set_xlabel("key token, frame after frame")
        if number == 0:
            axes.set_ylabel("query token")
        bar = figure.colorbar(picture, ax=axes, pad=0.02, shrink=0.9)
        bar.set_label(label)
    return dressed(figure, theme)


def _averaged(values: Tensor) -> Tensor:
    """Means over squares of tokens, so that at most `MOST_CELLS` are left a side."""
    square = -(-max(values.shape) // MOST_CELLS)
    if square == 1:
        return values.double()
    return F.avg_pool2d(values.double()[None], square, ceil_mode=True, count_include_pad=False)[0]
