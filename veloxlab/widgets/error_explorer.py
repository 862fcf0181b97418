"""The explorer of errors: what a method does to one head's attention, and to its keys and values one by one."""

from __future__ import annotations

from typing import Any, ClassVar

import ipywidgets
import polars as pl

from veloxlab import views
from veloxlab.calibration import Calibration
from veloxlab.checks import checked
from veloxlab.measure import Capture
from veloxlab.widgets.error_frames import MEASURES, ErrorLook
from veloxlab.widgets.fitting import Fitting
from veloxlab.widgets.layer_explorer import WIDEST, LayerChart, LayerExplorer, LayerFrames
from veloxlab.widgets.progress import ProgressBar
from veloxlab.widgets.worker import Worker


def _attention(frame: pl.DataFrame, look: ErrorLook) -> str:
    where = f"layer {look.layer}, KV head {frame['head'][0]}"
    return f"{look.method} at {look.bits} bits, {where}: {views.attention_caption(frame)}"


class ErrorExplorer(LayerExplorer[ErrorLook]):
    """See what a method at a width does to one KV head: its attention map, and the errors of its keys and values.

    Every token is seen through its codes. Nothing here needs a network.

    Parameters
    ----------
    capture : what `veloxlab.capture` gave.
    layer : index in the prompt cache to begin with; the capture's first by default.
    head : KV head; the attention map is that of its first query head.
    method, bits : what codes the keys and values.
    calibration : what `veloxlab.calibrate` gave, for a method that has to be fitted.
    fitting, worker : of the laboratory that it is a page of; the first stands in for the calibration.

    Attributes
    ----------
    layer, head, method, bits : traits; set them and the charts follow.
    charts : by name ``attention``, ``positions``, ``distribution`` and ``by_bits``, each with ``frame``,
        ``to_parquet``, ``to_csv``, ``to_png`` and ``to_svg``.
    problem : why a chart shows an older choice, or an empty text.

    Raises
    ------
    InputError : a layer, head or method that there is not; a choice that cannot be measured.
    """

    NAME = "errors"
    KNOBS = ("layer", "method", "bits")
    CHARTS: ClassVar[dict[str, LayerChart]] = {
        "attention": LayerChart(
            lambda frame, look: views.attention_maps(frame, caption=_attention(frame, look)),
            lambda frame, look: _attention(frame, look),
            lambda *_: None,
        ),
        "positions": LayerChart(
            lambda frame, _: views.errors_along_position(frame),
            lambda frame, _: views.profile_caption(frame),
            lambda *_: None,
        ),
        "distribution": LayerChart(
            lambda frame, _: views.error_distribution(frame),
            lambda frame, _: views.distribution_caption(frame),
            lambda *_: None,
        ),
        "by_bits": LayerChart(
            lambda frame, _: views.errors_by_bits(frame), lambda frame, _: views.by_bits_caption(frame), lambda *_: None
        ),
    }

    @checked()
    def __init__(
        self,
        capture: Capture,
        *,
        layer: int | None = None,
        head: int = 0,
        method: str = "turboquant",
        bits: int = 2,
        calibration: Calibration | None = None,
        fitting: Fitting | None = None,
        worker: Worker | None = None,
    ) -> None:
        frames = LayerFrames(capture, fitting or Fitting(given=calibration), MEASURES)
        maps = all(c.queries is not None for c in capture.layers)
        names = [name for name in self.CHARTS if name != "attention" or maps]
        super().__init__(frames, names, worker, layer=layer, head=head, method=method, bits=bits)
        self.children = [self._controls(), self._message, *self.charts.values()]
        if not maps:
            self.say_always("Not every layer shows its queries, so there are no attention maps.")

    def __repr__(self) -> str:
        said = self.charts["positions"].content["params"]["caption"]
        return f"ErrorExplorer(layer {self.layer}, KV head {self.head}, {self.method}: {said})"

    def _look(self, **changed: Any) -> ErrorLook:
        knobs = {name: getattr(self, name) for name in self.KNOBS} | changed
        method, bits = knobs["method"], knobs["bits"]
        ready = [w for w in self._fitting.widths(method) if w == bits or self._fitting.is_ready(method, w)]
        return ErrorLook(**knobs, widths=tuple(ready))

    def _likely(self) -> list[ErrorLook]:
        return self._neighbours()

    def _controls(self) -> ipywidgets.Widget:
        rows = [
            [
                self._steps("layer", list(self._layers), tip="Layer of the model"),
                self._steps("head", list(self.heads), tip="KV head"),
            ],
            [
                self._choice("method", self._fitting.methods, tip="How vectors are coded"),
                self._steps("bits", list(range(1, WIDEST + 1)), tip="Its code bits"),
            ],
            [ProgressBar(self.worker)],
        ]
        return ipywidgets.VBox([ipywidgets.HBox(row) for row in rows])
