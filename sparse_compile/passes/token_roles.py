"""Whose tokens a part holds, told by the names of the graph inputs it comes from."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import fx

from sparse_compile.passes.graph_facts import is_tensor, rank, sizes
from sparse_compile.passes.token_parts import Note, Part
from sparse_compile.sites import VISUAL_ROLES, GraphInput

Inputs = Mapping[fx.Node, GraphInput]

LEARNED, VECTOR, MIXED, UNKNOWN = "learned", "vector", "mixed", "unknown"
UNNAMED_ROLES = frozenset({LEARNED, VECTOR})
"""Roles that say nothing about the tokens beside them."""

ROLE_WORDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("audio", ("audio", "sound", "melody", "aud")),
    (
        "image",
        (
            "image_embeds",
            "encoder_hidden_states_image",
            "encoder_hidden_states_2_image",
            "clip",
            "siglip",
            "image_states",
            "face",
            "motion_hidden",
        ),
    ),
    (
        "text",
        (
            *("encoder_hidden_states", "prompt", "text", "caption", "cap_feats", "txt", "llm", "byt5", "context"),
            *("input_ids", "und"),
        ),
    ),
    ("control", ("control", "vace", "history", "pose")),
    (
        VECTOR,
        (
            "timestep",
            "guidance",
            "pooled",
            "temb",
            "sigma",
            "rotary",
            "rope",
            "freqs",
            "cos",
            "sin",
            "ids",
            "mask",
        ),
    ),
    ("video", ("hidden_states", "sample", "latent", "x", "img", "video", "visual", "vis", "vision", "gen")),
)
"""Role and the words that tell it; the first hit wins (``encoder_hidden_states`` holds ``hidden_states``).

Models that understand and generate call the two streams *und* and *gen*.
"""

WHOLE_WORD_LENGTH = 3
"""Words up to this long must stand alone: ``sin`` is no part of ``single``."""

_POSITIONAL = re.compile(r"args[._]\d+")


def role_of_input(node: fx.Node, inputs: Inputs) -> str:
    """The role of one graph input: by name, or by rank where the call gave it by position."""
    known = inputs.get(node)
    name = node.name if known is None else known.name
    if _POSITIONAL.fullmatch(name):
        return _role_by_rank(node, inputs)
    return role_of_name(name)


def role_of_name(name: str) -> str:
    """The first role that has a word in this name."""
    words = set(re.split(r"[^a-z0-9]+|_", name.lower()))
    for role, tokens in ROLE_WORDS:
        if any(token in words if len(token) <= WHOLE_WORD_LENGTH else token in name for token in tokens):
            return role
    return UNKNOWN


def _role_by_rank(node: fx.Node, inputs: Inputs) -> str:
    """Latents have a grid, text is the shorter of the sequences, the rest are vectors."""
    if _has_grid(node):
        return "video"
    if rank(node) != 3:
        return VECTOR
    arguments = [n for n, known in inputs.items() if is_tensor(n) and not known.owned]
    longest = max((sizes(n)[1] for n in arguments if rank(n) == 3), default=0)
    beside_latents = any(map(_has_grid, arguments))
    return "text" if beside_latents or sizes(node)[1] < longest else UNKNOWN


def _has_grid(node: fx.Node) -> bool:
    """Whether an input has more axes than a table of rotary angles or a mask, which broadcast along one."""
    return rank(node) >= 4 and sum(size > 1 for size in sizes(node)[1:]) >= 3


def role_of_part(part: Part, inputs: Inputs) -> str:
    """The role of a part: the one its inputs agree on, apart from those that only modulate it."""
    if part.note is Note.GENERATED or not part.origins:
        return LEARNED
    roles = {role_of_input(node, inputs) for node in part.origins} - {VECTOR}
    if not roles:
        return VECTOR
    if len(roles) == 1:
        return roles.pop()
    has_grid = len(part.factors) >= 3
    return "video" if "video" in roles and (has_grid or not part.reordered) else MIXED


def is_visual(part: Part, inputs: Inputs) -> bool:
    """Whether a part holds video, or a control stream in the shape of one."""
    return role_of_part(part, inputs) in VISUAL_ROLES
