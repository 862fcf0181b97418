"""The explorer of keys and values in a real JupyterLab with no network: every control twice, and in the dark."""

from __future__ import annotations

import os
import statistics
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser

CELL = """
import veloxlab as vl
model, tokenizer = vl.load("smollm2-135m")
explorer = vl.KeyExplorer(vl.capture(model, tokenizer, tokens=128), layer=7)
explorer
"""
BOX = ".veloxlab-keys"
CHARTS = f"{BOX} svg.marks"
TEXTS = """() => [...document.querySelectorAll(".veloxlab-keys svg.marks")].map((svg) => svg.textContent)"""
CHANGED = f"""([before, changing]) => {{
  const now = ({TEXTS})();
  return changing.every((i) => now[i] !== before[i]);
}}"""
IDLE = "() => document.querySelector('.veloxlab-keys .widget-hprogress')?.style.visibility === 'hidden'"
WATCH = """() => {
  window.moved = { key: 0, drawn: 0 };
  window.addEventListener("keydown", () => { window.moved.key = performance.now(); }, true);
  const observer = new MutationObserver(() => { window.moved.drawn = performance.now(); });
  for (const chart of document.querySelectorAll(".veloxlab-keys .veloxlab-chart"))
    observer.observe(chart, { subtree: true, childList: true, attributes: true, characterData: true });
}"""
ALL = [0, 1, 2, 3, 4]  # channels, density, levels, spectrum, pairs


def settled(page, act, changing: list[int]) -> None:
    """Act, and wait until these charts say something new and nothing is measured any more."""
    before = page.evaluate(TEXTS)
    act()
    page.wait_for_function(CHANGED, arg=[before, changing])
    page.wait_for_function(IDLE)


def test_every_control_moves_its_charts_twice(notebook, capsys):
    visit = notebook(CELL, name="keys.ipynb")
    page = visit.page
    page.set_default_timeout(90_000)
    page.locator(CHARTS).nth(4).wait_for()
    page.wait_for_function(IDLE)
    page.evaluate(WATCH)
    pictures = os.environ.get("VELOXLAB_PICTURES")

    for name, keys, changing in (
        ("layer", ("ArrowRight", "ArrowRight"), ALL),
        ("head", ("ArrowRight", "ArrowRight"), ALL),
        ("bits", ("ArrowRight", "ArrowRight"), [2]),
    ):
        page.locator(f"{BOX} .widget-slider", has_text=name).locator(".noUi-handle").focus()
        for key in keys:
            settled(page, lambda key=key: page.keyboard.press(key), changing)

    for name, options, changing in (
        ("space", ("rotated", "eigenbasis", "smoothed", "before RoPE", "as cached"), [0, 1]),
        ("tensor", ("values", "keys"), [0, 1, 2, 3]),
        ("method", ("rabitq", "qjl"), [2]),
    ):
        box = page.locator(f"{BOX} .widget-dropdown", has_text=name).locator("select")
        for option in options:
            settled(page, lambda box=box, option=option: box.select_option(option), changing)

    # what cannot be is said, and leaves the charts
    page.locator(f"{BOX} .widget-dropdown", has_text="tensor").locator("select").select_option("values")
    page.locator(f"{BOX} .widget-dropdown", has_text="space").locator("select").select_option("before RoPE")
    page.locator(BOX, has_text="Values go through no RoPE").wait_for()
    page.locator(f"{BOX} .widget-dropdown", has_text="tensor").locator("select").select_option("keys")
    page.locator(f"{CHARTS} >> nth=0", has_text="before RoPE").wait_for()
    page.wait_for_function(IDLE)

    # over layers that are measured the numbers alone travel
    page.locator(f"{BOX} .widget-slider", has_text="head").locator(".noUi-handle").focus()
    times = []
    for key in ["ArrowLeft", "ArrowLeft", "ArrowRight", "ArrowRight"] * 3:
        settled(page, lambda key=key: page.keyboard.press(key), ALL)
        times.append(page.evaluate("() => window.moved.drawn - window.moved.key"))
    with capsys.disabled():
        print(f"\nhead to five charts: median {statistics.median(times):.0f} ms of {len(times)} moves")

    if pictures:
        page.set_viewport_size({"width": 1180, "height": 1900})
        page.locator(BOX).screenshot(path=Path(pictures) / "keys.png")
    page.evaluate("() => window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    page.wait_for_function(
        "() => [...document.querySelectorAll('.veloxlab-keys svg.marks')].every((svg) =>"
        " svg.querySelector('.role-axis-label text').getAttribute('fill') === '#a3abb5')"
    )
    page.locator("#jupyterlab-splash").wait_for(state="detached")
    if pictures:
        page.locator(BOX).screenshot(path=Path(pictures) / "keys_dark.png")
    assert visit.errors == []
    assert visit.outside == []
