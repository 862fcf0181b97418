"""The charts of the explorer of keys and values: how each is drawn, and when new numbers are all that it needs."""

from __future__ import annotations

from veloxlab import views
from veloxlab.views.distributions import MARKS, SHARES_SHOWN
from veloxlab.widgets.layer_explorer import LayerChart

CHARTS = {
    "channels": LayerChart(
        lambda frame, _: views.channel_ranges(frame),
        lambda frame, _: views.channel_caption(frame),
        # channels that are drawn in groups are no rows of the frame
        lambda frame, look: (look.tensor, look.space, frame.height if 3 * frame.height > MARKS else 0),
    ),
    "density": LayerChart(
        lambda frame, _: views.density(frame),
        lambda frame, _: views.density_caption(frame),
        lambda _, look: look.space,
    ),
    "levels": LayerChart(
        lambda frame, look: views.levels_on_density(frame, method=look.method),
        lambda frame, look: views.levels_caption(frame, look.method),
        lambda frame, look: (look.tensor, frame.filter(kind="level").height <= SHARES_SHOWN),
    ),
    "spectrum": LayerChart(
        lambda frame, _: views.spectrum(frame), lambda frame, _: views.spectrum_caption(frame), lambda *_: None
    ),
    "pairs": LayerChart(
        lambda frame, _: views.pair_energy(frame),
        lambda frame, _: views.pair_caption(frame),
        lambda frame, _: tuple(frame["wavelength"]),
    ),
}
