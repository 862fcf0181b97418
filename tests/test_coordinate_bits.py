"""Bits of single coordinates: the plan of a fitted codec, and its map."""

from typing import Any

import numpy as np
import polars as pl
import pytest

import veloxlab as vl
from tests.test_calibration import TEXT, Letters
from tests.tiny_models import tiny
from veloxlab.errors import InputError
from veloxlab.measure.levels import COORDINATE_BITS, coordinate_bits
from veloxlab.views import coordinate_caption, coordinate_map, picture


@pytest.fixture(scope="module")
def calibration(calibrations):
    return vl.calibrate(tiny("llama"), Letters(), "spectralquant", TEXT, bits=2, tokens=300, folder=calibrations)


def test_the_bits_are_those_of_the_plans(calibration):
    frame = coordinate_bits(calibration, 2)
    assert frame.schema == COORDINATE_BITS
    for (layer, role, bits), codec in calibration.codecs.items():
        own = frame.filter(layer=layer, tensor=role).sort("coordinate")
        assert own["bits"].to_list() == list(codec.plan)
        assert own["bits"].mean() == bits
    with pytest.raises(InputError, match="nothing at 3 bits"):
        coordinate_bits(calibration, 3)


def test_planned_bits_are_means_over_heads(calibrations):
    fitted = vl.calibrate(tiny("llama"), Letters(), "fisherquant", TEXT, tokens=256, folder=calibrations)
    frame = coordinate_bits(fitted, 2.25)
    assert frame.schema == COORDINATE_BITS
    own = frame.filter(layer=1, tensor="values").sort("coordinate")["bits"]
    codec: Any = fitted.codec("fisherquant", 1, "values", 2.25)
    assert own.to_list() == np.mean(codec.widths, axis=0).tolist()
    assert "bits of" in picture.svg(coordinate_map(frame).to_dict())
    with pytest.raises(InputError, match="takes any bits from 1 to 8"):
        coordinate_bits(fitted, 9)


def test_the_caption_states_means_and_coordinates_without_bits(calibration):
    frame = coordinate_bits(calibration, 2)
    none = 100 * (frame.filter(tensor="keys")["bits"] == 0).mean()
    assert f"keys 2.00 on average, {frame.filter(tensor='keys')['bits'].max():g} at most, none for {none:.0f} %" in (  # type: ignore[str-bytes-safe]
        coordinate_caption(frame)
    )
    drawing = picture.svg(coordinate_map(frame).to_dict())
    assert coordinate_caption(frame) in drawing
    many = pl.concat(frame.with_columns(pl.col("layer") + 2 * i) for i in range(40))
    assert len(coordinate_map(many).to_dict()["datasets"].popitem()[1]) <= 2000
    assert "coordinates, by" in picture.svg(coordinate_map(many).to_dict())
