"""The page of keys and values: one KV head in the spaces in which methods code it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import ipywidgets
import polars as pl

from veloxlab import views
from veloxlab.checks import choice
from veloxlab.codecs import TENSORS, Tensor
from veloxlab.measure.distributions import SPACES, channel_distributions, densities
from veloxlab.measure.levels import level_densities
from veloxlab.measure.spectra import rope_pairs, spectra
from veloxlab.progress import Progress
from veloxlab.views.distributions import MARKS, SHARES_SHOWN, SPACE_WORDS
from veloxlab.widgets.pages.charts import ChartPage, HeadPage, Look, Measure, head_chart, plain
from veloxlab.widgets.selection import Checked

SEEN = ("layer", "tensor", "space")


def _levels(page: ChartPage, progress: Progress, layer: int, tensor: Tensor, method: str, bits: int) -> pl.DataFrame:
    calibration = page.selection.fitting.calibration(method, [bits], progress)
    return level_densities(page.of_layer(layer), method, bits=bits, tensors=(tensor,), calibration=calibration)


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
    SETTINGS = ("layer", "head", "tensor", "space", "method", "bits")
    MEASURES: ClassVar[dict[str, Measure]] = {
        "channels": lambda page, _, layer, tensor, space: channel_distributions(
            page.of_layer(layer), space, tensors=(tensor,)
        ),
        "density": lambda page, _, layer, tensor, space: densities(page.of_layer(layer), space, tensors=(tensor,)),
        "levels": _levels,
        "spectrum": lambda page, _, layer, tensor: spectra(page.of_layer(layer), tensors=(tensor,)),
        "pairs": lambda page, _, layer: rope_pairs(page.of_layer(layer)),
    }
    CHARTS = (
        head_chart(
            "channels",
            SEEN,
            plain(views.channel_ranges),
            plain(views.channel_caption),
            # channels that are drawn in groups are no rows of the frame
            lambda frame, look: (look.tensor, look.space, frame.height if 3 * frame.height > MARKS else 0),
        ),
        head_chart("density", SEEN, plain(views.density), plain(views.density_caption), lambda _, look: look.space),
        head_chart(
            "levels",
            ("layer", "tensor", "method", "bits"),
            lambda frame, look: views.levels_on_density(frame, method=look.method),
            lambda frame, look: views.levels_caption(frame, look.method),
            lambda frame, look: (look.tensor, frame.filter(kind="level").height <= SHARES_SHOWN),
        ),
        head_chart("spectrum", ("layer", "tensor"), plain(views.spectrum), plain(views.spectrum_caption)),
        head_chart(
            "pairs",
            ("layer",),
            plain(views.pair_energy),
            plain(views.pair_caption),
            lambda frame, _: tuple(frame["wavelength"]),
        ),
    )
    RARE = "pairs", "rope", "Not every layer has a rotary embedding that is known, so there is no chart of its pairs."

    tensor = Checked(choice(*TENSORS), "keys", help="keys or values")
    space = Checked(choice(*SPACES), "raw", help="space in which they are seen")

    @property
    def summary(self) -> str:
        """What is shown, and what its channels say."""
        said = self.charts["channels"].content["params"]["caption"]
        return f"{self.tensor}, {SPACE_WORDS[self.space]}, {self.method} at {self.bits} bits: {said}"

    def _likely(self) -> Iterable[Look]:
        spaces = [self._look(space=space) for space in SPACES]
        return [*super()._likely(), *spaces, *(self._look(tensor=tensor) for tensor in TENSORS)]

    def _controls(self, *own: Sequence[ipywidgets.Widget]) -> ipywidgets.Widget:
        spaces = [(SPACE_WORDS[space], space) for space in SPACES]
        tensor = self._control(ipywidgets.Dropdown, "tensor", options=TENSORS)
        return super()._controls([tensor, self._control(ipywidgets.Dropdown, "space", options=spaces)], *own)
