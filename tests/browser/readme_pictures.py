"""Takes the README's pictures from the present pages, into the folder VELOXLAB_PICTURES.

``pytest`` runs this file only by its name: `.ci/run` allows no skipped test of the browser.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.browser.shown import Shown, turn

pytestmark = pytest.mark.browser

CELL = """
import veloxlab as vl
lab = vl.Lab(*vl.load("smollm2-135m"), key_bits=3, value_bits=2, window=16, tokens=128)
lab
"""
LAB = ".veloxlab-lab"
WIDTH = 1440  # pixels
PAGES = {  # by the name of a picture: a page, and the button to press there
    "lab": ("Cache", ""),
    "errors": ("Errors", ""),
    "keys": ("Keys and values", ""),
    "compare": ("Compare", "Measure at equal bits"),
    "side_by_side": ("Generation", "Generate"),
    "tuner": ("Budget", "Measure tables"),
    "planner": ("Memory", ""),
}


def test_pictures_are_taken(notebook):
    visit = notebook(CELL, name="pictures.ipynb")
    page, folder = visit.page, Path(os.environ["VELOXLAB_PICTURES"])
    page.set_default_timeout(900_000)  # milliseconds: for a machine without saved results
    page.evaluate("() => window.jupyterapp.shell.collapseLeft()")
    lab = Shown(page, LAB)
    lab.drawn(3)
    for name, (title, words) in PAGES.items():
        page.get_by_role("tab", name=title, exact=True).click()
        lab.idle()
        button = page.locator(LAB).get_by_role("button", name=words or "none").locator("visible=true")
        if words and button.count():
            button.click()
            lab.busy()
            lab.idle()
        for suffix, theme in {"": "Light", "_dark": "Dark"}.items():
            turn(page, theme)
            for height in (900, "document.querySelector('.veloxlab-lab').getBoundingClientRect().height + 300"):
                tall = page.evaluate(f"() => Math.ceil({height})")
                page.set_viewport_size({"width": WIDTH, "height": tall})
            page.wait_for_timeout(1000)  # until charts have the width of their columns
            page.locator(LAB).screenshot(path=folder / f"{name}{suffix}.png")
    assert visit.errors == []
