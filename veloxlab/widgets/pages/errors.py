"""What a look at the errors of one layer asks, and what measures it. No widgets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import ipywidgets
import polars as pl

from veloxlab import views
from veloxlab.cache.calibration import Calibration
from veloxlab.checks import checked
from veloxlab.measure import Capture, code_bits, token_errors
from veloxlab.measure.attention_maps import attention_map
from veloxlab.measure.errors import error_densities, errors_along_position, errors_by_bits
from veloxlab.progress import Progress
from veloxlab.widgets.fitting import Fitting
from veloxlab.widgets.pages.layer import WIDEST, LayerChart, LayerExplorer, LayerFrames, Question
from veloxlab.widgets.panel import ProgressBar
from veloxlab.widgets.worker import Worker

BLOCKS = 32  # of positions: a tenth and nine tenths need some vectors each
MAP = 20  # blocks of a side of an attention map: three triangles of 210 cells, which a page draws at once


@dataclass(frozen=True)
class ErrorLook:
    """What is looked at: a layer, a method at a width, and the widths that it is compared with."""

    layer: int
    method: str
    bits: int
    widths: tuple[int, ...]

    @property
    def questions(self) -> dict[str, Question]:
        """What has to be measured for each chart."""
        return {
            **{name: (name, self.layer, self.method, self.bits) for name in ("attention", "positions", "distribution")},
            "by_bits": ("by_bits", self.layer, self.method, self.widths),
        }


def _attention_frame(fitting: Fitting, progress: Progress, seen: Capture, method: str, bits: int) -> pl.DataFrame:
    """The map of the first query head of each KV head."""
    (layer,) = seen.layers
    kv_heads = layer.keys.shape[1]
    group = 1 if layer.queries is None else layer.queries.shape[1] // kv_heads
    calibration = fitting.calibration(method, [bits], progress)
    maps = [
        attention_map(layer, head * group, method, bits=bits, calibration=calibration, blocks=MAP).with_columns(
            head=pl.lit(head)
        )
        for head in range(kv_heads)
    ]
    return pl.concat(maps)


def _pooled(pool: Callable[[pl.DataFrame], pl.DataFrame]) -> Callable[..., pl.DataFrame]:
    """Measures errors of single tokens, pooled for each head alone."""

    def measure(fitting: Fitting, progress: Progress, seen: Capture, method: str, bits: int) -> pl.DataFrame:
        calibration = fitting.calibration(method, [bits], progress)
        tokens = token_errors(seen, method, bits=bits, calibration=calibration)
        return _by_head(tokens, pool)

    return measure


def _by_head(errors: pl.DataFrame, pool: Callable[[pl.DataFrame], pl.DataFrame]) -> pl.DataFrame:
    heads = errors["head"].unique().sort()
    return pl.concat(pool(errors.filter(head=head)).with_columns(head=pl.lit(head)) for head in heads)


def _by_bits(fitting: Fitting, progress: Progress, seen: Capture, method: str, widths: tuple[int, ...]) -> pl.DataFrame:
    calibration = fitting.calibration(method, widths, progress)
    tokens, taken = [], []
    for done, bits in enumerate(widths):
        progress(done, len(widths), f"measuring {bits} bits")
        tokens.append(token_errors(seen, method, bits=bits, calibration=calibration))
        spent = code_bits(seen, method, bits=bits, calibration=calibration)
        taken.append(spent.with_columns(bits=pl.lit(bits, pl.Int32)))
    true_bits = pl.concat(taken)
    return _by_head(pl.concat(tokens), lambda own: errors_by_bits(own, true_bits))


MEASURES: dict[str, Callable[..., pl.DataFrame]] = {
    "attention": _attention_frame,
    "positions": _pooled(lambda own: errors_along_position(own, blocks=BLOCKS)),
    "distribution": _pooled(error_densities),
    "by_bits": _by_bits,
}


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
