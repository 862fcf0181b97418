"""The charts of the explorer of keys and values: how each is drawn, and when new numbers are all that it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import altair as alt
import polars as pl

from veloxlab import views
from veloxlab.views.distributions import MARKS, SHARES_SHOWN
from veloxlab.widgets.key_frames import Look


@dataclass(frozen=True)
class KeyChart:
    """One chart of one head.

    Attributes
    ----------
    draw : the chart of a frame.
    caption : the line under its heading.
    shape : what its spec depends on beside numbers: frames of one shape can be put into one chart.
    """

    draw: Callable[[pl.DataFrame, Look], alt.VConcatChart]
    caption: Callable[[pl.DataFrame, Look], str]
    shape: Callable[[pl.DataFrame, Look], object]


CHARTS = {
    "channels": KeyChart(
        lambda frame, _: views.channel_ranges(frame),
        lambda frame, _: views.channel_caption(frame),
        # channels that are drawn in groups are no rows of the frame
        lambda frame, look: (look.tensor, look.space, frame.height if 3 * frame.height > MARKS else 0),
    ),
    "density": KeyChart(
        lambda frame, _: views.density(frame),
        lambda frame, _: views.density_caption(frame),
        lambda _, look: look.space,
    ),
    "levels": KeyChart(
        lambda frame, look: views.levels_on_density(frame, method=look.method),
        lambda frame, look: views.levels_caption(frame, look.method),
        lambda frame, look: (look.tensor, frame.filter(kind="level").height <= SHARES_SHOWN),
    ),
    "spectrum": KeyChart(
        lambda frame, _: views.spectrum(frame), lambda frame, _: views.spectrum_caption(frame), lambda *_: None
    ),
    "pairs": KeyChart(
        lambda frame, _: views.pair_energy(frame),
        lambda frame, _: views.pair_caption(frame),
        lambda frame, _: tuple(frame["wavelength"]),
    ),
}
