"""The tuner of budgets in a real JupyterLab with no network: every control twice, measuring, taking away, dark."""

from __future__ import annotations

import os
import statistics
from pathlib import Path

import pytest

import veloxlab as vl

pytestmark = pytest.mark.browser

TABLES = """
import veloxlab as vl
from veloxlab.shipped import shipped_folder

rates = vl.RateBudget.load(shipped_folder("data") / "results" / "rates_smollm2-135m.json")
"""
WITHOUT_MODEL = TABLES + "vl.BudgetTuner(rates, budget=3.25)"
WITH_MODEL = TABLES + "vl.BudgetTuner(rates, *vl.load('smollm2-135m'), budget=3.25, tokens=192)"
TUNER = ".veloxlab-tuner"
CHARTS = f"{TUNER} svg.marks"
BITS, LOSSES, FRONTIER = 0, 1, 2
TEXTS = f"""() => [...document.querySelectorAll("{CHARTS}")].map((svg) => svg.textContent + svg.innerHTML.length)"""
CHANGED = f"""([before, changing]) => {{
  const now = ({TEXTS})();
  return changing.every((i) => now[i] !== before[i]);
}}"""
# when something was done, and when a chart last changed after it
WATCH = f"""() => {{
  window.moved = {{ key: 0, drawn: 0 }};
  for (const event of ["keydown", "change"])
    window.addEventListener(event, () => {{ window.moved.key = performance.now(); }}, true);
  const observer = new MutationObserver(() => {{ window.moved.drawn = performance.now(); }});
  for (const chart of document.querySelectorAll("{TUNER} .veloxlab-chart"))
    observer.observe(chart, {{ subtree: true, childList: true, attributes: true, characterData: true }});
}}"""
IDLE = f"() => document.querySelector('{TUNER} .widget-hprogress')?.style.visibility === 'hidden'"
BUSY = f"() => document.querySelector('{TUNER} .widget-hprogress')?.style.visibility === 'visible'"


def changed(page, do, changing: list[int]) -> float:
    """Do something, wait until these charts say something new, and give the milliseconds until they did."""
    before = page.evaluate(TEXTS)
    do()
    page.wait_for_function(CHANGED, arg=[before, changing])
    return page.evaluate("() => window.moved.drawn - window.moved.key")


def knob(page, name: str, place: int = 0):
    return page.locator(f"{TUNER} .widget-slider", has_text=name).locator(".noUi-handle").nth(place)


def pressed(page, name: str, keys: list[str], changing: list[int], place: int = 0) -> list[float]:
    knob(page, name, place).focus()
    return [changed(page, lambda key=key: page.keyboard.press(key), changing) for key in keys]


def chosen(page, name: str, label: str) -> None:
    page.locator(f"{TUNER} .widget-dropdown", has_text=name).locator("select").select_option(label)


