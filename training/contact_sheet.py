"""A picture of videos: one a row, its frames from left to right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor

PAPER, INK = (250, 250, 248), (32, 34, 38)
GAP = 4
"""Pixels between frames."""
TITLE_HEIGHT = 16


class Row(NamedTuple):
    """A video, float [3, T, H, W] in [-1, 1], under its title."""

    title: str
    video: Tensor


def write_sheet(rows: Sequence[Row], path: Path, *, scale: int = 3) -> None:
    """Write a PNG of videos of one size; ``scale`` enlarges, and pixels stay squares."""
    _, frames, height, width = rows[0].video.shape
    column, line = width * scale + GAP, TITLE_HEIGHT + height * scale + GAP
    sheet = Image.new("RGB", (GAP + frames * column, GAP + len(rows) * line), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        top = GAP + number * line
        draw.text((GAP, top), row.title, fill=INK)
        for index in range(frames):
            sheet.paste(_frame(row.video[:, index], scale), (GAP + index * column, top + TITLE_HEIGHT))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _frame(frame: Tensor, scale: int) -> Image.Image:
    """One frame, float [3, H, W] in [-1, 1], enlarged."""
    pixels = ((frame.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    picture = Image.fromarray(pixels.numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
