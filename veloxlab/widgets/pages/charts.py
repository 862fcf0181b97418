"""Pages that are lists of charts: what each chart shows, what it needs measured, and the measured frames."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from types import SimpleNamespace
from typing import Any, ClassVar

import altair as alt
import polars as pl

from veloxlab.checks import WORDS
from veloxlab.codecs import find_method
from veloxlab.errors import InputError
from veloxlab.measure import Capture
from veloxlab.progress import Progress as Tell
from veloxlab.progress import silent
from veloxlab.widgets.chart_view import ChartView
from veloxlab.widgets.chosen import Checked, Chosen
from veloxlab.widgets.layout import awaited, columns, note
from veloxlab.widgets.lifetime import loosen, weakly
from veloxlab.widgets.panel import Panel
from veloxlab.widgets.selection import Selection
from veloxlab.widgets.worker import Progress, Status, Worker, sentence

Request = tuple[Any, ...]  # the name of a measurement, then its arguments
Look = Any  # a `SimpleNamespace`: the settings that a page shows, by name
Measure = Callable[..., Any]  # takes a `ChartPage`, a progress, and the arguments of a request; usually returns a frame
WAITING = "Measuring these settings. Until then the charts show the previous settings."
AWAITED = "Each chart appears when it is measured."
CANCELLED = "Cancelled. The charts show the last settings that were measured. Press Retry to measure these."
NONE_YET = "Cancelled. Press Retry to measure what is shown here."


@dataclass(frozen=True)
class Chart:
    """One chart of a page.

    ``depends``: the settings that it depends on. ``rows`` makes its rows from the measured frames, ``draw`` a chart
    from rows, ``caption`` the line under its heading. A chart without ``caption`` is always drawn again as a whole.
    ``shape``: a value that the spec depends on, besides its numbers; new rows of equal shape go into the old chart.
    ``data``: from ``rows`` to the chart's own rows, if they differ. ``asks``: the measurements that it needs. ``why``:
    its purpose, for the line above it. ``badge``: "measured", "predicted" or "measured, then predicted".
    """

    name: str
    depends: tuple[str, ...]
    rows: Callable[[Sequence[Any], Look], Any]
    draw: Callable[[Any, Look], alt.TopLevelMixin]
    caption: Callable[[Any, Look], str] | None = None
    shape: Callable[[Any, Look], object] = lambda rows, look: None
    asks: Callable[[Look], Iterable[Request]] = lambda look: ()
    why: str = ""
    badge: str = "measured"
    data: Callable[[Any], pl.DataFrame] = lambda rows: rows

    def at(self, look: Look) -> tuple[object, ...]:
        """Values of the settings that it depends on."""
        return tuple(attrgetter(name)(look) for name in self.depends)


class ChartPage(Panel):
    """Charts that follow the settings. The worker measures what they need once, and likely next settings ahead.

    ``shown`` has the rows of each chart; ``found`` has the results of measurements by request, ``refused`` the errors
    of those that failed. A frame never changes, so any thread may read it.
    """

    MEASURES: ClassVar[Mapping[str, Measure]] = {}
    TALL: ClassVar[tuple[str, ...]] = ()  # charts as high as two others

    problem = Checked(WORDS, "", help="why a chart shows older settings")

    def __init__(
        self, selection: Selection, worker: Worker | None = None, capture: Capture | None = None, **settings: Any
    ) -> None:
        super().__init__(selection, worker, **settings)
        self.capture = capture
        self.shown: dict[str, Any] = {}
        self.found: dict[Request, Any] = selection.kept.setdefault(self.NAME, {})  # a later page finds them
        self.refused: dict[Request, str] = {}
        self._kinds: dict[str, Chart] = {}
        self._at: dict[str, tuple[object, object]] = {}  # by drawn chart: the settings that it shows, and its shape
        self._grid = columns()
        self._drawing = threading.Lock()
        self._complete = True
        self._cancelled: set[Request] = set()
        self._said: str | None = ""
        own = [name for name, trait in self.traits().items() if name in self.SETTINGS and not isinstance(trait, Chosen)]
        if own:
            self.observe(lambda _: self._selected(), own)
        self._ends.append(self.worker.watch(weakly(self._follow)))

    def of_layer(self, layer: int | None) -> Capture:
        """The capture of one layer, or with None of all layers."""
        assert self.capture is not None
        return replace(self.capture, layers=tuple(c for c in self.capture.layers if layer in (None, c.layer)))

    def _measured(self, request: Request, progress: Tell) -> Any:  # noqa: ANN401 - as `Measure`
        if request not in self.found:
            name, *rest = request
            self.found[request] = self.MEASURES[name](self, progress, *rest)
        return self.found[request]

    def _lacking(self, looks: Iterable[Look]) -> list[Request]:
        asked = dict.fromkeys(r for look in looks for kind in self._kinds.values() for r in kind.asks(look))
        return [request for request in asked if request not in self.found]

    def _measure(self) -> None:
        """Measure what is missing for the present settings, and draw it; then measure for likely next settings."""
        missing = self._lacking([self._look()])
        ahead = [request for request in self._lacking(self._likely()) if request not in self.refused]

        def job(requests: list[Request], progress: Progress) -> None:
            for done, request in enumerate(requests):
                progress(done, len(requests), f"measuring {request[0]}")
                try:
                    self._measured(request, progress)
                except InputError as error:
                    self.refused[request] = sentence(error)
                if not self._all_drawn:
                    self._show()
            self._show()

        if missing and {*missing} <= self._cancelled:
            self._say_cancelled()
        elif missing:
            new = not self._all_drawn  # a new page waits: when other work is cancelled, its own goes on
            self._submit("frames", lambda progress: job(missing, progress), first=new, kept=new)
        if ahead:
            self._submit("ahead", lambda progress: job(ahead, progress), ahead=True)

    def _look(self, **changed: Any) -> Look:
        return SimpleNamespace(**({name: getattr(self, name) for name in self.SETTINGS} | changed))

    def _likely(self) -> Iterable[Look]:
        return ()  # likely next settings

    def _draw(self, kinds: Iterable[Chart], *, now: bool = False) -> None:
        """Show these charts. With ``now``, and on a page with its own worker, what they need is measured here.

        That raises `InputError` for a failed measurement. Other pages show a chart after the worker measured it.
        """
        self._kinds = {kind.name: kind for kind in kinds}
        self.charts, self.shown, self._at = {}, {}, {}
        if now or self._owns_worker:
            for request in self._lacking([self._look()]):
                self._measured(request, silent)
        look = self._look()
        for kind in self._kinds.values():
            self._bring(kind, look)
        self._arrange()

    def _arrange(self) -> None:
        """Put the charts into the grid, with a placeholder for each chart that is not measured yet."""
        self._grid.children = [self.charts.get(name) or awaited(kind.why) for name, kind in self._kinds.items()]
        loosen(self._grid)

    def _added(self, name: str, view: ChartView) -> None:
        """Called when a chart was drawn for the first time."""

    @property
    def _all_drawn(self) -> bool:
        return len(self.charts) == len(self._kinds)

    def _of_drawn(self, held: Mapping[str, Any], name: str) -> Any:  # noqa: ANN401
        if name not in held:
            raise InputError(f"The chart {name!r} is not measured yet: wait for it with wait().")
        return held[name]

    def _caption(self, name: str) -> str:
        """The line under a chart's heading."""
        return str(self.charts[name].content["params"]["caption"]) if name in self.charts else "not measured yet"

    def _selected(self, change: object = None) -> None:
        self._cancelled.clear()  # a new choice asks for the measurements again
        super()._selected(change)

    def _can_retry(self) -> bool:
        others = self.worker.stopped(f"{self.NAME}: ") - {f"{self.NAME}: frames"}
        lacks = not self._complete and bool(self._cancelled or self.selection.fitting.held)
        return bool(others) or lacks

    def retry(self) -> None:
        self._cancelled.clear()
        super().retry()

    def _settle(self, timeout: float | None = None) -> bool:
        return self._complete or self.wait(timeout)

    def _redraw(self) -> None:
        super()._redraw()
        self._said = None
        self._show()
        self._measure()

    def _show(self) -> None:
        """Update all charts whose measurements for the present settings are done. Call it from any thread."""
        with self._drawing:  # so the last caller draws the newest settings
            now = self._look()
            before = len(self.charts)
            problems = dict.fromkeys(self._bring(kind, now) for kind in self._kinds.values())
            if len(self.charts) > before:
                self._arrange()
            self._complete = self._all_drawn
            for name, view in self.charts.items():
                kind = self._kinds[name]
                drawn = self._at[name][0] == kind.at(now)
                self._complete &= drawn
                view.note = note(kind.why, kind.badge if drawn else "stale")
        self.problem = " ".join(filter(None, problems))
        said = self.problem or ("" if self._complete else WAITING if self._all_drawn else AWAITED)
        if said != self._said:
            self._said = said
            self.say(said)

    def _bring(self, kind: Chart, look: Look) -> str:
        """Update one chart to the settings of ``look``; return why they cannot be measured, or an empty string."""
        at, asked = kind.at(look), [*kind.asks(look)]
        found = [self.found.get(request) for request in asked]
        if any(frame is None for frame in found):
            return next(filter(None, map(self.refused.get, asked)), "")
        before, old_shape = self._at.get(kind.name, (None, None))
        if at != before:
            self.shown[kind.name] = rows = kind.rows(found, look)
            shape, view = kind.shape(rows, look), self.charts.get(kind.name)
            if view is None:
                view = self._chart(kind.draw(rows, look), kind.why, kind.badge)
                if kind.name in self.TALL:
                    view.add_class("veloxlab-tall")
                drawn = {**self.charts, kind.name: view}
                self.charts = {name: drawn[name] for name in self._kinds if name in drawn}
                self._added(kind.name, view)
            elif kind.caption is not None and shape == old_shape:
                view.put(kind.data(rows), caption=kind.caption(rows, look))
            else:
                view.show(kind.draw(rows, look))
            self._at[kind.name] = at, shape
        return ""

    def _follow(self, status: Status) -> None:
        if status.state == "cancelled" and status.key == f"{self.NAME}: frames" and not self._complete:
            self.selection.fitting.hold()
            self._cancelled = {*self._lacking([self._look()])}
            self._say_cancelled()

    def _say_cancelled(self) -> None:
        self.say(CANCELLED if self._all_drawn else NONE_YET)


def coded(measure: Callable[..., pl.DataFrame], *names: str, **given: Any) -> Measure:
    """A measurement of one layer, or of all, with a method, bits and a seed; ``names`` are its further arguments.

    ``measure`` takes the capture, and by name all of these arguments, ``given`` and a calibration.
    """

    def run(
        page: ChartPage, progress: Tell, layer: int | None, method: str, bits: int, seed: int, *more: Any
    ) -> pl.DataFrame:
        calibration = page.selection.fitting.calibration(method, [bits], progress, seed)
        of = {"method": method, "bits": bits, "calibration": calibration, **find_method(method).seeded(seed), **given}
        return measure(page.of_layer(layer), **of, **dict(zip(names, more, strict=True)))

    return run
