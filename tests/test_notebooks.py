"""The shipped notebooks are saved executed, complete and small, and so are those that the tool saves."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tests import execute_notebooks
from tests.execute_notebooks import NOTEBOOKS, WIDGET_VIEW, cleaned, main

PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
LARGEST_BYTES = 2**20


def faults(notebook: nbformat.NotebookNode) -> list[str]:
    """Return the faults of a saved notebook; nbval accepts any output of a cell without a saved output."""
    found = ["it stores widget state"] if "widgets" in notebook.metadata else []
    for number, cell in enumerate(cell for cell in notebook.cells if cell.cell_type == "code"):
        if cell.execution_count is None:
            found.append(f"code cell {number} was not run")
        if any(output.output_type == "error" for output in cell.outputs):
            found.append(f"code cell {number} ends in an error")
        if any(WIDGET_VIEW in output.get("data", {}) and len(output.data) > 1 for output in cell.outputs):
            found.append(f"code cell {number} shows a dead widget before its picture")
    return found


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Return a folder of notebooks for the tool."""
    monkeypatch.setattr(execute_notebooks, "NOTEBOOKS", tmp_path)
    return tmp_path


def write(path: Path, *sources: str) -> None:
    nbformat.write(new_notebook(cells=[new_code_cell(source) for source in sources]), path)


def widget_output(*others: str) -> nbformat.NotebookNode:
    data = dict.fromkeys(others, "shown") | {WIDGET_VIEW: {"model_id": "1", "version_major": 2, "version_minor": 0}}
    return new_output("display_data", data)


# the shipped notebooks


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook_is_saved_executed(path):
    assert faults(nbformat.read(path, as_version=4)) == []


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook_is_valid_and_small(path):
    nbformat.validate(nbformat.read(path, as_version=4))
    assert path.stat().st_size <= LARGEST_BYTES


# the check itself


def test_every_fault_is_found():
    error = new_output("error", ename="ValueError", evalue="", traceback=[])
    cells = [
        new_markdown_cell("text"),
        new_code_cell("1", execution_count=1),
        new_code_cell("2"),
        new_code_cell("3", execution_count=3, outputs=[error]),
        new_code_cell("4", execution_count=4, outputs=[widget_output("image/svg+xml")]),
    ]
    assert faults(new_notebook(cells=cells, metadata={"widgets": {}})) == [
        "it stores widget state",
        "code cell 1 was not run",
        "code cell 2 ends in an error",
        "code cell 3 shows a dead widget before its picture",
    ]


# the tool


def test_tool_saves_an_executed_notebook(folder, capsys):
    path = folder / "sums.ipynb"
    write(path, "a = 1", "a + 1")
    assert main(["notebooks/sums.ipynb"]) == 0
    notebook = nbformat.read(path, as_version=4)
    assert faults(notebook) == []
    assert notebook.cells[1].outputs[0].data["text/plain"] == "2"
    assert [cell.metadata for cell in notebook.cells] == [{}, {}]
    assert notebook.metadata == execute_notebooks.METADATA
    assert capsys.readouterr().out == "sums.ipynb: executed\n"
    assert [entry.name for entry in folder.iterdir()] == ["sums.ipynb"]


def test_tool_does_not_change_a_failing_notebook(folder, capsys):
    path = folder / "wrong.ipynb"
    write(path, "1 / 0")
    before = path.read_bytes()
    assert main([]) == 1
    assert path.read_bytes() == before
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_tool_names_a_missing_notebook(folder, capsys):
    assert main(["gone.ipynb"]) == 1
    assert "gone.ipynb: " in capsys.readouterr().err


def test_dead_widgets_are_removed_if_there_is_another_output():
    cell = new_code_cell("chart", outputs=[widget_output("text/plain", "image/svg+xml"), widget_output()])
    cell.metadata["execution"] = {"iopub.status.busy": "2025-01-01T00:00:00Z"}
    notebook = cleaned(new_notebook(cells=[cell], metadata={"widgets": {"state": {}}}))
    assert [list(output.data) for output in cell.outputs] == [["text/plain", "image/svg+xml"], [WIDGET_VIEW]]
    assert cell.metadata == {}
    assert "widgets" not in notebook.metadata
