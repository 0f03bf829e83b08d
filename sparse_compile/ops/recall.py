"""Ops for budgets that follow the content: plans that cover a share of the attention mass, and their calibration."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.ops.library import implementation, register


def _plan_estimated_recall(
    q_means: Tensor,
    k_means: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    ready: Tensor,
    asked: Tensor | None,
    scale: float,
    target: float,
    min_density: float,
    max_density: float,
    rank_by: str,
    padded_queries_attend: bool,
    seed: int,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """Keep key clusters until the mass that their means tell reaches what is asked (docs/svg2.md, section 7).

    Args:
        q_means: float32 [B, H, Cq, D].
        k_means: float32 [B, Hkv, Ck, D].
        q_offsets: int32 [B, H, Cq + 3].
        k_offsets: int32 [B, Hkv, Ck + 3].
        ready: int32 [1]; 0 keeps every valid key for every query.
        asked: float32 [B, H], the estimate to reach in each head, see `calibrate_recall`; 0 or None: the target.
        scale: softmax scale.
        target: mass to keep, in (0, 1).
        min_density: least share of the keys of a row.
        max_density: largest share; a head more than half of whose queries need more attends to everything.
        rank_by: ``mass``, ``mass_per_key`` or ``random``.
        padded_queries_attend: whether padding queries attend to every valid key or to nothing.
        seed: seed of ``random``.
        kernel: which implementation.

    Returns:
        The keep bitmap of a Plan, int32 [B, H, Cq + 2, ceil((Ck + 2) / 32)], and at_bounds float32 [B, H, 2]: the share
        of the clustered queries whose row the floor holds up, and the ceiling holds down.
    """
    from sparse_compile.kernels.recall_map import reference

    wanted = q_means.new_full(q_means.shape[:2], target) if asked is None else reference.from_target(asked, target)
    bounds = reference.Bounds(min_density, max_density)
    sides = (q_means, k_means, q_offsets, k_offsets, ready, wanted)
    if implementation(kernel) == "triton":
        from sparse_compile.kernels.recall_map import triton_launch

        return triton_launch.plan_estimated_recall(*sides, scale, bounds, rank_by, padded_queries_attend, seed)
    return reference.plan_estimated_recall(*sides, scale, bounds, rank_by, padded_queries_attend, seed)


def _plan_estimated_recall_fake(q_means: Tensor, k_means: Tensor, *ignored: object) -> tuple[Tensor, Tensor]:
    b, h, cq, _ = q_means.shape
    words = (k_means.shape[2] + 2 + 31) // 32
    return q_means.new_empty((b, h, cq + 2, words), dtype=torch.int32), q_means.new_empty((b, h, 2))


def _plan_measured_recall(
    mass: Tensor,
    q_offsets: Tensor,
    q_is_video: Tensor,
    k_offsets: Tensor,
    k_is_video: Tensor,
    keep: Tensor,
    ready: Tensor,
    at_bounds: Tensor,
    target: float,
    min_density: float,
    max_density: float,
    rank_by: str,
    padded_queries_attend: bool,
    seed: int,
    kernel: str,
) -> Tensor:
    """Keep key blocks until each row holds the target share of its mass, and file them (docs/adaspa.md, section 13.1).

    Args:
        mass: float32 [B, H, Gq, Gk], from `block_mass`.
        q_offsets: int32 [B, H, Gq + 1].
        q_is_video: bool [Gq].
        k_offsets: int32 [B, Hkv, Gk + 1].
        k_is_video: bool [Gk].
        keep: int32 [B, H, Gq, ceil(Gk / 32)]; set to the keep bitmap of the Plan.
        ready: int32 [1]; set to 1.
        at_bounds: float32 [B, H, 2]; set as in `plan_estimated_recall`, for the video rows.
        target: mass to keep, in (0, 1).
        min_density: see `plan_estimated_recall`.
        max_density: see `plan_estimated_recall`.
        rank_by: ``mass``, ``mass_per_key`` or ``random``.
        padded_queries_attend: whether padding queries attend to every valid key or to nothing.
        seed: seed of ``random``.
        kernel: which implementation.

    Returns:
        recall float32 [B, H], the share of its mass that a video row keeps, mean over their tokens.
    """
    from sparse_compile.kernels.recall_map import reference

    bounds = reference.Bounds(min_density, max_density)
    sides = (mass, q_offsets, q_is_video, k_offsets, k_is_video)
    if implementation(kernel) == "triton":
        from sparse_compile.kernels.recall_map import triton_launch

        kept, recall, held = triton_launch.plan_measured_recall(
            *sides, target, bounds, rank_by, padded_queries_attend, seed
        )
    else:
        kept, recall, held = reference.plan_measured_recall(
            *sides, target, bounds, rank_by, padded_queries_attend, seed
        )
    keep.copy_(kept)
    at_bounds.copy_(held)
    ready.fill_(1)
    return recall


def _plan_measured_recall_fake(mass: Tensor, *_: object) -> Tensor:
    return mass.new_empty(mass.shape[:2])


def _calibrate_recall(measured: Tensor, at_bounds: Tensor, target: float, asked: Tensor, kernel: str) -> None:
    """Adapt what is asked of the estimate to the mass that was kept, for the next plan (docs/svg2.md, section 7).

    Args:
        measured: float32 [B, H], from `kept_mass`; NaN where it was not measured: nothing is learnt of it.
        at_bounds: float32 [B, H, 2], from `plan_estimated_recall`: heads out of reach learn nothing.
        target: mass to keep, in (0, 1).
        asked: float32 [B, H], what was asked; set to what to ask next. 0 stands for the target.
        kernel: which implementation.
    """
    from sparse_compile.kernels.recall_map import reference

    implementation(kernel)
    reference.calibrate(measured, at_bounds, target, asked)


def _calibrate_recall_fake(measured: Tensor, at_bounds: Tensor, target: float, asked: Tensor, kernel: str) -> None:
    return None


def _keep_weak_heads_whole(
    recall: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    keep: Tensor,
    min_recall: float,
    padded_queries_attend: bool,
    kernel: str,
) -> Tensor:
    """Put heads back to dense whose plan keeps too little (docs/adaspa.md, section 13.1).

    Args:
        recall: float32 [B, H], the mass that the plan keeps.
        q_offsets: int32 [B, H, Gq + 1].
        k_offsets: int32 [B, Hkv, Gk + 1].
        keep: int32 [B, H, Gq, ceil(Gk / 32)], the plan; set to everything valid in heads whose recall is too low.
        min_recall: the least recall, in (0, 1].
        padded_queries_attend: whether padding queries attend to every valid key or to nothing.
        kernel: which implementation.

    Returns:
        recall float32 [B, H], 1 for the heads that were put back.
    """
    from sparse_compile.kernels.recall_map import reference

    implementation(kernel)
    kept, lifted = reference.keep_weak_heads_whole(
        keep, recall, q_offsets, k_offsets, min_recall, padded_queries_attend
    )
    keep.copy_(kept)
    return lifted


def _keep_weak_heads_whole_fake(recall: Tensor, *_: object) -> Tensor:
    return recall.new_empty(recall.shape)


register(
    "plan_estimated_recall(Tensor q_means, Tensor k_means, Tensor q_offsets, Tensor k_offsets, Tensor ready,"
    " Tensor? asked, float scale, float target, float min_density, float max_density, str rank_by,"
    " bool padded_queries_attend, int seed, str kernel) -> (Tensor keep, Tensor at_bounds)",
    _plan_estimated_recall,
    _plan_estimated_recall_fake,
)
register(
    "plan_measured_recall(Tensor mass, Tensor q_offsets, Tensor q_is_video, Tensor k_offsets, Tensor k_is_video,"
    " Tensor(a!) keep, Tensor(b!) ready, Tensor(c!) at_bounds, float target, float min_density, float max_density,"
    " str rank_by, bool padded_queries_attend, int seed, str kernel) -> Tensor recall",
    _plan_measured_recall,
    _plan_measured_recall_fake,
)
register(
    "calibrate_recall(Tensor measured, Tensor at_bounds, float target, Tensor(a!) asked, str kernel) -> ()",
    _calibrate_recall,
    _calibrate_recall_fake,
)
register(
    "keep_weak_heads_whole(Tensor recall, Tensor q_offsets, Tensor k_offsets, Tensor(a!) keep, float min_recall,"
    " bool padded_queries_attend, str kernel) -> Tensor recall",
    _keep_weak_heads_whole,
    _keep_weak_heads_whole_fake,
)
