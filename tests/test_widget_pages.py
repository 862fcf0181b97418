"""What widgets and reports send to a page: text stays text, and numbers are numbers, while the worker adds more."""

from __future__ import annotations

import ast
import json
import math
import re
from html import unescape
from typing import Any

import altair as alt
import polars as pl
import pytest

import veloxlab as vl
from tests.knobs import turn
from tests.test_lab_pages import Letters
from tests.tiny_models import tiny
from veloxlab.allocate.ratequant import JUDGED
from veloxlab.errors import InputError
from veloxlab.views import picture
from veloxlab.views.report import Section, report
from veloxlab.widgets import ChartView, lifetime
from veloxlab.widgets.pages.budget import TakeAway, history
from veloxlab.widgets.pages.cache import Measuring

HOSTILE = "<!-- <script> </script> --> \u2028 & \"'\\"
BITS = {0: (3, 4), 1: (4, 4)}


@pytest.fixture(scope="module")
def lab():
    lab = vl.Lab(tiny("llama"), Letters(), tokens=64, sinks=2, window=16)
    assert lab.wait(120)
    yield lab
    lab.close()


@pytest.fixture
def measuring(lab) -> Measuring:
    return Measuring(lab._capture, "turboquant", lab._fitting)


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


def test_tables_are_read_while_the_worker_fills_them(measuring):
    for width in (3, 4):
        measuring.width(width, 2, 16)
    tables = measuring.tables

    def read() -> list[pl.DataFrame]:
        errors = [tables.errors(BITS, metric, 2, 16) for metric in ("output_error", "rel_mse")]
        return [*errors, tables.code_bits(BITS), tables.memory(BITS, 2, 16, "ours")]

    expected = read()
    for name in ("tokens", "codes", "attention", "growth"):
        setattr(tables, name, Filled(getattr(tables, name)))
    assert all(one.equals(other) for one, other in zip(read(), expected, strict=True))
    assert tables.errors({0: (3, 5), 1: (4, 4)}, "rel_mse", 2, 16) is None
    assert tables.memory(BITS, 4, 16, "ours") is None


def test_an_explorer_asks_for_more_while_the_worker_fills_its_frames(lab):
    explorer = lab.turn_to("keys")
    explorer._frames.frames = Filled(explorer._frames.frames)
    explorer._unmeasurable = Filled(explorer._unmeasurable)
    turn(explorer, space="rotated")
    assert explorer._shown["channels"][0][-1] == "rotated"


@pytest.mark.parametrize("failing", ["code_bits", "token_errors"])
def test_a_width_that_fails_half_way_is_measured_again(measuring, monkeypatch, failing):
    def fails(*_: object, **__: object) -> pl.DataFrame:
        raise InputError("not now")

    with monkeypatch.context() as patch:
        patch.setattr(f"{Measuring.__module__}.{failing}", fails)
        with pytest.raises(InputError, match="not now"):
            measuring.width(3, 2, 16)
    measuring.width(3, 2, 16)
    assert measuring.tables.code_bits({0: (3, 3), 1: (3, 3)}) is not None
    assert measuring.tables.errors({0: (3, 3), 1: (3, 3)}, "rel_mse", 2, 16) is not None


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
    before = lab._overrides
    lab.layer, lab.key_bits = 1, 5
    lab._set_width("value_bits", 6, 1)
    assert before == {0: (3, 4)}
    assert lab._overrides == {0: (3, 4), 1: (5, 6)}
    lab._reset()


def test_text_in_a_report_opens_and_ends_nothing():
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
    row = dict.fromkeys(JUDGED, 1) | {"kind": "allocated", "name": HOSTILE}
    shown = history(pl.DataFrame([row], schema=JUDGED, strict=False))
    assert "<script" not in shown
    assert "&lt;script&gt;" in shown
    monkeypatch.setattr(lab, "lines", lambda _: [HOSTILE])
    lab._tell_code()
    assert "<script" not in lab._code.value


def test_the_line_that_loads_a_plan_is_python_whatever_the_path():
    box = TakeAway(lambda: pytest.fail("nothing is saved"))
    box.path.value = 'C:\\plans\\new "one".json'
    code = ast.parse(unescape(re.sub(r"<[^>]*>", "", box.code.value)))
    (path,) = [node.value for node in ast.walk(code) if isinstance(node, ast.Constant)]
    assert path == box.path.value


def test_names_of_a_drawing_are_set_apart_and_its_texts_are_not():
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
