"""The tour's laboratory in a real JupyterLab with no network: each control twice, and how long a move takes."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from tests.browser.shown import SMALL_MODEL, Shown, milliseconds

pytestmark = pytest.mark.browser

TOUR = Path(__file__).parents[2] / "notebooks" / "00_tour.ipynb"
LAB = ".veloxlab-lab"


def lab_cell() -> str:
    """The tour's cell that shows the laboratory."""
    return next(cell.source for cell in nbformat.read(TOUR, as_version=4).cells if "vl.Lab(" in cell.source)


def test_every_knob_of_the_tours_laboratory_moves_its_charts(notebook, capsys):
    visit = notebook(SMALL_MODEL, lab_cell(), name="tour.ipynb")
    page = visit.page
    page.set_default_timeout(90_000)
    lab = Shown(page, LAB)
    lab.drawn(3)

    # the charts in order: errors, bits, memory
    for name, keys, changing in (
        ("K bits", ("ArrowRight", "ArrowRight"), [0, 1, 2]),
        ("V bits", ("ArrowLeft", "ArrowLeft"), [0, 1, 2]),
        # one step changes no number in its three shown digits: blocks of tokens wait to be encoded
        ("sinks", ("End", "Home"), [0, 2]),
        ("window", ("Home", "PageUp"), [0, 2]),
    ):
        lab.pressed(name, keys, changing)

    # a pick in one chart is a pick in all charts and controls
    page.locator(f"{lab.charts} >> nth=0 >> [aria-label^='layer: 7;'] >> nth=-1").click()
    page.wait_for_function(
        "() => document.querySelectorAll('.veloxlab-lab svg.marks')[2].textContent.includes('layer 7 in')"
    )
    picked = lab.dropdown("layer").element_handle()
    page.wait_for_function("(select) => select.value === '7'", arg=picked)  # set by the kernel
    lab.pressed("K bits", ["ArrowRight"], [1, 2])  # of that layer: the mean error may keep its two digits
    lab.dropdown("layer").select_option("all layers")
    page.get_by_role("button", name="Same for all").click()

    # measured caches are on a page of their own, and a point there sets the controls
    page.get_by_role("button", name="Measure fidelity").click()
    page.get_by_role("tab", name="Compare").click()
    page.locator(lab.charts, has_text="KL divergence of predictions").wait_for()
    lab.idle()
    page.get_by_role("tab", name="Cache").click()
    lab.pressed("K bits", ["ArrowLeft"], [0, 1, 2])
    page.get_by_role("tab", name="Compare").click()
    page.get_by_role("button", name="Use it").click()
    lab.changes(page.get_by_role("tab", name="Cache").click, [0, 1, 2])  # a hidden page is not drawn

    # methods have their own widths and charts
    for method in ("rvq", "turboquant"):
        lab.changes(lambda method=method: lab.dropdown("method").select_option(method), [0, 2])
    lab.idle()

    times = lab.pressed("K bits", ["ArrowLeft", "ArrowLeft", "ArrowRight", "ArrowRight"], [0, 1, 2])
    with capsys.disabled():
        print(f"\nslider to three charts: {milliseconds(times)}")

    # above each chart are its purpose and a badge; the help is a link or names its notebook
    assert page.locator(f"{LAB} .veloxlab-badge", has_text="measured").first.get_attribute("title")
    assert page.locator(f"{LAB} .veloxlab-why", has_text="Which layers and heads lose most").is_visible()
    assert "00_tour.ipynb" in page.locator(f"{LAB} .veloxlab-help").locator("visible=true").first.get_attribute("title")

    # each window width has its number of columns, and the controls stay in sight
    page.evaluate("() => window.jupyterapp.shell.collapseLeft()")
    lab.laid_out(640, 900, columns=1)
    page.evaluate("() => window.jupyterapp.shell.expandLeft()")
    lab.laid_out(1920, 1000, columns=3)
    lab.laid_out(1440, 900, columns=2)
    tops = page.locator(f"{LAB} > .widget-tab > .lm-TabBar .lm-TabBar-tab").evaluate_all(
        "(tabs) => tabs.map((tab) => tab.offsetTop)"
    )
    assert max(tops) <= 1  # one row: the open page's tab is a pixel higher
    page.locator(lab.charts).nth(2).scroll_into_view_if_needed()
    inside = (
        "(() => { const at = document.querySelector('.jp-WindowedPanel-outer').getBoundingClientRect(); return %s })()"
    )
    head = "document.querySelector('.veloxlab-head').getBoundingClientRect().top - at.top"
    assert page.evaluate(inside % head) >= 0
    page.get_by_role("button", name="Compact").click()
    whole = "document.querySelector('.veloxlab-lab').offsetHeight < at.height"
    page.wait_for_function(f"() => {inside % whole}")
    page.get_by_role("button", name="Compact").click()

    lab.turns_dark()
    assert visit.errors == []
    assert visit.outside == []
