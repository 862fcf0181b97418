"""A report in a real browser, from its file alone: charts are drawn, light and dark, without a network request."""

from __future__ import annotations

import polars as pl
import pytest

from veloxlab import views
from veloxlab.views.picture import Section, report
from veloxlab.widgets.chart_view import ensure_bundle

pytestmark = pytest.mark.browser

TEXT_COLOUR = "() => document.querySelector('svg.marks .role-axis-label text').getAttribute('fill')"


def test_a_report_needs_nothing_but_itself(bare, tmp_path):
    rows = [
        {"tokens": tokens, "cache": cache, "layer": 0, "bytes": tokens * each, "kind": "measured"}
        for tokens in (512, 1024)
        for cache, each in (("fp16", 4000), ("turboquant", 1000))
    ]
    frame = pl.DataFrame(rows).with_columns(cache=pl.col("cache").replace("fp16", "<!-- <script>"))
    sections = [
        Section("What is held", "By 1,024 tokens.", chart=views.memory_growth(frame).to_dict()),
        Section(
            "</script><b>numbers</b>",
            table=frame,
            folded="Table of <b>4</b> rows",
            code='cache = vl.make_cache(model, "turboquant")',
        ),
    ]
    path = tmp_path / "report.html"
    path.write_text(
        report("A <report>", sections, ensure_bundle().read_text("utf-8"), b'{"cells": []}'), encoding="utf-8"
    )

    bare.page.emulate_media(color_scheme="light")
    bare.page.goto(path.as_uri())
    bare.page.wait_for_function("() => document.body.dataset.drawn === '1'", timeout=30_000)
    assert bare.page.title() == "A <report>"
    assert bare.page.locator("svg.marks").count() == 1
    assert "<!-- <script>" in bare.page.locator("svg.marks").text_content()
    assert bare.page.locator("td").count() == frame.width * frame.height
    assert bare.page.locator("h2").nth(1).inner_text() == "</script><b>numbers</b>"
    assert not bare.page.locator("td").first.is_visible()
    bare.page.get_by_text("Table of <b>4</b> rows").click()
    assert bare.page.locator("td").first.is_visible()
    with bare.page.expect_download() as saved:
        bare.page.get_by_text("Save the notebook").click()
    assert saved.value.suggested_filename == "veloxlab.ipynb"
    assert saved.value.path().read_bytes() == b'{"cells": []}'
    light = bare.page.evaluate(TEXT_COLOUR)
    bare.page.emulate_media(color_scheme="dark")
    bare.page.wait_for_function(f"(light) => ({TEXT_COLOUR})() !== light", arg=light)
    assert bare.errors == []
    assert [url for url in bare.outside if not url.startswith("file:")] == []
