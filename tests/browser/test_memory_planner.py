"""The memory planner in a real JupyterLab with no network: its knobs move its chart, in either theme."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser

CELL = """
import veloxlab as vl
vl.MemoryPlanner(context=131_072, memory_gb=8.0)
"""
PLANNER = ".veloxlab-planner"
CHART = f"{PLANNER} svg.marks"
CHANGED = f"(before) => document.querySelector('{CHART}').textContent !== before"


def press(page, key: str) -> None:
    before = page.locator(CHART).text_content()
    page.keyboard.press(key)
    page.wait_for_function(CHANGED, arg=before)


def test_the_knobs_of_the_planner_move_its_chart(notebook):
    visit = notebook(CELL, name="planner.ipynb")
    page = visit.page
    page.locator(CHART, has_text="131,072 tokens as turboquant K4 V4: 4.44 GB of 8 GB").wait_for()

    # twice: only the first message of a comm is handled on the main thread
    for name, keys in (
        ("K bits", "Left Left"),
        ("V bits", "Right Right"),
        ("context", "Left Left"),
        ("window", "End Home"),
    ):
        page.locator(f"{PLANNER} .widget-slider", has_text=name).locator(".noUi-handle").focus()
        for key in keys.split():
            press(page, f"Arrow{key}" if key in ("Left", "Right") else key)
    boxes = page.locator(f"{PLANNER} input[type=number]")
    for place, value in ((0, "4"), (1, "24"), (2, "16")):  # sequences, memory, layers
        before = page.locator(CHART).text_content()
        boxes.nth(place).fill(value)
        boxes.nth(place).press("Enter")
        page.wait_for_function(CHANGED, arg=before)
    page.locator(f"{PLANNER} select").select_option("rabitq")
    page.locator(CHART, has_text="4 sequences of 92,682 tokens as rabitq K2 V6: ").wait_for()
    page.locator(CHART, has_text="of 24 GB").wait_for()

    pictures = os.environ.get("VELOXLAB_PICTURES")
    if pictures:
        page.locator(PLANNER).screenshot(path=Path(pictures) / "planner.png")
    page.evaluate("() => window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    page.wait_for_function(
        f"() => document.querySelector('{CHART} .role-axis-label text').getAttribute('fill') === '#a3abb5'"
    )
    page.locator("#jupyterlab-splash").wait_for(state="detached")
    if pictures:
        page.locator(PLANNER).screenshot(path=Path(pictures) / "planner_dark.png")
    assert visit.errors == []
    assert visit.outside == []
