"""The chart's front end alone, in an empty page: drawing, patches, picks, theme, size and its end."""

from __future__ import annotations

import json
from typing import Any

import altair as alt
import polars as pl
import pytest

from veloxlab import views
from veloxlab.measure.tokens import ATTENDED
from veloxlab.widgets.chart_view import STATIC, ChartView
from veloxlab.widgets.layout import STYLE

pytestmark = pytest.mark.browser

BARS = ".mark-rect path"
SVG = "svg.marks"


def frame(*heights: float) -> pl.DataFrame:
    return pl.DataFrame({"layer": range(len(heights)), "error": heights}, schema_overrides={"error": pl.Float64})


def bars(*heights: float) -> alt.Chart:
    marked = alt.condition("datum.layer === picked_layer", alt.value("#d8435c"), alt.value("#3b7dd8"))
    return (
        alt.Chart(frame(*heights), title=alt.TitleParams(text=alt.expr("caption")), width=300, height=120)
        .mark_bar()
        .encode(x="layer:O", y=alt.Y("error:Q").scale(domain=[0, 10]), color=marked)
        .add_params(alt.param(name="picked_layer", value=None), alt.param(name="caption", value="first"))
    )


def state(view: ChartView) -> dict[str, Any]:
    datasets = {name: rows.decode() for name, rows in view.content["datasets"].items()}
    content = {**view.content, "datasets": datasets}
    return {"runtime": "IPY_MODEL_r", "spec": view.spec, "content": content, "picked": view.picked}


def open_chart(bare, view: ChartView, name: str = "one", *, shared: bool = True) -> None:
    runtime = {key: getattr(view.runtime, key) for key in ("version", "code", "themes")}
    code = (STATIC / "chart_view.js").read_text()
    bare.page.evaluate("(given) => lab.open(...given)", [name, code, state(view), runtime, shared])


def send(bare, view: ChartView, name: str = "one") -> None:
    """Send the page the newest state, as the comm would, and wait until it is drawn."""
    now = state(view)
    for key in ("spec", "content", "picked"):
        bare.page.evaluate("([name, key, value]) => lab.charts[name].model.set(key, value)", [name, key, now[key]])
    wait_for(bare, f"document.querySelector('#{name} .veloxlab-chart').dataset.revision === '{view.revision}'")


def wait_for(bare, condition: str) -> None:
    bare.page.wait_for_function(f"() => {condition}", timeout=10_000)


def heights(bare, name: str = "one") -> list[float]:
    return bare.page.evaluate(
        "(css) => [...document.querySelectorAll(css)].map((bar) => Math.round(bar.getBBox().height))", f"#{name} {BARS}"
    )


def fills(bare, name: str = "one") -> list[str]:
    css = f"#{name} {BARS}"
    return bare.page.evaluate("(css) => [...document.querySelectorAll(css)].map((b) => b.getAttribute('fill'))", css)


def picked(bare, name: str = "one") -> int | None:
    return bare.page.evaluate("(name) => lab.charts[name].model.get('picked')", name)


def tag_svg(bare, name: str = "one") -> None:
    bare.page.evaluate("(css) => { document.querySelector(css).dataset.kept = 'yes'; }", f"#{name} {SVG}")


def kept_svg(bare, name: str = "one") -> bool:
    return bare.page.locator(f"#{name} {SVG}").get_attribute("data-kept") == "yes"


def test_new_numbers_patch_the_chart_without_embedding_it_anew(bare):
    view = ChartView(bars(5, 10))
    open_chart(bare, view)
    assert heights(bare) == [60, 120]
    assert "first" in bare.page.locator(f"#one {SVG}").text_content()
    tag_svg(bare)
    view.put(frame(10, 5, float("nan"), 2.5), caption="second")
    send(bare, view)
    assert heights(bare) == [120, 60, 30]  # NaN has no bar
    assert "second" in bare.page.locator(f"#one {SVG}").text_content()
    view.show(bars(1))
    send(bare, view)
    assert heights(bare) == [12]
    assert kept_svg(bare)
    view.show(bars(1).mark_bar(opacity=0.5))
    send(bare, view)
    assert not kept_svg(bare)
    assert bare.errors == []
    assert bare.outside == []


