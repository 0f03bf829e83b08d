"""Pictures for people: animated GIFs, and a sheet of dense, each method and its difference to dense, frame by frame."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PAPER = (250, 250, 248)
INK = (32, 34, 38)
FAINT = (112, 116, 124)
RULE = (216, 217, 214)
GAP = 6
"""Pixels between frames."""
GROUP_GAP = 14
"""Pixels between dense and a method, and between two methods."""
MARGIN = 20
LABEL_GAP = 16
"""Pixels between the labels and the frames beside them."""
CAPTION_HEIGHT = 22
TITLE_SIZE, LABEL_SIZE, NOTE_SIZE = 16, 15, 12
LINE_SPACING = 5
FRAME_MILLISECONDS = 140
DIFFERENCE_GAIN = 4
"""How much brighter the difference is drawn."""
DIFFERENCE = "difference"
DIFFERENCE_NOTES = ("to dense,", f"{DIFFERENCE_GAIN} x brighter")


@dataclass(frozen=True)
class Variant:
    """What one method made of a prompt; ``notes`` are short lines for the margin. Video: float [3, T, H, W]."""

    label: str
    video: Tensor
    notes: tuple[str, ...] = ()


class Row(NamedTuple):
    """One video of a sheet, float [3, T, H, W] in [0, 1]; ``opens`` where a method begins."""

    label: str
    video: Tensor
    notes: tuple[str, ...]
    opens: bool


@dataclass(frozen=True)
class Comparison:
    """One prompt, generated densely and with each method from the same noise. Videos: float [3, T, H, W] in [0, 1]."""

    title: str
    dense: Tensor
    variants: tuple[Variant, ...]

    def rows(self) -> Iterator[Row]:
        """Dense, then each method and its difference to dense."""
        yield Row("dense", self.dense, (), False)
        for variant in self.variants:
            difference = ((self.dense - variant.video).abs() * DIFFERENCE_GAIN).clamp(0, 1)
            yield Row(variant.label, variant.video, variant.notes, True)
            yield Row(DIFFERENCE, difference, DIFFERENCE_NOTES, False)


def write_gif(video: Tensor, path: Path, scale: int = 4) -> None:
    """Write one video, float [3, T, H, W] in [0, 1], as an endless GIF."""
    _save_gif([_frame(video, index, scale) for index in range(video.shape[1])], path)


def write_side_by_side_gif(comparison: Comparison, path: Path, scale: int = 4) -> None:
    """Write all rows of a comparison next to each other as an endless GIF."""
    _, frames, height, width = comparison.dense.shape
    rows = list(comparison.rows())
    lefts, right = [], GAP
    for row in rows:
        right += GROUP_GAP - GAP if row.opens else 0
        lefts.append(right)
        right += width * scale + GAP
    font = _font(NOTE_SIZE + 1)
    still = Image.new("RGB", (right, CAPTION_HEIGHT + height * scale + GAP), PAPER)
    draw = ImageDraw.Draw(still)
    for row, left in zip(rows, lefts, strict=True):
        label = f"{row.label} x {DIFFERENCE_GAIN}" if row.label == DIFFERENCE else row.label
        draw.text((left, 4), _shortened(label, width * scale, font), fill=INK, font=font)
    pictures = []
    for index in range(frames):
        canvas = still.copy()
        for row, left in zip(rows, lefts, strict=True):
            canvas.paste(_frame(row.video, index, scale), (left, CAPTION_HEIGHT))
        pictures.append(canvas)
    _save_gif(pictures, path)


def write_contact_sheet(
    comparisons: Sequence[Comparison], path: Path, *, heading: str = "", columns: int = 6, scale: int = 4
) -> None:
    """Write a PNG: for each prompt the rows of its comparison, with frames as columns.

    Args:
        comparisons: one a prompt, all of one size.
        path: the file to write.
        heading: a line above everything.
        columns: how many frames to show, evenly spread, first and last included.
        scale: enlargement; pixels stay squares.
    """
    frames = comparisons[0].dense.shape[1]
    shown = torch.linspace(0, frames - 1, min(columns, frames)).round().int().tolist()
    blocks = [_block(comparison, shown, scale) for comparison in comparisons]
    top = MARGIN + (CAPTION_HEIGHT + GAP if heading else 0)
    heading_width = int(_font(NOTE_SIZE + 2).getlength(heading))
    width = 2 * MARGIN + max(heading_width, *(block.width for block in blocks))
    height = top + sum(block.height for block in blocks) + 2 * MARGIN * (len(blocks) - 1) + MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 6), heading, fill=FAINT, font=_font(NOTE_SIZE + 2))
    for number, block in enumerate(blocks):
        if number:
            draw.line((MARGIN, top + MARGIN, width - MARGIN, top + MARGIN), fill=RULE)
            top += 2 * MARGIN
        sheet.paste(block, (MARGIN, top))
        top += block.height
    sheet.save(path)


def _block(comparison: Comparison, shown: Sequence[int], scale: int) -> Image.Image:
    """One prompt of a sheet: its title, numbers of frames, and the rows, each with its label at the left."""
    _, _, height, width = comparison.dense.shape
    step = width * scale + GAP
    rows = [(row, _label(row)) for row in comparison.rows()]
    label_width = max(label.width for _, label in rows) + LABEL_GAP
    title_width = int(_font(TITLE_SIZE).getlength(comparison.title)) + 1
    header = 2 * CAPTION_HEIGHT + GAP
    heights = [max(height * scale, label.height) for _, label in rows]
    gaps = sum(GROUP_GAP if row.opens else GAP for row, _ in rows[1:])
    size = (max(title_width, label_width + len(shown) * step - GAP), header + sum(heights) + gaps)
    block = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(block)
    draw.text((0, 0), comparison.title, fill=INK, font=_font(TITLE_SIZE))
    for column, index in enumerate(shown):
        above = (label_width + column * step, CAPTION_HEIGHT + GAP)
        draw.text(above, f"frame {index}", fill=FAINT, font=_font(NOTE_SIZE))
    top = header
    for place, ((row, label), row_height) in enumerate(zip(rows, heights, strict=True)):
        if place:
            top += GROUP_GAP if row.opens else GAP
        block.paste(label, (0, top + (row_height - label.height) // 2))
        for column, index in enumerate(shown):
            block.paste(_frame(row.video, index, scale), (label_width + column * step, top))
        top += row_height
    return block


def _label(row: Row) -> Image.Image:
    """A row's label and below it its notes, as wide and high as they need."""
    lines = [(row.label, LABEL_SIZE, INK), *((note, NOTE_SIZE, FAINT) for note in row.notes)]
    width = max(int(_font(size).getlength(text)) + 1 for text, size, _ in lines)
    label = Image.new("RGB", (width, sum(size + LINE_SPACING for _, size, _ in lines)), PAPER)
    draw = ImageDraw.Draw(label)
    top = 0
    for text, size, colour in lines:
        draw.text((0, top), text, fill=colour, font=_font(size))
        top += size + LINE_SPACING
    return label


def _shortened(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text, or as much of its beginning as fits into ``width`` pixels."""
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text


def _frame(video: Tensor, index: int, scale: int) -> Image.Image:
    """One frame of float [3, T, H, W], enlarged."""
    pixels = (video[:, index].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    picture = Image.fromarray(pixels.numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def _save_gif(pictures: list[Image.Image], path: Path) -> None:
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=FRAME_MILLISECONDS, loop=0)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
