"""Each control of each page of the laboratory in a real JupyterLab, moved twice: the kernel gets each value."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import Locator, Page

from tests.browser.shown import INTERVAL, SMALL_MODEL, Shown
from veloxlab.widgets.lab import PAGES

pytestmark = pytest.mark.browser

CELL = """
from tests.knobs import controls
lab = vl.Lab(model, tokenizer, tokens=128)
def values():
    found = {name: each._trait_values.get("value") for name, each in controls(lab.page_of(lab.page)).items()}
    return {name: str(value) for name, value in found.items() if value not in (None, ())}
lab
"""
VALUES = """async () => {
  const { kernel } = window.jupyterapp.shell.currentWidget.sessionContext.session;
  const asked = { code: "", store_history: false, user_expressions: { found: "values()" } };
  return (await kernel.requestExecute(asked).done).content.user_expressions.found.data?.["text/plain"];
}"""  # undefined until the kernel has made the page
BOXES = ".widget-slider, .widget-dropdown, .widget-checkbox, .widget-text, .widget-textarea"
TEXTS = {"model": ("8B, as Llama 3.1", "this model")}  # for text fields by label
NUMBERS = ("7", "6")  # valid in all other text fields
CONTROLS = 60  # and some more


def move_twice(page: Page, box: Locator) -> list[Any]:
    """Return two functions that move a control to another value; none for a control with one value."""
    handle, select, check = (box.locator(kind) for kind in (".noUi-handle", "select", "input[type=checkbox]"))
    if handle.count():
        ends = [handle.first.get_attribute(f"aria-value{end}") for end in ("now", "max")]
        keys = ["ArrowLeft", "ArrowRight"] if ends[0] == ends[1] else ["ArrowRight", "ArrowLeft"]
        return [lambda key=key: (handle.first.focus(), page.keyboard.press(key)) for key in keys]
    if select.count():
        options, now = select.locator("option").all_text_contents(), select.evaluate("each => each.selectedIndex")
        others = [*options[:now], *options[now + 1 :]]
        labels = [others[-1], options[now]] if others else []
        return [lambda label=label: select.select_option(label=label) for label in labels]
    if check.count():
        return [check.click, check.click]
    field = box.locator("input, textarea").first
    texts = TEXTS.get(box.locator("label").first.inner_text(), NUMBERS)
    return [lambda text=text: (field.fill(text), field.press("Tab")) for text in texts]


def is_heard(page: Page, before: str | None) -> bool:
    """Whether the kernel has other values than ``before`` within ten seconds."""
    for _ in range(10_000 // INTERVAL):
        if page.evaluate(VALUES) != before:
            return True
        page.wait_for_timeout(INTERVAL)
    return False


def test_each_control_of_each_page_is_heard_twice(notebook: Any) -> None:
    visit = notebook(SMALL_MODEL, CELL, name="controls.ipynb")
    page = visit.page
    page.set_default_timeout(120_000)
    Shown(page, ".veloxlab-lab").drawn(3)
    boxes = page.locator(".veloxlab-lab").locator(BOXES).locator("visible=true")
    heard = set[str]()
    for title, _ in PAGES.values():
        page.get_by_role("tab", name=title, exact=True).click()
        assert is_heard(page, None), title
        if page.evaluate(VALUES) == "{}":  # a page of buttons
            continue
        boxes.first.wait_for()
        for i in range(boxes.count()):
            if boxes.nth(i).locator("[disabled]").count():
                continue
            label = f"{title}: {boxes.nth(i).locator('label').first.inner_text()}"
            for move in move_twice(page, boxes.nth(i)):
                before = page.evaluate(VALUES)
                move()
                assert is_heard(page, before), label
                heard.add(label)
    assert len(heard) > CONTROLS
    assert visit.errors == []
    assert visit.outside == []
