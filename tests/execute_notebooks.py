"""Runs notebooks and saves them as the repository keeps them: ``uv run python -m tests.execute_notebooks [names]``.

A saved notebook shows every chart without a kernel, and has nothing that differs between runs.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests import environment  # noqa: F401 - first

# isort: split
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
CELL_SECONDS = 180
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def main(names: Sequence[str]) -> int:
    """Run the named notebooks, or all; return 1 if one failed, and leave that file unchanged."""
    paths = [NOTEBOOKS / f"{Path(name).stem}.ipynb" for name in names] or sorted(NOTEBOOKS.glob("*.ipynb"))
    failed = 0
    for path in paths:
        try:
            save(path, cleaned(execute(path)))
        except (CellExecutionError, CellTimeoutError, FileNotFoundError) as error:
            print(f"{path.name}: {error}", file=sys.stderr)
            failed = 1
        else:
            print(f"{path.name}: executed")
    return failed


def execute(path: Path) -> NotebookNode:
    """Run every cell of a notebook in a new kernel, in the notebook's folder."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        store_widget_state=False,  # megabytes, and random names
    )
    return client.execute()


def cleaned(notebook: NotebookNode) -> NotebookNode:
    """Remove what a reader without a kernel cannot use, and what differs between runs of the same code.

    A widget needs its state, which is not saved: JupyterLab would show an error instead of the
    image or text beside it.
    """
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if len(output.get("data", {})) > 1:
                output.data.pop(WIDGET_VIEW, None)
    return notebook


def save(path: Path, notebook: NotebookNode) -> None:
    """Write a notebook in one step, so that no reader sees half of it."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".execute_") as folder:
        whole = Path(folder) / path.name
        nbformat.write(notebook, whole)
        whole.replace(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
