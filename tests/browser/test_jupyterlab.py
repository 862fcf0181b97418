"""Linked charts under a slider in a real JupyterLab, with no network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from veloxlab.views import theme

pytestmark = pytest.mark.browser

CELL = """
import itertools, math
import ipywidgets, polars as pl
from IPython.display import display
from veloxlab import views
from veloxlab.widgets import ChartView, link

layers, heads = 30, 3

def errors(bits):
    rows = [
        {"layer": l, "head": h, "tensor": t, "rel_mse": f * 4.0**-bits * (1 + math.sin(l / 3 + h) / 2 + 4 / (1 + l))}
        for (t, f), l, h in itertools.product((("keys", 1), ("values", 0.6)), range(layers), range(heads))
    ]
    return pl.DataFrame(rows)

def spent(bits):
    rows = [
        {"layer": l, "tensor": t, "part": p, "bits_per_value": b}
        for t, l in itertools.product(("keys", "values"), range(layers))
        for p, b in (("codes", bits + (l < 2)), ("scales", 0.25))
    ]
    return pl.DataFrame(rows, schema_overrides={"bits_per_value": pl.Float64})

def held(bits):
    rows = [
        {"tokens": n, "cache": c, "layer": l, "bytes": int(n * 384 * b / 8), "kind": k}
        for n, k in ((4096, "measured"), (8192, "measured"), (16384, "predicted"), (32768, "predicted"))
        for c, b in (("fp16", 16), ("turboquant", bits + 0.25))
        for l in range(layers)
    ]
    return pl.DataFrame(rows)

error_view = ChartView(views.error_map(errors(3), domain=(1e-4, 1), caption="errors at 3 bits"))
bit_view = ChartView(views.bit_allocation(spent(3), greatest=8, caption="spent at 3 bits"))
memory_view = ChartView(views.memory_growth(held(3), caption="held at 3 bits"))
link(error_view, bit_view, memory_view)

def move(change):
    bits = change["new"]
    error_view.put(errors(bits), caption=f"errors at {bits} bits")
    bit_view.put(spent(bits), caption=f"spent at {bits} bits")
    memory_view.put(held(bits), caption=f"held at {bits} bits")

slider = ipywidgets.IntSlider(3, 1, 7, description="bits")
slider.observe(move, "value")
box = ipywidgets.VBox([slider, error_view, bit_view, memory_view])
box.add_class("probe")
box
"""
CHARTS = ".probe svg.marks"
PICKED = "#d8435c"
SETTLED = """(bits) => ["errors", "spent", "held"].every((what, i) =>
  document.querySelectorAll(".probe svg.marks")[i]?.textContent.includes(`${what} at ${bits} bits`))"""
OUTLINED = f"""(counts) => counts.every((count, i) =>
  document.querySelectorAll(".probe svg.marks")[i].querySelectorAll("[stroke='{PICKED}']").length === count)"""
TOTAL = ".probe svg.marks >> nth=2 >> text=/turboquant .* MB/"


PLAIN = """
points = pl.DataFrame({
    "name": ["rvq K2 V2", "rvq K4 V4"], "key_bits": [2.5, 4.5], "value_bits": [2.5, 4.5], "kl_mean": [0.2, 0.01],
    "held_bytes": [2_000_000, 4_000_000], "top1_flips": [0.1, 0.01], "perplexity": [13.0, 12.0],
})
display(views.error_map(errors(3), caption="plain errors"), views.bit_allocation(spent(3), caption="plain bits"))
display(views.memory_growth(held(3), caption="plain bytes"), views.frontier(points, caption="plain frontier"))
"""


@pytest.fixture(scope="module")
def pictures() -> Path | None:
    """A folder for screenshots, if VELOXLAB_PICTURES names one."""
    asked = os.environ.get("VELOXLAB_PICTURES")
    return Path(asked) if asked else None


def plain_charts_are_drawn(visit, pictures):
    """The charts that JupyterLab itself draws."""
    plain = ".jp-RenderedVegaCommon5"
    for i, caption in enumerate(("errors", "bits", "bytes", "frontier")):
        visit.page.locator(plain).nth(i).scroll_into_view_if_needed()
        visit.page.locator(plain).nth(i).locator("svg.marks", has_text=f"plain {caption}").wait_for()
        words = visit.page.locator(plain).nth(i).locator("text", has_text=f"plain {caption}")
        assert words.get_attribute("fill") == theme.NEUTRAL  # without veloxlab's theme it would have no colour
        if pictures:
            visit.page.locator(plain).nth(i).screenshot(path=pictures / f"plain-{caption}.png")


def step(visit, expected: int, key: str) -> None:
    visit.page.keyboard.press(key)
    visit.page.wait_for_function(SETTLED, arg=expected)


def test_plain_charts_are_drawn_and_a_slider_and_a_pick_move_linked_ones(notebook, pictures):
    visit = notebook(CELL, PLAIN)
    page = visit.page
    page.wait_for_function(SETTLED, arg=3)
    plain_charts_are_drawn(visit, pictures)
    before = page.locator(TOTAL).text_content()

    # at least twice: the kernel handles only the first message of a comm on the main thread
    page.locator(".probe .noUi-handle").scroll_into_view_if_needed()
    page.locator(".probe .noUi-handle").focus()
    for expected in (4, 5, 6):
        step(visit, expected, "ArrowRight")
    assert page.locator(TOTAL).text_content() != before

    # a click on layer 7 in the map of errors
    page.locator(CHARTS).nth(0).scroll_into_view_if_needed()
    page.locator(f"{CHARTS} >> nth=0 >> [aria-label^='layer: 7;'] >> nth=-1").click()
    page.wait_for_function(OUTLINED, arg=[3, 2, 2])
    page.locator(CHARTS).nth(2).scroll_into_view_if_needed()
    assert page.locator(f"{CHARTS} >> nth=2").text_content().count("layer 7 in") == 2

    # arrow keys go to the chart, not to the notebook's commands
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.querySelectorAll('.probe svg.marks')[2].textContent.includes('layer 8 in')")
    if pictures:
        page.locator(".probe").screenshot(path=pictures / "lab-light.png")

    page.evaluate("() => window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    page.wait_for_function(
        "() => [...document.querySelectorAll('.probe svg.marks')].every((svg) =>"
        " svg.querySelector('.role-axis-label text').getAttribute('fill') === '#a3abb5')"
    )
    page.wait_for_function(OUTLINED, arg=[3, 2, 2])
    page.wait_for_function(SETTLED, arg=6)
    page.locator("#jupyterlab-splash").wait_for(state="detached")
    if pictures:
        page.locator(".probe").screenshot(path=pictures / "lab-dark.png")

    # a second click on the layer clears it in all charts
    page.locator(f"{CHARTS} >> nth=1 >> [aria-label^='layer: 8;'] >> nth=0").click()
    page.wait_for_function(OUTLINED, arg=[0, 0, 0])
    assert visit.errors == []
    assert visit.outside == []