def test_a_chart_says_that_it_is_busy_until_the_newest_numbers_are_drawn(bare):
    view = ChartView(bars(5))
    open_chart(bare, view)
    busy = """(content) => {
      const { el, model } = lab.charts.one;
      model.set("content", content);
      return el.ariaBusy;
    }"""
    for height in (10, 2.5):  # the second arrives while the first is drawn
        view.put(frame(height))
        assert bare.page.evaluate(busy, state(view)["content"]) == "true"
    wait_for(bare, "lab.charts.one.el.ariaBusy === 'false'")
    assert heights(bare) == [30]


# the elements of a chart, sorted, with rounded numbers: neither their order nor Vega's rounding matters
DRAWN = """(name) => [...document.querySelectorAll(`#${name} svg.marks :is(path, line, text, rect)`)]
  .map((mark) => ["d", "transform", "fill", "opacity", "stroke", "x2", "y2"]
    .map((own) => mark.getAttribute(own) ?? "")
    .map((own) => own.replace(/url.*/, "url").replace(/-?\\d+\\.\\d+/g, (n) => Number(n).toFixed(3)))
    .join() + mark.textContent)
  .sort()"""


def spent(*parts: tuple[int, str, str, float]) -> alt.VConcatChart:
    rows = pl.DataFrame(parts, ["layer", "tensor", "part", "bits_per_value"], orient="row")
    return views.bit_allocation(rows, greatest=9)


def attended(*keys: tuple[int, float]) -> alt.VConcatChart:
    rows = [
        {"key": key, "key_end": key + 1, "weight": weight, "exact_weight": weight / 2, "error": 0.1, "state": "codes"}
        for key, weight in keys
    ]
    return views.attended_keys(pl.DataFrame(rows, ATTENDED).with_columns(text=pl.format("word {}", "key")))


def attended_moves() -> list[alt.VConcatChart]:
    counts = ((1, 3), (2, 4), (3, 12), (4, 2))
    return [attended(*((key, 0.5 / (key + i)) for key in range(count))) for i, count in counts]


def stacked_moves() -> list[alt.VConcatChart]:
    others = ((0, "keys", "scales", 0.5), (1, "keys", "codes", 2.0), (1, "keys", "scales", 1.0))
    return [spent((0, "keys", "codes", bits), *others) for bits in (3.0, 5.0, 2.5)]


def filtered_moves() -> list[alt.Chart]:
    return [bars(*heights).transform_filter("datum.error > 3") for heights in ((5, 10, 2), (1, 10, 4), (5, 4, 2))]


@pytest.mark.parametrize("make", [stacked_moves, attended_moves, filtered_moves])
def test_a_chart_that_was_patched_looks_as_one_drawn_anew(bare, make):
    moves = make()
    view = ChartView(moves[0])
    open_chart(bare, view)
    tag_svg(bare)
    for i, chart in enumerate([*moves, *moves]):
        view.show(chart)
        send(bare, view)
        open_chart(bare, ChartView(chart), f"new{i}")
        assert bare.page.evaluate(DRAWN, "one") == bare.page.evaluate(DRAWN, f"new{i}")
    assert kept_svg(bare)
    assert bare.errors == []


def test_a_patch_keeps_the_marks_of_its_rows_measures_nothing_and_sends_the_kernel_nothing(bare):
    log: list[str] = []
    bare.page.on("console", lambda message: log.append(message.text))
    view = ChartView(bars(5, 10).transform_filter("datum.error < 100").encode(y=alt.Y("error:Q").scale(domainMin=0)))
    open_chart(bare, view)
    view.put(frame(10, 5))
    send(bare, view)
    bare.page.evaluate("lab.countMeasures()")
    bare.page.evaluate(f"document.querySelector('#one {BARS}').dataset.kept = 'yes'")
    view.put(frame(2, 5), caption="moved")
    send(bare, view)
    assert heights(bare) == [48, 120]
    assert bare.page.locator("#one path[data-kept]").count() == 1
    view.put(frame(200, 200))  # a scale without rows
    send(bare, view)
    assert bare.page.evaluate("[lab.measures(), lab.charts.one.model.saves()]") == [0, 0]
    assert log == []  # no warnings of Vega, which take a millisecond each


