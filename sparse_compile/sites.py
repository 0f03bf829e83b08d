"""The nouns of the rewrite: a Site, whose tokens lie on its axis, and what was decided about it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from enum import Enum, StrEnum
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import fx

VISUAL_ROLES = frozenset({"video", "control"})


class Reason(Enum):
    """Why a site stays dense: a sentence, a remedy, and whether that is by design or a limit of ours.

    Members are (code, by design, sentence, remedy). An *unsupported* one (not by design) is an error under ``strict``.
    """

    CROSS_ATTENTION = ("cross_attention", True, "cross-attention: few keys, nothing to gain", "")
    EXTRA_KEYS = ("extra_keys", True, "tokens that are no video attend to themselves and to more", "")
    TEXT_ONLY = ("text_only", True, "attention among text tokens", "")
    AUDIO_ONLY = ("audio_only", True, "attention among audio tokens", "")
    IMAGE_ONLY = ("image_only", True, "attention among image-embedding tokens", "")
    FACTORISED = ("factorised_attention", True, "frames or space lie in the batch: already factorised", "")
    TOO_SHORT = ("too_short", True, "too few video tokens to gain anything", "A lower min_tokens forces it.")
    NO_GAIN = (
        "no_gain",
        True,
        "a sparse call would not be faster than dense attention here",
        "Setting min_tokens to a number forces it.",
    )
    ONE_BLOCK = ("one_block", True, "one block holds all video tokens: nothing to skip", "Lower block_size.")
    DENSE_LAYER = ("dense_layer", True, "one of the layers that dense_layers keeps dense", "")
    DENSE_METHOD = ("dense_method", True, "method='dense' was asked for", "")
    GRADIENTS = (
        "gradients",
        True,
        "gradients are needed, which the sparse ops do not have",
        "Call the model under torch.no_grad() or torch.inference_mode().",
    )
    UNKNOWN_TOKENS = (
        "unknown_tokens",
        False,
        "the graph does not tell which tokens are video",
        "Give text_tokens and text_position, or compile with fullgraph=True.",
    )
    TOKEN_ORDER = (
        "token_order_unknown",
        False,
        "a gather or an unknown operation reorders the video tokens",
        "Compile the repeated blocks alone; text_tokens and text_position tell what was packed by an index.",
    )
    UNKNOWN_GRID = (
        "unknown_grid",
        False,
        "the graph does not tell how many frames, rows and columns the video has",
        "Compile the model as a whole, with dynamic=False.",
    )
    DYNAMIC_SPLIT = (
        "dynamic_split",
        False,
        "the border between video and text has a symbolic size that the graph does not spell out",
        "Compile with dynamic=False.",
    )
    NO_PARAMETER = (
        "no_parameter",
        False,
        "no Parameter above the query, so no place to keep state",
        "Avoid graph breaks between projection and attention (sequential or leaf-level offload makes them).",
    )
    NESTED = (
        "nested_graph",
        False,
        "the attention lies in a sub-graph",
        "Switch gradient checkpointing off.",
    )
    CAUSAL = ("causal", False, "causal attention", "")
    DROPOUT = ("dropout", False, "attention with dropout", "Call model.eval().")
    MASK = ("mask", False, "a mask that is not a key-padding mask", "")
    KEY_BIAS = ("key_bias", False, "a floating-point bias per key", "")
    DTYPE = ("dtype", False, "q, k and v are not all float16, bfloat16 or float32", "")
    HEAD_DIM = ("head_dim", False, "the head size is no multiple of 8 up to 256", "")
    GQA = ("gqa", False, "the number of query heads is no multiple of the number of key heads", "")
    DEVICE = ("device", False, "q, k and v lie on different devices or on one without a kernel", "")
    RANK = ("rank", False, "q, k and v are not 4-dimensional [B, H, S, D]", "")
    ANALYSIS_FAILED = ("analysis_failed", False, "reading this part of the graph failed", "Please report it.")
    PRECOMPILE = (
        "caching_precompile",
        False,
        "torch's caching_precompile would load the code without its guards",
        "Unset TORCH_CACHING_PRECOMPILE.",
    )

    def __init__(self, code: str, by_design: bool, sentence: str, remedy: str) -> None:
        self.code = code
        self.by_design = by_design
        self.sentence = sentence
        self.remedy = remedy


@dataclass(frozen=True)
class Decision:
    """Sparse (no reason), or dense for a reason; ``note`` adds what the reader of a report should know."""

    reason: Reason | None
    note: str = ""

    @property
    def sparse(self) -> bool:
        """Whether the site is rewritten."""
        return self.reason is None


class MaskForm(StrEnum):
    """What the attention mask of a site is, read from its node and shape, never from its values."""

    NONE = "none"
    KEY_PADDING = "key_padding"
    """bool [B or 1, 1, 1, Sk], or [B or 1, Sk] broadcast so: False keys take no mass."""
    OUTER = "outer"
    """bool [B or 1, 1, S, S], proved to be m[i] and m[j]: key padding, and rows with m False give 0."""
    KEY_BIAS = "key_bias"
    GENERAL = "general"


@dataclass(frozen=True)
class GraphInput:
    """What a placeholder of Dynamo's graph is.

    ``name`` is dotted and without Dynamo's wrapping (``blocks.0.attn1.to_q.weight``, ``hidden_states``); ``owned`` says
    that it belongs to the module (a Parameter or a buffer) and is no argument of the call.
    """

    name: str
    is_parameter: bool = False
    owned: bool = False


@dataclass(frozen=True)
class TokenPart:
    """Consecutive tokens of one role.

    ``length`` is a hint (a real number even where the size is symbolic). ``size`` tells how to write the length into a
    graph: an int when it is static, ``(node, dim)`` when it is that size of a tensor node, None when unknown.
    """

    role: str
    length: int
    size: int | tuple[fx.Node, int] | None
    grid: tuple[int, ...] = ()

    @property
    def visual(self) -> bool:
        """Whether these tokens are clustered: video, or a control stream in the shape of one."""
        return self.role in VISUAL_ROLES

    def symbolic_length(self) -> int | torch.SymInt:
        """The length as the graph has it; the hint where the graph does not spell it out."""
        if isinstance(self.size, tuple):
            node, dim = self.size
            length: int | torch.SymInt = node.meta["example_value"].shape[dim]
            return length
        return self.length

    def moved(self, old_to_new: Mapping[fx.Node, fx.Node]) -> TokenPart:
        """This part in a copy of its graph."""
        if isinstance(self.size, tuple):
            node, dim = self.size
            return replace(self, size=(old_to_new[node], dim))
        return self


@dataclass(frozen=True)
class TokenLayout:
    """Whose tokens lie where on a token axis, in order."""

    parts: tuple[TokenPart, ...]

    @property
    def video_tokens(self) -> int:
        """Number of visual tokens (hint)."""
        return sum(part.length for part in self.parts if part.visual)

    @property
    def grid(self) -> tuple[int, ...]:
        """(frames, height, width) of the longest visual part where the graph tells, else ()."""
        grids = [(part.length, part.grid) for part in self.parts if part.visual and len(part.grid) > 1]
        return max(grids)[1] if grids else ()

    def video_size(self, length: int | torch.SymInt) -> int | torch.SymInt:
        """Number of visual tokens, for state that is shaped by it: symbolic where the graph's sizes are.

        Args:
            length: size of the whole axis.
        """
        if isinstance(length, int):
            return self.video_tokens
        if all(isinstance(part.size, int) for part in self.parts if part.visual):
            return self.video_tokens
        return length - sum(part.symbolic_length() for part in self.parts if not part.visual)

    def visual_runs(self) -> list[tuple[int, int]]:
        """(first, behind last) part of each run of neighbouring visual parts."""
        runs: list[tuple[int, int]] = []
        for index, part in enumerate(self.parts):
            if not part.visual:
                continue
            if runs and runs[-1][1] == index:
                runs[-1] = (runs[-1][0], index + 1)
            else:
                runs.append((index, index + 1))
        return runs

    def segments(self, length: int | torch.SymInt) -> list[int | torch.SymInt]:
        """Sizes of the stretches of text, video, text, …, text that the axis is made of; text may be of size 0.

        Symbolic where the graph's sizes are. The stretch of a part that the graph does not spell out is the rest.

        Args:
            length: size of the whole axis.
        """
        edges = [0, *(edge for run in self.visual_runs() for edge in run), len(self.parts)]
        stretches = [self.parts[start:stop] for start, stop in itertools.pairwise(edges)]
        sizes = [sum(part.symbolic_length() for part in stretch) for stretch in stretches]
        if not isinstance(length, int):
            for index, stretch in enumerate(stretches):
                if any(part.size is None for part in stretch):
                    sizes[index] = length - (sum(sizes) - sizes[index])
        return sizes

    def moved(self, old_to_new: Mapping[fx.Node, fx.Node]) -> TokenLayout:
        """This layout in a copy of its graph."""
        return TokenLayout(tuple(part.moved(old_to_new) for part in self.parts))

    def __str__(self) -> str:
        return "+".join(f"{part.role}:{part.length}" for part in self.parts)


@dataclass(frozen=True, eq=False, kw_only=True)
class Site:
    """One attention in one graph.

    Made by `match_attention` (the node and its arguments, the owner), completed by `classify_sites` (layout, role, mask
    form, decision). Sizes are hints: plain ints even where the graph's sizes are symbolic.
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    query_sizes: tuple[int, ...] = ()
    key_sizes: tuple[int, ...] = ()
    value_sizes: tuple[int, ...] = ()
    output_strides: tuple[int, ...] = ()
    """Strides of the attention's own result (hints)."""
    nested: bool = False
    """In a sub-graph (gradient checkpointing), where nothing is rewritten."""
    owner: fx.Node | None = None
    """Placeholder of the Parameter that names the layer at run time."""
    ordinal: int = 0
    """Which of the sites with this owner, in graph order."""
    name: str = ""
    """Where the model computes it, for example ``blocks.0.attn1``."""
    modules: tuple[tuple[str, str], ...] = ()
    """(path, class name) of the modules around it, outermost first."""
    layout: TokenLayout | None = None
    key_layout: TokenLayout | None = None
    role: str = "unknown"
    mask_form: MaskForm = MaskForm.NONE
    decision: Decision | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the attention computes in: its result's, to which autocast brings q, k and v."""
        dtype: torch.dtype = self.node.meta["example_value"].dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """The device of the query."""
        device: torch.device = self.query.meta["example_value"].device
        return device

    @property
    def sparse(self) -> bool:
        """Whether it was decided that this site becomes sparse."""
        return self.decision is not None and self.decision.sparse

    @property
    def reason(self) -> Reason | None:
        """Why it stays dense; None while that is undecided, or where it becomes sparse."""
        return None if self.decision is None else self.decision.reason

    def moved(self, old_to_new: Mapping[fx.Node, fx.Node]) -> Self:
        """This site in a copy of its graph."""

        def move(node: fx.Node | None) -> fx.Node | None:
            return None if node is None else old_to_new[node]

        return replace(
            self,
            node=old_to_new[self.node],
            query=old_to_new[self.query],
            key=old_to_new[self.key],
            value=old_to_new[self.value],
            mask=move(self.mask),
            owner=move(self.owner),
            layout=None if self.layout is None else self.layout.moved(old_to_new),
            key_layout=None if self.key_layout is None else self.key_layout.moved(old_to_new),
        )

    def decided(self, reason: Reason | None, note: str = "") -> Self:
        """This site with a decision."""
        return replace(self, decision=Decision(reason, note))
