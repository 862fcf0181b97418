"""Pages that are lists of charts: what each shows, what has to be measured for it, and the frames that were."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar

import altair as alt
import ipywidgets
import polars as pl

from veloxlab.checks import WORDS
from veloxlab.errors import InputError
from veloxlab.measure import Capture
from veloxlab.progress import Progress as Tell
from veloxlab.progress import silent
from veloxlab.widgets.chart_view import ChartView
from veloxlab.widgets.fitting import Fitting
from veloxlab.widgets.lifetime import weakly
from veloxlab.widgets.panel import Panel, ProgressBar, rows
from veloxlab.widgets.selection import Checked, Chosen, Selection
from veloxlab.widgets.worker import Progress, Status, Worker, sentence

T = TypeVar("T")
Request = tuple[Any, ...]  # the name of a measurement, and what it is of
Look = Any  # a `SimpleNamespace`: what a page shows, setting by setting
WAITING = "Measuring these settings. A chart that waits shows the last ones."
CANCELLED = "Cancelled. The charts show the last settings that were measured. Change a setting to measure these."


@dataclass
class Frames:
    """What was measured, by request, or why it cannot be. A frame is never changed, so any thread may read it.

    ``measures``: functions by the name of a request; they take these frames, a progress, and the rest of the request.
    """

    measures: Mapping[str, Callable[..., Any]]
    fitting: Fitting
    capture: Capture | None = None
    found: dict[Request, Any] = field(default_factory=dict)
    refused: dict[Request, str] = field(default_factory=dict)

    def measure(self, request: Request, progress: Tell = silent) -> Any:  # noqa: ANN401 - a frame, or what makes one
        """Give what is asked for, measured if it is asked for the first time; raises what measuring raises."""
        if request not in self.found:
            name, *rest = request
            self.found[request] = self.measures[name](self, progress, *rest)
        return self.found[request]

    def of_layer(self, layer: int) -> Capture:
        """The capture of one layer alone."""
        assert self.capture is not None
        return replace(self.capture, layers=tuple(c for c in self.capture.layers if c.layer == layer))


@dataclass(frozen=True)
class Chart:
    """One chart of a page.

    Attributes
    ----------
    name : of the chart.
    depends : settings that it depends on.
    rows : its rows, from what was measured.
    draw : the chart of its rows.
    caption : the line under its heading; without it the chart is always drawn as a whole.
    shape : what its spec depends on beside numbers: rows of one shape can be put into one chart.
    asks : what has to be measured for it.
    """

    name: str
    depends: tuple[str, ...]
    rows: Callable[[Sequence[Any], Look], Any]
    draw: Callable[[Any, Look], alt.TopLevelMixin]
    caption: Callable[[Any, Look], str] | None = None
    shape: Callable[[Any, Look], object] = lambda rows, look: None
    asks: Callable[[Look], Iterable[Request]] = lambda look: ()

    def at(self, look: Look) -> tuple[object, ...]:
        """The settings that it depends on."""
        return tuple(getattr(look, name) for name in self.depends)


class Charts:
    """Charts that are brought to one look after another.

    Parameters
    ----------
    kinds : what the charts are.
    frames : what is measured for them.
    look : the first; what is missing for it is measured now, and `InputError` says what cannot be.

    Attributes
    ----------
    views : by name.
    shown : the rows that each shows.
    problem : why a chart shows an older look, or an empty text.
    """

    def __init__(self, kinds: Iterable[Chart], frames: Frames, look: Look) -> None:
        self._kinds = {kind.name: kind for kind in kinds}
        self._frames = frames
        self._lock = threading.Lock()
        self._at: dict[str, tuple[object, object]] = {}  # of each chart: the settings that it shows, and its shape
        self.problem = ""
        self.shown: dict[str, Any] = {}
        self.views: dict[str, ChartView] = {}
        for name, kind in self._kinds.items():
            self.shown[name] = shown = kind.rows([frames.measure(request) for request in kind.asks(look)], look)
            self._at[name] = kind.at(look), kind.shape(shown, look)
            self.views[name] = ChartView(kind.draw(shown, look))

    def asked(self, looks: Iterable[Look]) -> list[Request]:
        """What is not measured of some looks."""
        asked = dict.fromkeys(r for look in looks for kind in self._kinds.values() for r in kind.asks(look))
        return [request for request in asked if request not in self._frames.found]

    def show(self, look: Callable[[], Look]) -> bool:
        """Bring every chart to a look as far as it is measured, and tell whether that was all. From any thread."""
        with self._lock:  # the one who comes last reads the newest settings
            now = look()
            problems = dict.fromkeys(self._show(name, kind, now) for name, kind in self._kinds.items())
            self.problem = " ".join(problem for problem in problems if problem)
            return all(self._at[name][0] == kind.at(now) for name, kind in self._kinds.items())

    def _show(self, name: str, kind: Chart, look: Look) -> str:
        """Bring one chart to a look, and give the reason if that cannot be."""
        at, asked = kind.at(look), [*kind.asks(look)]
        found = [self._frames.found.get(request) for request in asked]
        if any(frame is None for frame in found):
            return next((why for why in map(self._frames.refused.get, asked) if why), "")
        if at != self._at[name][0]:
            self.shown[name] = shown = kind.rows(found, look)
            shape = kind.shape(shown, look)
            if kind.caption is not None and shape == self._at[name][1]:
                self.views[name].put(shown, caption=kind.caption(shown, look))
            else:
                self.views[name].show(kind.draw(shown, look))
            self._at[name] = at, shape
        return ""


class ChartPage(Panel):
    """Charts that follow the settings. What they need is measured once, on the worker; what may be next, ahead.

    A subclass says what its settings and its charts are, and what may be looked at next.

    Attributes
    ----------
    charts : by name.
    problem : trait: why a chart shows older settings, or an empty text.
    """

    SETTINGS: ClassVar[tuple[str, ...]]

    problem = Checked(WORDS, "", help="why a chart shows older settings")

    def __init__(
        self,
        name: str,
        frames: Frames,
        kinds: Iterable[Chart],
        selection: Selection,
        worker: Worker | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(name, selection, worker, **settings)
        self._frames, self._complete = frames, True
        self._said: str | None = ""
        self._charts = Charts(kinds, frames, self._look())
        self.charts = self._charts.views
        traits = self.traits()
        for setting in self.SETTINGS:
            if setting in traits and not isinstance(traits[setting], Chosen):
                self.observe(lambda _: self._selected(), setting)
        self._ends.append(self.worker.watch(weakly(self._follow)))

    @property
    def named(self) -> Mapping[str, ChartView]:
        """The charts."""
        return self.charts

    def _look(self, **changed: Any) -> Look:
        """The present settings, with some changed."""
        return SimpleNamespace(**({name: getattr(self, name) for name in self.SETTINGS} | changed))

    def _likely(self) -> Iterable[Look]:
        """What may be looked at next."""
        return ()

    def _redraw(self) -> None:
        """Show at once what is measured, and ask for what is not."""
        self._said = None
        self._show()
        self._measure()

    def _show(self) -> None:
        self._complete = self._charts.show(self._look)
        self.problem = self._charts.problem
        said = self.problem or ("" if self._complete else WAITING)
        if said != self._said:
            self._said = said
            self.say(said)

    def _measure(self) -> None:
        """Measure what the present settings lack, and draw it; then what the next move may need."""
        missing = self._charts.asked([self._look()])
        ahead = [request for request in self._charts.asked(self._likely()) if request not in self._frames.refused]

        def job(requests: Collection[Request], progress: Progress) -> None:
            for done, request in enumerate(requests):
                progress(done, len(requests), f"measuring {request[0]}")
                try:
                    self._frames.measure(request, progress)
                except InputError as error:
                    self._frames.refused[request] = sentence(error)
            self._show()

        if missing:
            self._submit("frames", lambda progress: job(missing, progress))
        if ahead:
            self._submit("ahead", lambda progress: job(ahead, progress), ahead=True)

    def _follow(self, status: Status) -> None:
        if status.state == "cancelled" and status.key == f"{self._name}: frames" and not self._complete:
            self.say(CANCELLED)


# one KV head of one layer --------------------------------------------------------------------------------------------


def head_chart(
    name: str,
    depends: tuple[str, ...],
    draw: Callable[[pl.DataFrame, Look], alt.TopLevelMixin],
    caption: Callable[[pl.DataFrame, Look], str],
    shape: Callable[[pl.DataFrame, Look], object] = lambda rows, look: None,
) -> Chart:
    """A chart of one KV head, from a frame of all heads that depends on some settings."""
    return Chart(
        name,
        ("head", *depends),
        lambda frames, look: frames[0].filter(head=look.head),
        draw,
        caption,
        shape,
        lambda look: [(name, *(getattr(look, setting) for setting in depends))],
    )


def plain(make: Callable[[Any], T]) -> Callable[[Any, Look], T]:
    """A function of rows as one of rows and a look."""
    return lambda rows, _: make(rows)


class HeadPage(ChartPage):
    """Charts of one KV head of one layer, under a method at a number of bits.

    Attributes
    ----------
    layer, head, method : traits; a subclass adds ``bits``.
    """

    bits: Any
    layer = Chosen("layer", read="shown_layer", help="layer, by its index in the prompt cache")
    head = Chosen("head", help="KV head")
    method = Chosen("method", help="a method's id")

    def _neighbours(self) -> list[Look]:
        """What one move of a control that all these pages have leads to."""
        chosen, fitting = self.selection, self.selection.fitting
        looks = [self._look(layer=self.layer + step) for step in (1, -1) if self.layer + step in chosen.layers]
        ready = [b for b in chosen.widths if abs(b - self.bits) == 1 and fitting.is_ready(self.method, b)]
        looks += [self._look(bits=bits) for bits in ready]
        others = [m for m in chosen.methods if self.bits in fitting.widths(m) and fitting.is_ready(m, self.bits)]
        return looks + [self._look(method=method) for method in others if method != self.method]

    def say(self, sentence: str) -> None:
        """Show a sentence; where there is none, what the bits are of."""
        own = self.selection.choice.own_bits
        note = ""
        if self.layer in own:
            note = f"These are bits of layer {self.layer} alone."
        elif own:
            note = f"These are bits of all layers but {', '.join(map(str, sorted(own)))}."
        super().say(sentence or " ".join(words for words in (self.lasting, note) if words))

    def _controls(self, *own: Sequence[ipywidgets.Widget]) -> ipywidgets.Widget:
        """Rows of controls, the page's own between those that all these pages have."""
        layers, heads = self.selection.layers, range(self.selection.heads)
        steps = ipywidgets.SelectionSlider
        return rows(
            [self._control(steps, "layer", options=layers), self._control(steps, "head", options=heads)],
            *own,
            [self._methods(), self._bits("bits")],
            [ProgressBar(self.worker)],
        )
