"""What is to be found in the graphs of the tiny models."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One kind of attention site: as the tables below count them."""

    role: str
    layout: str
    keys: int
    mask: str
    grid: str
    verdict: str


CROSS, SPARSE = "cross_attention", "sparse"

EXPECTED: dict[str, dict[Row, int]] = {
    "wan_t2v": {
        Row("self", "video:480", 480, "none", "5x8x12", SPARSE): 2,
        Row("cross", "video:480", 20, "none", "5x8x12", CROSS): 2,
    },
    "wan_ti2v_per_token_time": {
        Row("self", "video:480", 480, "none", "5x8x12", SPARSE): 2,
        Row("cross", "video:480", 20, "none", "5x8x12", CROSS): 2,
    },
    "wan_i2v": {
        Row("self", "video:192", 192, "none", "3x8x8", SPARSE): 2,
        Row("cross", "video:192", 512, "none", "3x8x8", CROSS): 2,
        Row("cross", "video:192", 9, "none", "3x8x8", CROSS): 2,
    },
    "wan_vace": {
        Row("self", "video:256", 256, "none", "4x8x8", SPARSE): 2,
        Row("cross", "video:256", 20, "none", "4x8x8", CROSS): 2,
        Row("self", "control:256", 256, "none", "4x8x8", SPARSE): 2,
        Row("cross", "control:256", 20, "none", "4x8x8", CROSS): 2,
    },
    "hunyuan_video": {
        Row("joint", "video:320+text:14", 334, "key_padding", "5x8x8", SPARSE): 3,
        Row("text-self", "text:14", 14, "general", "", "text_only"): 1,
    },
    "cogvideox": {Row("joint", "text:18+video:192", 210, "none", "3x8x8", SPARSE): 2},
    "cogvideox_rope": {Row("joint", "text:18+video:192", 210, "none", "3x8x8", SPARSE): 2},
    "ltx": {
        Row("self", "video:192", 192, "none", "", SPARSE): 2,
        Row("cross", "video:192", 22, "key_bias", "", CROSS): 2,
    },
    # 997 and 1009 stand for numbers of text tokens that depend on data
    "mochi": {
        Row("joint", "video:192+text:997", 1189, "none", "3x8x8", SPARSE): 1,
        Row("joint", "video:192+mixed:1009", 1201, "none", "3x8x8", SPARSE): 1,
        Row("learned-cross", "learned:1", 17, "key_padding", "", CROSS): 1,
    },
    "cosmos": {
        Row("self", "video:192", 192, "none", "3x8x8", SPARSE): 2,
        Row("cross", "video:192", 13, "none", "3x8x8", CROSS): 2,
    },
    "allegro": {
        Row("self", "video:192", 192, "key_bias", "3x8x8", "key_bias"): 2,
        Row("cross", "video:192", 17, "key_bias", "3x8x8", CROSS): 2,
    },
    "latte": {
        Row("self", "video:64", 64, "none", "8x8", "factorised_attention"): 2,
        Row("cross", "video:64", 11, "none", "8x8", CROSS): 2,
        Row("self", "video:5", 5, "none", "", "factorised_attention"): 2,
    },
    "flux": {Row("joint", "text:15+video:120", 135, "none", "", SPARSE): 3},
    "sd3": {
        Row("joint", "video:80+text:23", 103, "none", "8x10", SPARSE): 2,
        Row("self", "video:80", 80, "none", "8x10", SPARSE): 1,
    },
}
"""Sites of the whole-model graph."""

GRAPHS: dict[str, int] = dict.fromkeys(EXPECTED, 1)
"""Graphs of the whole model."""

REGIONAL: dict[str, tuple[int, int]] = {
    "wan_t2v": (1, 2),
    "wan_ti2v_per_token_time": (1, 2),
    "wan_i2v": (1, 3),
    "wan_vace": (3, 6),
    "hunyuan_video": (5, 4),
    "ltx": (1, 2),
    "flux": (3, 3),
}
"""Graphs and sites where the repeated blocks are compiled one by one; the other models have none."""
