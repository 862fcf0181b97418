"""The page of keys and values: one KV head, in the spaces in which methods code it."""

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
    """See the keys or values of one KV head, in the spaces in which methods code them.

    Everything is measured on the capture, once. It needs no model and no network.

    ``capture``: from `veloxlab.capture`. ``layer``: the first shown layer, an index in the prompt cache; by default the
    first of the capture. ``head``: KV head. ``method``, ``bits``: the charts show the levels of this method; the bits
    are those of the shown tensor. ``calibration``: from `veloxlab.calibrate`, for a method that has to be fitted.
    ``settings``: ``tensor="values"``, ``space="rotated"`` or another of `veloxlab.measure.distributions.SPACES`. Raises
    `InputError` for an unknown choice, or for one that cannot be measured.

    All of them except the capture and the calibration are traits: set them and the ``charts`` follow, each a
    `ChartView`, by name: ``channels``, ``density``, ``levels``, ``spectrum`` and, if each layer has a known RoPE,
    ``pairs``.
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
            # if channels are drawn in groups, their number does not change the spec
            lambda frame, look: (look.tensor, look.space, frame.height if 3 * frame.height > MARKS else 0),
            why="A few very large channels make the levels too coarse for all others.",
        ),
        head_chart(
            "density",
            SEEN,
            views.density,
            views.density_caption,
            lambda _, look: look.space,
            why="The distribution that one table of levels has to fit.",
        ),
        head_chart(
            "levels",
            (*CODED, "tensor"),
            views.levels_on_density,
            views.levels_caption,
            lambda frame, look: (look.tensor, frame.filter(kind="level").height <= SHARES_SHOWN),
            more=lambda look: {"method": look.method},
            why="How well the method's levels fit the numbers that it quantizes.",
        ),
        head_chart(
            "spectrum",
            ("layer", "tensor"),
            views.spectrum,
            views.spectrum_caption,
            why="How many directions have most of the energy: these can get most bits.",
        ),
        head_chart(
            "pairs",
            ("layer",),
            views.pair_energy,
            views.pair_caption,
            lambda frame, _: tuple(frame["wavelength"]),
            why="Which of the pairs of coordinates that RoPE rotates have most energy.",
        ),
    )
    RARE = (
        ("pairs",),
        "rope",
        "Some layers have no known rotary embedding, so there is no chart of pairs.",
    )

    tensor = Checked(choice(*TENSORS), "keys", help="the shown tensor, keys or values")
    space = Checked(choice(*SPACES), "raw", help="the space of the charts, such as one in which a method codes vectors")

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
