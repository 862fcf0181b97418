"""What a look at keys or values asks, and what measures it. No widgets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import ipywidgets
import polars as pl
import traitlets as t

from veloxlab import views
from veloxlab.cache.calibration import Calibration
from veloxlab.checks import checked
from veloxlab.codecs import ROLES, Role
from veloxlab.errors import InputError
from veloxlab.measure import Capture
from veloxlab.measure.distributions import SPACES, Space, channel_distributions, check_space, densities
from veloxlab.measure.levels import level_densities
from veloxlab.measure.spectra import rope_pairs, spectra
from veloxlab.progress import Progress
from veloxlab.views.distributions import MARKS, SHARES_SHOWN, SPACE_WORDS
from veloxlab.widgets.fitting import Fitting
from veloxlab.widgets.pages.layer import WIDEST, LayerChart, LayerExplorer, LayerFrames, Question, listed
from veloxlab.widgets.panel import ProgressBar
from veloxlab.widgets.traits import Words
from veloxlab.widgets.worker import Worker


@dataclass(frozen=True)
class KeyLook:
    """What is looked at: a layer's keys or values in a space, and a method at a width."""

    layer: int
    tensor: Role
    space: Space
    method: str
    bits: int

    @property
    def questions(self) -> dict[str, Question]:
        """What has to be measured for each chart."""
        return {
            "channels": ("channels", self.layer, self.tensor, self.space),
            "density": ("density", self.layer, self.tensor, self.space),
            "levels": ("levels", self.layer, self.tensor, self.method, self.bits),
            "spectrum": ("spectrum", self.layer, self.tensor),
            "pairs": ("pairs", self.layer),
        }


def _levels(fitting: Fitting, progress: Progress, seen: Capture, tensor: Role, method: str, bits: int) -> pl.DataFrame:
    calibration = fitting.calibration(method, [bits], progress)
    return level_densities(seen, method, bits=bits, tensors=(tensor,), calibration=calibration)


MEASURES: dict[str, Callable[..., pl.DataFrame]] = {
    "channels": lambda _, __, seen, tensor, space: channel_distributions(seen, space, tensors=(tensor,)),
    "density": lambda _, __, seen, tensor, space: densities(seen, space, tensors=(tensor,)),
    "levels": _levels,
    "spectrum": lambda _, __, seen, tensor: spectra(seen, tensors=(tensor,)),
    "pairs": lambda _, __, seen: rope_pairs(seen),
}


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


PAIRS = "pairs"  # the chart that needs a rotary embedding


class KeyExplorer(LayerExplorer[KeyLook]):
    """See one KV head's keys or values in the spaces in which methods code them.

    Everything is measured on the capture, once, on a thread of its own; what the next moves may need is measured ahead.
    Nothing here needs the model or a network.

    Parameters
    ----------
    capture : what `veloxlab.capture` gave.
    layer : index in the prompt cache to begin with; the capture's first by default.
    head : KV head.
    tensor : ``"keys"`` or ``"values"``.
    space : one of `veloxlab.measure.distributions.SPACES`.
    method, bits : whose levels are drawn.
    calibration : what `veloxlab.calibrate` gave, for a method that has to be fitted.
    fitting, worker : of the laboratory that it is a page of; the first stands in for the calibration.

    Attributes
    ----------
    layer, head, tensor, space, method, bits : traits; set them and the charts follow.
    charts : by name ``channels``, ``density``, ``levels``, ``spectrum`` and, where every layer has
        a known RoPE, ``pairs``: each with ``frame``,
        ``to_parquet``, ``to_csv``, ``to_png`` and ``to_svg``.
    problem : why a chart shows an older choice, or an empty text.

    Raises
    ------
    InputError : a layer, head, tensor, space or method that there is not; a choice that cannot be measured.
    """

    NAME = "keys"
    CHARTS: ClassVar[dict[str, LayerChart]] = CHARTS
    KNOBS = ("layer", "tensor", "space", "method", "bits")

    tensor = Words("keys", help="keys or values")
    space = Words("raw", help="space in which they are seen")

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
        fitting: Fitting | None = None,
        worker: Worker | None = None,
    ) -> None:
        frames = LayerFrames(capture, fitting or Fitting(given=calibration), MEASURES)
        names = [name for name in CHARTS if name != PAIRS or all(c.rope for c in capture.layers)]
        knobs = {"layer": layer, "head": head, "tensor": tensor, "space": space, "method": method, "bits": bits}
        super().__init__(frames, names, worker, **knobs)
        self.children = [self._controls(), self._message, *self.charts.values()]
        if PAIRS not in names:
            self.say_always("Not every layer has a rotary embedding that is known, so there is no chart of its pairs.")

    def __repr__(self) -> str:
        return (
            f"KeyExplorer({self.tensor}, {SPACE_WORDS[self.space]}, {self.method} at {self.bits} bits: "
            f"{self.charts['channels'].content['params']['caption']})"
        )

    @t.validate("tensor")
    def _tensor_is_known(self, proposal: dict[str, Any]) -> str:
        if proposal["value"] not in ROLES:
            raise InputError(f"There is no tensor {proposal['value']!r}: choose one of {listed(ROLES)}.")
        return str(proposal["value"])

    @t.validate("space")
    def _space_is_known(self, proposal: dict[str, Any]) -> str:
        check_space(proposal["value"])
        return str(proposal["value"])

    def _look(self, **changed: Any) -> KeyLook:
        return KeyLook(**({name: getattr(self, name) for name in self.KNOBS} | changed))

    def _likely(self) -> list[KeyLook]:
        looks = [self._look(space=space) for space in SPACES] + [self._look(tensor=side) for side in ROLES]
        return [*self._neighbours(), *looks]

    def _controls(self) -> ipywidgets.Widget:
        spaces = [(SPACE_WORDS[space], space) for space in SPACES]
        rows = [
            [
                self._steps("layer", list(self._layers), tip="Layer of the model"),
                self._steps("head", list(self.heads), tip="KV head"),
            ],
            [
                self._choice("tensor", list(ROLES), tip="Keys or values"),
                self._choice("space", spaces, tip="The space in which their coordinates are seen"),
            ],
            [
                self._choice("method", self._fitting.methods, tip="The method whose levels are drawn"),
                self._steps("bits", list(range(1, WIDEST + 1)), tip="Its code bits"),
            ],
            [ProgressBar(self.worker)],
        ]
        return ipywidgets.VBox([ipywidgets.HBox(row) for row in rows])
