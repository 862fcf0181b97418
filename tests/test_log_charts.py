"""No chart puts a value without a logarithm on a log scale: NaN is left out and counted, zero is at the floor."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from functools import cache

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
from veloxlab.views import picture
from veloxlab.views.columns import log_domain, not_drawn

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
        "side": ["exact"] * 6 + ["compressed"] * 6,
        "position": [*range(6)] * 2,
        "token": [*range(5, 11)] * 2,
        "text": [" one", " two", " three", " four", " five", " six"] * 2,
        "probability": [0.5] * 12,
        "exact_probability": [0.5] * 12,
        "kl": [None] * 6 + [0.2, 0.02, 0.5, 0.1, 0.3, 0.4],
        "held_bytes": [100] * 12,
    }
)
PLANE = pl.DataFrame({"key_bits": [2, 2, 3, 3], "value_bits": [2, 3, 2, 3], "kl": [0.9, 0.5, 0.3, 0.1]})
Draw = Callable[[pl.DataFrame], alt.TopLevelMixin]
# chart, caption function, frame, and the column on a log scale
CHARTS: dict[str, tuple[Draw, Callable[[pl.DataFrame], str], pl.DataFrame, str]] = {
    **{
        f"error_map {m}": (
            lambda f, m=m: views.error_map(f, metric=m),
            lambda f, m=m: views.error_caption(f, m),
            error_frame(),
            m,
        )
        for m in ("rel_mse", "cosine")
    },
    "frontier": (views.frontier, views.fidelity_caption, fidelity_frame(), "kl_mean"),
    "pareto_front": (views.pareto_front, views.pareto_caption, pareto_frame().filter(windows=8), "kl"),
    "sensitivity": (views.sensitivity_by_layer, views.sensitivity_caption, sensitivity_frame(), "sensitivity"),
    "budget": (views.budget_frontier, lambda f: "; ".join(not_drawn(f["loss"])), budget_rows(), "loss"),
    "attention_maps": (views.attention_maps, views.attention_caption, attention(), "weight"),
    "channel_map": (views.channel_map, views.channel_map_caption, by_layer(), "rms"),
    "outliers": (views.outliers_by_layer, views.outlier_caption, loudness(), "loudest_ratio"),
    "spectrum": (views.spectrum, views.spectrum_caption, shares(), "share"),
    "dimensions": (views.dimensions_by_layer, views.dimensions_caption, counts(), "centred"),
    "error_distribution": (views.error_distribution, views.distribution_caption, spread(), "least"),
    "errors_by_bits": (views.errors_by_bits, views.by_bits_caption, ERRORS_BY_BITS, "error"),
    "strip": (views.token_strip, lambda f: views.strip_caption(f, None), STRIP, "kl"),
    "plane": (views.bit_plane, views.plane_caption, PLANE, "kl"),
    "lengths": (views.costs_by_length, views.lengths_caption, lengths_frame(), "tokens"),
}
NOT_FINITE = (None, math.nan, math.inf)
COUNTED = r"[1-9]\d* not (?:drawn|finite)|not finite: [1-9]|Not finite: \w+"
EACH = pytest.mark.parametrize("name", CHARTS)


def replaced(frame: pl.DataFrame, column: str, *values: float | None) -> pl.DataFrame:
    """Return the frame with other values in its last rows but one."""
    first = frame.height - 1 - len(values)
    column_type = pl.Float64 if any(isinstance(value, float) for value in values) else frame.schema[column]
    new = pl.Series(column, values, column_type, strict=False)
    old = frame[column].cast(column_type)
    return frame.with_columns(pl.concat([old[:first], new, old[-1:]]))


@cache
def spoilt(name: str) -> dict:
    """Return the spec of a chart whose rows have values without a logarithm, each in one place."""
    draw, _, frame, column = CHARTS[name]
    rows = pl.concat([frame] * math.ceil(12 / frame.height))
    return draw(replaced(rows, column, *NOT_FINITE, 0.0, -1.0)).to_dict()


def scales(node: object) -> Iterator[str]:
    """Yield the fields that a spec puts on log scales."""
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
def test_every_log_scale_uses_the_shared_function(name):
    fields = set(scales(spoilt(name)))
    assert fields
    made = set(re.findall(r'"as": "(\w+_drawn)"', json.dumps(spoilt(name))))
    assert fields <= made


@EACH
def test_values_without_a_logarithm_are_left_out_or_at_the_floor_and_counted(name):
    said = picture.svg(spoilt(name))
    assert not re.search(r"NaN|Infinity|undefined", said)
    assert any(re.search(COUNTED, line) for line in words(said))


@EACH
@pytest.mark.parametrize("value", [*NOT_FINITE, 0.0, -1.0, "good"])
def test_a_caption_counts_nan_and_no_finite_number(name, value):
    _, caption, frame, column = CHARTS[name]
    said = caption(frame if value == "good" else replaced(frame, column, value))
    assert "nan" not in said
    if value == "good":
        assert not re.search(COUNTED, said)
    elif value in NOT_FINITE and not (name == "strip" and value is None):  # no prediction there
        assert re.search(COUNTED, said)


@pytest.mark.parametrize("name", ["error_map rel_mse", "frontier", "budget"])
def test_zero_is_drawn_at_the_floor(name):
    draw, _, frame, column = CHARTS[name]

    def marks(value: float | None) -> int:
        return len(
            re.findall(r'aria-roledescription="(?:point|rect mark)"', drawn(draw(replaced(frame, column, value))))
        )

    assert marks(0.0) == marks(0.1) > marks(None)


def test_a_frontier_accepts_a_row_of_nulls():
    nulls = dict.fromkeys(fidelity_frame().columns)
    frame = pl.concat([fidelity_frame(), pl.DataFrame([nulls], schema=fidelity_frame().schema)])
    said = words(drawn(views.frontier(frame)))
    assert any("Not finite: a row without a name." in line for line in said)
    costless = replaced(fidelity_frame(), "key_bits", None)
    assert any("Not drawn: rvq K4 V4." in line for line in words(drawn(views.frontier(costless))))
    assert "Not drawn" not in views.fidelity_caption(costless, "held_bytes")


def test_a_missing_cosine_is_not_an_error_of_one():
    said = drawn(views.error_map(replaced(error_frame(), "cosine", None), metric="cosine"))
    assert any("× 1 not finite" in line for line in words(said))
    assert not re.search(r"cosine: 1[;\"]", said)


def test_rows_that_are_left_out_are_counted_in_words():
    values = pl.Series([1.0, None, math.nan, math.inf, 0.0, -1.0])
    assert not_drawn(values) == ["3 not drawn: not finite"]
    assert not_drawn(values, zero=True) == ["5 not drawn: not above zero, or not finite"]
    assert not_drawn(pl.Series([1, 2])) == []
    assert log_domain([None, 0.3, 0.004]) == (0.002, 0.5)
