"""How close a sparse video is to the dense video of the same seed.

Both videos are float [B, C, T, H, W] in [0, 1] (`to_unit_range` makes them so) and are clamped first. Every
metric returns float32 [B], one number a video; compare per video, on the same prompts and seeds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_compile.errors import SparseAttentionError

PSNR_CAP = 120.0
"""What equal videos get, in dB."""
SMALL_FRAME = 64
"""Frames with a side below this are compared with the smaller SSIM window."""
SSIM_SIGMA = 1.5
SSIM_C1 = 1e-4
SSIM_C2 = 9e-4


def to_unit_range(video: Tensor) -> Tensor:
    """Map pixels from [-1, 1] to [0, 1]."""
    return (video.float() + 1) / 2


def psnr(video: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each whole video in dB, at most 120.

    -10 log10 of the mean squared difference over channels, frames and pixels. Shapes: [B, C, T, H, W] -> [B].
    """
    video, reference = _checked(video, reference)
    return _decibels((video - reference).square().mean(dim=(1, 2, 3, 4)))


def psnr_frame(video: Tensor, reference: Tensor) -> Tensor:
    """Mean over frames of the PSNR of each frame; never below `psnr`.

    Shapes: [B, C, T, H, W] -> [B].
    """
    video, reference = _checked(video, reference)
    return _decibels((video - reference).square().mean(dim=(1, 3, 4))).mean(dim=1)


def ssim(video: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity, mean over channels, frames and the positions where the window fits.

    Gaussian window of sigma 1.5, 11 wide (7 where a side is below 64 pixels), C1 = 1e-4, C2 = 9e-4.
    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004.
    Shapes: [B, C, T, H, W] -> [B].
    """
    video, reference = _checked(video, reference)
    batch, _, _, height, width = video.shape
    window = gaussian_window(7 if min(height, width) < SMALL_FRAME else 11)
    if min(height, width) < window.numel():
        raise SparseAttentionError(
            f"SSIM needs frames of at least {window.numel()} x {window.numel()} pixels",
            (height, width),
            "Use larger frames.",
        )
    x = video.double().reshape(-1, 1, height, width)
    y = reference.double().reshape(-1, 1, height, width)
    mean_x, mean_y = _blur(x, window), _blur(y, window)
    var_x = _blur(x * x, window) - mean_x.square()
    var_y = _blur(y * y, window) - mean_y.square()
    cov = _blur(x * y, window) - mean_x * mean_y
    similarity = ((2 * mean_x * mean_y + SSIM_C1) * (2 * cov + SSIM_C2)) / (
        (mean_x.square() + mean_y.square() + SSIM_C1) * (var_x + var_y + SSIM_C2)
    )
    return similarity.reshape(batch, -1).mean(dim=1).float()


def flicker_gap(video: Tensor, reference: Tensor) -> Tensor:
    """How far the mean change from frame to frame is from the reference's, relative to it.

    Shows temporal artefacts that PSNR hides. 0 where neither video changes, infinite where only the reference
    stands still. Shapes: [B, C, T, H, W] with T >= 2 -> [B].
    """
    video, reference = _checked(video, reference)
    if video.shape[2] < 2:
        raise SparseAttentionError("flicker needs at least 2 frames", video.shape[2], "Generate a longer video.")
    change = video.diff(dim=2).abs().mean(dim=(1, 2, 3, 4))
    expected = reference.diff(dim=2).abs().mean(dim=(1, 2, 3, 4))
    gap = (change - expected).abs()
    return torch.where(gap == 0, 0.0, gap / expected)


def gaussian_window(size: int, sigma: float = SSIM_SIGMA) -> Tensor:
    """The weights of a Gaussian window of ``size``, float64, with sum 1."""
    offsets = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    weights = torch.exp(-offsets.square() / (2 * sigma**2))
    return weights / weights.sum()


def _checked(video: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    if video.ndim != 5 or video.shape != reference.shape:
        raise SparseAttentionError(
            "two videos of one shape [B, C, T, H, W] are compared",
            (tuple(video.shape), tuple(reference.shape)),
            "Generate both at the same size.",
        )
    return video.float().clamp(0, 1), reference.float().clamp(0, 1)


def _decibels(mean_squared_error: Tensor) -> Tensor:
    return (-10 * torch.log10(mean_squared_error)).clamp(max=PSNR_CAP)


def _blur(images: Tensor, window: Tensor) -> Tensor:
    """Weighted means [N, 1, H, W] -> [N, 1, H - size + 1, W - size + 1]."""
    window = window.to(images.device)
    return F.conv2d(F.conv2d(images, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
