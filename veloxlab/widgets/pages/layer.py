"""What explorers of one layer and head share: frames, each measured once, and charts that follow the knobs."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import altair as alt
import polars as pl
import traitlets as t

from veloxlab.codecs import find_method
from veloxlab.errors import InputError
from veloxlab.measure import Capture
from veloxlab.progress import Progress as Tell
from veloxlab.progress import silent
from veloxlab.widgets.chart_view import ChartView
from veloxlab.widgets.fitting import Fitting
from veloxlab.widgets.panel import Panel
from veloxlab.widgets.traits import Whole, Words
from veloxlab.widgets.worker import Progress, Worker, sentence

WIDEST = 8  # bits of the slider
Question = tuple[object, ...]  # the name of a frame, the layer, and what else it depends on


class Look(Protocol):
    """What is looked at, but for the head: knobs, as a dataclass."""

    @property
    def questions(self) -> dict[str, Question]:
        """What has to be measured for each chart."""


L = TypeVar("L", bound=Look)


@dataclass(frozen=True)
class LayerChart:
    """One chart of one head.

    Attributes
    ----------
    draw : the chart of a frame and a `Look`.
    caption : the line under its heading.
    shape : what its spec depends on beside numbers: frames of one shape can be put into one chart.
    """

    draw: Callable[[pl.DataFrame, Any], alt.VConcatChart]
    caption: Callable[[pl.DataFrame, Any], str]
    shape: Callable[[pl.DataFrame, Any], object]


@dataclass
class LayerFrames:
    """Frames by question, of all KV heads. They are never changed, so any thread may read them.

    Attributes
    ----------
    capture : whose layers are measured, one at a time.
    fitting : calibrations of methods that learn.
    measures : by the name of a frame: what measures it on a capture of one layer. It gets the rest of the question.
    frames : what was measured.
    """

    capture: Capture
    fitting: Fitting
    measures: Mapping[str, Callable[..., pl.DataFrame]]
    frames: dict[Question, pl.DataFrame] = field(default_factory=dict)

    def measure(self, question: Question, progress: Tell = silent) -> pl.DataFrame:
        """Give the frame of a question, measured if it is asked for the first time; raises what measuring raises."""
        if question not in self.frames:
            name, layer, *rest = question
            only = replace(self.capture, layers=tuple(c for c in self.capture.layers if c.layer == layer))
            self.frames[question] = self.measures[str(name)](self.fitting, progress, only, *rest)
        return self.frames[question]


class LayerExplorer(Panel, Generic[L]):
    """Charts of one KV head of one layer, under a method at a width.

    A subclass says what its charts are, and what a look at its knobs asks. Everything is measured once, on the worker;
    what the next moves may need is measured ahead.

    Attributes
    ----------
    layer, head, method, bits : traits; set them and the charts follow.
    charts : by name.
    problem : why a chart shows an older choice, or an empty text.
    """

    NAME: ClassVar[str]
    CHARTS: ClassVar[Mapping[str, LayerChart]]
    KNOBS: ClassVar[tuple[str, ...]]  # of a look; the head is one more

    layer = Whole(help="layer, by its index in the prompt cache")
    head = Whole(0, help="KV head")
    method = Words("turboquant", help="a method's id")
    bits = Whole(2, help="its code bits")
    problem = Words("", help="why a chart shows an older choice")

    def __init__(self, frames: LayerFrames, names: Collection[str], worker: Worker | None, **traits: Any) -> None:
        self._frames, self._fitting, self._names = frames, frames.fitting, list(names)
        self._layers = {c.layer: c for c in frames.capture.layers}
        self._unmeasurable: dict[Question, str] = {}
        self._shown: dict[str, tuple[object, ...]] = {}  # question, head and shape of what each chart shows
        self._showing = threading.Lock()
        if traits["layer"] is None:
            traits["layer"] = next(iter(self._layers))
        super().__init__(self.NAME, worker, **traits)
        self.charts = {name: self._first_view(name) for name in self._names}
        self.observe(lambda _: self._choose(), [*self.KNOBS, "head"])
        self.observe(lambda change: self.say(change["new"]), "problem")
        self._measure_ahead()

    @property
    def named(self) -> dict[str, ChartView]:
        """The charts."""
        return self.charts

    @property
    def heads(self) -> range:
        """KV heads that every layer has."""
        return range(min(c.keys.shape[1] for c in self._layers.values()))

    @abstractmethod
    def _look(self, **changed: Any) -> L:
        """The present choice, with some knobs changed."""

    @abstractmethod
    def _likely(self) -> list[L]:
        """What may be looked at next."""

    def _neighbours(self) -> list[L]:
        """The looks that one move of a knob that all explorers have leads to."""
        steps = {name: [getattr(self, name) + step for step in (1, -1)] for name in ("layer", "bits")}
        looks = [self._look(layer=layer) for layer in steps["layer"] if layer in self._layers]
        looks += [self._look(bits=bits) for bits in steps["bits"] if self._is_ready(self.method, bits)]
        return looks + [self._look(method=m) for m in self._fitting.methods if self._is_ready(m, self.bits)]

    def _is_ready(self, method: str, bits: int) -> bool:
        return bits in self._fitting.widths(method) and self._fitting.is_ready(method, bits)

    # choices --------------------------------------------------------------------------------------------------------

    @t.validate("layer")
    def _layer_is_there(self, proposal: dict[str, Any]) -> int:
        if proposal["value"] not in self._layers:
            raise InputError(f"There is no layer {proposal['value']}: choose one of {listed(self._layers)}.")
        return int(proposal["value"])

    @t.validate("head")
    def _head_is_there(self, proposal: dict[str, Any]) -> int:
        if proposal["value"] not in self.heads:
            raise InputError(f"There is no KV head {proposal['value']}: choose one from 0 to {self.heads[-1]}.")
        return int(proposal["value"])

    @t.validate("bits")
    def _bits_are_on_the_slider(self, proposal: dict[str, Any]) -> int:
        if not 1 <= proposal["value"] <= WIDEST:
            raise InputError(f"bits={proposal['value']} is out of range: choose a whole number from 1 to {WIDEST}.")
        return int(proposal["value"])

    @t.validate("method")
    def _method_can_be_seen(self, proposal: dict[str, Any]) -> str:
        find_method(proposal["value"])
        if proposal["value"] not in self._fitting.methods:
            known = listed(self._fitting.methods)
            raise InputError(
                f"{proposal['value']!r} is not among the methods that can be seen here: {known}. "
                f"One that has to be fitted takes {type(self).__name__}(capture, calibration=vl.calibrate(...))."
            )
        return str(proposal["value"])

    # drawing --------------------------------------------------------------------------------------------------------

    def _choose(self) -> None:
        """Show at once what is measured, and ask for what is not."""
        self._show()
        self._measure_ahead()

    def _first_view(self, name: str) -> ChartView:
        look, chart = self._look(), self.CHARTS[name]
        frame = self._frames.measure(look.questions[name]).filter(head=self.head)  # what cannot be is refused here
        self._shown[name] = (look.questions[name], self.head, chart.shape(frame, look))
        return ChartView(chart.draw(frame, look))

    def _show(self) -> None:
        """Bring every chart whose frame is measured to the present choice, from whichever thread."""
        with self._showing:  # the one who comes last reads the newest choice
            look, head = self._look(), self.head
            for name, view in self.charts.items():
                question, chart = look.questions[name], self.CHARTS[name]
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
        likely = [look for look in self._likely() if look != now]
        questions = dict.fromkeys(look.questions[name] for look in likely for name in self._names)
        ahead = [q for q in questions if q not in self._frames.frames and q not in self._unmeasurable]

        def job(questions: Collection[Question], progress: Progress) -> None:
            for done, question in enumerate(questions):
                progress(done, len(questions), f"measuring {question[0]} of layer {question[1]}")
                self._try(question, progress)
            self._show()

        if missing:
            self._submit("frames", lambda progress: job(missing, progress))
        if ahead:
            self._submit("ahead", lambda progress: job(ahead, progress), ahead=True)

    def _try(self, question: Question, progress: Progress) -> None:
        try:
            self._frames.measure(question, progress)
        except InputError as error:
            self._unmeasurable[question] = sentence(error)


def listed(choices: Collection[object]) -> str:
    """Choices in a sentence."""
    return ", ".join(map(str, choices))
