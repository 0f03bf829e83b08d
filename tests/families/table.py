"""The table of families: every model that is held to have its sites found, and its output unchanged."""

from __future__ import annotations

from families import (
    audio,
    autoregressive,
    cogvideox,
    cosmos,
    cross_image,
    flux,
    flux_kin,
    hunyuan,
    image_editing,
    joint_image,
    joint_video,
    kandinsky,
    latte,
    ltx,
    ltx2,
    lumina,
    mochi,
    packed,
    sana,
    sd3,
    wan,
    wan_variants,
)
from families.case import Case

GROUPS: dict[str, tuple[Case, ...]] = {
    "wan": wan.CASES,
    "wan_variants": wan_variants.CASES,
    "hunyuan": hunyuan.CASES,
    "kandinsky": kandinsky.CASES,
    "autoregressive": autoregressive.CASES,
    "sana": sana.CASES,
    "cogvideox": cogvideox.CASES,
    "ltx": ltx.CASES,
    "mochi": mochi.CASES,
    "cosmos": cosmos.CASES,
    "latte": latte.CASES,
    "flux": flux.CASES,
    "sd3": sd3.CASES,
    "ltx2": ltx2.CASES,
    "joint_video": joint_video.CASES,
    "packed": packed.CASES,
    "image_editing": image_editing.CASES,
    "flux_kin": flux_kin.CASES,
    "joint_image": joint_image.CASES,
    "lumina": lumina.CASES,
    "cross_image": cross_image.CASES,
    "audio": audio.CASES,
}
"""Cases of related families, by the name of their module."""

CASES: tuple[Case, ...] = tuple(case for cases in GROUPS.values() for case in cases)


def case_of(name: str) -> Case:
    """The case of this name."""
    return next(case for case in CASES if case.name == name)
