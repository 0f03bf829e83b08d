"""The command line: arguments, errors, and a missing extra."""

import importlib
import importlib.util
import subprocess
import sys

import pytest

from sparse_compile.cli.main import build_parser, main
from sparse_compile.evaluation.demo_model import TRAINED_SIZES


def test_the_sizes_on_offer_are_those_the_model_was_trained_at():
    for size in TRAINED_SIZES:
        assert build_parser().parse_args(["demo", "--size", str(size)]).size == str(size)


def test_options_are_pairs_of_key_and_value():
    parsed = build_parser().parse_args(["demo", "--options", "density=0.5", "rank_by=random"])
    assert dict(parsed.options) == {"density": "0.5", "rank_by": "random"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: command"),
        (["demo", "--options", "density"], "must look like density=0.5"),
        (["demo", "--steps", "0"], "must be at least 1"),
        (["demo", "--size", "9x9x9"], "invalid choice"),
    ],
    ids=["no command", "no equals sign", "no steps", "untrained size"],
)
def test_wrong_arguments_end_with_two_and_say_why(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "explain"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["topp=0.5"], "got 'topp'. Did you mean 'top_p'?"),
        (["method=adaspa", "density=0.5"], "option 'density' belongs to method 'svg2', and method is 'adaspa'"),
    ],
    ids=["unknown", "of the other method"],
)
def test_a_wrong_option_is_named_before_anything_runs(command, options, message, monkeypatch, capsys):
    module = importlib.import_module("sparse_compile.cli." + {"explain": "explain_demo"}.get(command, command))
    monkeypatch.setattr(module, "load_pipeline", lambda: pytest.fail("something runs"))
    assert main([command, "--options", *options]) == 2
    assert message in capsys.readouterr().err


def test_explain_is_of_one_method_and_says_how_to_choose_another(capsys):
    assert main(["explain", "--options", "sparsity=0.5"]) == 2
    assert "choose method='adaspa'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "explain"])
def test_a_missing_extra_says_what_to_install(command, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else found(name))
    assert main([command]) == 2
    error = capsys.readouterr().err
    assert "missing: rich" in error
    assert "pip install 'sparse_compile[demo]'" in error


def test_help_and_doctor_need_no_extra():
    code = (
        "import sys\n"
        "for name in ('diffusers', 'rich', 'PIL'): sys.modules[name] = None\n"
        "from sparse_compile.cli.main import main\n"
        "main(['doctor'])\n"
        "main(['--help'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "demo" in done.stdout
