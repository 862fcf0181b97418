"""Data from widgets and reports to a page: text stays text, and numbers are numbers, while the worker adds more."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import altair as alt
import ipywidgets
import polars as pl
import pytest

import veloxlab as vl
from tests.knobs import turn
from tests.letters import Letters
from tests.tiny_models import tiny
from veloxlab.allocate.ratequant import EVALUATED
from veloxlab.errors import InputError
from veloxlab.views import picture
from veloxlab.views.picture import Section, report
from veloxlab.widgets import ChartView, lifetime
from veloxlab.widgets.pages.budget_controls import PlanFile, history
from veloxlab.widgets.pages.cache import at_bits
from veloxlab.widgets.selection import Choice

HOSTILE = "<!-- <script> </script> --> \u2028 & \"'\\"
BITS = {0: (3, 4), 1: (4, 4)}


@pytest.fixture(scope="module")
def lab():
    lab = vl.Lab(tiny("llama"), Letters(), tokens=64, sinks=2, window=16)
    assert lab.wait(120)
    yield lab
    lab.close()


class Filled(dict[Any, Any]):
    """A dictionary that another thread fills at each step of a loop over it."""

    def _step(self, each: object) -> object:
        self[object()] = None
        return each

    def __iter__(self):
        return (self._step(key) for key in super().__iter__())

    def keys(self):
        return iter(self)

    def values(self):
        return (self._step(value) for value in super().values())

    def items(self):
        return (self._step(item) for item in super().items())


@pytest.mark.parametrize("page", ["cache", "keys"])
def test_a_page_asks_for_more_while_the_worker_fills_its_frames(lab, page):
    explorer = lab.turn_to(page)
    for name in ("found", "refused"):
        setattr(explorer, name, Filled(getattr(explorer, name)))
    turn(explorer, **({"key_bits": 3, "value_bits": 5} if page == "cache" else {"space": "rotated"}))
    assert explorer._complete


def test_each_layer_is_shown_at_its_own_bits(lab):
    frames = [
        pl.DataFrame(
            {"layer": [0, 1, 0, 1], "tensor": ["keys"] * 2 + ["values"] * 2, "at": width},
            schema_overrides={"layer": pl.Int32},
        )
        for width in (3, 4)
    ]
    assert at_bits(frames, BITS).rows() == [(0, "keys", 3), (1, "keys", 4), (0, "values", 4), (1, "values", 4)]


def test_a_failed_request_is_measured_again(lab, monkeypatch):
    page = lab.turn_to("cache")
    with monkeypatch.context() as patch:
        patch.setitem(page.MEASURES, "bits", lambda *_: 1 / 0)
        page.found.clear()  # these bits can have been measured ahead
        turn(page, key_bits=6)
        assert "ZeroDivisionError" in page._message.value
        assert page.bits.frame.filter(tensor="keys", part="codes")["bits_per_value"].max() != 6
    turn(page, sinks=3)
    assert page.bits.frame.filter(tensor="keys", part="codes")["bits_per_value"].max() == 6


def test_pages_are_read_while_others_are_made(lab):
    lab.turn_to("memory")
    seen = []
    for name in lab.pages:
        seen.append(name)
        lab.turn_to("errors")
    assert "memory" in seen
    assert "errors" in lab.pages


def test_bits_of_layers_are_read_while_others_are_set(lab):
    lab.layer, lab.key_bits = 0, 3
    before = lab.selection.choice
    lab.layer, lab.key_bits = 1, 5
    assert before.own_bits == {0: (3, lab.value_bits)}
    assert {layer: bits[0] for layer, bits in lab.selection.choice.own_bits.items()} == {0: 3, 1: 5}
    lab.selection.choose(own_bits={}, layer=None)


def test_text_in_a_report_cannot_open_or_close_elements():
    frame = pl.DataFrame({"x": [HOSTILE], "y": [math.nan]})
    spec = alt.Chart(frame, title=HOSTILE).mark_bar().encode(x="x:N", y="y:Q").to_dict()
    section = Section(HOSTILE, HOSTILE, chart=spec, table=pl.DataFrame({HOSTILE: [HOSTILE]}), code=HOSTILE)
    script = f"export const vegaEmbed = {json.dumps(HOSTILE)};"
    page = report(HOSTILE, [section], script)
    assert "<!--" not in page
    assert page.count("<script") == page.count("</script>") == 3
    charts, vega = re.findall(r'<script type="application/json" id="\w+">(.*?)</script>', page, re.DOTALL)
    assert json.loads(vega) == script
    (shown,) = json.loads(charts, parse_constant=pytest.fail)["specs"]
    assert shown["title"] == HOSTILE
    assert next(iter(shown["datasets"].values())) == [{"x": HOSTILE, "y": None}]


def test_text_in_a_table_of_plans_and_in_a_line_of_code_stays_text(lab, monkeypatch):
    row = dict.fromkeys(EVALUATED, 1) | {"kind": "allocated", "name": HOSTILE}
    shown = history(pl.DataFrame([row], schema=EVALUATED, strict=False))
    assert "<script" not in shown
    assert "&lt;script&gt;" in shown
    page = lab.turn_to("cache")
    monkeypatch.setattr(Choice, "lines", lambda *_: [HOSTILE])
    page._redraw()
    assert page._code.value == HOSTILE  # a page shows it as text content


def as_html(widget: ipywidgets.Widget) -> Iterator[str]:
    """Yield the HTML that a widget, and all widgets in it, send to a browser."""
    assert not getattr(widget, "description_allow_html", False)
    if isinstance(widget, ipywidgets.HTML | ipywidgets.HTMLMath):
        yield widget.value
    for child in getattr(widget, "children", ()):
        yield from as_html(child)


def test_external_text_is_not_markup_on_any_page(lab):
    for name in ("cache", "errors", "keys", "generation", "memory"):
        page = lab.turn_to(name)
        page.say(HOSTILE)  # as the message of an error
    page = lab.turn_to("generation")
    page.prompt = HOSTILE
    shown = [*as_html(lab)]
    assert sum("&lt;script&gt;" in text for text in shown) >= 5
    assert not [text for text in shown if "<script" in text or "<!--" in text]
    page.prompt = "Once"


def test_a_path_is_not_markup_where_a_plan_is_saved(tmp_path):
    box = PlanFile(lambda: SimpleNamespace(calibrations={}, save=vl.Plan.uniform(tiny("llama")).save))
    box.path.value = f"{tmp_path}/none/<script>/plan.json"
    box._clicked()
    assert "There is no folder" in box.said.value
    assert not [text for text in as_html(box) if "<script" in text]


def test_the_line_that_loads_a_plan_is_valid_python_for_any_path():
    box = PlanFile(lambda: SimpleNamespace(calibrations={}))
    box.path.value = 'C:\\plans\\new "one".json'
    code = ast.parse(box.code.value)
    (path,) = [node.value for node in ast.walk(code) if isinstance(node, ast.Constant)]
    assert path == box.path.value


def test_ids_of_a_drawing_get_a_prefix_and_its_texts_do_not():
    frame = pl.DataFrame({"x": ['id="clip0" url(#z)'], "y": [1]})
    chart = alt.Chart(frame).mark_bar(clip=True).encode(x="x:N", y="y:Q")
    drawing = picture._apart(picture.svg(chart.to_dict()), "chart3-")
    assert '>id="clip0" url(#z)<' in drawing
    (clip,) = re.findall(r'<clipPath id="(\w+-clip\d+)"', drawing)
    assert clip.startswith("chart3-")
    assert f"url(#{clip})" in drawing


def test_no_widget_sends_a_number_that_json_does_not_have(lab):
    for page in ("errors", "keys", "memory"):
        lab.turn_to(page)
    for value in (math.nan, math.inf):
        with pytest.raises(InputError, match="memory_gb"):
            lab.pages["memory"].memory_gb = value
    level = alt.param(name="level", value=1.0)
    view = ChartView(alt.Chart(pl.DataFrame({"x": [1.0]})).mark_point().encode(x="x:Q").add_params(level))
    view.put(pl.DataFrame({"x": [math.nan]}), level=[math.inf, 1.0])
    assert view.content["params"]["level"] == [None, 1.0]
    view.put(level=math.nan)
    for widget in [*lifetime.parts(lab), view]:
        state = widget.get_state()
        content = state.pop("content", {"datasets": {}})
        for rows in content["datasets"].values():
            json.loads(rows, parse_constant=pytest.fail)
        json.dumps([state, {**content, "datasets": {}}], allow_nan=False)


# the legend


def test_the_legend_of_a_page_has_only_the_marks_of_its_charts(lab):
    def said(page: str) -> list[str]:
        panel = lab.turn_to(page)
        assert lab.wait(120)
        return re.findall(r"</b> ([^<]*)<", panel._legend.value)

    assert said("cache") == ["keys", "values", "exact", "picked", "not finite", "above the scale"]
    assert said("errors") == ["keys", "values", "picked", "not finite"]
    assert said("tokens")[2:4] == ["exact", "compressed"]
    assert said("compare") == []  # without a chart before its first measurement
    lab.measure()
    assert said("compare") == ["picked"]
