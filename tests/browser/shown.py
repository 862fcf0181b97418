"""One widget of ours as a page shows it: what its charts say, its knobs, and how it waits."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from playwright.sync_api import Locator, Page

from veloxlab.views import theme

# for what is not about a model's answers; with as many layers and KV heads as the tests walk through
SMALL_MODEL = """
import veloxlab as vl
from tests.letters import Letters
from tests.tiny_models import tiny
model, tokenizer = tiny("llama", num_hidden_layers=9, num_attention_heads=6, num_key_value_heads=3), Letters()
"""

# The kernel answers in the order in which it was asked: what it sent before this answer is in the page by then.
ANSWERED = """async () => {
  const { kernel } = window.jupyterapp.shell.currentWidget.sessionContext.session;
  await kernel.requestExecute({ code: "", silent: true, store_history: false }).done;
  await new Promise((next) => requestAnimationFrame(() => requestAnimationFrame(next)));
}"""

# milliseconds: a look at every frame would make the page draw frames, and measure its charts, as fast as it can
INTERVAL = 50

IS_LIGHT = "document.body.dataset.jpThemeLight === '%s'"


def turn(page: Page, theme: str) -> None:
    """Turn JupyterLab to the theme ``"Light"`` or ``"Dark"``, and wait until it has turned."""
    page.evaluate(f"() => window.jupyterapp.commands.execute('apputils:change-theme', {{theme: 'JupyterLab {theme}'}})")
    page.wait_for_function("() => " + IS_LIGHT % ("true" if theme == "Light" else "false"), polling=INTERVAL)
    page.locator("#jupyterlab-splash").wait_for(state="detached")


class Shown:
    """The widget that is at a CSS selector.

    Attributes
    ----------
    box, charts : selectors, of the widget and of the charts in it.
    """

    def __init__(self, page: Page, box: str) -> None:
        self.page, self.box, self.charts = page, box, f"{box} svg.marks"
        # a mark may move, and neither a word nor the length of the picture change with it
        self._pictures = f"[...document.querySelectorAll('{self.charts}')].map((chart) => chart.innerHTML)"
        # the open page's: those of hidden pages stand still
        bars = f"[...document.querySelectorAll('{box} .widget-hprogress')]"
        self._bar = f"{bars}.find((bar) => bar.offsetParent !== null)?.style.visibility"

    def drawn(self, count: int) -> None:
        """Wait for so many charts, and from then on note when a person acts and when a chart last changed."""
        self.page.locator(self.charts).nth(count - 1).wait_for()
        self.page.evaluate(
            f"""() => {{
              window.moved = {{ acted: 0, drawn: 0 }};
              for (const event of ["keydown", "change"])
                window.addEventListener(event, () => {{ window.moved.acted = performance.now(); }}, true);
              const observer = new MutationObserver(() => {{ window.moved.drawn = performance.now(); }});
              for (const chart of document.querySelectorAll("{self.box} .veloxlab-chart"))
                observer.observe(chart, {{ subtree: true, childList: true, attributes: true, characterData: true }});
            }}"""
        )

    def changes(self, act: Callable[[], object], charts: Sequence[int]) -> float:
        """Act, wait until these charts show something new, and give the milliseconds until they did.

        Charts that still show an earlier act are waited for first: they would be taken for the answer to this one.
        """
        self.page.evaluate(ANSWERED)
        self.page.wait_for_function(
            f"() => document.querySelector('{self.box} [aria-busy=true]') === null", polling=INTERVAL
        )
        self.page.evaluate(f"() => {{ window.before = {self._pictures}; }}")
        act()
        self.page.wait_for_function(
            f"(charts) => {{ const now = {self._pictures}; return charts.every((i) => now[i] !== window.before[i]); }}",
            arg=list(charts),
            polling=INTERVAL,
        )
        return float(self.page.evaluate("() => window.moved.drawn - window.moved.acted"))

    def pressed(self, name: str, keys: Sequence[str], charts: Sequence[int], place: int = 0) -> list[float]:
        """Press keys on the slider of this name, and give how long these charts took after each."""
        self.page.locator(f"{self.box} .widget-slider", has_text=name).locator(".noUi-handle").nth(place).focus()
        return [self.changes(lambda key=key: self.page.keyboard.press(key), charts) for key in keys]

    def dropdown(self, name: str) -> Locator:
        """Give the list of this name."""
        return self.page.locator(f"{self.box} .widget-dropdown", has_text=name).locator("select")

    def idle(self) -> None:
        """Wait until nothing is measured any more."""
        self.page.wait_for_function(f"() => {self._bar} === 'hidden'", polling=INTERVAL)

    def busy(self) -> None:
        """Wait until something is measured."""
        self.page.wait_for_function(f"() => {self._bar} === 'visible'", polling=INTERVAL)

    def laid_out(self, width: int, height: int, columns: int) -> None:
        """Give the window a size, and wait for so many columns, in which every chart lies, and no sideways scroll."""
        self.page.set_viewport_size({"width": width, "height": height})
        self.page.wait_for_function(
            f"""(columns) => {{
              const grid = [...document.querySelectorAll(".veloxlab-grid")].find((each) => each.offsetParent);
              const out = document.querySelector("{self.box}").closest(".jp-OutputArea-output");
              const charts = [...grid.querySelectorAll("svg.marks")].map((each) => each.getBoundingClientRect().width);
              const room = (grid.clientWidth - 20 * (columns - 1)) / columns;
              return getComputedStyle(grid).gridTemplateColumns.split(" ").length === columns &&
                out.scrollWidth <= out.clientWidth && charts.every((wide) => wide > room - 40 && wide < room + 1);
            }}""",
            arg=columns,
            polling=INTERVAL,
        )

    def turns_dark(self) -> None:
        """Turn JupyterLab dark, and wait until the words of every chart that is seen are of its ink."""
        turn(self.page, "Dark")
        light, dark = (theme.INK[mode]["soft"] for mode in ("light", "dark"))
        self.page.wait_for_function(
            f"""() => [...document.querySelectorAll("{self.charts}")].every((chart) => {{
              if (!chart.checkVisibility()) return true;
              const fills = [...chart.querySelectorAll("text")].map((text) => text.getAttribute("fill"));
              return fills.includes("{dark}") && !fills.includes("{light}");
            }})""",
            polling=INTERVAL,
        )


def milliseconds(times: Sequence[float]) -> str:
    """Say a median and its spread."""
    return f"median {statistics.median(times):.0f} ms of {len(times)} moves ({min(times):.0f} to {max(times):.0f})"
