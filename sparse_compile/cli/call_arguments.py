"""The arguments of one call of a model, guessed from the names in its `forward` and from its configuration.

No model is known by name. For each argument there are a few candidates (the orders of axes in which videos are passed,
the widths of text that the configuration names); which of them fit is found out by calling the model.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from sparse_compile.cli.model_source import literal
from sparse_compile.compiler.examine import attention_calls, first_line
from sparse_compile.compiler.torch_internals import needs_values
from sparse_compile.errors import SparseAttentionError

MOST_TRIALS = 128
AUDIO_TOKENS, IMAGE_TOKENS = 77, 257
SHAPE = re.compile(r"(\d+(?:x\d+)+|\d+(?=:))(?::(\w+))?$")

TEXT_WIDTHS = (
    "text_dim",
    "text_embed_dim",
    "caption_channels",
    "in_text_dim",
    "joint_attention_dim",
    "cap_feat_dim",
    "context_in_dim",
    "cross_attention_dim",
    "encoder_hidden_states_channels",
)
SECOND_TEXT_WIDTHS = ("text_embed_2_dim", "text_embed_dim_t5", "in_text_dim2")
POOLED_WIDTHS = ("pooled_projection_dim", "in_text_dim2", "pooled_embed_dim")
IMAGE_WIDTHS = ("image_dim", "image_embed_dim", "image_proj_dim", "image_embed_in_dim", "added_kv_proj_dim")
CHANNELS = ("in_channels", "in_visual_dim", "latent_channels", "num_channels_latents")
CONTROL_CHANNELS = ("vace_in_channels", "control_channels")


@dataclass(frozen=True)
class Sizes:
    """How large the guessed tensors are."""

    frames: int
    height: int
    width: int
    """Of the latents that the transformer gets."""
    text: int
    batch: int = 1

    @property
    def positions(self) -> int:
        """Places of the latent video."""
        return self.frames * self.height * self.width


class CallFound(NamedTuple):
    """Arguments with which a model ran, or came as far as values of tensors are needed."""

    arguments: dict[str, Any]
    eager: Counter[str]
    """Its attentions, by module."""
    needs_values: str
    """Why the call needs more than sizes; empty where it does not."""


def find_call(
    model: nn.Module, sizes: Sizes, given: Mapping[str, Any], known: Mapping[str, Any] | None = None
) -> CallFound:
    """Arguments with which the model runs.

    Args:
        model: a module.
        sizes: how large they are to be.
        given: what the user said of some of them.
        known: all others, where the model's source told.

    Raises:
        SparseAttentionError: an argument cannot be guessed, or no guess ran; says which and how to give it.
    """
    parameters = inspect.signature(inspect.unwrap(type(model).forward)).parameters
    named = {n: p for n, p in parameters.items() if n != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if unknown := [name for name in given if name not in named and not takes_any]:
        raise SparseAttentionError(
            "--input must name an argument of forward", unknown[0], f"Known: {', '.join(named)}."
        )
    if known is not None:
        choices = {name: [value] for name, value in {**known, **given}.items()}
    else:
        facts = _facts(model)
        choices = {name: [given[name]] if name in given else _candidates(name, facts, sizes) for name in named}
        missing = [n for n, p in named.items() if p.default is p.empty and not choices[n]]
        if missing:
            raise _cannot_guess(missing, "nothing is known of it")
        choices = {name: values for name, values in choices.items() if values}
    return _first_that_runs(model, choices)


def _first_that_runs(model: nn.Module, choices: Mapping[str, Sequence[Any]]) -> CallFound:
    first = ""
    for arguments in itertools.islice(_combinations(choices), MOST_TRIALS):
        try:
            return CallFound(arguments, attention_calls(model, arguments), "")
        except Exception as error:  # noqa: BLE001 - whatever a model says to arguments that it does not take
            if needs_values(error):
                return CallFound(arguments, Counter(), first_line(error))
            first = first or f"{first_line(error)}, called with {described(arguments)}"
    raise _cannot_guess(list(choices), first)


def _combinations(choices: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def _cannot_guess(names: Sequence[str], why: str) -> SparseAttentionError:
    return SparseAttentionError(
        "explain needs arguments that the model takes",
        ", ".join(names),
        f"{why}. Give them: --input {names[0]}=1x16x21x60x104 for a tensor (1x512:int64 with a dtype), or a value.",
    )


def parse_input(text: str) -> object:
    """``1x16x21x60x104`` or ``2:int64`` as a tensor, several of them after commas as a tuple, else a value."""
    pieces = text.split(",")
    shapes = [SHAPE.match(piece.strip()) for piece in pieces]
    if not all(shapes):
        return literal(text)
    tensors = tuple(_tensor(shape[1], shape[2]) for shape in shapes if shape is not None)
    return tensors[0] if len(tensors) == 1 else tensors


def _tensor(shape: str, dtype: str | None) -> torch.Tensor:
    kind = getattr(torch, dtype or "float32", None)
    if not isinstance(kind, torch.dtype):
        raise SparseAttentionError("the word behind a shape must be a dtype", dtype, "For example 1x512:int64.")
    return torch.ones([int(size) for size in shape.split("x")], dtype=kind)


def described(arguments: Mapping[str, Any]) -> str:
    """Arguments as ``--input`` takes them."""
    return ", ".join(f"{name}={_shown(value)}" for name, value in arguments.items())


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        shape = "x".join(map(str, value.shape)) or "scalar"
        return shape if dtype == "float32" and value.ndim > 1 else f"{shape}:{dtype}"
    if isinstance(value, list | tuple) and any(isinstance(item, torch.Tensor) for item in value):
        return ",".join(map(_shown, value))
    return repr(value)


# ---------------------------------------------------------------------- candidates


def _facts(model: nn.Module) -> dict[str, Any]:
    """The configuration of a model, as far as there is one."""
    config = getattr(model, "config", None)
    return dict(config) if isinstance(config, Mapping) else {}


Rule = Callable[[Mapping[str, Any], Sizes], list[Any]]


def _candidates(name: str, facts: Mapping[str, Any], sizes: Sizes) -> list[Any]:
    """What an argument of this name may be; empty: leave it out."""
    for pattern, rule in RULES:
        if re.fullmatch(pattern, name):
            return rule(facts, sizes)
    return []


def _numbers(facts: Mapping[str, Any], names: Sequence[str]) -> list[int]:
    """The numbers that the configuration has under these names, each once."""
    found = [facts.get(name) for name in names]
    return list(dict.fromkeys(int(number) for number in found if isinstance(number, int) and number > 0))


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def _video(facts: Mapping[str, Any], sizes: Sizes, channels: Sequence[str] = CHANNELS) -> list[Any]:
    batch, frames, height, width = sizes.batch, sizes.frames, sizes.height, sizes.width
    shapes = []
    for c in _numbers(facts, channels):
        shapes += [
            (batch, c, frames, height, width),
            (batch, frames, c, height, width),
            (batch, frames, height, width, c),
            (batch, _packed(facts, sizes), c),
            (batch, c, height, width),
        ]
    return [_noise(*shape) for shape in shapes]


def _packed(facts: Mapping[str, Any], sizes: Sizes) -> int:
    """Tokens of a video that is patched before the transformer gets it."""
    patch = facts.get("patch_size") or 1
    spatial, temporal = (patch, facts.get("patch_size_t") or 1) if isinstance(patch, int) else (1, 1)
    return (sizes.frames // temporal) * (sizes.height // spatial) * (sizes.width // spatial)


def _text_tokens(facts: Mapping[str, Any], sizes: Sizes) -> int:
    return next(iter(_numbers(facts, ("max_text_seq_length",))), sizes.text)


def _text(facts: Mapping[str, Any], sizes: Sizes) -> list[Any]:
    return [_noise(sizes.batch, _text_tokens(facts, sizes), w) for w in _numbers(facts, TEXT_WIDTHS)]


def _second_text(facts: Mapping[str, Any], sizes: Sizes) -> list[Any]:
    return [_noise(sizes.batch, sizes.text // 2, w) for w in _numbers(facts, SECOND_TEXT_WIDTHS)]


def _text_mask(facts: Mapping[str, Any], sizes: Sizes) -> list[Any]:
    shape = (sizes.batch, _text_tokens(facts, sizes))
    return [torch.ones(shape, dtype=torch.bool), torch.ones(shape), None]


def _second_text_mask(facts: Mapping[str, Any], sizes: Sizes) -> list[Any]:
    return [torch.ones(sizes.batch, sizes.text // 2, dtype=torch.bool)] if _second_text(facts, sizes) else []


def _images(facts: Mapping[str, Any], sizes: Sizes) -> list[Any]:
    return [_noise(sizes.batch, IMAGE_TOKENS, width) for width in _numbers(facts, IMAGE_WIDTHS)]


def _pooled(facts: Mapping[str, Any], sizes: Sizes) -> list[Any]:
    return [_noise(sizes.batch, width) for width in _numbers(facts, POOLED_WIDTHS)]


def _time(facts: Mapping[str, Any], sizes: Sizes) -> list[Any]:
    return [torch.full((sizes.batch,), 500), torch.full((sizes.batch,), 500.0), torch.full((1,), 500)]


def _guidance(facts: Mapping[str, Any], sizes: Sizes) -> list[Any]:
    return [torch.full((sizes.batch,), 6000.0)] if facts.get("guidance_embeds") else []


def _ids(tokens: Callable[[Mapping[str, Any], Sizes], int]) -> Rule:
    def rule(facts: Mapping[str, Any], sizes: Sizes) -> list[Any]:
        axes = facts.get("axes_dims_rope") or facts.get("axes_dim") or (0, 0, 0)
        return [torch.zeros(tokens(facts, sizes), len(axes)), torch.zeros(sizes.batch, tokens(facts, sizes), len(axes))]

    return rule


def _rotary(facts: Mapping[str, Any], sizes: Sizes) -> list[Any]:
    if not facts.get("use_rotary_positional_embeddings"):
        return []
    tokens, size = _packed(facts, sizes), _numbers(facts, ("attention_head_dim",))
    return [(_noise(tokens, width), _noise(tokens, width)) for width in size]


def _grid_positions(facts: Mapping[str, Any], sizes: Sizes) -> list[Any]:
    patch = facts.get("patch_size")
    steps = tuple(patch) if isinstance(patch, list | tuple) and len(patch) == 3 else (1, 1, 1)
    grid = zip((sizes.frames, sizes.height, sizes.width), steps, strict=True)
    return [tuple(torch.arange(size // step) for size, step in grid)]


def _padding_mask(facts: Mapping[str, Any], sizes: Sizes) -> list[Any]:
    return [torch.zeros(1, 1, sizes.height, sizes.width)] if facts.get("concat_padding_mask") else []


def _audio(facts: Mapping[str, Any], sizes: Sizes) -> list[Any]:
    return [_noise(sizes.batch, AUDIO_TOKENS, c) for c in _numbers(facts, ("audio_in_channels",))]


def _number(size: Callable[[Sizes], object]) -> Rule:
    return lambda facts, sizes: [size(sizes)]


RULES: tuple[tuple[str, Rule], ...] = (
    (r"hidden_states|sample|latents|x", _video),
    (r"control_hidden_states", lambda facts, sizes: _video(facts, sizes, CONTROL_CHANNELS)),
    (r"audio_hidden_states", _audio),
    (r"encoder_hidden_states_image|image_embeds", _images),
    (r"encoder_hidden_states_(2|t5)", _second_text),
    (r"(audio_)?encoder_hidden_states|caption|cap_feats|text", _text),
    (r"encoder_attention_mask_2", _second_text_mask),
    (r"(audio_)?encoder_attention_mask|encoder_hidden_states_mask", _text_mask),
    (r"pooled_projections|pooled_embeds", _pooled),
    (r"(r_)?timesteps?|t", _time),
    (r"guidance", _guidance),
    (r"img_ids|image_ids", _ids(_packed)),
    (r"txt_ids|text_ids", _ids(_text_tokens)),
    (r"image_rotary_emb", _rotary),
    (r"visual_rope_pos", _grid_positions),
    (r"text_rope_pos", lambda facts, sizes: [torch.arange(_text_tokens(facts, sizes))]),
    (r"padding_mask", _padding_mask),
    (r"num_frames", _number(lambda sizes: sizes.frames)),
    (r"height", _number(lambda sizes: sizes.height)),
    (r"width", _number(lambda sizes: sizes.width)),
    (r"audio_num_frames", _number(lambda sizes: AUDIO_TOKENS)),
    (r"fps", _number(lambda sizes: 24)),
    (r"img_shapes", _number(lambda sizes: [(sizes.frames, sizes.height, sizes.width)] * sizes.batch)),
    (r"txt_seq_lens", _number(lambda sizes: [sizes.text] * sizes.batch)),
    (r"indices_latents", lambda facts, sizes: [torch.arange(sizes.frames)[None].expand(sizes.batch, -1)]),
)
"""Patterns of names of arguments, in the order in which they are tried, and what such an argument may be."""
