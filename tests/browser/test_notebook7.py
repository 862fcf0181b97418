"""The laboratory in Notebook 7, the other usual front end of Jupyter, with no network."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import BrowserContext

from tests.browser.conftest import Visit, opener, served
from tests.browser.shown import SMALL_MODEL, Shown

pytestmark = pytest.mark.browser

# an error of Notebook 7.6 itself, in its keyboard shortcuts: a notebook without widgets has it too
KNOWN = "(reading 'schema')", "/static/notebook/notebook_core."


@pytest.fixture
def notebook7(tmp_path_factory: pytest.TempPathFactory, browser: BrowserContext) -> Iterator[Callable[..., Visit]]:
    with (
        served("notebook", tmp_path_factory) as (address, folder),
        opener(browser, f"{address}/notebooks", folder) as run,
    ):
        yield run


def test_the_laboratory_moves_its_charts_in_notebook_7(notebook7):
    visit = notebook7(SMALL_MODEL, "vl.Lab(model, tokenizer, tokens=128)", name="lab.ipynb")
    page = visit.page
    page.set_default_timeout(90_000)
    assert page.evaluate("() => window.jupyterapp.name") == "Jupyter Notebook"
    lab = Shown(page, ".veloxlab-lab")
    lab.drawn(3)

    # Notebook keeps arrow keys from sliders, except with an attribute that asks for the keys
    lab.pressed("K bits", ["ArrowLeft", "ArrowLeft"], [0, 1, 2])
    assert [error for error in visit.errors if not all(part in error.stack for part in KNOWN)] == []
    assert visit.outside == []
