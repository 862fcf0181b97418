"""One widget of veloxlab in a page: its charts, its controls, and its progress bar."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from playwright.sync_api import Locator, Page

from veloxlab.views import theme

# for tests that do not depend on a model's answers; with enough layers and KV heads for the tests' steps
SMALL_MODEL = """
import veloxlab as vl
from tests.letters import Letters
from tests.tiny_models import tiny
model, tokenizer = tiny("llama", num_hidden_layers=9, num_attention_heads=6, num_key_value_heads=3), Letters()
"""

# The kernel answers requests in order: when this answer arrives, the page has all earlier messages.
ANSWERED = """async () => {
  const { kernel } = window.jupyterapp.shell.currentWidget.sessionContext.session;
  await kernel.requestExecute({ code: "", silent: true, store_history: false }).done;
  await new Promise((next) => requestAnimationFrame(() => requestAnimationFrame(next)));
}"""

# milliseconds: a check at each frame would make the page draw frames, and measure its charts, at full speed
INTERVAL = 50

IS_LIGHT = "document.body.dataset.jpThemeLight === '%s'"


def turn(page: Page, theme: str) -> None:
    """Set the theme of JupyterLab to ``"Light"`` or ``"Dark"``, and wait until it is applied."""
    page.evaluate(f"() => window.jupyterapp.commands.execute('apputils:change-theme', {{theme: 'JupyterLab {theme}'}})")
    page.wait_for_function("() => " + IS_LIGHT % ("true" if theme == "Light" else "false"), polling=INTERVAL)
    page.locator("#jupyterlab-splash").wait_for(state="detached")


class Shown:
    """The widget at a CSS selector.

    Attributes
    ----------
    box, charts : selectors of the widget and of its charts.
    """

    def __init__(self, page: Page, box: str) -> None:
        self.page, self.box, self.charts = page, box, f"{box} svg.marks"
        # the whole picture: a mark may move without a change of a word or of the picture's length
        self._pictures = f"[...document.querySelectorAll('{self.charts}')].map((chart) => chart.innerHTML)"
        # the bar of the open page: those of hidden pages do not change
        bars = f"[...document.querySelectorAll('{box} .widget-hprogress')]"
        self._bar = f"{bars}.find((bar) => bar.offsetParent !== null)?.style.visibility"

    def drawn(self, count: int) -> None:
        """Wait for so many charts; from then on record the times of the last user action and of the last change."""
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
        """Act, wait until these charts have changed, and return the milliseconds that this took.

        First it waits for charts that still change after an earlier act, so that they do not count for this one.
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
        """Press keys on the slider of this name, and return the milliseconds that these charts took after each."""
        self.page.locator(f"{self.box} .widget-slider", has_text=name).locator(".noUi-handle").nth(place).focus()
        return [self.changes(lambda key=key: self.page.keyboard.press(key), charts) for key in keys]

    def dropdown(self, name: str) -> Locator:
        """The dropdown of this name."""
        return self.page.locator(f"{self.box} .widget-dropdown", has_text=name).locator("select")

    def idle(self) -> None:
        """Wait until no measurement runs."""
        self.page.wait_for_function(f"() => {self._bar} === 'hidden'", polling=INTERVAL)

    def busy(self) -> None:
        """Wait until a measurement runs."""
        self.page.wait_for_function(f"() => {self._bar} === 'visible'", polling=INTERVAL)

    def laid_out(self, width: int, height: int, columns: int) -> None:
        """Resize the window, and wait until all charts are in so many columns, without sideways scroll."""
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
        """Set the dark theme of JupyterLab, and wait until the text of each visible chart has its colours."""
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
    """A median and its range, as text."""
    return f"median {statistics.median(times):.0f} ms of {len(times)} moves ({min(times):.0f} to {max(times):.0f})"
