"""Rows on disk, and what a row's key depends on."""

import json

import pytest

from sparse_compile.config import Config
from sparse_compile.errors import SparseAttentionError
from sparse_compile.evaluation import results
from sparse_compile.evaluation.protocol import Protocol
from sparse_compile.evaluation.results import ResultsFile, key_of, options_at_work


def key(protocol=None, **options):
    return key_of(protocol or Protocol(), options_at_work(Config.from_options(options)))


@pytest.fixture
def file(tmp_path):
    return ResultsFile(tmp_path / "folder" / "results.jsonl")


def test_no_file_has_no_rows_and_is_made_with_the_first(file):
    assert file.rows() == []
    file.append({"key": "a", "psnr": 1.5})
    file.append({"key": "b", "psnr": None})
    assert file.rows() == [{"key": "a", "psnr": 1.5}, {"key": "b", "psnr": None}]


@pytest.mark.parametrize(
    ("tail", "kept"),
    [('{"key": "b", "ps', ["a", "c"]), ('{"key": "b"}', ["a", "b", "c"]), ("", ["a", "c"])],
    ids=["half a line", "a line without its end", "nothing"],
)
def test_a_half_written_last_line_does_not_count_and_is_replaced(file, tail, kept):
    file.append({"key": "a"})
    file.path.write_text(file.path.read_text() + tail)
    assert [row["key"] for row in file.rows()] == kept[:-1]
    file.append({"key": "c"})
    assert [json.loads(line)["key"] for line in file.path.read_text().splitlines()] == kept


def test_a_file_that_begins_with_half_a_line_is_begun_again(file):
    file.path.parent.mkdir()
    file.path.write_text('{"ke')
    file.append({"key": "a"})
    assert file.path.read_text() == '{"key": "a"}\n'


def test_a_broken_line_before_the_last_is_named(file):
    file.path.parent.mkdir()
    file.path.write_text('{"key": "a"}\nnot JSON\n{"key": "b"}\n')
    with pytest.raises(SparseAttentionError, match=r"results are lines of JSON; got 'line 2 of .*Delete the line"):
        file.rows()


def test_rows_are_found_by_key_and_the_newest_counts(file):
    for row in ({"key": "a", "psnr": 1}, {"psnr": 2}, {"key": "a", "psnr": 3}):
        file.append(row)
    assert file.by_key() == {"a": {"key": "a", "psnr": 3}}


def test_equal_settings_have_equal_keys_however_they_are_written():
    assert key(method="svg2", density="0.25") == key(density=0.25, correction="coupled", dense_steps=0.2)
    assert key(verbose=True, strict=True) == key()


@pytest.mark.parametrize(
    "options",
    [{"density": 0.5}, {"correction": "none"}, {"dense_steps": 0.1}, {"seed": 1}, {"method": "adaspa"}],
    ids=lambda options: next(iter(options)),
)
def test_each_setting_changes_the_key(options):
    assert key(**options) != key()


@pytest.mark.parametrize(
    "fields", [{"videos": 3}, {"seeds": (0,)}, {"steps": 30}, {"guidance": 3.0}], ids=lambda fields: next(iter(fields))
)
def test_each_part_of_the_protocol_changes_the_key(fields):
    assert key(Protocol(**fields)) != key()


def test_another_checkpoint_has_other_keys(tmp_path, monkeypatch):
    before = key()
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (tmp_path / name).write_text("other")
    monkeypatch.setattr(results, "CHECKPOINT", tmp_path)
    results.checkpoint_digest.cache_clear()
    try:
        assert key() != before
    finally:
        results.checkpoint_digest.cache_clear()


def test_the_options_at_work_are_those_of_the_method():
    options = options_at_work(Config(density=0.25))
    assert options["density"] == 0.25 and options["correction"] == "coupled" and options["kmeans_iters"] == 2
    assert not {"block_size", "top_p", "strict"} & options.keys()
