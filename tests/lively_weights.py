"""Random weights under which a wrong attention shows."""

from __future__ import annotations

import torch

QK_NORMS = frozenset({"norm_q", "norm_k", "norm_added_q", "norm_added_k"})
VALUE_PROJECTIONS = frozenset({"to_v", "to_out", "add_v_proj", "to_add_out"})


def lively(model: torch.nn.Module, seed: int = 3) -> torch.nn.Module:
    """Shake weights so that the output depends on attention.

    As diffusers initialises them, gates are at or near zero and scores are flat: a wrong attention would
    change the output by 1e-2, or by nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        *_, grandparent, parent, _ = ["", "", *name.split(".")]
        if parameter.ndim >= 2 and not parameter.any():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        if parameter.ndim == 1 and parent in QK_NORMS:
            parameter.mul_(2.0)
        if parameter.ndim == 2:
            if VALUE_PROJECTIONS & set(name.split(".")):
                parameter.mul_(3.0)
            elif "time_proj" in name.split(".") or (parent == "linear" and grandparent.startswith("norm")):
                parameter.mul_(4.0)
    return model
