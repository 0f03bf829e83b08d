"""The contact sheet of data and samples."""

from PIL import Image

from sparse_compile.evaluation.demo_model import CHECKPOINT
from training.contact_sheet import GAP, TITLE_HEIGHT
from training.sample import main


def test_a_sheet_shows_data_and_samples(tmp_path):
    sheet = tmp_path / "new" / "sheet.png"
    options = ["--size", "2x16x24", "--videos", "2", "--steps", "2"]
    assert main(["--model", str(CHECKPOINT), "--out", str(sheet), *options]) == 0
    with Image.open(sheet) as picture:
        width, height = 2 * (24 * 3 + GAP) + GAP, 2 * 2 * (TITLE_HEIGHT + 16 * 3 + GAP) + GAP
        assert picture.size == (width, height)
        assert picture.getcolors(maxcolors=100) is None  # more than 100


def test_a_missing_checkpoint_is_an_error_of_the_command(tmp_path, capsys):
    assert main(["--model", str(tmp_path), "--out", str(tmp_path / "sheet.png")]) == 2
    assert "training.sample: a checkpoint is a folder" in capsys.readouterr().err
