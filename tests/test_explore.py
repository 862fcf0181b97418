"""The slider over measured frames."""

import altair as alt
import polars as pl
import pytest

from veloxlab.errors import InputError
from veloxlab.widgets.explore import Explore

FRAMES = {bits: pl.DataFrame({"layer": [0, 1], "error": [1.0 / bits, 2.0 / bits]}) for bits in (2, 3, 4)}


def bars(frame):
    return alt.Chart(frame, width=100).mark_bar().encode(x="layer:O", y="error:Q")


def test_the_chart_follows_the_slider_twice():
    explore = Explore(FRAMES, bars, description="bits", value=3)
    for bits in (2, 4):
        explore.slider.value = bits
        assert explore.view.frame.equals(FRAMES[bits])
    assert repr(explore) == "Explore(bits = 4 of 2, 3, 4)"


def test_a_saved_notebook_keeps_an_image():
    bundle, _ = Explore(FRAMES, bars, description="bits")._repr_mimebundle_()
    assert bundle["image/png"].startswith("iVBOR")
    assert bundle["text/plain"].startswith("Explore(bits = 2")


def test_bad_input_is_refused_in_a_sentence():
    with pytest.raises(InputError, match="nothing to explore"):
        Explore({}, bars, description="bits")
    with pytest.raises(InputError, match="no frame for 9: choose one of 2, 3, 4"):
        Explore(FRAMES, bars, description="bits", value=9)
