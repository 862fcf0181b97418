"""The command line: output, started programs, and exit status."""

from __future__ import annotations

import json
import os
import sys

import pytest

from veloxlab import checkup, cli, texts
from veloxlab.checkup import Check
from veloxlab.cli import main
from veloxlab.cli.measurements import results_name


class Started(Exception):  # noqa: N818 - it is no error: it ends the process, as execv does
    """Carries the arguments of the program that would have replaced this process."""


@pytest.fixture
def started(monkeypatch):
    """Run ``main``; return the folder that it opens in JupyterLab, and the arguments after it."""

    def execv(path, arguments):
        raise Started(path, arguments)

    def run(*argv):
        with pytest.raises(Started) as start:
            main(argv)
        path, arguments = start.value.args
        assert path == arguments[0] == sys.executable
        assert arguments[1:3] == ["-m", "jupyterlab"]
        assert arguments[4] == "--LabApp.default_url=/lab/tree/00_tour.ipynb"
        return [arguments[3], *arguments[5:]]

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    return run


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Imitate an installation from a wheel, with a user in an empty folder; return that folder."""
    notebooks = tmp_path / "site-packages" / "veloxlab" / "notebooks"
    notebooks.mkdir(parents=True)
    for name in ("00_tour.ipynb", "01_turboquant.ipynb"):
        (notebooks / name).write_text(f"shipped {name}")
    monkeypatch.setattr(texts, "PACKAGE", notebooks.parent)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


# JupyterLab


def test_tour_of_a_clone_opens_in_a_copy_too(started, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert started() == [str(tmp_path / "veloxlab-notebooks")]
    own = texts.PACKAGE.parent / "notebooks" / "00_tour.ipynb"
    assert (tmp_path / "veloxlab-notebooks" / "00_tour.ipynb").read_bytes() == own.read_bytes()


def test_tour_of_an_installed_package_opens_in_a_copy(started, installed, capsys):
    copies = installed / "veloxlab-notebooks"
    assert started() == [str(copies)]
    for name in ("00_tour.ipynb", "01_turboquant.ipynb"):
        assert (copies / name).read_text() == f"shipped {name}"
    assert capsys.readouterr().err == f"The notebooks are in {copies}.\n"


def test_copies_are_never_overwritten(started, installed):
    copies = installed / "veloxlab-notebooks"
    copies.mkdir()
    (copies / "00_tour.ipynb").write_text("changed by a user")
    started()
    assert (copies / "00_tour.ipynb").read_text() == "changed by a user"
    assert (copies / "01_turboquant.ipynb").exists()


def test_words_after_two_dashes_go_to_jupyterlab(started, installed):
    assert started("--", "--no-browser", "--port=9999")[1:] == ["--no-browser", "--port=9999"]


def test_root_is_allowed_with_a_note(started, installed, monkeypatch, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert started()[1:] == ["--allow-root"]
    assert "This process runs as root, so JupyterLab starts with --allow-root.\n" in capsys.readouterr().err
    assert started("--", "--allow-root")[1:] == ["--allow-root"]


def test_missing_jupyterlab_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert main([]) == 2
    assert capsys.readouterr().err == "JupyterLab is not installed; run `uv pip install jupyterlab`.\n"


def test_bad_input_is_a_sentence_and_status_2(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(texts, "PACKAGE", tmp_path / "veloxlab")
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("The folder notebooks of veloxlab is missing; ")


# the doctor


@pytest.fixture
def checks(monkeypatch):
    """Let the doctor find the checks of a test."""
    return lambda *found: monkeypatch.setattr(checkup, "doctor", lambda: list(found))


def test_checks_are_printed_as_an_aligned_table(checks, capsys):
    checks(Check("mlx", "ok", "0.32.4"), Check("back end", "warn", "cpu", "add a GPU"))
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == (
        "ok    mlx       0.32.4\n"
        "WARN  back end  cpu\n"
        "                -> add a GPU\n"
    )  # fmt: skip


def test_failed_check_is_status_1(checks, capsys):
    checks(Check("mlx", "fail", "not installed", "install it"))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.startswith("FAIL  mlx  not installed\n")


def test_checks_are_printed_as_json(capsys):
    assert main(["doctor", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {"name": "python", "status": "ok", "detail": sys.version.split()[0], "hint": ""} in printed


def test_doctor_passes_no_arguments_on(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", "--", "--port=9999"])
    assert "doctor accepts no arguments after --: leave out -- --port=9999" in capsys.readouterr().err


def test_unknown_command_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["docter"])
    assert "doctor" in capsys.readouterr().err.split("invalid choice")[1]


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("veloxlab ")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("smollm2-135m", "smollm2-135m"),
        ("meta-llama/Llama-3.2-1B", "Llama-3.2-1B"),
        ("models/Llama-3.2-1B.Q4_K_M.gguf", "Llama-3.2-1B.Q4_K_M"),
        ("models/tiny.GGUF", "tiny"),
        ("models/Qwen2.5-0.5B/", "Qwen2.5-0.5B"),
    ],
)
def test_results_have_the_models_whole_name(model, name):
    assert results_name(model) == name