def test_what_nobody_sees_is_drawn_once_it_is_seen(bare):
    view = ChartView(bars(5, 10))
    open_chart(bare, view)
    box = "document.querySelector('#one')"
    hidden = "new Promise((next) => requestAnimationFrame(() => setTimeout(next)))"
    bare.page.evaluate(f"({box}.style.display = 'none', {hidden})")
    view.put(frame(10, 5))
    bare.page.evaluate("(content) => lab.charts.one.model.set('content', content)", state(view)["content"])
    bare.page.evaluate(hidden)
    assert bare.page.locator("#one .veloxlab-chart").get_attribute("data-revision") == "1"
    bare.page.evaluate(f"{box}.style.display = ''")
    wait_for(bare, f"{box}.querySelector('.veloxlab-chart').dataset.revision === '2'")
    assert heights(bare) == [120, 60]


def test_a_click_picks_a_layer_in_every_linked_chart_and_a_second_click_clears_it(bare):
    for name in ("one", "two"):
        open_chart(bare, ChartView(bars(5, 10, 5)), name)
    bare.page.evaluate("lab.link('one', 'two')")
    bare.page.locator(f"#one {BARS}").nth(1).click()
    wait_for(bare, "lab.charts.two.model.get('picked') === 1")
    wait_for(bare, f"document.querySelectorAll('#two {BARS}')[1].getAttribute('fill') === '#d8435c'")
    assert fills(bare, "one") == fills(bare, "two") == ["#3b7dd8", "#d8435c", "#3b7dd8"]
    bare.page.locator(f"#two {BARS}").nth(1).click()
    wait_for(bare, f"document.querySelectorAll('#one {BARS}')[1].getAttribute('fill') === '#3b7dd8'")
    assert picked(bare, "one") is None
    bare.page.locator(f"#two {BARS}").nth(2).click()
    assert picked(bare, "one") == 2
    bare.page.locator(f"#one {SVG}").click(position={"x": 200, "y": 4})
    assert picked(bare, "two") is None


def test_a_chart_grows_with_its_caption(bare):
    view = ChartView(
        views.memory_growth(pl.DataFrame({"tokens": [1], "cache": ["a"], "bytes": [1], "kind": ["measured"]}))
    )
    open_chart(bare, view)
    width = "() => document.querySelector('#one svg.marks').clientWidth"
    before = bare.page.evaluate(width)
    view.put(caption="a caption " * 20)
    send(bare, view)
    assert bare.page.evaluate(width) > before + 100


@pytest.mark.parametrize(("draw", "metric"), [(views.token_heads, "error"), (views.error_map, "rel_mse")])
def test_a_click_and_arrow_keys_pick_a_layer_and_a_head(bare, draw, metric):
    cells = [(*at, "keys", 0.1) for at in ((0, 0), (0, 1), (1, 0), (1, 1))]
    open_chart(bare, ChartView(draw(pl.DataFrame(cells, ["layer", "head", "tensor", metric], orient="row"))))
    cell = "#one [aria-label*='layer: 1'][aria-label*='KV head: 0']"
    now = "[lab.charts.one.model.get('picked'), lab.charts.one.model.get('picked_head')]"
    bare.page.locator(cell).first.click()
    assert bare.page.evaluate(now) == [1, 0]
    bare.page.locator(f"#one {SVG}").click(position={"x": 200, "y": 4})  # outside all cells
    assert bare.page.evaluate(now) == [1, 0]
    bare.page.locator("#one .veloxlab-chart").focus()
    for key, expected in (("ArrowDown", [1, 1]), ("ArrowLeft", [0, 1]), ("ArrowUp", [0, 0])):
        bare.page.keyboard.press(key)
        assert bare.page.evaluate(now) == expected
    frames = "document.querySelectorAll('#one path[stroke=\"#d8435c\"]').length"
    wait_for(bare, f"{frames} === {1 if draw is views.token_heads else 2}")  # of lines by layer there is one more
    bare.page.locator("#one [aria-label*='layer: 0'][aria-label*='KV head: 0']").first.click()
    assert bare.page.evaluate(now) == [None, 0]
    assert bare.errors == []


def test_a_layer_picked_in_python_is_marked(bare):
    view = ChartView(bars(5, 10), picked=0)
    open_chart(bare, view)
    assert fills(bare) == ["#d8435c", "#3b7dd8"]
    view.picked = 1
    send(bare, view)
    wait_for(bare, f"document.querySelectorAll('#one {BARS}')[1].getAttribute('fill') === '#d8435c'")


