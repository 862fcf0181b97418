"""One slider over frames that are measured already, in a real JupyterLab with no network."""

from __future__ import annotations

import pytest

from tests.browser.shown import Shown

pytestmark = pytest.mark.browser

CELL = """
import altair as alt
import polars as pl
from veloxlab.widgets.explore import Explore

frames = {bits: pl.DataFrame({"x": [0, 1], "error": [4.0**-bits, 1.0]}) for bits in (1, 2, 3)}
explore = Explore(frames, lambda frame: alt.Chart(frame).mark_bar().encode(x="x:O", y="error:Q"), description="bits")
explore.add_class("explore")
explore
"""


def test_the_slider_shows_the_frame_that_it_points_at(notebook):
    visit = notebook(CELL, name="explore.ipynb")
    explore = Shown(visit.page, ".explore")
    explore.drawn(1)
    explore.pressed("bits", ["ArrowRight", "ArrowRight", "ArrowLeft"], [0])
    visit.page.locator(".explore .widget-readout", has_text="2").wait_for()
    explore.turns_dark("")
    assert visit.errors == []
    assert visit.outside == []
