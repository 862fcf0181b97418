"""The explorer of keys and values in a real JupyterLab with no network: every control twice, and in the dark."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.browser.shown import SMALL_MODEL, Shown, milliseconds

pytestmark = pytest.mark.browser

CELL = """
explorer = vl.widgets.KeyExplorer(vl.capture(model, tokenizer, tokens=128), layer=4)
explorer
"""
BOX = ".veloxlab-keys"
ALL = [0, 1, 2, 3, 4]  # channels, density, levels, spectrum, pairs


def settled(shown: Shown, act: Callable[[], object], changing: list[int]) -> float:
    """Act, wait until these charts have changed and no measurement runs, and return the milliseconds."""
    took = shown.changes(act, changing)
    shown.idle()
    return took


def test_every_control_moves_its_charts_twice(notebook, capsys):
    visit = notebook(SMALL_MODEL, CELL, name="keys.ipynb")
    page = visit.page
    page.set_default_timeout(90_000)
    explorer = Shown(page, BOX)
    explorer.drawn(5)
    explorer.idle()

    for name, keys, changing in (
        ("layer", ("ArrowRight", "ArrowRight"), ALL),
        ("head", ("ArrowRight", "ArrowRight"), ALL),
        ("bits", ("ArrowRight", "ArrowRight"), [2]),
    ):
        page.locator(f"{BOX} .widget-slider", has_text=name).locator(".noUi-handle").focus()
        for key in keys:
            settled(explorer, lambda key=key: page.keyboard.press(key), changing)

    for name, options, changing in (
        ("space", ("rotated", "eigenbasis", "smoothed", "before RoPE", "as cached"), [0, 1]),
        ("tensor", ("values", "keys"), [0, 1, 2, 3]),
        ("method", ("rabitq", "qjl"), [2]),
    ):
        box = explorer.dropdown(name)
        for option in options:
            settled(explorer, lambda box=box, option=option: box.select_option(option), changing)

    # a choice that cannot be measured gives a message, and the charts stay
    explorer.dropdown("tensor").select_option("values")
    explorer.dropdown("space").select_option("before RoPE")
    page.locator(BOX, has_text="Values go through no RoPE").wait_for()
    explorer.dropdown("tensor").select_option("keys")
    page.locator(f"{explorer.charts} >> nth=0", has_text="before RoPE").wait_for()
    explorer.idle()

    # between measured layers only numbers are sent
    page.locator(f"{BOX} .widget-slider", has_text="head").locator(".noUi-handle").focus()
    times = [
        settled(explorer, lambda key=key: page.keyboard.press(key), ALL)
        for key in ["ArrowLeft", "ArrowLeft", "ArrowRight", "ArrowRight"]
    ]
    with capsys.disabled():
        print(f"\nhead to five charts: {milliseconds(times)}")

    explorer.turns_dark()
    assert visit.errors == []
    assert visit.outside == []
