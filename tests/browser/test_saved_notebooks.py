"""Every saved notebook in a real JupyterLab with no kernel and no network: it shows its pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook, new_output
from playwright.sync_api import BrowserContext, Error

from tests.browser.conftest import Visit, opened
from tests.execute_notebooks import NOTEBOOKS, WIDGET_VIEW, cleaned

pytestmark = pytest.mark.browser

PATHS = [path for path in sorted(NOTEBOOKS.glob("*.ipynb")) if path.stem != "18_reference"]  # it has only text
PICTURE = "image/png"
PATIENCE = 20_000  # milliseconds
DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="

OPEN = """async (name) => {
  await window.jupyterapp.restored;
  window.panel = await window.jupyterapp.commands.execute("docmanager:open", {
    path: name, factory: "Notebook", kernelPreference: { shouldStart: false },
  });
  await window.panel.revealed;
}"""
TRUST = "(trusted) => { for (const cell of window.panel.model.cells) cell.trusted = trusted; }"
SCROLL = "(place) => window.panel.content.scrollToItem(place, 'start')"  # distant cells are not drawn
# the number of outputs of a cell that show a picture of some size, or a chart with marks
PICTURED = """(place) => (window.panel.content.widgets[place].outputArea?.widgets ?? []).filter(({ node }) =>
  node.querySelector("img")?.naturalWidth > 0 || node.querySelector("svg.marks .role-mark > *") !== null).length"""
DEAD = """() => window.panel.content.widgets.some((cell) =>
  /Error displaying widget|Loading widget/.test(cell.outputArea?.node.textContent))"""
CLOSE = """() => {
  const hadKernel = window.panel.sessionContext.session !== null;
  window.panel.dispose();
  return hadKernel;
}"""


class Reader:
    """A user who opens notebooks in one JupyterLab, without a kernel."""

    def __init__(self, visit: Visit, folder: Path) -> None:
        self.visit, self.page, self._folder = visit, visit.page, folder
        self.dead = False  # whether the last notebook showed a widget without its model

    def reads(self, notebook: NotebookNode, name: str, *trusted: bool) -> list[list[int]]:
        """Open a notebook and scroll through it; return for each cell how many of its outputs show a picture.

        It is read once for each of ``trusted``. A notebook is trusted where it was run; JupyterLab then prefers other
        MIME types.
        """
        nbformat.write(notebook, self._folder / name)
        self.page.evaluate(OPEN, name)
        seen = []
        for each in trusted:
            self.page.evaluate(TRUST, each)
            seen.append([self._pictured(place, count) for place, count in pictures(notebook).items()])
            self.dead = self.page.evaluate(DEAD)
            if self.dead:
                break
        assert not self.page.evaluate(CLOSE)
        return seen

    def _pictured(self, place: int, expected: int) -> int:
        self.page.evaluate(SCROLL, place)
        with contextlib.suppress(Error):  # at a timeout, the caller's comparison has the better message
            self.page.wait_for_function(f"([place, count]) => ({PICTURED})(place) === count", arg=[place, expected])
        return int(self.page.evaluate(PICTURED, place))

    def errors(self) -> list[str]:
        """Errors in the page, without the one that JupyterLab has for each notebook without a kernel."""
        # https://github.com/jupyter-widgets/ipywidgets/issues/3970
        known = "(reading 'kernel')", "@jupyter-widgets/jupyterlab-manager"
        stacks = [str(error.stack) for error in self.visit.errors]
        return [stack for stack in stacks if not all(part in stack for part in known)]


def pictures(notebook: NotebookNode) -> dict[int, int]:
    """By index of each cell with outputs: how many of these outputs have a saved picture."""
    return {
        place: sum(PICTURE in output.get("data", {}) for output in cell.outputs)
        for place, cell in enumerate(notebook.cells)
        if cell.get("outputs")
    }


@pytest.fixture(scope="module")
def jupyterlab(lab: tuple[str, Path], browser: BrowserContext) -> Iterator[Reader]:
    address, folder = lab
    page = opened(browser, 1180, 1500)
    page.set_default_timeout(PATIENCE)
    visit = Visit(page)
    page.goto(f"{address}/lab?reset")
    page.wait_for_function("window.jupyterapp !== undefined")
    yield Reader(visit, folder)
    page.close()


@pytest.fixture
def reader(jupyterlab: Reader) -> Reader:
    jupyterlab.visit.errors.clear()  # of the previous notebook
    jupyterlab.visit.outside.clear()
    return jupyterlab


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_saved_pictures_show_where_no_kernel_runs(reader, path):
    notebook = nbformat.read(path, as_version=4)
    saved = list(pictures(notebook).values())
    assert sum(saved) > 0
    assert reader.reads(notebook, path.name, False, True) == [saved, saved]
    assert not reader.dead
    assert reader.errors() == []
    assert reader.visit.outside == []


def test_a_saved_widget_view_would_hide_its_picture(reader):
    view = {"model_id": "1", "version_major": 2, "version_minor": 0}
    output = new_output("display_data", {WIDGET_VIEW: view, PICTURE: DOT, "text/plain": "a widget"})
    notebook = new_notebook(cells=[new_code_cell("widget", outputs=[output])])
    reader.page.set_default_timeout(4000)
    assert reader.reads(notebook, "view.ipynb", False, True) == [[1], [0]]
    assert reader.dead
    reader.page.set_default_timeout(PATIENCE)
    assert reader.reads(cleaned(notebook), "picture.ipynb", True) == [[1]]
