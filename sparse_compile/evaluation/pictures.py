"""Pictures for people: animated GIFs, and a sheet of dense, sparse and their difference, frame by frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PAPER = (250, 250, 248)
INK = (32, 34, 38)
FAINT = (120, 124, 132)
GAP = 6
"""Pixels between frames."""
MARGIN = 20
LABEL_WIDTH = 96
CAPTION_HEIGHT = 22
FRAME_MILLISECONDS = 140
DIFFERENCE_GAIN = 4
"""How much brighter the difference is drawn."""


@dataclass(frozen=True)
class Comparison:
    """One prompt, generated twice from the same noise. Videos are float [3, T, H, W] in [0, 1]."""

    title: str
    caption: str
    dense: Tensor
    sparse: Tensor

    def rows(self) -> tuple[tuple[str, Tensor], ...]:
        """(label, video) of the three rows of a sheet."""
        difference = ((self.dense - self.sparse).abs() * DIFFERENCE_GAIN).clamp(0, 1)
        return (
            ("dense", self.dense),
            ("sparse", self.sparse),
            (f"difference x{DIFFERENCE_GAIN}", difference),
        )


def write_gif(video: Tensor, path: Path, scale: int = 4) -> None:
    """Write one video, float [3, T, H, W] in [0, 1], as an endless GIF."""
    _save_gif([_frame(video, index, scale) for index in range(video.shape[1])], path)


def write_side_by_side_gif(comparison: Comparison, path: Path, scale: int = 4) -> None:
    """Write dense, sparse and difference next to each other as an endless GIF."""
    rows = comparison.rows()
    _, frames, height, width = comparison.dense.shape
    step = width * scale + GAP
    canvas_size = (2 * GAP + 3 * step - GAP, CAPTION_HEIGHT + height * scale + GAP)
    pictures = []
    for index in range(frames):
        canvas = Image.new("RGB", canvas_size, PAPER)
        draw = ImageDraw.Draw(canvas)
        for column, (label, video) in enumerate(rows):
            left = GAP + column * step
            draw.text((left, 4), label, fill=INK, font=_font(13))
            canvas.paste(_frame(video, index, scale), (left, CAPTION_HEIGHT))
        pictures.append(canvas)
    _save_gif(pictures, path)


def write_contact_sheet(
    comparisons: Sequence[Comparison], path: Path, *, heading: str = "", columns: int = 6, scale: int = 4
) -> None:
    """Write a PNG: for each prompt the rows dense, sparse and difference, with frames as columns.

    Args:
        comparisons: one a prompt, all of one size.
        path: the file to write.
        heading: a line above everything.
        columns: how many frames to show, evenly spread, first and last included.
        scale: enlargement; pixels stay squares.
    """
    _, frames, height, width = comparisons[0].dense.shape
    shown = torch.linspace(0, frames - 1, min(columns, frames)).round().int().tolist()
    step = width * scale + GAP
    row_height = height * scale + GAP
    block_height = 2 * CAPTION_HEIGHT + 4 + CAPTION_HEIGHT + 3 * row_height + MARGIN
    top = MARGIN + (CAPTION_HEIGHT + GAP if heading else 0)
    sheet_width = 2 * MARGIN + LABEL_WIDTH + len(shown) * step - GAP
    sheet = Image.new("RGB", (sheet_width, top + len(comparisons) * block_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    if heading:
        draw.text((MARGIN, MARGIN - 4), heading, fill=FAINT, font=_font(14))
    for comparison in comparisons:
        _draw_comparison(sheet, draw, comparison, top, shown, scale)
        top += block_height
    sheet.save(path)


def _draw_comparison(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    comparison: Comparison,
    top: int,
    shown: list[int],
    scale: int,
) -> None:
    _, _, height, width = comparison.dense.shape
    step = width * scale + GAP
    left = MARGIN + LABEL_WIDTH
    draw.text((MARGIN, top), comparison.title, fill=INK, font=_font(16))
    draw.text((MARGIN, top + CAPTION_HEIGHT), comparison.caption, fill=FAINT, font=_font(13))
    top += 2 * CAPTION_HEIGHT + 4
    for column, index in enumerate(shown):
        draw.text((left + column * step, top), f"frame {index}", fill=FAINT, font=_font(12))
    top += CAPTION_HEIGHT - 4
    for label, video in comparison.rows():
        middle = top + height * scale // 2
        draw.text((MARGIN, middle), label.replace(" x", "\nx "), fill=INK, font=_font(14))
        for column, index in enumerate(shown):
            sheet.paste(_frame(video, index, scale), (left + column * step, top))
        top += height * scale + GAP


def _frame(video: Tensor, index: int, scale: int) -> Image.Image:
    """One frame of float [3, T, H, W], enlarged."""
    pixels = (video[:, index].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    picture = Image.fromarray(pixels.numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def _save_gif(pictures: list[Image.Image], path: Path) -> None:
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=FRAME_MILLISECONDS, loop=0)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
