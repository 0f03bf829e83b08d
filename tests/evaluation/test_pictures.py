"""Pictures hold the right pixels at the right size."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from sparse_compile.evaluation.pictures import (
    CAPTION_HEIGHT,
    DIFFERENCE_GAIN,
    GAP,
    Comparison,
    Variant,
    write_contact_sheet,
    write_gif,
    write_side_by_side_gif,
)

FRAMES, HEIGHT, WIDTH = 5, 32, 32
BLUE, GREEN = 2, 1
NOTES = ("density 0.25", "PSNR 21.5 dB")


def compared(methods: int, label: str = "svg2") -> Comparison:
    """A field that grows red; the first method adds blue at the left, the second green."""
    dense = torch.zeros(3, FRAMES, HEIGHT, WIDTH)
    dense[0] = torch.linspace(0.2, 1.0, FRAMES).view(FRAMES, 1, 1)
    variants = []
    for channel, name in list(zip((BLUE, GREEN), (label, "adaspa"), strict=True))[:methods]:
        video = dense.clone()
        video[channel, :, :, :4] = 0.2
        variants.append(Variant(name, video, NOTES))
    return Comparison("A red field", dense, tuple(variants))


def size_of(path):
    with Image.open(path) as picture:
        return picture.size


def pixels_of(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_a_gif_has_every_frame_enlarged(tmp_path):
    write_gif(compared(1).dense, tmp_path / "video.gif", scale=3)
    assert size_of(tmp_path / "video.gif") == (3 * WIDTH, 3 * HEIGHT)
    with Image.open(tmp_path / "video.gif") as gif:
        reds = [np.asarray(frame.convert("RGB"))[0, 0, 0] for frame in ImageSequence.Iterator(gif)]
    assert reds == pytest.approx([51, 102, 153, 204, 255], abs=2)


def test_each_method_is_followed_by_its_own_difference_shown_brighter():
    comparison = compared(2)
    rows = list(comparison.rows())
    assert [row.label for row in rows] == ["dense", "svg2", "difference", "adaspa", "difference"]
    assert [row.opens for row in rows] == [False, True, False, True, False]
    assert torch.equal(rows[0].video, comparison.dense)
    for row, difference, channel, variant in zip(
        rows[1::2], rows[2::2], (BLUE, GREEN), comparison.variants, strict=True
    ):
        assert torch.equal(row.video, variant.video)
        assert row.notes == NOTES
        assert difference.video[channel, 0, 0, 0].item() == pytest.approx(0.2 * DIFFERENCE_GAIN)
        assert difference.video[channel, 0, 0, 4:].abs().max() == 0
        assert str(DIFFERENCE_GAIN) in " ".join(difference.notes)


@pytest.mark.parametrize("methods", [1, 2])
def test_side_by_side_shows_dense_and_two_videos_a_method(methods, tmp_path):
    path = tmp_path / "all.gif"
    write_side_by_side_gif(compared(methods), path, scale=4)
    with Image.open(path) as gif:
        assert gif.n_frames == FRAMES
    videos = 1 + 2 * methods
    width, height = size_of(path)
    assert videos * 4 * WIDTH < width < (videos + 0.5) * 4 * WIDTH
    assert 4 * HEIGHT < height < 5 * 4 * HEIGHT
    line = pixels_of(path)[height // 2]
    blue, green = ((line[:, channel] > 150) & (line[:, 0] < 50) for channel in (BLUE, GREEN))
    assert (blue.sum(), green.sum()) == (4 * 4, 4 * 4 if methods == 2 else 0)


def test_a_long_label_does_not_run_into_the_next_video(tmp_path):
    for label in ("i", "M" * 40):
        write_side_by_side_gif(compared(1, label), tmp_path / f"{label}.gif", scale=4)
    short, long = (pixels_of(tmp_path / f"{label}.gif") for label in ("i", "M" * 40))
    difference = short.shape[1] - GAP - 4 * WIDTH
    assert (long[:CAPTION_HEIGHT, difference - GAP :] == short[:CAPTION_HEIGHT, difference - GAP :]).all()
    assert (long[:CAPTION_HEIGHT, :difference] != short[:CAPTION_HEIGHT, :difference]).any()


def test_a_sheet_has_rows_for_every_method_and_prompt_and_columns_for_the_chosen_frames(tmp_path):
    def size(methods, prompts, columns):
        write_contact_sheet([compared(methods)] * prompts, tmp_path / "sheet.png", columns=columns, scale=4)
        return size_of(tmp_path / "sheet.png")

    one, two = size(1, 1, 5), size(2, 1, 5)
    assert two[0] == one[0] > 5 * 4 * WIDTH
    assert 3 * 4 * HEIGHT < one[1] < 4 * 4 * HEIGHT
    assert 2 * 4 * HEIGHT < two[1] - one[1] < 2.5 * 4 * HEIGHT
    prompts = size(1, 2, 5)
    assert prompts[0] == one[0]
    assert 3 * 4 * HEIGHT < prompts[1] - one[1] < 4 * 4 * HEIGHT
    few = size(1, 1, 2)
    assert few[1] == one[1]
    assert one[0] - few[0] == 3 * (4 * WIDTH + GAP)


def test_a_sheet_shows_the_first_and_the_last_frame(tmp_path):
    write_contact_sheet([compared(1)], tmp_path / "sheet.png", columns=2, heading="five frames")
    colours = {tuple(colour) for colour in pixels_of(tmp_path / "sheet.png").reshape(-1, 3)}
    assert {(51, 0, 0), (255, 0, 0)} <= colours
    assert (153, 0, 0) not in colours


@pytest.mark.parametrize("scale", [1, 4], ids=["labels higher than frames", "frames higher than labels"])
@pytest.mark.parametrize("label", ["svg2", "NeighbourhoodAttention"])
def test_labels_do_not_touch_frames_or_each_other(label, scale, tmp_path):
    write_contact_sheet([compared(1, label)], tmp_path / "sheet.png", scale=scale)
    pixels = pixels_of(tmp_path / "sheet.png")
    red = (pixels[..., 0] >= 51) & (pixels[..., 1:] == 0).all(axis=2)
    first = np.argwhere(red)[:, 1].min()
    strip = pixels[:, first - 8 : first]
    title = 46
    assert (strip[title:] == strip[0, 0]).all()
    labels = (pixels[title:, : first - 8].sum(axis=2) < 600).any(axis=1)
    lines = np.count_nonzero(np.diff(labels.astype(int)) == 1)
    assert lines == 1 + (1 + len(NOTES)) + 3