def test_every_control_of_the_tuner(notebook):
    visit = notebook(WITHOUT_MODEL, name="tuner.ipynb")
    page = visit.page
    page.set_default_timeout(90_000)
    page.locator(CHARTS).nth(3).wait_for()
    page.evaluate(WATCH)
    all_three = [BITS, LOSSES, FRONTIER]

    # budgets of every kind
    pressed(page, "true bits", ["ArrowRight", "ArrowRight", "ArrowLeft", "ArrowLeft"], all_three)
    chosen(page, "budget", "bytes a token")
    pressed(page, "bytes a token", ["ArrowLeft", "ArrowLeft"], all_three)
    chosen(page, "budget", "tokens in memory")
    pressed(page, "megabytes", ["ArrowRight", "ArrowRight"], all_three)
    tokens = page.locator(f"{TUNER} input[type=number]")
    for length in ("5000", "6000"):
        tokens.fill(length)
        changed(page, lambda: tokens.press("Enter"), all_three)
    chosen(page, "budget", "predicted loss")
    pressed(page, "nats a token", ["ArrowLeft", "ArrowLeft"], all_three)
    chosen(page, "budget", "average bits")

    # bounds; the first handle is of the least bits
    pressed(page, "bits allowed", ["ArrowRight", "ArrowLeft", "ArrowLeft"], [FRONTIER])
    pressed(page, "bits allowed", ["ArrowLeft", "ArrowRight"], [FRONTIER], place=1)
    pressed(page, "first layers", ["ArrowRight", "ArrowRight"], all_three)
    pressed(page, "last layers", ["ArrowRight", "ArrowRight"], all_three)
    for protection in ("no codes: kept exact", "the most bits"):
        changed(page, lambda protection=protection: chosen(page, "these get", protection), all_three)
    pressed(page, "first layers", ["Home"], [FRONTIER])
    pressed(page, "last layers", ["Home"], [FRONTIER])
    keys_first = page.locator(f"{TUNER} input[type=checkbox]")
    for _ in range(2):
        changed(page, keys_first.click, [FRONTIER])
    pressed(page, "weight of keys", ["Home", "End"], [BITS, LOSSES, FRONTIER])

    # a pick in one chart is a pick in all that have layers
    page.locator(f"{CHARTS} >> nth=0 >> [aria-label^='layer: 7;'] >> nth=-1").click()
    page.wait_for_function(
        f"() => [0, 1, 3].every((i) => document.querySelectorAll('{CHARTS}')[i].querySelector(\"[stroke='#d8435c']\"))"
    )
    assert visit.errors == []
    assert visit.outside == []


def test_measuring_taking_away_and_the_time_of_a_move(notebook, lab, capsys):
    _, folder = lab
    visit = notebook(WITH_MODEL, name="measured.ipynb")
    page = visit.page
    page.set_default_timeout(90_000)
    page.locator(CHARTS).nth(3).wait_for()
    page.evaluate(WATCH)
    pictures = os.environ.get("VELOXLAB_PICTURES")

    # measured, cancelled, measured again
    page.get_by_role("button", name="Measure", exact=True).click()
    page.wait_for_function(BUSY)
    page.get_by_role("button", name="Cancel").click()
    page.wait_for_function(IDLE)
    page.locator(TUNER, has_text="cancelled").wait_for()
    assert page.locator(f"{TUNER} table").count() == 0
    for name in ("Measure", "Measure uniform"):
        page.get_by_role("button", name=name, exact=True).click()
        kind = "uniform" if name.endswith("uniform") else "allocated"
        page.locator(f"{CHARTS} >> nth=2 >> [aria-label*='loss: measured, {kind}']").wait_for()
        page.wait_for_function(IDLE)
    assert page.locator(f"{TUNER} table tr").count() == 3

    times = pressed(page, "true bits", ["ArrowLeft", "ArrowLeft", "ArrowRight", "ArrowRight"] * 5, [0, 1, 2])
    with capsys.disabled():
        print(
            f"\nslider to three charts: median {statistics.median(times):.0f} ms of {len(times)} moves "
            f"({min(times):.0f} to {max(times):.0f})"
        )

    if pictures:
        page.set_viewport_size({"width": 1180, "height": 1900})
        page.locator(TUNER).screenshot(path=Path(pictures) / "tuner.png")
    page.evaluate("() => window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    page.wait_for_function(
        f"() => [...document.querySelectorAll('{CHARTS}')].every((svg) =>"
        " svg.querySelector('.role-axis-label text').getAttribute('fill') === '#a3abb5')"
    )
    page.locator("#jupyterlab-splash").wait_for(state="detached")
    if pictures:
        page.locator(TUNER).screenshot(path=Path(pictures) / "tuner_dark.png")
    # a plan that another process reads
    box = page.locator(f"{TUNER} .widget-text input[type=text]")
    for name in ("nowhere/plan.json", "tuned.json"):
        box.fill(name)
        box.press("Tab")
        page.locator(f"{TUNER} pre", has_text=f'vl.Plan.load("{name}")').wait_for()
        page.get_by_role("button", name="Save plan").click()
        words = "There is no folder" if "/" in name else "Saved to "
        page.locator(f"{TUNER} .widget-html", has_text=words).last.wait_for()
    assert vl.Plan.load(folder / "tuned.json").frame.height == 30
    assert visit.errors == []
    assert visit.outside == []
