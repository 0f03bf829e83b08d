"""A trained model on disk: diffusers' folder of config and safetensors, with the log of its training beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from sparse_compile.errors import SparseAttentionError

VERSION = 1
"""Of what this module writes; a folder that names none is of the first version."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = "config.json"
TRAINING = "training.json"
CODE_CARRIERS = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
"""Endings of files that can run code when they are loaded."""


def save_checkpoint(
    folder: Path, model: WanTransformer3DModel, weights: Mapping[str, Tensor], training: Mapping[str, Any]
) -> None:
    """Write the weights in bfloat16, the model's config and what is known about the training.

    Each file is replaced at once, so that an interrupted run leaves whole files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    half = {name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in weights.items()}
    unfinished = folder / f"{WEIGHTS}.unfinished"
    unfinished.write_bytes(save(half, metadata={"format": "pt"}))  # `save_file` makes it readable to its owner only
    os.replace(unfinished, folder / WEIGHTS)
    config = {name: value for name, value in json.loads(model.to_json_string()).items() if name != "_name_or_path"}
    _write_json(folder / CONFIG, config)
    _write_json(folder / TRAINING, {"version": VERSION, **training})


def load_checkpoint(folder: Path) -> WanTransformer3DModel:
    """The model of a folder, in float32 on the CPU.

    Raises:
        SparseAttentionError: the folder is missing or incomplete, a file is damaged or could run code, or it holds
            another version or another architecture.
    """
    config = _read_json(folder / CONFIG)
    if (kind := config.get("_class_name")) != WanTransformer3DModel.__name__:
        raise SparseAttentionError(
            f"a checkpoint holds a {WanTransformer3DModel.__name__}", kind, f"Give another folder than {folder}."
        )
    check_version(read_training(folder), folder / TRAINING)
    weights = _read_weights(folder)
    model = WanTransformer3DModel.from_config(config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        raise SparseAttentionError(
            f"the weights have the shapes that {CONFIG} says",
            f"{folder}: {len(wrong)} tensors differ, the first is {wrong[0]}",
            f"Take {CONFIG} and {WEIGHTS} from the same training run.",
        )
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model.eval()


def read_training(folder: Path) -> dict[str, Any]:
    """What the training wrote about itself; empty if the folder holds nothing of the kind."""
    path = folder / TRAINING
    return _read_json(path) if path.exists() else {}


def check_version(training: Mapping[str, Any], source: Path) -> None:
    """Refuse what a later version of this module has written.

    Raises:
        SparseAttentionError: it is of another version.
    """
    if (version := training.get("version", VERSION)) != VERSION:
        raise SparseAttentionError(
            f"a checkpoint is of version {VERSION}", f"version {version} in {source}", "Train it again with this code."
        )


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.exists():
        refused = sorted(entry.name for entry in folder.iterdir() if entry.suffix in CODE_CARRIERS)
        if refused:
            raise SparseAttentionError(
                "weights are read from safetensors only, because a pickle can run code",
                f"{folder}: {', '.join(refused)}",
                f"Convert it to {WEIGHTS} where you trust it.",
            )
        raise SparseAttentionError(f"a checkpoint holds {WEIGHTS}", str(folder), "Give the folder of a training run.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise SparseAttentionError(
            f"{WEIGHTS} is a whole safetensors file", f"{path}: {error}", "Copy it again; it is damaged or cut short."
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise SparseAttentionError(
            f"a checkpoint is a folder that holds {path.name}", str(path.parent), "Give the folder of a training run."
        )
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise SparseAttentionError(f"{path.name} is JSON", f"{path}: {error}", "Copy it again.") from error
    if not isinstance(content, dict):
        raise SparseAttentionError(f"{path.name} holds a JSON object", str(path), "Copy it again.")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(unfinished, path)
