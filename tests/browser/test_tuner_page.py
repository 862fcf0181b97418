"""The tuner of budgets in a real JupyterLab with no network: each control twice, measurements, a saved plan, dark."""

from __future__ import annotations

import pytest

import veloxlab as vl
from tests.browser.shown import Shown, milliseconds

pytestmark = pytest.mark.browser

TABLES = """
import veloxlab as vl
from veloxlab.texts import shipped_folder

rates = vl.allocate.RateBudget.load(shipped_folder("data") / "results" / "rates_smollm2-135m.json")
"""
WITHOUT_MODEL = TABLES + "vl.widgets.BudgetTuner(rates, budget=3.25)"
WITH_MODEL = TABLES + "vl.widgets.BudgetTuner(rates, *vl.load('smollm2-135m'), budget=3.25, tokens=64)"
TUNER = ".veloxlab-tuner"
BITS, LOSSES, FRONTIER = 0, 1, 2


def test_every_control_of_the_tuner(notebook):
    visit = notebook(WITHOUT_MODEL, name="tuner.ipynb")
    page = visit.page
    page.set_default_timeout(90_000)
    tuner = Shown(page, TUNER)
    tuner.drawn(4)
    all_three = [BITS, LOSSES, FRONTIER]

    # budgets of each kind
    tuner.pressed("true bits", ["ArrowRight", "ArrowRight", "ArrowLeft", "ArrowLeft"], all_three)
    tuner.dropdown("budget").select_option("bytes a token")
    tuner.pressed("bytes a token", ["ArrowLeft", "ArrowLeft"], all_three)
    tuner.dropdown("budget").select_option("tokens in memory")
    tuner.pressed("megabytes", ["ArrowRight", "ArrowRight"], all_three)
    tokens = page.locator(f"{TUNER} input[type=number]")
    for length in ("5000", "6000"):
        tokens.fill(length)
        tuner.changes(lambda: tokens.press("Enter"), all_three)
    tuner.dropdown("budget").select_option("predicted loss")
    tuner.pressed("nats a token", ["ArrowLeft", "ArrowLeft"], all_three)
    tuner.dropdown("budget").select_option("average bits")

    # bounds; the first handle sets the least bits
    tuner.pressed("bits allowed", ["ArrowRight", "ArrowLeft"], [FRONTIER])
    tuner.pressed("bits allowed", ["ArrowLeft", "ArrowRight"], [FRONTIER], place=1)
    tuner.pressed("first layers", ["ArrowRight", "ArrowRight"], all_three)
    tuner.pressed("last layers", ["ArrowRight", "ArrowRight"], all_three)
    for protection in ("no codes: kept exact", "the most bits"):
        tuner.changes(lambda protection=protection: tuner.dropdown("these get").select_option(protection), all_three)
    tuner.pressed("first layers", ["Home"], [FRONTIER])
    tuner.pressed("last layers", ["Home"], [FRONTIER])
    keys_first = page.locator(f"{TUNER} input[type=checkbox]")
    for _ in range(2):
        tuner.changes(keys_first.click, [FRONTIER])
    tuner.pressed("weight of keys", ["Home", "End"], [BITS, LOSSES, FRONTIER])

    # a pick in one chart is a pick in all charts with layers
    page.locator(f"{tuner.charts} >> nth=0 >> [aria-label^='layer: 7;'] >> nth=-1").click()
    page.wait_for_function(
        f"""() => [0, 1, 3].every((i) =>
          document.querySelectorAll('{tuner.charts}')[i].querySelector("[stroke='#d8435c']"))"""
    )
    assert visit.errors == []
    assert visit.outside == []


def test_measuring_taking_away_and_the_time_of_a_move(notebook, lab, capsys):
    _, folder = lab
    visit = notebook(WITH_MODEL, name="measured.ipynb")
    page = visit.page
    page.set_default_timeout(90_000)
    tuner = Shown(page, TUNER)
    tuner.drawn(4)

    # measured, cancelled, measured again
    page.get_by_role("button", name="Measure", exact=True).click()
    tuner.busy()
    page.get_by_role("button", name="Cancel").click()
    tuner.idle()
    page.locator(TUNER, has_text="cancelled").wait_for()
    assert page.locator(f"{TUNER} table").count() == 0
    for name in ("Measure", "Measure uniform"):
        page.get_by_role("button", name=name, exact=True).click()
        kind = "uniform" if name.endswith("uniform") else "allocated"
        page.locator(f"{tuner.charts} >> nth=2 >> [aria-label*='loss: measured, {kind}']").wait_for()
        tuner.idle()
    assert page.locator(f"{TUNER} table tr").count() == 3

    times = tuner.pressed("true bits", ["ArrowLeft", "ArrowLeft", "ArrowRight", "ArrowRight"], [0, 1, 2])
    with capsys.disabled():
        print(f"\nslider to three charts: {milliseconds(times)}")

    tuner.turns_dark()
    # another process reads the plan
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
