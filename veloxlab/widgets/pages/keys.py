"""The page of keys and values: one KV head in the spaces in which methods code it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import ipywidgets

from veloxlab import views
from veloxlab.checks import choice
from veloxlab.codecs import TENSORS
from veloxlab.measure.distributions import SPACES, channel_distributions, densities
from veloxlab.measure.levels import level_densities
from veloxlab.measure.spectra import rope_pairs, spectra
from veloxlab.views.distributions import MARKS, SHARES_SHOWN, SPACE_WORDS
from veloxlab.views.marks import bits_said
from veloxlab.widgets.chosen import Checked
from veloxlab.widgets.pages.charts import Look, Measure, coded
from veloxlab.widgets.pages.heads import CODED, HeadPage, head_chart

SEEN = ("layer", "tensor", "space")


class KeyExplorer(HeadPage):
    """See one KV head's keys or values in the spaces in which methods code them.

    Everything is measured on the capture, once. Nothing here needs the model or a network.

    ``capture``: what `veloxlab.capture` gave. ``layer``: index in the prompt cache to begin with; the capture's first
    by default. ``head``: KV head. ``method``, ``bits``: whose levels are drawn; the bits are those of what is shown,
    the keys or the values. ``calibration``: what `veloxlab.calibrate` gave, for a method that has to be fitted.
    ``settings``: ``tensor="values"``, ``space="rotated"`` or another of `veloxlab.measure.distributions.SPACES`. Raises
    `InputError` for a choice that there is not, or that cannot be measured.

    All of them but the capture and the calibration are traits: set them and the ``charts`` follow, each a `ChartView`,
    by name: ``channels``, ``density``, ``levels``, ``spectrum`` and, where every layer has a known RoPE, ``pairs``.
    """

    NAME = "keys"
    HELP = "12_key_distributions.ipynb#1. Outlier channels"
    SETTINGS = ("layer", "head", "tensor", "space", "method", "bits", "seed")
    MEASURES: ClassVar[dict[str, Measure]] = {
        "channels": lambda page, _, layer, tensor, space: channel_distributions(
            page.of_layer(layer), space, tensors=(tensor,)
        ),
        "density": lambda page, _, layer, tensor, space: densities(page.of_layer(layer), space, tensors=(tensor,)),
        "levels": coded(lambda seen, tensor, **of: level_densities(seen, tensors=(tensor,), **of), "tensor"),
        "spectrum": lambda page, _, layer, tensor: spectra(page.of_layer(layer), tensors=(tensor,)),
        "pairs": lambda page, _, layer: rope_pairs(page.of_layer(layer)),
    }
    CHARTS = (
        head_chart(
            "channels",
            SEEN,
            views.channel_ranges,
            views.channel_caption,
            # channels that are drawn in groups are no rows of the frame
            lambda frame, look: (look.tensor, look.space, frame.height if 3 * frame.height > MARKS else 0),
            why="Channels far larger than others waste the levels of all.",
        ),
        head_chart(
            "density",
            SEEN,
            views.density,
            views.density_caption,
            lambda _, look: look.space,
            why="What one table of levels has to fit.",
        ),
        head_chart(
            "levels",
            (*CODED, "tensor"),
            views.levels_on_density,
            views.levels_caption,
            lambda frame, look: (look.tensor, frame.filter(kind="level").height <= SHARES_SHOWN),
            more=lambda look: {"method": look.method},
            why="How well the method's levels fit what it quantizes.",
        ),
        head_chart(
            "spectrum",
            ("layer", "tensor"),
            views.spectrum,
            views.spectrum_caption,
            why="How many directions hold the energy: few can get most bits.",
        ),
        head_chart(
            "pairs",
            ("layer",),
            views.pair_energy,
            views.pair_caption,
            lambda frame, _: tuple(frame["wavelength"]),
            why="Which of the pairs that RoPE turns carry the keys.",
        ),
    )
    RARE = (
        ("pairs",),
        "rope",
        "Not every layer has a rotary embedding that is known, so there is no chart of its pairs.",
    )

    tensor = Checked(choice(*TENSORS), "keys", help="whether keys or values are seen")
    space = Checked(
        choice(*SPACES), "raw", help="space in which they are seen, such as that in which a method codes them"
    )

    @property
    def summary(self) -> str:
        said = f"{self.tensor}, {SPACE_WORDS[self.space]}, {self.method} at {bits_said(self.bits)}"
        return f"{said}: {self._caption('channels')}"

    def _likely(self) -> Iterable[Look]:
        spaces = [self._look(space=space) for space in SPACES]
        return [*super()._likely(), *spaces, *(self._look(tensor=tensor) for tensor in TENSORS)]

    def _controls(self, *own: ipywidgets.Widget) -> ipywidgets.Widget:
        spaces = [(SPACE_WORDS[space], space) for space in SPACES]
        tensor = self._control(ipywidgets.Dropdown, "tensor", options=TENSORS)
        return super()._controls(tensor, self._control(ipywidgets.Dropdown, "space", options=spaces), *own)
