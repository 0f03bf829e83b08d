"""The same numbers laid out in memory as models and callers lay them out, NaN beside them."""

from __future__ import annotations

import math

import torch

VIEWS = {
    "token-major": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "last dimension first": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "odd offset": lambda x: torch.cat([x.new_full((3,), math.nan), x.flatten()])[3:].view(x.shape),
    "rows of a wider tensor": lambda x: torch.cat([x, torch.full_like(x[..., :5], math.nan)], -1)[..., :-5],
}
