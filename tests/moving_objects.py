"""Synthetic video attention that drifts over the steps of a generation (docs/adaspa.md, section 14).

Each head mixes two ways to attend: to the same object, wherever it is, and to the same place. Objects are Voronoi cells
around points that move from frame to frame; places are Fourier features. Noise lies on top.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

GRID = (8, 16, 24)
"""Frames, rows and columns of tokens, in raster order."""
LOGITS = ((0, 8), (2, 6), (4, 4), (6, 0), (3, 2), (1, 1))
"""For each head: the logit of two tokens of one object, and of two tokens at one place."""
OBJECTS = 10
FREQUENCIES = 16
SIZE = 4 * FREQUENCIES
"""Head size: one half holds the code of the object, the other a sine and a cosine of each frequency."""
CORRELATION = 0.995
"""Of the noise of one step with that of the next."""
STEPS = 30
"""The steps over which the gain drifts."""
CUT_AT = 15
GAIN_AT_END, NOISE_AT_END = 1.4, 0.6


@dataclass(frozen=True, kw_only=True)
class MovingObjects:
    """What happens, and how clearly it can be seen.

    ``drift`` is one of small (the noise alone changes), objects (and they move on), gain (and the logits grow while the
    noise falls) and cut (and the objects are others from step 15 on).
    """

    drift: str = "objects"
    grid: tuple[int, int, int] = GRID
    heads: int = len(LOGITS)
    text: int = 0
    """Tokens behind the video that belong to no object and no place."""
    gain: float = 1.0
    """Factor on all logits."""
    noise: float = 0.5
    """Standard deviation of each component."""
    seed: int = 0

    def at(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Float32 q, k and v of one step, [1, heads, tokens, SIZE]; the softmax scale is SIZE ** -0.5."""
        scene = 1 if self.drift == "cut" and step >= CUT_AT else 0
        moved = 0.1 * step if self.drift == "objects" else 0.0
        through = step / STEPS if self.drift == "gain" else 0.0
        gain = self.gain * (1 + (GAIN_AT_END - 1) * through)
        noise = self.noise * (1 + (NOISE_AT_END - 1) * through)
        tokens = math.prod(self.grid)
        features = torch.zeros(self.heads, tokens + self.text, SIZE)
        codes, places = self._codes()[self._objects(scene, moved)], self._places()
        for head in range(self.heads):
            same_object, same_place = LOGITS[head % len(LOGITS)]
            parts = (math.sqrt(same_object) * codes, math.sqrt(same_place) * places)
            features[head, :tokens] = SIZE**0.25 * torch.cat(parts, dim=-1)
        shake = self._noise(step, tokens + self.text)
        q, k = ((math.sqrt(gain) * features + noise * own).unsqueeze(0) for own in shake)
        return q, k, torch.randn(q.shape, generator=self._generator("values"))

    def _generator(self, purpose: str) -> torch.Generator:
        purposes = ("noise", "codes", "places", "values", "scene 0", "scene 1")
        return torch.Generator().manual_seed(100 * self.seed + purposes.index(purpose))

    def _codes(self) -> Tensor:
        """A unit vector for each object, [OBJECTS, SIZE / 2]."""
        codes = torch.randn(OBJECTS, SIZE // 2, generator=self._generator("codes"))
        return codes / codes.norm(dim=-1, keepdim=True)

    def _positions(self) -> Tensor:
        """Frame, row and column of each token, [tokens, 3]."""
        return torch.cartesian_prod(*(torch.arange(size, dtype=torch.float32) for size in self.grid))

    def _objects(self, scene: int, moved: float) -> Tensor:
        """The object at each token: the nearest of points that move over a frame without edges, int64 [tokens]."""
        generator = self._generator(f"scene {scene}")
        area = torch.tensor(self.grid[1:], dtype=torch.float32)
        start = torch.rand(OBJECTS, 2, generator=generator) * area
        velocity = torch.randn(OBJECTS, 2, generator=generator) / 2  # tokens a frame
        where = self._positions()
        points = start + velocity * (where[:, :1, None] + moved)
        apart = (where[:, None, 1:] - points).remainder(area)
        return torch.minimum(apart, area - apart).square().sum(-1).argmin(-1)

    def _places(self) -> Tensor:
        """A unit vector for each place; their products fall off with distance, [tokens, SIZE / 2]."""
        frequencies = torch.randn(3, FREQUENCIES, generator=self._generator("places"))
        angles = self._positions() / torch.tensor(self.grid) * 2 * math.pi @ frequencies
        return torch.cat((angles.cos(), angles.sin()), dim=-1) / math.sqrt(FREQUENCIES)

    def _noise(self, step: int, tokens: int) -> Tensor:
        """A first-order autoregressive process for q and one for k, [2, heads, tokens, SIZE]."""
        generator = self._generator("noise")
        now = torch.randn(2, self.heads, tokens, SIZE, generator=generator)
        for _ in range(step):
            fresh = torch.randn(now.shape, generator=generator)
            now = CORRELATION * now + math.sqrt(1 - CORRELATION**2) * fresh
        return now