def test_arrow_keys_pick_layers_before_the_page_takes_them(bare):
    open_chart(bare, ChartView(bars(5, 10, 5)))
    bare.page.keyboard.press("Tab")
    bare.page.evaluate("document.addEventListener('keydown', (e) => { window.taken = e.key; }, true)")
    for key, expected in (("ArrowRight", 0), ("ArrowRight", 1), ("End", 2), ("ArrowLeft", 1), ("Escape", None)):
        bare.page.keyboard.press(key)
        assert picked(bare) == expected
    assert bare.page.evaluate("window.taken") is None, "the page saw a key that the chart uses"
    bare.page.keyboard.press("Shift+Enter")
    assert bare.page.evaluate("window.taken") == "Enter"


@pytest.mark.parametrize(
    "darken",
    [
        "document.body.dataset.jpThemeLight = 'false'",
        "document.body.classList.add('vscode-dark')",
        "document.body.style.background = '#111'",
    ],
)
def test_a_dark_ground_gives_light_text_at_once(bare, darken):
    open_chart(bare, ChartView(bars(5, 10)))
    label = bare.page.locator(f"#one {SVG} .role-axis-label text").first
    light = label.get_attribute("fill")
    bare.page.evaluate(darken)
    wait_for(bare, f"document.querySelector('#one .role-axis-label text').getAttribute('fill') !== '{light}'")
    assert label.get_attribute("fill") == "#a3abb5"
    assert heights(bare) == [60, 120]


@pytest.mark.parametrize("white", ["color(srgb 1 1 1)", "oklch(1 0 0)"])
def test_a_white_ground_is_known_in_every_way_to_write_a_colour(bare, white):
    bare.page.evaluate("document.body.style.background = '#111'")
    open_chart(bare, ChartView(bars(5, 10)))
    label = bare.page.locator(f"#one {SVG} .role-axis-label text").first
    assert label.get_attribute("fill") == "#a3abb5"
    bare.page.evaluate(f"document.body.style.background = '{white}'")
    wait_for(bare, "document.querySelector('#one .role-axis-label text').getAttribute('fill') !== '#a3abb5'")


def test_a_legend_keeps_its_colours_beside_a_chart_of_another_vega(bare):
    # JupyterLab's own Vega also numbers its gradients from 0, and a page uses the first element of a name
    other = "<svg width=9 height=9><defs><linearGradient id='gradient_0'></linearGradient></defs></svg>"
    bare.page.evaluate("(svg) => { document.body.innerHTML = svg; }", other)
    view = ChartView(bars(5, 10).encode(color=alt.Color("error:Q")))
    open_chart(bare, view)
    mine = """() => {
      const filled = document.querySelector("#one [fill^='url']").getAttribute("fill");
      return document.querySelector(filled.match(/#[^)]*/)[0]).closest("#one") !== null;
    }"""
    assert bare.page.evaluate(mine)
    view.put(frame(1, 2, 3))
    send(bare, view)
    assert bare.page.evaluate(mine)


def test_a_legend_keeps_its_bar_beside_the_same_chart_on_a_hidden_page(bare):
    """As in two laboratories: each chart has its own copy of the code, and a hidden gradient draws nothing."""
    for name in ("one", "two"):
        open_chart(bare, ChartView(bars(5, 10).encode(color=alt.Color("error:Q"))), name)
    bare.page.evaluate("document.querySelector('#one').style.display = 'none'")
    mine = """() => [...document.querySelectorAll("#two [fill^='url']")].map((bar) =>
      document.querySelector(bar.getAttribute("fill").match(/#[^)"]*/)[0]).closest("#two") !== null)"""
    assert bare.page.evaluate(mine) == [True]


def test_a_legend_keeps_its_colours_after_any_redraw(bare):
    """Vega restores its own names whenever it draws, and the page may start a redraw at any time."""
    view = ChartView(bars(5, 10).encode(color=alt.Color("error:Q")))
    open_chart(bare, view)
    dangling = """() => [...document.querySelectorAll("#one [fill^='url']")]
      .filter((mark) => document.querySelector(mark.getAttribute("fill").match(/#[^)]*/)[0]) === null).length"""
    bare.page.evaluate("document.querySelector('#one linearGradient').id = 'gradient_0'")
    bare.page.evaluate("new Promise((next) => setTimeout(next))")
    assert bare.page.evaluate(dangling) == 0
    assert bare.page.locator("#one linearGradient[id^='gradient_']").count() == 0


