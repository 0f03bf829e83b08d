"""Metrics against scikit-image, scipy and closed forms."""

import math

import pytest
import torch
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from sparse_compile.errors import SparseAttentionError
from sparse_compile.evaluation.metrics import flicker_gap, psnr, psnr_frame, ssim, to_unit_range


def two_videos(height: int = 32, width: int = 48, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    reference = torch.rand(batch, 3, 4, height, width, generator=generator)
    noise = torch.randn(reference.shape, generator=generator)
    frames = torch.tensor([0.02, 0.05, 0.1, 0.2]).view(1, 1, 4, 1, 1)
    return (reference + frames * noise).clamp(0, 1), reference


def test_pixels_map_to_the_unit_range():
    assert to_unit_range(torch.tensor([-1.0, 0.0, 1.0])).tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("metric", [psnr, psnr_frame], ids=["psnr", "psnr_frame"])
def test_psnr_of_a_constant_error_has_a_closed_form(metric):
    reference = torch.full((2, 3, 4, 8, 8), 0.5)
    video = reference + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1, 1)
    assert metric(video, reference).tolist() == pytest.approx([20.0, 40.0], abs=1e-3)


def test_psnr_agrees_with_scikit_image():
    video, reference = two_videos()
    expected = [
        peak_signal_noise_ratio(b.numpy(), a.numpy(), data_range=1) for a, b in zip(video, reference, strict=True)
    ]
    assert psnr(video, reference).tolist() == pytest.approx(expected, abs=1e-3)


def test_psnr_by_frame_agrees_with_scikit_image():
    video, reference = two_videos(batch=1)
    frames = zip(video[0].unbind(1), reference[0].unbind(1), strict=True)
    each = [peak_signal_noise_ratio(b.numpy(), a.numpy(), data_range=1) for a, b in frames]
    assert psnr_frame(video, reference).item() == pytest.approx(sum(each) / len(each), abs=1e-3)


def test_psnr_by_frame_is_never_below_psnr():
    video, reference = two_videos()
    assert (psnr_frame(video, reference) > psnr(video, reference)).all()


def test_equal_videos_get_the_best_of_every_metric():
    video, _ = two_videos()
    assert psnr(video, video).tolist() == [120.0, 120.0]
    assert psnr_frame(video, video).tolist() == [120.0, 120.0]
    assert ssim(video, video).tolist() == pytest.approx([1.0, 1.0])
    assert flicker_gap(video, video).tolist() == [0.0, 0.0]


def test_values_outside_the_unit_range_are_clamped_first():
    video, reference = two_videos()
    assert psnr(reference + 2, torch.ones_like(reference)).tolist() == [120.0, 120.0]
    assert torch.equal(ssim(video * 2, reference), ssim((video * 2).clamp(0, 1), reference))


def test_ssim_of_large_frames_agrees_with_scikit_image():
    video, reference = two_videos(64, 80)
    for index in range(len(video)):
        frames = zip(video[index].unbind(1), reference[index].unbind(1), strict=True)
        each = [
            structural_similarity(
                b.double().numpy(),
                a.double().numpy(),
                channel_axis=0,
                data_range=1,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
            )
            for a, b in frames
        ]
        assert ssim(video, reference)[index].item() == pytest.approx(sum(each) / len(each), abs=1e-6)


def test_ssim_of_small_frames_uses_a_window_of_seven():
    video, reference = two_videos(32, 48, batch=1)

    def blur(image):
        return ndimage.gaussian_filter(image, 1.5, radius=3)[3:-3, 3:-3]

    values = []
    frames = (every[0].flatten(0, 1).double().numpy() for every in (video, reference))
    for a, b in zip(*frames, strict=True):
        mean_a, mean_b = blur(a), blur(b)
        cov = blur(a * b) - mean_a * mean_b
        spread = blur(a * a) - mean_a**2 + blur(b * b) - mean_b**2
        numerator = (2 * mean_a * mean_b + 1e-4) * (2 * cov + 9e-4)
        values.append((numerator / ((mean_a**2 + mean_b**2 + 1e-4) * (spread + 9e-4))).mean())
    assert ssim(video, reference).item() == pytest.approx(sum(values) / len(values), abs=1e-6)


def test_ssim_refuses_frames_smaller_than_its_window():
    video = torch.rand(1, 3, 2, 6, 32)
    with pytest.raises(SparseAttentionError, match="at least 7 x 7 pixels"):
        ssim(video, video)


def test_flicker_gap_is_the_relative_change_of_the_mean_step():
    steps = torch.tensor([0.0, 0.1, 0.2]).view(1, 1, 3, 1, 1)
    reference = steps.expand(1, 3, 3, 8, 8)
    assert flicker_gap(reference * 1.5, reference).item() == pytest.approx(0.5, abs=1e-5)
    assert flicker_gap(reference * 0, reference).item() == pytest.approx(1.0, abs=1e-5)


def test_flicker_where_the_reference_stands_still_is_infinite():
    moving, _ = two_videos(batch=1)
    assert flicker_gap(moving, torch.zeros_like(moving)).item() == math.inf


def test_flicker_needs_two_frames():
    video = torch.rand(1, 3, 1, 8, 8)
    with pytest.raises(SparseAttentionError, match="at least 2 frames"):
        flicker_gap(video, video)


@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (1, 3, 4, 8, 9)], ids=["four dimensions", "another width"])
def test_videos_of_different_shapes_are_refused(shape):
    with pytest.raises(SparseAttentionError, match="one shape"):
        psnr(torch.rand(shape), torch.rand(1, 3, 4, 8, 8))
