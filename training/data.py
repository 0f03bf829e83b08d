"""The videos that the model learns from: two textured shapes that bounce over a textured background.

The attributes of a scene (`sparse_compile.evaluation.demo_model.SLOTS`) are its prompt. Positions, directions and
phases are drawn here and are in no prompt, so that frames can agree with each other through self-attention only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_compile.evaluation.demo_model import SLOTS, Scene, VideoSize, prompt_embeds

COLOUR_VALUES = ((1, -1, -1), (-1, 1, -1), (-1, -0.4, 1), (1, 1, -1), (1, -0.6, 1), (0.9, 0.9, 0.9))
"""Red, green and blue of each of `sparse_compile.evaluation.demo_model.COLOURS`."""


def draw_attributes(count: int, generator: torch.Generator) -> Tensor:
    """Prompts, int64 [B, 10]."""
    return torch.stack([torch.randint(0, len(words), (count,), generator=generator) for words in SLOTS], dim=1)


def embed(attributes: Tensor) -> Tensor:
    """What the model reads for prompts, float32 [B, 10, 64]."""
    return prompt_embeds([Scene(tuple(row)) for row in attributes.tolist()])


def render(attributes: Tensor, size: VideoSize, generator: torch.Generator) -> Tensor:
    """Videos of the prompts, float32 [B, 3, T, H, W] in [-1, 1], drawn on the device of ``attributes``.

    Args:
        attributes: int64 [B, 10].
        size: a scene is scaled by the shorter side; one of 32 pixels is the scale 1.
        generator: on the CPU, so that a seed means the same scenes on every device.
    """
    count, device = attributes.shape[0], attributes.device
    frames, height, width = size
    colours = torch.tensor(COLOUR_VALUES, device=device)
    scale = min(height, width) / 32.0

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator).to(device) * (high - low) + low

    y = torch.arange(height, device=device).float().view(1, 1, height, 1)
    x = torch.arange(width, device=device).float().view(1, 1, 1, width)
    time = torch.arange(frames, device=device).float().view(1, frames, 1, 1)

    backdrop, backdrop_colour = attributes[:, 8], colours[attributes[:, 9]]
    drift = _per_video((backdrop == 2) * uniform(0.4, 1.0) * scale)
    pattern_x = x + _per_video(uniform(0, 40)) + drift * time
    pattern_y = y + _per_video(uniform(0, 40)) + 0 * time
    # A backdrop's words are plain, dotted, drifting striped; a texture's are plain, striped, dotted.
    texture_of_backdrop = (backdrop > 0).long() + (backdrop == 1).long()
    pattern = _texture(texture_of_backdrop, pattern_x, pattern_y, 11 * scale)
    shade = (0.28 * pattern - 0.35).expand(count, frames, height, width).unsqueeze(1)
    video = backdrop_colour.view(count, 3, 1, 1, 1) * 0.35 + shade
    for slot in (0, 4):  # the second shape is in front
        kind, texture, speed = attributes[:, slot], attributes[:, slot + 2], attributes[:, slot + 3]
        colour = colours[attributes[:, slot + 1]].view(count, 3, 1, 1, 1)
        radius = uniform(5.0, 7.5) * scale
        angle = uniform(0, 2 * math.pi)
        velocity = (0.3 + 0.9 * speed) * scale
        right, bottom = width - radius, height - radius
        start_x = radius + uniform(0, 1) * (right - radius)
        centre_x = _bounce(start_x, velocity * angle.cos(), radius, right, frames)
        start_y = radius + uniform(0, 1) * (bottom - radius)
        centre_y = _bounce(start_y, velocity * angle.sin(), radius, bottom, frames)
        from_x, from_y = x - centre_x.view(count, frames, 1, 1), y - centre_y.view(count, frames, 1, 1)
        covered = _coverage(kind, from_x, from_y, _per_video(radius)).unsqueeze(1)
        tone = (1 - 0.45 * (1 + _texture(texture, from_x, from_y, 5.5 * scale))).unsqueeze(1)
        video = video * (1 - covered) + (colour * 0.9 * tone) * covered
    return video.clamp(-1, 1)


def _per_video(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _bounce(start: Tensor, velocity: Tensor, low: Tensor, high: Tensor, frames: int) -> Tensor:
    """Positions [B, T] of points that are thrown back at ``low`` and ``high``: a triangle wave."""
    span = (high - low).unsqueeze(1)
    way = (start - low).unsqueeze(1) + velocity.unsqueeze(1) * torch.arange(frames, device=start.device)
    way = torch.remainder(way, 2 * span)
    return low.unsqueeze(1) + torch.minimum(way, 2 * span - way)


def _coverage(kind: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """How much of each pixel a shape covers, with soft edges: [B, T, H, W] in [0, 1]; x, y from its centre."""
    circle = radius - torch.sqrt(x**2 + y**2 + 1e-6)
    square = radius * 0.88 - torch.maximum(x.abs(), y.abs())
    triangle = torch.minimum(radius * 0.75 - y, (y + radius * 1.05) * 0.5 - x.abs() * 0.87)
    kind = _per_video(kind)
    return torch.sigmoid(3 * torch.where(kind == 0, circle, torch.where(kind == 1, square, triangle)))


def _texture(kind: Tensor, x: Tensor, y: Tensor, period: float) -> Tensor:
    """Plain, striped or dotted, in [-1, 1]."""
    wave = 2 * math.pi / period
    stripes, dots = torch.sin(wave * (x + y) * 0.7), torch.sin(wave * x) * torch.sin(wave * y)
    kind = _per_video(kind)
    return torch.where(kind == 0, torch.zeros_like(stripes), torch.where(kind == 1, stripes, dots))