@pytest.mark.parametrize("name", ["memory", "attention"])
def test_a_chart_of_a_page_is_as_wide_as_its_column_and_follows_it(bare, name):
    blocks = [(0, 32), (32, 64)]
    rows = [
        {"kind": kind, "query": q, "query_end": end, "key": k, "key_end": to, "weight": 0.1, "moved": 0.1}
        for kind in ("exact", "compressed", "difference")
        for q, end in blocks
        for k, to in blocks
    ]
    growth = pl.DataFrame({"tokens": [1, 2], "cache": ["fp16"] * 2, "bytes": [10**6, 10**7], "kind": ["measured"] * 2})
    view = ChartView(views.memory_growth(growth) if name == "memory" else views.attention_maps(pl.DataFrame(rows)))
    view.put(caption="words that are longer than a narrow column " * 3)
    bare.page.add_style_tag(path=STATIC / "chart_view.css")
    bare.page.evaluate("document.body.className = 'veloxlab-grid'")
    open_chart(bare, view)
    tag_svg(bare)
    for width in (720, 480, 640):
        bare.page.set_viewport_size({"width": width, "height": 700})
        wide = "document.querySelector('#one svg.marks').getBoundingClientRect().width"
        room = "document.querySelector('#one .veloxlab-chart').clientWidth"
        wait_for(bare, f"{room} - {wide} >= 0 && {room} - {wide} < 12")
    plot = bare.page.evaluate(
        "[...document.querySelectorAll('#one .background')].map((e) => e.getBBox()).filter((b) => b.width > 50)"
        ".map((b) => b.width / b.height)"
    )
    assert name == "memory" or plot[0] == pytest.approx(1, abs=0.02)  # a square map stays square
    assert kept_svg(bare)
    label = bare.page.locator("#one .veloxlab-chart").get_attribute("aria-label")
    assert "words that are longer than a narrow column" in label
    assert bare.page.locator("#one text tspan").count() >= 2
    assert bare.page.evaluate("document.documentElement.scrollWidth") <= 640
    assert bare.errors == []


def test_closing_leaves_no_listener_and_no_element(bare):
    before = bare.page.evaluate("lab.pageListeners()")
    open_chart(bare, ChartView(bars(5, 10)))
    bare.page.evaluate("document.querySelector('#one .veloxlab-chart').focus()")  # it then listens for keys
    assert bare.page.evaluate("lab.charts.one.model.listeners()") == 7
    assert bare.page.evaluate("lab.pageListeners()") >= before + 3
    bare.page.evaluate("lab.charts.one.cleanup()")
    assert bare.page.evaluate("lab.charts.one.model.listeners()") == 0
    assert bare.page.evaluate("lab.pageListeners()") == before
    assert bare.page.evaluate("lab.charts.one.el.childElementCount") == 0
    bare.page.evaluate("lab.charts.one.model.set('picked', 1)")
    assert bare.errors == []


def test_a_view_whose_output_was_cleared_is_drawn_again_with_the_newest_numbers(bare):
    view = ChartView(bars(5, 10))
    open_chart(bare, view)
    bare.page.evaluate("lab.charts.one.cleanup()")
    view.put(frame(10, 5))
    bare.page.evaluate("(content) => lab.charts.one.model.set('content', content)", state(view)["content"])
    bare.page.evaluate("lab.charts.one.draw()")
    assert heights(bare) == [120, 60]
    bare.page.evaluate("lab.charts.one.draw()")  # a second view, as for an output in its own window
    view.put(frame(2.5))
    send(bare, view)
    wait_for(bare, "[...document.querySelectorAll('#one .veloxlab-chart')].every((e) => e.dataset.revision === '3')")
    assert heights(bare) == [30, 30]
    assert bare.errors == []


