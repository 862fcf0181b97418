"""The base of all widgets of charts: a worker with its progress bar, a selection with its controls, and files."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import altair as alt
import ipywidgets
import polars as pl
import traitlets as t

from veloxlab.errors import InputError
from veloxlab.store import make_folder, write_atomically
from veloxlab.views.picture import Section, report
from veloxlab.widgets.chart_view import PATIENCE, ChartView, ensure_bundle
from veloxlab.widgets.chosen import Chosen, ChosenBits
from veloxlab.widgets.layout import about, button, laid_out, marks_in, note, status
from veloxlab.widgets.lifetime import Ending, loosen, weakly
from veloxlab.widgets.progress_bar import ProgressBar
from veloxlab.widgets.selection import Selection
from veloxlab.widgets.worker import Job, Worker

KEPT = {"_model_id", "_cross_validation_lock", "_repr_mimebundle_", "worker", "points"}  # attributes of a closed panel


class Panel(Ending, ipywidgets.VBox):  # type: ignore[misc]  # ipywidgets has no types
    """A widget of charts. A worker measures their numbers, and they follow a selection.

    A subclass has a ``NAME``. It calls ``Panel.__init__``, sets its children, with ``_message`` among them, and then
    calls `follow`. `close` and garbage collection end a panel: its widgets leave the page, its work stops, and it drops
    its references to the model and to all results except the public tables.
    """

    NAME: ClassVar[str]
    IS_PAGE: ClassVar[bool] = True  # a laboratory holds pages, and is not a page
    HELP: ClassVar[str] = "00_tour.ipynb#5. Set the controls"  # a notebook that explains the page, and a heading there
    WHY: ClassVar[Mapping[str, str]] = {}  # by chart: its purpose, for the line above it
    SETTINGS: ClassVar[tuple[str, ...]] = ()  # traits that ``settings`` may have, and on which its charts depend
    children: Any
    active = True  # whether it draws the present choice; hidden pages of a laboratory do not

    def __init__(self, selection: Selection, worker: Worker | None = None, **settings: Any) -> None:
        if unknown := sorted({*settings} - {*self.SETTINGS}):
            known = ", ".join(self.SETTINGS)
            raise InputError(f"{type(self).__name__} has no setting {unknown[0]!r}. Its settings are: {known}.")
        self.selection, self._owns_worker = selection, worker is None
        self.worker = worker or Worker(f"veloxlab-{self.NAME}")
        self.charts: Mapping[str, ChartView] = {}
        self._ends, self._keys, self._bits_links = list[Callable[[], object]](), set[str](), list[t.link]()
        self._message, self._banner = ipywidgets.HTML(), ipywidgets.HTML()
        loosen(self._message)  # the next lines may fail
        loosen(self._banner)
        self._legend, self._marks = ipywidgets.HTML(), set[str]()  # of the charts so far
        loosen(self._legend)
        super().__init__(**settings)
        self._seen = self._chosen()
        self.add_class(f"veloxlab-{self.NAME}")
        if self.IS_PAGE:
            self.add_class("veloxlab-page")
        loosen(self)
        self.observe(lambda change: loosen(change["owner"]), "children")

    def close(self) -> None:
        """End the panel and its work; see the class. Later use of its attributes raises `InputError`."""
        if self.comm is None:
            return
        for end in self._ends:
            end()
        for key in self._keys:
            self.worker.cancel(key)
        if self._owns_worker:
            self.worker.close()
        super().close()
        self.unobserve_all()
        self.children = ()
        tables = {name for name, value in vars(self).items() if isinstance(value, pl.DataFrame) and name[0] != "_"}
        traits = {name for name in vars(self) if name.startswith("_trait_")}
        self._let_go = {*vars(self)} - tables - traits - KEPT
        for name in self._let_go:
            delattr(self, name)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - only for attributes that the instance lacks
        if name in vars(self).get("_let_go", ()):
            raise InputError(f"This {type(self).__name__} is closed: make a new one.")
        return super().__getattribute__(name)  # raises the usual error

    @property
    def summary(self) -> str:
        """One line about its content."""
        return f"charts: {', '.join(self.named) or 'none yet'}"

    def __repr__(self) -> str:
        if self.comm is None:
            return f"{type(self).__name__}(closed)"
        waits = "" if self._settle(PATIENCE) else "; still measuring, this is of older settings"
        return f"{type(self).__name__}({self.summary}{waits})"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:  # noqa: ANN401
        if self.comm is not None:
            self._settle(PATIENCE)
        return super()._repr_mimebundle_(**kwargs)

    def _settle(self, timeout: float | None = None) -> bool:
        """Wait, up to ``timeout`` seconds, until the charts show the present choice; return whether they do."""
        return True

    @property
    def named(self) -> Mapping[str, ChartView]:
        """Its present charts, including those of its parts, by name, from top to bottom."""
        return self.charts

    @property
    def views(self) -> tuple[ChartView, ...]:
        return tuple(self.named.values())

    def _submit(self, key: str, job: Job, *, on_done: Callable[[Any], None] = lambda _: None, **order: bool) -> None:
        """Submit a job to the worker; ``order`` has the arguments ``ahead``, ``first`` and ``kept`` of its `submit`."""
        key = f"{self.NAME}: {key}"
        self._keys.add(key)
        self.worker.submit(key, job, on_done=on_done, on_error=weakly(self.say), **order)

    def wait(self, timeout: float | None = None, *, ahead: bool = False) -> bool:
        """Wait until all jobs are done; see `Worker.wait`."""
        return self.worker.wait(timeout, ahead=ahead)

    @property
    def notes(self) -> list[str]:
        """Sentences about the present choice, for the page's banner, which leaves out empty ones."""
        return [self.selection.choice.note]

    def say(self, sentence: str) -> None:
        """Show a sentence, such as an error, in the place of the last one."""
        if self.comm is not None:
            self._message.value = f"<em>{html.escape(sentence)}</em>" if sentence else ""

    def _note(self) -> None:
        """Update the banner to the present choice."""
        self._banner.value = "<br>".join(html.escape(note) for note in self.notes if note)

    def progress(self, **layout: Any) -> ProgressBar:
        """A progress bar of the worker, with a button that cancels and retries."""
        return ProgressBar(self.worker, weakly(self.retry), weakly(self._can_retry), f"{self.NAME}: ", **layout)

    def _can_retry(self) -> bool:
        return bool(self.worker.stopped(f"{self.NAME}: ") or self.selection.fitting.held)

    def retry(self) -> None:
        """Submit cancelled jobs again."""
        self.selection.fitting.held.clear()
        self.worker.retry()
        self._redraw()

    def _laid_out(
        self, head: Iterable[ipywidgets.Widget], *parts: ipywidgets.Widget, told: ipywidgets.Widget | None = None
    ) -> None:
        """Set the children: a head that stays in sight, with the banner (or ``told``) and the bar, then ``parts``."""
        self._bar = self.progress()
        said = status([told or self._banner, self._message, self._bar.before], self._bar)
        self._legend.value = about(self.HELP, self._marks)
        self.children = laid_out([*head, said, self._legend], *parts)

    def _saying(self, act: Callable[[], object]) -> None:
        """Call ``act``, and show an `InputError` as the message."""
        try:
            act()
        except InputError as error:
            self.say(str(error))

    def _put(self, charts: Mapping[str, alt.TopLevelMixin], slot: ipywidgets.Box) -> None:
        """Show charts: the first ones in ``slot``, later ones in the place of the first."""
        for name, chart in charts.items() if self.charts else ():
            self.charts[name].show(chart)
        if not self.charts:
            self.charts = {name: self._chart(chart, self.WHY.get(name, "")) for name, chart in charts.items()}
            slot.children = self.views

    def _chart(self, chart: alt.TopLevelMixin, why: str = "", badge: str = "measured") -> ChartView:
        """A chart of this page, with a line above it; a token picked in it is picked on all pages."""
        view = ChartView(chart, settle=weakly(self._settle))
        view.note = note(why, badge)
        self._watch(view, "picked_token", self._token_picked)
        self._watch(view, "spec", self._drawn_as)
        self._drawn_as({"new": view.spec})
        return view

    def _drawn_as(self, change: dict[str, Any]) -> None:
        """Add the marks of a chart to the legend."""
        self._marks = self._marks | marks_in(change["new"]["json"])
        self._legend.value = about(self.HELP, self._marks)

    @property
    def _token(self) -> int | None:
        """Position of the picked token in the charts of this page; None if it is in another text."""
        return None if self.selection.choice.ids else self.selection.choice.token

    def _token_picked(self, change: dict[str, Any]) -> None:
        if change["new"] != self._token:
            self._pick_token(change["new"])

    def _pick_token(self, place: int | None) -> None:
        self.selection.choose(token=place, ids=())

    def _mark(self) -> None:
        """Mark the picked token in the charts."""
        for view in self.charts.values():
            view.picked_token = self._token

    def follow(self) -> None:
        """Follow the selection from now on."""
        self._watch(self.selection, "choice", self._selected)
        self._selected()

    def _watch(self, whole: t.HasTraits, trait: str, follow: Callable[[Any], None]) -> None:
        """Call the method ``follow`` after each change of a trait of ``whole``, until this panel is closed."""
        weak = weakly(follow)
        whole.observe(weak, trait)
        self._ends.append(lambda: whole.unobserve(weak, trait))

    def _chosen(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name, trait in self.traits().items() if isinstance(trait, Chosen)}

    def _selected(self, _: object = None) -> None:
        """Update traits, controls and charts to the present choice; a hidden page does so when it is shown."""
        if self.active:
            with self.selection.lock:
                self._tell_changes()
                self._redraw()

    def _tell_changes(self) -> None:
        """Notify observers of the traits that changed with the selection, so that controls show them."""
        before, self._seen = self._seen, self._chosen()
        if self._seen.get("method") != before.get("method"):
            self._offer_bits()
        for name, value in self._seen.items():
            if value != before[name]:
                self._notify_trait(name, before[name], value)

    def activate(self, active: bool) -> None:
        """Start or stop drawing the present choice."""
        self.active = active
        self._bar.activate(active)
        Panel._selected(self)  # not a subclass's own: the choice did not change

    def _redraw(self) -> None:
        """Show the present choice."""
        self._note()
        self._mark()

    def _control(
        self, kind: type[ipywidgets.Widget], trait: str, words: str = "", tip: str = "", **settings: Any
    ) -> ipywidgets.Widget:
        """A control that shows and sets a trait; its tooltip is ``tip`` or the trait's help."""
        own = self.traits()[trait]
        control = kind(value=getattr(self, trait), description=words or trait, **settings)
        ends = [settings[end] for end in ("min", "max") if end in settings]
        tip = tip or own.help[:1].upper() + own.help[1:]
        control.tooltip = f"{tip} ({ends[0]:,.12g} to {ends[1]:,.12g})" if len(ends) > 1 else tip
        link = t.link((self, trait), (control, "value"))
        self._bits_links += [link] if isinstance(own, ChosenBits) else []
        return control

    def _slider(self, trait: str, least: int, most: int, **settings: Any) -> ipywidgets.Widget:
        return self._control(ipywidgets.IntSlider, trait, min=least, max=most, **settings)

    def _methods(self) -> ipywidgets.Widget:
        tip = "How keys and values are coded"
        return self._control(ipywidgets.Dropdown, "method", tip=tip, options=self.selection.methods)

    def _all_codes(self) -> ipywidgets.Widget:
        tip = "Set sinks and window to 0, so that no token is exact, even in a short text"
        return button("Code all tokens", tip, lambda: self.selection.choose(sinks=0, window=0))

    def _of_cache(self, sinks: int = 64, window: int = 256, **of_window: Any) -> list[ipywidgets.Widget]:
        """Controls of the method, the bits of keys and of values, and sinks and window up to so many tokens."""
        bits = self._bits("key_bits", "K bits"), self._bits("value_bits", "V bits")
        exact = self._slider("sinks", 0, sinks), self._slider("window", 0, window, **of_window)
        return [self._methods(), *bits, *exact]

    def _bits(self, trait: str, words: str = "") -> ipywidgets.Widget:
        return self._control(ipywidgets.SelectionSlider, trait, words, options=self.selection.widths)

    def _offer_bits(self) -> None:
        for link in self._bits_links:
            slider = link.target[0]
            link.unlink()  # new options set a value that the user did not choose
            with slider.hold_sync():  # one message: between two, the page would send back the end of its new scale
                slider.options = self.selection.widths
                link.link()

    @property
    def title(self) -> str:
        """The title of its report."""
        return f"veloxlab: {self.summary}"

    @property
    def sections(self) -> list[Section]:
        """Its part of a report: its charts."""
        return [Section(chart=view.to_dict()) for view in self.named.values()]

    notebook = b""
    """A notebook that repeats the page's measurement, for `export`; empty for a page without one."""

    def export(self, path: str | Path) -> Path:
        """Write the page as one HTML file with live charts, light and dark; it needs no network. Return its path."""
        self._settle()
        page = report(self.title, self.sections, ensure_bundle().read_text("utf-8"), self.notebook)
        return write_atomically(path, page.encode())

    def save_pictures(self, folder: str | Path) -> list[Path]:
        """Write each chart as SVG and PNG and its rows as Parquet into ``folder``, and return the paths."""
        self._settle()
        kinds = {"svg": ChartView.to_svg, "png": ChartView.to_png, "parquet": ChartView.to_parquet}
        folder, named = make_folder(folder), self.named.items()
        return [save(view, folder / f"{name}.{kind}") for name, view in named for kind, save in kinds.items()]
