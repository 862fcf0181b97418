"""The explorer of keys and values: how one head's coordinates lie in any space, and under a method's levels."""

from __future__ import annotations

import threading
from collections.abc import Collection
from typing import Any

import ipywidgets
import traitlets as t

from veloxlab.calibration import Calibration
from veloxlab.codecs import METHODS, find_method
from veloxlab.errors import InputError
from veloxlab.measure import Capture
from veloxlab.measure.spaces import SIDES, SPACES, check_space
from veloxlab.views.distributions import SPACE_WORDS
from veloxlab.widgets.chart_view import ChartView
from veloxlab.widgets.key_charts import CHARTS
from veloxlab.widgets.key_frames import KeyFrames, Look, Question
from veloxlab.widgets.panel import Panel
from veloxlab.widgets.progress import ProgressBar
from veloxlab.widgets.worker import Progress, sentence

EXACT = "none"  # the method without levels
WIDEST = 8  # bits of the slider
PAIRS = "pairs"  # the chart that needs a rotary embedding


class KeyExplorer(Panel):
    """See one KV head's keys or values in the spaces in which methods code them.

    Everything is measured on the capture, once, on a thread of its own; what the next moves may need is measured ahead.
    Nothing here needs the model or a network.

    Parameters
    ----------
    capture : what `veloxlab.capture` gave.
    layer : index in the prompt cache to begin with; the capture's first by default.
    head : KV head.
    tensor : ``"keys"`` or ``"values"``.
    space : one of `veloxlab.measure.spaces.SPACES`.
    method, bits : whose levels are drawn.
    calibration : what `veloxlab.calibrate` gave, for a method that has to be fitted.

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

    layer = t.Int(help="layer, by its index in the prompt cache")
    head = t.Int(0, help="KV head")
    tensor = t.Unicode("keys", help="keys or values")
    space = t.Unicode("raw", help="space in which they are seen")
    method = t.Unicode("turboquant", help="method whose levels are drawn")
    bits = t.Int(2, help="its code bits")
    problem = t.Unicode("", help="why a chart shows an older choice")

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
    ) -> None:
        self._layers = {c.layer: c for c in capture.layers}
        self._methods = [m.id for m in METHODS.values() if not m.calibrated and m.id != EXACT]
        self._methods += [calibration.method] if calibration and calibration.method not in self._methods else []
        self._frames = KeyFrames(capture, calibration)
        self._names = [name for name in CHARTS if name != PAIRS or all(c.rope for c in capture.layers)]
        self._unmeasurable: dict[Question, str] = {}
        self._shown: dict[str, tuple[object, ...]] = {}  # question, head and shape of what each chart shows
        self._showing = threading.Lock()
        first = capture.layers[0].layer if layer is None else layer
        super().__init__("keys", layer=first, head=head, tensor=tensor, space=space, method=method, bits=bits)
        self.charts = {name: self._first_view(name) for name in self._names}
        self.children = [self._controls(), self._message, *self.charts.values()]
        self.observe(lambda _: self._choose(), ["layer", "head", "tensor", "space", "method", "bits"])
        self.observe(lambda change: self._say(change["new"]), "problem")
        self._measure_ahead()

    @property
    def views(self) -> tuple[ChartView, ...]:
        """The charts."""
        return tuple(self.charts.values())

    def __repr__(self) -> str:
        return (
            f"KeyExplorer({self.tensor}, {SPACE_WORDS[self.space]}, {self.method} at {self.bits} bits: "
            f"{self.charts['channels'].content['params']['caption']})"
        )

    # choices --------------------------------------------------------------------------------------------------------

    @t.validate("layer")
    def _layer_is_there(self, proposal: dict[str, Any]) -> int:
        if proposal["value"] not in self._layers:
            raise InputError(f"There is no layer {proposal['value']}: choose one of {_listed(self._layers)}.")
        return int(proposal["value"])

    @t.validate("head")
    def _head_is_there(self, proposal: dict[str, Any]) -> int:
        heads = min(c.keys.shape[1] for c in self._layers.values())
        if not 0 <= proposal["value"] < heads:
            raise InputError(f"There is no KV head {proposal['value']}: choose one from 0 to {heads - 1}.")
        return int(proposal["value"])

    @t.validate("tensor")
    def _tensor_is_known(self, proposal: dict[str, Any]) -> str:
        if proposal["value"] not in SIDES:
            raise InputError(f"There is no tensor {proposal['value']!r}: choose one of {_listed(SIDES)}.")
        return str(proposal["value"])

    @t.validate("space")
    def _space_is_known(self, proposal: dict[str, Any]) -> str:
        check_space(proposal["value"])
        return str(proposal["value"])

    @t.validate("bits")
    def _bits_are_on_the_slider(self, proposal: dict[str, Any]) -> int:
        if not 1 <= proposal["value"] <= WIDEST:
            raise InputError(f"bits={proposal['value']} is out of range: choose a whole number from 1 to {WIDEST}.")
        return int(proposal["value"])

    @t.validate("method")
    def _method_can_be_seen(self, proposal: dict[str, Any]) -> str:
        find_method(proposal["value"])
        if proposal["value"] not in self._methods:
            raise InputError(
                f"{proposal['value']!r} is not among the methods that can be seen here: {_listed(self._methods)}. "
                "One that has to be fitted takes KeyExplorer(capture, calibration=vl.calibrate(...))."
            )
        return str(proposal["value"])

    def _look(self, **changed: Any) -> Look:
        own = {name: getattr(self, name) for name in ("layer", "tensor", "space", "method", "bits")}
        return Look(**(own | changed))

    # drawing --------------------------------------------------------------------------------------------------------

    def _choose(self) -> None:
        """Show at once what is measured, and ask for what is not."""
        self._show()
        self._measure_ahead()

    def _first_view(self, name: str) -> ChartView:
        look, chart = self._look(), CHARTS[name]
        frame = self._frames.measure(look.questions[name]).filter(head=self.head)  # what cannot be is refused here
        self._shown[name] = (look.questions[name], self.head, chart.shape(frame, look))
        return ChartView(chart.draw(frame, look))

    def _show(self) -> None:
        """Bring every chart whose frame is measured to the present choice, from whichever thread."""
        with self._showing:  # the one who comes last reads the newest choice
            look, head = self._look(), self.head
            for name, view in self.charts.items():
                question, chart = look.questions[name], CHARTS[name]
                measured = self._frames.frames.get(question)
                if measured is None or self._shown[name][:2] == (question, head):
                    continue
                frame = measured.filter(head=head)
                shape = chart.shape(frame, look)
                if shape == self._shown[name][2]:
                    view.put(frame, caption=chart.caption(frame, look))
                else:
                    view.show(chart.draw(frame, look))
                self._shown[name] = (question, head, shape)
            asked = [look.questions[name] for name in self._names]
            self.problem = " ".join(dict.fromkeys(self._unmeasurable[q] for q in asked if q in self._unmeasurable))

    def _measure_ahead(self) -> None:
        """Measure what the present choice lacks and draw it; then what the next move of any one control may need."""
        now = self._look()
        missing = [now.questions[name] for name in self._names if now.questions[name] not in self._frames.frames]
        looks = [self._look(layer=self.layer + step) for step in (1, -1) if self.layer + step in self._layers]
        looks += [self._look(bits=self.bits + step) for step in (1, -1) if 1 <= self.bits + step <= WIDEST]
        looks += [self._look(space=space) for space in SPACES] + [self._look(tensor=side) for side in SIDES]
        looks += [self._look(method=method) for method in self._methods]
        ahead = dict.fromkeys(look.questions[name] for look in looks for name in self._names)

        def job(progress: Progress) -> None:
            for question in missing:
                self._try(question)
                progress.check()
            if missing:
                self._show()
            for done, question in enumerate(ahead):
                progress(done, len(ahead), f"measuring {question[0]} of layer {question[1]}")
                self._try(question)

        self.worker.submit("frames", job, on_error=lambda words: setattr(self, "problem", words))

    def _try(self, question: Question) -> None:
        try:
            self._frames.measure(question)
        except InputError as error:
            self._unmeasurable[question] = sentence(error)

    def _controls(self) -> ipywidgets.Widget:
        heads = range(min(c.keys.shape[1] for c in self._layers.values()))
        spaces = [(SPACE_WORDS[space], space) for space in SPACES]
        rows = [
            [
                self._steps("layer", list(self._layers), tip="Layer of the model"),
                self._steps("head", list(heads), tip="KV head"),
            ],
            [
                self._choice("tensor", list(SIDES), tip="Keys or values"),
                self._choice("space", spaces, tip="The space in which their coordinates are seen"),
            ],
            [
                self._choice("method", self._methods, tip="The method whose levels are drawn"),
                self._steps("bits", list(range(1, WIDEST + 1)), tip="Its code bits"),
            ],
            [ProgressBar(self.worker)],
        ]
        return ipywidgets.VBox([ipywidgets.HBox(row) for row in rows])


def _listed(choices: Collection[object]) -> str:
    return ", ".join(map(str, choices))
