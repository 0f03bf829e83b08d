"""Pictures hold the right pixels at the right size."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from sparse_compile.evaluation.pictures import (
    DIFFERENCE_GAIN,
    Comparison,
    write_contact_sheet,
    write_gif,
    write_side_by_side_gif,
)


@pytest.fixture
def comparison():
    dense = torch.zeros(3, 5, 8, 12)
    dense[0] = torch.linspace(0.2, 1.0, 5).view(5, 1, 1)
    sparse = dense.clone()
    sparse[2, :, :4] = 0.1
    return Comparison("A red field", "PSNR 30 dB", dense, sparse)


def test_a_gif_has_every_frame_enlarged(comparison, tmp_path):
    write_gif(comparison.dense, tmp_path / "video.gif", scale=3)
    with Image.open(tmp_path / "video.gif") as gif:
        assert gif.size == (36, 24)
        reds = [np.asarray(frame.convert("RGB"))[0, 0, 0] for frame in ImageSequence.Iterator(gif)]
    assert reds == pytest.approx([51, 102, 153, 204, 255], abs=2)


def test_the_difference_is_shown_brighter(comparison):
    (_, dense), (_, sparse), (label, difference) = comparison.rows()
    assert torch.equal(dense, comparison.dense)
    assert torch.equal(sparse, comparison.sparse)
    assert str(DIFFERENCE_GAIN) in label
    assert difference[2, 0, 0, 0].item() == pytest.approx(0.1 * DIFFERENCE_GAIN)
    assert difference[2, 0, 7, 0].item() == 0


def test_side_by_side_shows_three_videos(comparison, tmp_path):
    write_side_by_side_gif(comparison, tmp_path / "three.gif", scale=4)
    with Image.open(tmp_path / "three.gif") as gif:
        assert gif.n_frames == 5
        assert gif.size[0] > 3 * 12 * 4


def test_a_sheet_has_rows_for_every_prompt_and_columns_for_the_chosen_frames(comparison, tmp_path):
    for name, comparisons, columns in (("one", 1, 5), ("two", 2, 5), ("few", 1, 2)):
        write_contact_sheet([comparison] * comparisons, tmp_path / f"{name}.png", columns=columns, scale=4)
    sizes = {path.stem: Image.open(path).size for path in tmp_path.glob("*.png")}
    assert sizes["two"][0] == sizes["one"][0]
    assert sizes["two"][1] > 1.8 * (sizes["one"][1] - 40)
    assert sizes["few"][0] < sizes["one"][0]


def test_a_sheet_shows_the_first_and_the_last_frame(comparison, tmp_path):
    write_contact_sheet([comparison], tmp_path / "sheet.png", columns=2, heading="five frames")
    pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).reshape(-1, 3).tolist()
    assert [51, 0, 0] in pixels
    assert [255, 0, 0] in pixels
