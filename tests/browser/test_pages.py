"""The laboratory's pages in a real JupyterLab: one choice for all, every page in light and dark, no network."""

from __future__ import annotations

import pytest

from tests.browser.shown import SMALL_MODEL, Shown, milliseconds, turn

pytestmark = pytest.mark.browser

# this model's cache takes as long to measure as that of a larger one, so that the test can press Cancel in time
CELL = """
import time
from veloxlab.widgets.pages import experiment
measure = experiment.Experiment.fidelity
experiment.Experiment.fidelity = lambda self, *given: time.sleep(0.5) or measure(self, *given)
lab = vl.Lab(model, tokenizer, tokens=128)
lab
"""
LAB = ".veloxlab-lab"


def tab(page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def test_pages_are_made_when_they_are_opened_and_share_one_choice(notebook, capsys):
    visit = notebook(SMALL_MODEL, CELL, name="pages.ipynb")
    page = visit.page
    page.set_default_timeout(120_000)
    lab = Shown(page, LAB)
    lab.drawn(3)

    # every control of the page of errors, twice
    tab(page, "Errors")
    errors = Shown(page, ".veloxlab-errors")
    errors.drawn(5)
    errors.idle()
    errors.pressed("layer", ["ArrowRight", "ArrowRight"], [0, 1, 2, 3])
    errors.pressed("head", ["ArrowRight", "ArrowRight"], [0, 1, 2, 3])
    errors.pressed("bits", ["ArrowLeft", "ArrowLeft"], [0, 1, 2])
    for method in ("rabitq", "turboquant"):
        errors.changes(lambda method=method: errors.dropdown("method").select_option(method), [0, 1, 2, 3])
    errors.idle()
    for key in ("ArrowLeft", "ArrowRight"):  # waits for their measurements; likely next ones are measured ahead
        errors.pressed("layer", [key], [0, 1, 2, 3])
        errors.idle()
    layers = errors.pressed("layer", ["ArrowLeft", "ArrowRight"] * 2, [0, 1, 2, 3])
    widths = errors.pressed("bits", ["ArrowLeft", "ArrowRight"] * 2, [0, 1, 2])
    with capsys.disabled():
        print(f"\nlayer to four charts of errors: {milliseconds(layers)}; bits to three: {milliseconds(widths)}")

    # the choice of that page is the choice of this one
    tab(page, "Keys and values")
    keys = Shown(page, ".veloxlab-keys")
    keys.drawn(5)
    page.locator(keys.charts, has_text="Layer 2, KV head 2").first.wait_for()
    keys.pressed("layer", ["ArrowRight"], [0, 1, 2, 3])
    tab(page, "Cache")
    picked = Shown(page, LAB).dropdown("layer").first.element_handle()
    page.wait_for_function("(select) => select.value === '3'", arg=picked)
    page.locator(lab.charts, has_text="layer 3 in").first.wait_for()

    # a token picked in one chart is marked in all, also on other pages; a click on a cell picks a layer and a head
    tab(page, "Tokens")
    tokens = Shown(page, ".veloxlab-tokens")
    tokens.drawn(5)
    tokens.idle()
    times = tokens.pressed("token", ["Home", "ArrowRight", "ArrowRight"], [0, 1, 2, 3, 4])
    page.locator(tokens.charts, has_text="Token 3. ").wait_for()
    page.locator(f"{tokens.charts} >> nth=3 >> [aria-label*='layer: 5'][aria-label*='KV head: 2']").first.click()
    page.locator(".veloxlab-tokens .widget-slider", has_text="layer").locator(
        ".widget-readout", has_text="5"
    ).wait_for()
    tokens.idle()
    with capsys.disabled():
        print(f"token to five charts: {milliseconds(times)}")
    tab(page, "Errors")
    page.locator(f"{errors.charts} >> nth=0 >> .mark-rule line").first.wait_for(state="attached")

    # a page without layers has the bits of all layers
    tab(page, "Memory")
    plans = Shown(page, ".veloxlab-planner")
    plans.drawn(1)
    page.locator(plans.charts, has_text="turboquant K2 V4").first.wait_for()
    plans.pressed("V bits", ["ArrowLeft"], [0])
    page.locator(plans.charts, has_text="turboquant K2 V3").first.wait_for()

    # advice for a model that is not loaded; the controls follow
    tab(page, "Advise")
    advisor = page.locator(".veloxlab-advisor")
    advisor.locator(".veloxlab-verdict", has_text="Take fp16").wait_for()
    model = advisor.locator("input[list]")
    for name, held in (
        ("70B, as Llama 3.1", "39.69 GB for 4-bit weights"),
        ("8B, as Llama 3.1", "4.52 GB for 4-bit weights"),
    ):
        model.fill(name)
        model.press("Enter")
        advisor.locator(".veloxlab-verdict", has_text=held).wait_for()
    cache = Shown(page, ".veloxlab-advisor").dropdown("cache")
    cache.select_option("turboquant 4 bit")
    advisor.locator(".veloxlab-code", has_text="'turboquant', bits=4").wait_for()
    page.get_by_role("button", name="Set the controls").click()
    advisor.locator("em", has_text="All pages now show turboquant K4 V4").wait_for()
    tab(page, "Memory")
    plans.pressed("K bits", ["ArrowLeft", "ArrowLeft"], [0])
    plans.pressed("V bits", ["ArrowLeft"], [0])

    tab(page, "Generation")
    page.locator(".veloxlab-side-by-side").get_by_role("button", name="Generate").wait_for()
    assert "3" in page.locator(".veloxlab-side-by-side .widget-slider", has_text="V bits").inner_text()

    # methods side by side, and the settings of a measured point; a run can be cancelled
    tab(page, "Compare")
    page.get_by_role("button", name="Measure all methods").click()
    page.locator(f"{LAB} svg.marks", has_text="KL divergence of predictions").wait_for()
    points = lab.dropdown("measured")
    points.locator("option", has_text="polarquant K").wait_for(state="attached")  # the last method
    page.get_by_role("button", name="Measure all methods").click()
    page.locator(LAB).get_by_role("button", name="Cancel").locator("visible=true").first.click()
    points.select_option(label=points.locator("option", has_text="rvq K").first.text_content())
    page.get_by_role("button", name="Use it").click()
    lab.idle()
    lab.turns_dark()
    tab(page, "Cache")
    page.locator(lab.charts, has_text="rvq").first.wait_for()
    for name, box in (("Errors", errors), ("Keys and values", keys), ("Tokens", tokens), ("Memory", plans)):
        tab(page, name)
        if box is not plans:  # the planner measures nothing
            box.idle()
        turn(page, "Light")
        box.turns_dark()
    assert visit.errors == []
    assert visit.outside == []
