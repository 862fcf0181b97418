"""The memory planner, and a slider over measured frames, in a real JupyterLab with no network, in either theme."""

from __future__ import annotations

import pytest

from tests.browser.shown import Shown

pytestmark = pytest.mark.browser

CELL = """
import veloxlab as vl
vl.widgets.MemoryPlanner(context=131_072, memory_gb=8.0)
"""
EXPLORE = """
import altair as alt
import polars as pl
from veloxlab.widgets.explore import Explore

frames = {bits: pl.DataFrame({"x": [0, 1], "error": [4.0**-bits, 1.0]}) for bits in (1, 2, 3)}
explore = Explore(frames, lambda frame: alt.Chart(frame).mark_bar().encode(x="x:O", y="error:Q"), description="bits")
explore.add_class("explore")
explore
"""
PLANNER = ".veloxlab-planner"


def test_the_knobs_of_the_planner_and_a_slider_over_frames_move_their_charts(notebook):
    visit = notebook(EXPLORE, CELL, name="planner.ipynb")
    page = visit.page
    explore = Shown(page, ".explore")
    explore.drawn(1)
    explore.pressed("bits", ["ArrowRight", "ArrowRight", "ArrowLeft"], [0])
    page.locator(".explore .widget-readout", has_text="2").wait_for()

    planner = Shown(page, PLANNER)
    planner.drawn(1)
    page.locator(planner.charts, has_text="131,072 tokens as turboquant K4 V4: 4.44 GB of 8 GB").wait_for()

    # twice: the kernel handles only the first message of a comm on the main thread
    for name, keys in (
        ("K bits", "ArrowLeft ArrowLeft"),
        ("V bits", "ArrowRight ArrowRight"),
        ("context", "ArrowLeft ArrowLeft"),
        ("sinks", "End Home"),
        ("window", "End Home"),
    ):
        planner.pressed(name, keys.split(), [0])
    boxes = page.locator(f"{PLANNER} input[type=number]")
    # sequences, memory, layers, KV heads, head dimension, sliding window, period of layers that see all tokens;
    # among them are the machine's memory and the bits of weights, which have an effect only after a button
    twice = [("2", "4"), ("12", "24"), ("24", "16"), ("4", "8"), ("64", "128"), ("1024", "4096"), ("2", "0")]
    for place, values in zip((0, 1, 4, 5, 6, 7, 8), twice, strict=True):
        for value in values:
            boxes.nth(place).fill(value)
            planner.changes(lambda place=place: boxes.nth(place).press("Enter"), [0])
    boxes.nth(7).fill("0")  # no layer slides
    planner.changes(lambda: boxes.nth(7).press("Enter"), [0])
    page.get_by_role("button", name="Leave room for weights").click()
    page.locator(PLANNER, has_text="The weights of a model that is typed in are not known").wait_for()
    planner.changes(lambda: page.locator(f"{PLANNER} select").select_option("rvq"), [0])
    planner.changes(lambda: page.locator(f"{PLANNER} select").select_option("rabitq"), [0])
    page.locator(planner.charts, has_text="4 sequences of 92,682 tokens as rabitq K2 V6: ").wait_for()
    page.locator(planner.charts, has_text="of 24 GB").wait_for()

    planner.turns_dark()
    page.set_viewport_size({"width": 880, "height": 900})  # of which the page has about 500: its table of losses wraps
    tables = f"[...document.querySelectorAll('{PLANNER} .widget-html-content')]"
    narrow = f"document.querySelector('{PLANNER}').clientWidth < 560"
    page.wait_for_function(f"() => {narrow} && {tables}.every((each) => each.scrollWidth <= each.clientWidth + 1)")
    page.set_viewport_size({"width": 640, "height": 900})  # the table of losses is wider, and has its own scroll bar
    inside = "(box) => { const out = box.closest('.jp-OutputArea-output'); return out.scrollWidth <= out.clientWidth; }"
    page.wait_for_function(inside, arg=page.locator(PLANNER).element_handle())
    explore.turns_dark()
    assert visit.errors == []
    assert visit.outside == []
