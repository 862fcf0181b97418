"""Two texts, generated side by side in a real JupyterLab: run, cancelled, run again, in both themes."""

from __future__ import annotations

import pytest

from tests.browser.shown import SMALL_MODEL, Shown

pytestmark = pytest.mark.browser

# larger weights give another token at almost every position: the texts differ, but not from the first token
CELL = """
import mlx.core as mx
from mlx.utils import tree_map
model.update(tree_map(lambda weight: 1.5 * weight, model.parameters()))
mx.eval(model.parameters())
vl.widgets.SideBySide(model, tokenizer, bits=2, tokens=24)
"""
WIDGET = ".veloxlab-side-by-side"
CHART = f"{WIDGET} svg.marks"
# all texts that the chart has shown: the first tokens may be visible for a moment only
WATCH = f"""() => {{
  window.shown = new Set();
  new MutationObserver(() => {{
    for (const chart of document.querySelectorAll("{CHART}")) window.shown.add(chart.textContent);
  }}).observe(document.querySelector("{WIDGET}"), {{ subtree: true, childList: true, characterData: true }});
}}"""

# both methods at once: the page sends the second only when the kernel has answered the first, but the press earlier
CHOOSE_TWICE = """(list, generate) => {
  for (const method of ["rvq", "rabitq"]) {
    list.selectedIndex = [...list.options].findIndex((option) => option.text === method);
    list.dispatchEvent(new Event("change", { bubbles: true }));
  }
  generate.click();
}"""


def test_texts_come_as_they_are_made_and_a_run_can_be_cancelled(notebook):
    visit = notebook(SMALL_MODEL, CELL, name="side.ipynb")
    page = visit.page
    page.set_default_timeout(120_000)
    side = Shown(page, WIDGET)
    generate = page.get_by_role("button", name="Generate")
    generate.wait_for()
    page.evaluate(WATCH)
    generate.click()
    page.locator(CHART, has_text="The texts part at token").wait_for()
    page.locator(CHART, has_text="Held now: compressed").wait_for()
    side.idle()
    assert page.evaluate("() => window.shown.size") > 1  # the first tokens appeared while others were generated
    assert page.locator(f"{CHART} [stroke='#d8435c']").count() == 2
    whole = page.locator(CHART).first.text_content()

    for name, keys, value in (
        ("K bits", ("ArrowRight", "ArrowRight"), "4"),
        ("V bits", ("ArrowRight", "ArrowLeft"), "2"),
        ("tokens", ("ArrowLeft", "ArrowLeft", "End"), "512"),
        ("sinks", ("ArrowRight", "ArrowRight"), "6"),
        ("window", ("ArrowLeft", "ArrowLeft"), "14"),
    ):
        slider = page.locator(f"{WIDGET} .widget-slider", has_text=name)
        slider.locator(".noUi-handle").focus()
        for key in keys:
            page.keyboard.press(key)
        slider.locator(".widget-readout", has_text=value).wait_for()

    # another run, on another thread, which is cancelled
    page.locator(f"{WIDGET} textarea").fill("Why is the sky blue?")
    page.locator(f"{WIDGET} textarea").blur()
    generate.click()
    side.busy()
    page.wait_for_function(f"(before) => document.querySelector('{CHART}').textContent !== before", arg=whole)
    page.get_by_role("button", name="Cancel").click()
    side.idle()
    tokens = page.locator(f"{WIDGET} .widget-slider", has_text="tokens")
    tokens.locator(".noUi-handle").focus()
    for key in ("Home", "ArrowRight", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    tokens.locator(".widget-readout", has_text="4").wait_for()
    side.dropdown("method").evaluate(CHOOSE_TWICE, generate.element_handle())
    page.locator(CHART, has_text="rabitq at K4 V2 bits").wait_for()  # the complete run of the last method
    page.locator(f"{CHART} >> nth=0", has_text="The same text for 4 tokens").wait_for()
    side.idle()

    side.turns_dark()
    assert visit.errors == []
    assert visit.outside == []
