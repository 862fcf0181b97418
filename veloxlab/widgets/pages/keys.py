"""The page of keys and values: one KV head in the spaces in which methods code it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import polars as pl

from veloxlab import views
from veloxlab.cache.calibration import Calibration
from veloxlab.checks import checked, choice
from veloxlab.codecs import TENSORS, Tensor
from veloxlab.measure import Capture
from veloxlab.measure.distributions import SPACES, channel_distributions, densities
from veloxlab.measure.levels import level_densities
from veloxlab.measure.spectra import rope_pairs, spectra
from veloxlab.progress import Progress
from veloxlab.views.distributions import MARKS, SHARES_SHOWN, SPACE_WORDS
from veloxlab.widgets.fitting import Fitting
from veloxlab.widgets.pages.charts import Frames, HeadPage, Look, head_chart, plain
from veloxlab.widgets.selection import Checked, ChosenBits, Selection
from veloxlab.widgets.worker import Worker

SEEN = ("layer", "tensor", "space")


def _levels(frames: Frames, progress: Progress, layer: int, tensor: Tensor, method: str, bits: int) -> pl.DataFrame:
    calibration = frames.fitting.calibration(method, [bits], progress)
    return level_densities(frames.of_layer(layer), method, bits=bits, tensors=(tensor,), calibration=calibration)


MEASURES: dict[str, Callable[..., pl.DataFrame]] = {
    "channels": lambda frames, _, layer, tensor, space: channel_distributions(
        frames.of_layer(layer), space, tensors=(tensor,)
    ),
    "density": lambda frames, _, layer, tensor, space: densities(frames.of_layer(layer), space, tensors=(tensor,)),
    "levels": _levels,
    "spectrum": lambda frames, _, layer, tensor: spectra(frames.of_layer(layer), tensors=(tensor,)),
    "pairs": lambda frames, _, layer: rope_pairs(frames.of_layer(layer)),
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


class KeyExplorer(HeadPage):
    """See one KV head's keys or values in the spaces in which methods code them.

    Everything is measured on the capture, once. Nothing here needs the model or a network.

    Parameters
    ----------
    capture : what `veloxlab.capture` gave.
    layer : index in the prompt cache to begin with; the capture's first by default.
    head : KV head.
    tensor : ``"keys"`` or ``"values"``.
    space : one of `veloxlab.measure.distributions.SPACES`.
    method, bits : whose levels are drawn.
    calibration : what `veloxlab.calibrate` gave, for a method that has to be fitted.
    selection, worker : of the laboratory that it is a page of; the selection stands in for the other choices.

    Attributes
    ----------
    layer, head, tensor, space, method, bits : traits; set them and the charts follow. The bits are those of the keys
        or values that are shown.
    charts : by name ``channels``, ``density``, ``levels``, ``spectrum`` and, where every layer has a known RoPE,
        ``pairs``: each with ``frame``, ``to_parquet``, ``to_csv``, ``to_png`` and ``to_svg``.
    problem : why a chart shows older settings, or an empty text.

    Raises
    ------
    InputError : a layer, head, tensor, space, method or number of bits that there is not; a choice that cannot be
        measured.
    """

    SETTINGS = ("layer", "head", "tensor", "space", "method", "bits")

    tensor = Checked(choice(*TENSORS), "keys", help="keys or values")
    space = Checked(choice(*SPACES), "raw", help="space in which they are seen")
    bits = ChosenBits("", "shown_layer", help="code bits of each coordinate")

    @checked()
    def __init__(
        self,
        capture: Capture,
        *,
        layer: int | None = None,
        head: int = 0,
        tensor: str = "keys",
        space: str = "raw",
        method: str = "turboquant",
        bits: int = 2,
        calibration: Calibration | None = None,
        selection: Selection | None = None,
        worker: Worker | None = None,
    ) -> None:
        chosen: dict[str, Any] = {"layer": layer, "head": head, "method": method, "key_bits": bits, "value_bits": bits}
        selection = selection or Selection.of(capture, Fitting(given=calibration), **chosen)
        rope = all(c.rope for c in capture.layers)
        charts = [chart for chart in CHARTS if chart.name != "pairs" or rope]
        frames = Frames(MEASURES, selection.fitting, capture)
        super().__init__("keys", frames, charts, selection, worker, tensor=tensor, space=space)
        if not rope:
            self.lasting = "Not every layer has a rotary embedding that is known, so there is no chart of its pairs."
        spaces = [(SPACE_WORDS[space], space) for space in SPACES]
        self.children = [
            self._controls([self._choice("tensor", list(TENSORS)), self._choice("space", spaces)]),
            self._message,
            *self.charts.values(),
        ]
        self.follow()

    def __repr__(self) -> str:
        return (
            f"KeyExplorer({self.tensor}, {SPACE_WORDS[self.space]}, {self.method} at {self.bits} bits: "
            f"{self.charts['channels'].content['params']['caption']})"
        )

    def _likely(self) -> Iterable[Look]:
        spaces = [self._look(space=space) for space in SPACES]
        return [*self._neighbours(), *spaces, *(self._look(tensor=tensor) for tensor in TENSORS)]
