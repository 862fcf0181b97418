"""Every figure of the README and the notebooks has a source, and one command measures all of them again."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from veloxlab.cli import main, results
from veloxlab.cli.results import Index, figures, problems

README = """
# A title with 1.5 in it
Ours takes 0.25 times as long, and `code of 7.5` says 3.75 nothing. It has 12 tokens; see arXiv 2504.19874.

| cache | KL |
|---|---|
| ours | 0.125 |
| other | 0.5 |

    a command of 9.5
"""
INDEX = """
[[result]]
files = ["times.json"]
command = "python -m measure times"
[[result]]
files = ["table.md"]
command = "veloxlab compare"
[[result]]
files = ["guesses.json"]
by_hand = "before the runs"
[[figure]]
document = "README.md"
says = "takes {:.2f} times as long"
result = "times.json"
part = "decode"
row = { cache = "ours" }
columns = ["ratio"]
[[known]]
document = "README.md"
says = ["with 1.5 in it"]
why = "a title"
"""
ROWS = {"decode": {"rows": [{"cache": "ours", "ratio": 0.2501}, {"cache": "other", "ratio": 2}]}}


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "data" / "results"
    folder.mkdir(parents=True)
    (tmp_path / "README.md").write_text(README)
    (folder / "index.toml").write_text(INDEX)
    (folder / "times.json").write_text(json.dumps(ROWS))
    (folder / "guesses.json").write_text("{}")
    (folder / "table.md").write_text("| cache | KL |\n|---|---|\n| ours | 0.125 |\n")
    return tmp_path


def sources(root):
    return {f.number: f.source for f in figures(Index.read(root), root / "README.md")}


def test_every_figure_of_the_repository_has_a_source(capsys):
    assert main(["results", "--check"]) == 0, capsys.readouterr().err
    lines = capsys.readouterr().out.splitlines()
    said = (
        "README.md: 0.061 <- compare_smollm2-135m_4_sinks.parquet <- "
        "veloxlab compare --sinks 4 --methods turboquant fisherquant --out data/results"
    )
    assert said in lines
    assert len(lines) > 100


def test_a_figure_has_a_row_a_table_or_a_reason_as_source_or_none(root):
    found = sources(root)
    assert found == {"0.125": "table.md", "1.5": "a title", "0.25": "times.json", "3.75": "", "0.5": ""}
    assert list(problems(Index.read(root))) == []


def test_a_figure_without_a_source_is_reported_and_fails(root, monkeypatch, capsys):
    monkeypatch.setattr(results, "shipped_folder", lambda name: root / name)
    assert main(["results", "--check"]) == 1
    told = capsys.readouterr().err
    assert "README.md: 3.75 has no source (…" in told
    assert told.endswith("5 figures, 2 problems\n")


def test_a_changed_result_is_detected(root):
    path = root / "data" / "results" / "times.json"
    path.write_text(path.read_text().replace("0.2501", "0.31"))
    assert list(problems(Index.read(root))) == [
        "README.md: it does not have the words 'takes 0.31 times as long' of index.toml"
    ]
    assert sources(root)["0.25"] == ""


def test_files_and_the_index_name_each_other(root):
    folder = root / "data" / "results"
    (folder / "table.md").rename(folder / "other.md")
    assert list(problems(Index.read(root))) == [
        "other.md: no command in index.toml writes it",
        "table.md: index.toml names it, but it is missing",
    ]


def test_a_notebook_s_figures_can_come_from_its_outputs(root):
    cells = [
        {"cell_type": "markdown", "source": ["It takes 1.32 ms, or 45 % of it, or 9.99."]},
        {"cell_type": "code", "source": ["show()"], "outputs": [{"text": ["1.3204"]}, {"data": {"text/plain": "45"}}]},
    ]
    (root / "notebooks").mkdir()
    path = root / "notebooks" / "01_some.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    found = {f.number: f.command for f in figures(Index.read(root), path)}
    execute = "python -m tests.execute_notebooks notebooks/01_some.ipynb"
    assert found == {"1.32": execute, "45": execute, "9.99": ""}


def test_all_commands_are_run_and_a_stopped_run_continues(root, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(results, "shipped_folder", lambda name: root / name)
    ran, status = [], {"compare": 1}
    monkeypatch.setattr(
        subprocess, "run", lambda words, **_: ran.append(words) or SimpleNamespace(returncode=status.get(words[-1], 0))
    )
    assert main(["results", "--all"]) == 1
    assert ran == [[sys.executable, "-m", "measure", "times"], [sys.executable, "-m", "veloxlab.cli", "compare"]]
    status.clear()
    assert main(["results", "--all"]) == 0
    assert ran[2:] == [[sys.executable, "-m", "veloxlab.cli", "compare"]]
    assert "already done: python -m measure times" in capsys.readouterr().out


def test_commands_of_some_files_are_run_alone(root, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(results, "shipped_folder", lambda name: root / name)
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda words, **_: ran.append(words) or SimpleNamespace(returncode=0))
    assert main(["results", "--all", "table.md"]) == 0
    assert ran == [[sys.executable, "-m", "veloxlab.cli", "compare"]]
    assert main(["results", "--all", "tables.md"]) == 2
    assert "There is no result 'tables.md'" in capsys.readouterr().err


def test_costs_are_reported(root, monkeypatch, capsys):
    path = root / "data" / "results" / "index.toml"
    path.write_text(path.read_text().replace('command = "veloxlab', 'cpu_minutes = 12.5\ncommand = "veloxlab'))
    monkeypatch.setattr(results, "shipped_folder", lambda name: root / name)
    assert main(["results", "--costs"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ["    ?  python -m measure times", " 12.5  veloxlab compare"]
    assert err.startswith(" 12.5  CPU minutes in all")


def test_without_an_action_it_is_refused(capsys):
    assert main(["results"]) == 2
    assert "give one of --check, --costs and --all" in capsys.readouterr().err
