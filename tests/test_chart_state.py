"""The Python side of a chart: sent data, refused data, and outputs, from any thread."""

from __future__ import annotations

import base64
import math
import threading

import altair as alt
import polars as pl
import pytest

from veloxlab.errors import InputError
from veloxlab.views import picture
from veloxlab.widgets import ChartView, VegaRuntime


def frame(*errors: float) -> pl.DataFrame:
    return pl.DataFrame({"layer": range(len(errors)), "error": errors}, schema_overrides={"error": pl.Float64})


def bars(*errors: float, caption: str = "first") -> alt.Chart:
    return (
        alt.Chart(frame(*errors), title="Errors", width=200)
        .mark_bar()
        .encode(x="layer:O", y="error:Q")
        .add_params(alt.param(name="caption", value=caption), alt.param(name="picked_layer", value=None))
    )


def rows(view: ChartView, name: str = "data-0") -> list[dict]:
    return view.to_dict()["datasets"][name]


def test_new_numbers_keep_the_spec_and_a_new_mark_changes_it():
    view = ChartView(bars(1, 2))
    first = view.spec["id"]
    sent: list[dict] = []
    view.observe(lambda change: sent.append(change["new"]), "spec")
    view.show(bars(3, caption="second"))
    assert sent == []
    assert rows(view) == [{"layer": 0, "error": 3.0}]
    assert view.content["params"] == {"caption": "second"}
    view.show(bars(3).mark_line())
    assert [spec["id"] for spec in sent] == [view.content["spec"]] != [first]


def test_put_sends_rows_and_params_in_one_change():
    view = ChartView(bars(1, 2))
    changes: list[dict] = []
    view.observe(lambda change: changes.append(change["new"]), "content")
    view.put(frame(4, math.nan, -math.inf), caption="second")
    assert [change["revision"] for change in changes] == [2]
    assert rows(view) == [{"layer": i, "error": error} for i, error in enumerate((4.0, None, None))]
    assert view.content["params"] == {"caption": "second"}
    view.put(caption="third")
    assert len(rows(view)) == 3


def test_put_takes_frames_by_name():
    other = alt.Chart(alt.NamedData(name="mine"), width=100).mark_point().encode(x="x:Q")
    view = ChartView(bars(1, 2) & other)
    view.put({"mine": pl.DataFrame({"x": [1]}), "data-0": frame(5)})
    assert rows(view, "mine") == [{"x": 1}]
    assert rows(view) == [{"layer": 0, "error": 5.0}]


@pytest.mark.parametrize(
    ("put", "sentence"),
    [
        (lambda view: view.put({"rows": frame(1)}), "This chart has no dataset 'rows': it has data-0."),
        (lambda view: view.put(title="x"), "This chart has no param 'title': it has caption."),
        (lambda view: view.put(picked_layer=1), "This chart has no param 'picked_layer': it has caption."),
    ],
)
def test_unknown_names_are_refused_and_nothing_changes(put, sentence):
    view = ChartView(bars(1, 2))
    before = view.content
    with pytest.raises(InputError, match=sentence):
        put(view)
    assert view.content is before


def test_many_threads_may_put_at_once():
    view = ChartView(bars(1, 2))
    threads = [threading.Thread(target=view.put, args=(frame(i, i),), kwargs={"caption": str(i)}) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert view.revision == 17
    assert rows(view)[0]["error"] == float(view.content["params"]["caption"])


def test_the_bundle_is_held_once():
    one, other = ChartView(bars(1)), ChartView(bars(2))
    assert one.runtime is other.runtime is VegaRuntime.shared()
    assert "vegaEmbed" in one.runtime.code
    assert set(one.runtime.themes) == {"light", "dark"}


def test_a_page_that_asks_for_the_bundle_gets_it(monkeypatch):
    view = ChartView(bars(1))
    sent: list[dict] = []
    monkeypatch.setattr(view, "send", sent.append)
    view._handle_custom_msg({"wants": "something else"}, [])
    assert sent == []
    view._handle_custom_msg({"wants": "runtime"}, [])
    assert sent[0]["runtime"]["code"] == view.runtime.code


def test_an_output_holds_a_live_view_a_picture_and_a_stable_line():
    view = ChartView(bars(1, 2))
    data, _ = view._repr_mimebundle_()
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == view.model_id
    assert data["text/plain"] == "Errors (2 rows)"
    assert picture.png_size(base64.b64decode(data["image/png"]))[0] == pytest.approx(700, abs=2)
    view.show(bars(1), summary="mean 1.0")
    view.put(frame(2))
    assert view._repr_mimebundle_()[0]["text/plain"] == "mean 1.0"
    view.put(summary="mean 2.0")
    assert repr(view) == "mean 2.0"


def test_the_picture_shows_what_was_put_and_picked():
    view = ChartView(bars(1, 2).mark_bar(color=alt.expr("picked_layer === 1 ? '#010203' : '#040506'")))
    before = picture.svg(view.to_dict())
    view.put(frame(1, 9), caption="second")
    view.picked = 1
    after = picture.svg(view.to_dict())
    assert "#040506" in before
    assert "#010203" in after
    assert "error: 9" in after


def test_a_chart_returns_its_rows_and_its_image(tmp_path):
    view = ChartView(bars(1, 2))
    assert view.frame.to_dicts() == frame(1, 2).to_dicts()
    view.put(frame(3, math.nan))
    assert pl.read_parquet(view.to_parquet(tmp_path / "rows.parquet")).equals(frame(3, math.nan))
    assert pl.read_csv(view.to_csv(tmp_path / "rows.csv"))["error"][0] == 3
    assert view.to_svg(tmp_path / "chart.svg").read_text().startswith("<svg")
    assert picture.png_size(view.to_png(tmp_path / "chart.png", width=333).read_bytes())[0] == pytest.approx(333, abs=2)


def test_a_chart_without_rows_shows_a_message():
    view = ChartView(alt.Chart(alt.NamedData(name="mine"), width=100).mark_point().encode(x="x:Q"))
    with pytest.raises(InputError, match="This chart has no rows yet"):
        _ = view.frame
    view.put(pl.DataFrame({"x": [1]}))
    assert view.frame["x"].to_list() == [1]
