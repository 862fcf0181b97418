"""The memory planner in a real JupyterLab with no network: its knobs move its chart, in either theme."""

from __future__ import annotations

import pytest

from tests.browser.shown import Shown

pytestmark = pytest.mark.browser

CELL = """
import veloxlab as vl
vl.MemoryPlanner(context=131_072, memory_gb=8.0)
"""
PLANNER = ".veloxlab-planner"


def test_the_knobs_of_the_planner_move_its_chart(notebook):
    visit = notebook(CELL, name="planner.ipynb")
    page = visit.page
    planner = Shown(page, PLANNER)
    planner.drawn(1)
    page.locator(planner.charts, has_text="131,072 tokens as turboquant K4 V4: 4.44 GB of 8 GB").wait_for()

    # twice: only the first message of a comm is handled on the main thread
    for name, keys in (
        ("K bits", "ArrowLeft ArrowLeft"),
        ("V bits", "ArrowRight ArrowRight"),
        ("context", "ArrowLeft ArrowLeft"),
        ("window", "End Home"),
    ):
        planner.pressed(name, keys.split(), [0])
    boxes = page.locator(f"{PLANNER} input[type=number]")
    for place, value in ((0, "4"), (1, "24"), (2, "16")):  # sequences, memory, layers
        boxes.nth(place).fill(value)
        planner.changes(lambda place=place: boxes.nth(place).press("Enter"), [0])
    page.locator(f"{PLANNER} select").select_option("rabitq")
    page.locator(planner.charts, has_text="4 sequences of 92,682 tokens as rabitq K2 V6: ").wait_for()
    page.locator(planner.charts, has_text="of 24 GB").wait_for()

    planner.turns_dark("planner")
    assert visit.errors == []
    assert visit.outside == []
