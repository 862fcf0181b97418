"""The tour's laboratory in a real JupyterLab with no network: every knob twice, and how long a move takes."""

from __future__ import annotations

import os
import statistics
from pathlib import Path

import nbformat
import pytest

pytestmark = pytest.mark.browser

TOUR = Path(__file__).parents[2] / "notebooks" / "00_tour.ipynb"
LAB = ".veloxlab-lab"
CHARTS = f"{LAB} svg.marks"
TEXTS = """() => [...document.querySelectorAll(".veloxlab-lab svg.marks")].map((svg) => svg.textContent)"""
CHANGED = f"""([before, changing]) => {{
  const now = ({TEXTS})();
  return changing.every((i) => now[i] !== before[i]);
}}"""
# when a key went down, and when a chart last changed after it
WATCH = """() => {
  window.moved = { key: 0, drawn: 0 };
  window.addEventListener("keydown", () => { window.moved.key = performance.now(); }, true);
  const observer = new MutationObserver(() => { window.moved.drawn = performance.now(); });
  for (const chart of document.querySelectorAll(".veloxlab-lab .veloxlab-chart"))
    observer.observe(chart, { subtree: true, childList: true, attributes: true, characterData: true });
}"""
IDLE = "() => document.querySelector('.veloxlab-lab .widget-hprogress')?.style.visibility === 'hidden'"


def lab_cells() -> list[str]:
    """The tour's first cell, which loads the model, and the one that shows the laboratory."""
    code = [cell.source for cell in nbformat.read(TOUR, as_version=4).cells if cell.cell_type == "code"]
    return [code[0], next(source for source in code if "vl.Lab(" in source)]


def press(page, key: str, changing: list[int]) -> float:
    """Press a key, wait until these charts say something new, and give the milliseconds until they did."""
    before = page.evaluate(TEXTS)
    page.keyboard.press(key)
    page.wait_for_function(CHANGED, arg=[before, changing])
    return page.evaluate("() => window.moved.drawn - window.moved.key")


def knob(page, name: str):
    return page.locator(f"{LAB} .widget-slider", has_text=name).locator(".noUi-handle")


def test_every_knob_of_the_tours_laboratory_moves_its_charts(notebook, capsys):
    visit = notebook(*lab_cells(), name="tour.ipynb")
    page = visit.page
    page.set_default_timeout(90_000)
    page.locator(CHARTS).nth(2).wait_for()
    page.evaluate(WATCH)
    pictures = os.environ.get("VELOXLAB_PICTURES")

    # the charts in order: errors, bits, memory
    for name, keys, changing in (
        ("K bits", ("ArrowRight", "ArrowRight"), [0, 1, 2]),
        ("V bits", ("ArrowLeft", "ArrowLeft"), [0, 1, 2]),
        # a step of these changes little, and nothing that three digits show: blocks of tokens wait to be encoded
        ("sinks", ("End", "Home"), [0, 2]),
        ("window", ("Home", "PageUp"), [0, 2]),
    ):
        knob(page, name).focus()
        for key in keys:
            press(page, key, changing)

    # a pick in one chart is a pick in all, and in the knobs
    page.locator(f"{CHARTS} >> nth=0 >> [aria-label^='layer: 7;'] >> nth=-1").click()
    page.wait_for_function(
        "() => document.querySelectorAll('.veloxlab-lab svg.marks')[2].textContent.includes('layer 7 in')"
    )
    page.wait_for_function("() => document.querySelector('.veloxlab-lab select').value === '7'")  # by the kernel
    knob(page, "K bits").focus()
    press(page, "ArrowRight", [1, 2])  # of that layer alone: the mean error may stay at two digits
    page.locator(f"{LAB} select").first.select_option("all layers")
    page.get_by_role("button", name="Same for all").click()

    page.get_by_role("button", name="Measure fidelity").click()
    page.locator(CHARTS).nth(3).wait_for()
    page.wait_for_function(IDLE)

    knob(page, "K bits").focus()
    back_and_forth = ["ArrowLeft", "ArrowLeft", "ArrowRight", "ArrowRight"] * 5
    times = [press(page, key, [0, 1, 2]) for key in back_and_forth]
    with capsys.disabled():
        print(
            f"\nslider to three charts: median {statistics.median(times):.0f} ms of {len(times)} moves "
            f"({min(times):.0f} to {max(times):.0f})"
        )

    if pictures:
        page.set_viewport_size({"width": 1180, "height": 1900})
        page.locator(LAB).screenshot(path=Path(pictures) / "lab.png")
    page.evaluate("() => window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    page.wait_for_function(
        "() => [...document.querySelectorAll('.veloxlab-lab svg.marks')].every((svg) =>"
        " svg.querySelector('.role-axis-label text').getAttribute('fill') === '#a3abb5')"
    )
    page.locator("#jupyterlab-splash").wait_for(state="detached")
    if pictures:
        page.locator(LAB).screenshot(path=Path(pictures) / "lab_dark.png")
    assert visit.errors == []
    assert visit.outside == []