def test_a_broken_update_says_so_and_the_next_one_is_drawn(bare):
    view = ChartView(bars(5, 10))
    open_chart(bare, view)
    broken = {**state(view)["content"], "datasets": {"data-0": "{"}, "revision": 2}
    bare.page.evaluate("(content) => lab.charts.one.model.set('content', content)", broken)
    sentence = bare.page.locator("#one .veloxlab-sentence")
    sentence.wait_for(state="visible")
    assert sentence.text_content().startswith("This chart could not be drawn: ")
    for _ in range(2):
        view.put(frame(10, 5))
    send(bare, view)
    assert heights(bare) == [120, 60]
    sentence.wait_for(state="hidden")


def test_a_host_without_a_widget_manager_gets_the_bundle_from_the_chart_itself(bare):
    view = ChartView(bars(5, 10))
    open_chart(bare, view, shared=False)
    assert heights(bare) == [60, 120]
    assert json.loads(bare.page.evaluate("JSON.stringify(lab.charts.one.model.sent)")) == [{"wants": "runtime"}]


def test_a_legend_keeps_its_bar_when_a_redraw_names_the_gradient_anew(bare):
    rows = pl.DataFrame({"layer": [0, 1], "head": [0, 0], "tensor": ["keys", "keys"], "error": [0.1, 0.2]})
    open_chart(bare, ChartView(views.token_heads(rows)))
    bar = "document.querySelector('#one [data-gradient]')"
    there = f"document.getElementById({bar}.getAttribute('fill').slice(5, -1)) !== null"
    wait_for(bare, f"{bar} && {there}")
    bare.page.evaluate(
        f"(() => {{ const bar = {bar}; bar.setAttribute('fill', `url(#${{bar.dataset.gradient}})`); }})()"
    )
    wait_for(bare, there)
    assert bare.errors == []


def test_a_legend_keeps_its_bar_when_vega_gives_it_a_gradient_and_forgets_the_old_one(bare):
    """Vega keeps old gradients until a redraw, then renames the element and does not change the bar."""
    open_chart(bare, ChartView(bars(5, 10).encode(color=alt.Color("error:Q"))))
    bar = "document.querySelector('#one [data-gradient]')"
    there = f"document.getElementById({bar}.getAttribute('fill').slice(5, -1)) !== null"
    first = "document.querySelector('#one linearGradient')"
    wait_for(bare, f"{bar} && {there}")
    steps = (
        f"const a = {first}; const b = a.cloneNode(true); delete b.dataset.name; a.after(b); a.id = 'gradient_0'; "
        f"b.id = 'gradient_9'; {bar}.setAttribute('fill', 'url(#gradient_9)')",
        f"{first}.nextSibling.remove(); {first}.id = 'gradient_9'",
    )
    for step in steps:
        bare.page.evaluate(f"(() => {{ {step} }})()")
        bare.page.evaluate("new Promise((next) => setTimeout(next))")
        assert bare.page.evaluate(there), step
    assert bare.errors == []


def test_controls_show_their_words_and_are_seen_in_the_dark(bare):
    rows = "".join(f"<option {state}>a" for state in ("", "selected"))
    parts = "<label class='widget-label' style='width: 80px; overflow: hidden'>memory (GB), long</label>"
    parts = f"<div class='widget-inline-hbox' style='display: flex; width: 222px'>{parts}<input size=30></div>"
    page = (
        f"<div class='veloxlab-page'><div class='veloxlab-controls'>{parts}</div><select size=2>{rows}</select></div>"
    )
    bare.page.evaluate("(html) => { document.body.innerHTML = html; }", STYLE + page)
    assert bare.page.evaluate(
        "(({scrollWidth, clientWidth}) => scrollWidth <= clientWidth)(document.querySelector('label'))"
    )
    style = "getComputedStyle(document.querySelector('{}')).{}"
    assert bare.page.evaluate(style.format("option:checked", "backgroundImage")).startswith(
        "linear-gradient(rgb(59, 125"
    )
    assert bare.page.evaluate(style.format("select", "colorScheme")) == "normal"
    bare.page.evaluate("document.body.dataset.jpThemeLight = 'false'")
    assert bare.page.evaluate(style.format("select", "colorScheme")) == "dark"
    arrow = style.format(".veloxlab-page", "getPropertyValue('--jp-widgets-dropdown-arrow')")
    assert "fill='%23ccc'" in bare.page.evaluate(arrow)
