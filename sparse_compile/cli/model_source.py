"""The models that ``sparse-attn explain`` was asked about: a class, a file, a folder or a callable; without weights."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
from torch import nn

from sparse_compile.errors import SparseAttentionError
from sparse_compile.integrations.diffusers import DENOISERS

CONFIG, INDEX = "config.json", "model_index.json"


@dataclass(frozen=True)
class ModelSource:
    """One model that can be built."""

    name: str
    build: Callable[[], tuple[nn.Module, dict[str, Any] | None]]
    """The module, and the arguments of one call where they are known. Under fake tensors it needs no memory."""


def sources_of(what: str, changes: Sequence[tuple[str, str]] = ()) -> list[ModelSource]:
    """The models that a name stands for.

    Args:
        what: a class of diffusers, the path of a ``config.json``, of a folder with one, or of a pipeline's folder; or
            ``package.module:callable``, where the callable returns a module or (module, arguments of one call).
        changes: of the configuration, name and value as they were typed.

    Raises:
        SparseAttentionError: it is none of these, or the changes do not apply.
    """
    path = Path(what)
    if path.is_dir() and (path / INDEX).is_file():
        return _of_pipeline(path, changes)
    if path.is_dir() or path.suffix == ".json":
        return [_of_config(path / CONFIG if path.is_dir() else path, changes)]
    if ":" in what:
        return [_of_callable(what, changes)]
    return [ModelSource(what, lambda: (_configured(_class_named(what), {}, changes), None))]


def _of_pipeline(folder: Path, changes: Sequence[tuple[str, str]]) -> list[ModelSource]:
    index = _read(folder / INDEX)
    names = [name for name in index if name.startswith(DENOISERS) and (folder / name / CONFIG).is_file()]
    if not names:
        raise SparseAttentionError(
            "a pipeline's folder must hold the configuration of a transformer",
            str(folder),
            f"Expected something like transformer/{CONFIG}.",
        )
    return [ModelSource(name, _of_config(folder / name / CONFIG, changes).build) for name in names]


def _of_config(path: Path, changes: Sequence[tuple[str, str]]) -> ModelSource:
    config = _read(path)
    name = config.get("_class_name")
    if not isinstance(name, str):
        raise SparseAttentionError(
            "a configuration must name its class", str(path), "Expected the key _class_name, as diffusers writes it."
        )
    return ModelSource(name, lambda: (_configured(_class_named(name), config, changes), None))


def _read(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SparseAttentionError(
            "a configuration must be a JSON file", str(path), f"It does not read: {error}"
        ) from error
    if not isinstance(read, dict):
        raise SparseAttentionError(
            "a configuration must be a JSON object", str(path), "Give a config.json of diffusers."
        )
    return read


def _class_named(name: str) -> type[nn.Module]:
    found = getattr(diffusers, name, None)
    if not (inspect.isclass(found) and issubclass(found, nn.Module) and hasattr(found, "from_config")):
        raise SparseAttentionError(
            "explain needs a model",
            name,
            "Give a model class of diffusers, a config.json, the folder of a model or pipeline, or module:callable.",
        )
    return found


def _configured(
    model_class: type[nn.Module], config: Mapping[str, Any], changes: Sequence[tuple[str, str]]
) -> nn.Module:
    known = inspect.signature(model_class.__init__).parameters
    for name, _ in changes:
        if name not in known:
            raise SparseAttentionError(
                f"--config must name a setting of {model_class.__name__}", name, f"Known: {', '.join(list(known)[1:])}."
            )
    changed = {**config, **{name: literal(value) for name, value in changes}}
    model: nn.Module = model_class.from_config(changed)  # type: ignore[attr-defined]  # diffusers' ConfigMixin
    return model.eval().requires_grad_(False)


def _of_callable(what: str, changes: Sequence[tuple[str, str]]) -> ModelSource:
    if changes:
        raise SparseAttentionError(
            "--config changes a configuration of diffusers", what, "Change the callable instead."
        )
    module_name, _, name = what.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` has it: modules of the folder that the user is in
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise SparseAttentionError("package.module:callable must import", what, f"It does not: {error}.") from error

    def build() -> tuple[nn.Module, dict[str, Any] | None]:
        made = function()
        model, call = made if isinstance(made, tuple) else (made, None)
        if not isinstance(model, nn.Module):
            raise SparseAttentionError(
                "the callable must return a module, or a module and the keyword arguments of one call",
                f"{what}() returned {type(made).__name__}",
                "Return one of these.",
            )
        return model.eval().requires_grad_(False), None if call is None else dict(call)

    return ModelSource(what, build)


def literal(text: str) -> object:
    """A value as it was typed: a number, None, a list, …; other words are strings."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
