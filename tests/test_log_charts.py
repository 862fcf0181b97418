"""No chart hands a log scale what has no logarithm: what is no number is left out and counted, zero is at the floor."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator

import altair as alt
import polars as pl
import pytest

from tests.test_key_views import attention, by_layer, counts, loudness, shares, spread
from tests.test_views import (
    budget_rows,
    drawn,
    error_frame,
    fidelity_frame,
    lengths_frame,
    pareto_frame,
    sensitivity_frame,
    words,
)
from veloxlab import views
from veloxlab.views.furniture import log_domain, not_drawn

ERRORS_BY_BITS = pl.DataFrame(
    {
        "tensor": ["keys", "keys", "values", "values"],
        "bits": [2, 4, 2, 4],
        "error": [0.1, 0.01, 0.2, 0.02],
        "true_bits": [2.25, 4.25, 2.25, 4.25],
        "not_finite": [0] * 4,
    }
)
STRIP = pl.DataFrame(
    {
        "side": ["exact"] * 3 + ["compressed"] * 3,
        "position": [0, 1, 2] * 2,
        "token": [5, 6, 7] * 2,
        "text": [" one", " two", " three"] * 2,
        "probability": [0.5] * 6,
        "exact_probability": [0.5] * 6,
        "kl": [None] * 3 + [0.2, 0.02, 0.5],
        "held_bytes": [100] * 6,
    }
)
# what draws a frame, the frame, and the column that a log scale shows
CHARTS: dict[str, tuple[Callable[[pl.DataFrame], alt.TopLevelMixin], pl.DataFrame, str]] = {
    **{
        f"error_map {m}": (lambda f, m=m: views.error_map(f, metric=m), error_frame(), m) for m in ("rel_mse", "cosine")
    },
    "frontier": (views.frontier, fidelity_frame(), "kl_mean"),
    "pareto_front": (views.pareto_front, pareto_frame().filter(windows=8), "kl"),
    "sensitivity": (views.sensitivity_by_layer, sensitivity_frame(), "sensitivity"),
    "budget": (views.budget_frontier, budget_rows(), "loss"),
    "attention_maps": (views.attention_maps, attention(), "weight"),
    "channel_map": (views.channel_map, by_layer(), "rms"),
    "outliers": (views.outliers_by_layer, loudness(), "loudest_ratio"),
    "spectrum": (views.spectrum, shares(), "share"),
    "dimensions": (views.dimensions_by_layer, counts(), "centred"),
    "error_distribution": (views.error_distribution, spread(), "least"),
    "errors_by_bits": (views.errors_by_bits, ERRORS_BY_BITS, "error"),
    "strip": (views.token_strip, STRIP, "kl"),
    "lengths": (views.costs_by_length, lengths_frame(), "tokens"),
}
COUNTED = r"[1-9]\d* not (?:drawn|finite)|not finite: [1-9]|Not finite: \w+"
EACH = pytest.mark.parametrize("name", CHARTS)


def replaced(frame: pl.DataFrame, column: str, value: float | None) -> pl.DataFrame:
    """The frame with another value in its last row but one."""
    place = pl.int_range(pl.len()) == pl.len() - 2
    return frame.with_columns(pl.when(place).then(pl.lit(value)).otherwise(column).alias(column))


def scales(node: object) -> Iterator[str]:
    """The fields that a spec puts on log scales."""
    if isinstance(node, list):
        for child in node:
            yield from scales(child)
    elif isinstance(node, dict):
        scale = node.get("scale")
        if isinstance(scale, dict) and scale.get("type") == "log":
            yield node["field"]
        for child in node.values():
            yield from scales(child)


@EACH
def test_every_log_scale_shows_what_the_shared_function_gives_and_of_good_numbers_all(name):
    draw, frame, _ = CHARTS[name]
    spec = draw(frame).to_dict()
    assert not any(re.search(COUNTED, line) for line in words(drawn(draw(frame))))
    fields = set(scales(spec))
    assert fields
    made = set(re.findall(r'"as": "(\w+_drawn)"', json.dumps(spec)))
    assert fields <= made


@EACH
@pytest.mark.parametrize("value", [None, math.nan, math.inf, 0.0, -1.0])
def test_what_has_no_logarithm_is_not_drawn_or_is_at_the_floor(name, value):
    draw, frame, column = CHARTS[name]
    if column == "tokens" and value is not None and not math.isfinite(value):
        frame = frame.with_columns(pl.col("tokens").cast(pl.Float64))
    said = drawn(draw(replaced(frame, column, value)))
    assert not re.search(r"NaN|Infinity|undefined", said)
    no_number = value is None or not math.isfinite(value)
    if no_number and not (name == "strip" and value is None):  # nothing was predicted there
        assert any(re.search(COUNTED, line) for line in words(said))


@pytest.mark.parametrize("name", ["error_map rel_mse", "frontier", "budget"])
def test_zero_is_drawn_where_the_floor_is(name):
    draw, frame, column = CHARTS[name]

    def marks(value: float | None) -> int:
        return len(
            re.findall(r'aria-roledescription="(?:point|rect mark)"', drawn(draw(replaced(frame, column, value))))
        )

    assert marks(0.0) == marks(0.1) > marks(None)


def test_a_row_of_nulls_is_no_hindrance_to_a_frontier():
    nulls = dict.fromkeys(fidelity_frame().columns)
    frame = pl.concat([fidelity_frame(), pl.DataFrame([nulls], schema=fidelity_frame().schema)])
    said = words(drawn(views.frontier(frame)))
    assert any("Not finite: a row without a name." in line for line in said)
    costless = replaced(fidelity_frame(), "key_bits", None)
    assert any("Not drawn: rvq K4 V4." in line for line in words(drawn(views.frontier(costless))))
    assert "Not drawn" not in views.fidelity_caption(costless, "held_bytes")


def test_a_cosine_that_is_missing_is_no_error_of_one():
    said = drawn(views.error_map(replaced(error_frame(), "cosine", None), metric="cosine"))
    assert any("× 1 not finite" in line for line in words(said))
    assert not re.search(r"cosine: 1[;\"]", said)


def test_what_is_left_out_is_counted_in_words():
    values = pl.Series([1.0, None, math.nan, math.inf, 0.0, -1.0])
    assert not_drawn(values) == ["3 not drawn: not finite"]
    assert not_drawn(values, zero=True) == ["5 not drawn: not above zero, or not finite"]
    assert not_drawn(pl.Series([1, 2])) == []
    assert log_domain([None, 0.3, 0.004]) == (0.002, 0.5)
