"""A bar that follows a worker: how far, what is being done, and a button that ends it."""

from __future__ import annotations

import base64
import functools
import html
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import ipywidgets
import polars as pl
import traitlets as t

from veloxlab.checks import whole
from veloxlab.errors import InputError
from veloxlab.store import make_folder, write_atomically
from veloxlab.views import picture
from veloxlab.views.report import Section, report
from veloxlab.widgets.chart_view import ChartView, ensure_bundle
from veloxlab.widgets.lifetime import Ending, keep_shown, loosen, weakly
from veloxlab.widgets.worker import Job, Status, Worker

PAUSE = 0.05  # seconds between two moves of the bar: a page needs no more, and the comm is spared


class ProgressBar(ipywidgets.HBox):  # type: ignore[misc]
    """Show what a worker does, and let it be cancelled. It keeps its place while nothing runs.

    Parameters
    ----------
    worker
        The worker to follow.
    """

    def __init__(self, worker: Worker, **layout: Any) -> None:
        self._worker = worker
        self._moved = 0.0
        self._bar = ipywidgets.FloatProgress(0, min=0, max=1, layout={"width": "180px", "margin": "0 8px 0 0"})
        self._label = ipywidgets.Label(layout={"flex": "1 1 auto", "min_width": "0"})
        self._button = ipywidgets.Button(description="Cancel", tooltip="End this work", layout={"width": "80px"})
        self._button.on_click(lambda _: worker.cancel())
        super().__init__(
            [self._bar, self._label, self._button], layout={"align_items": "center", "height": "34px", **layout}
        )
        self._show(busy=False)
        self._unwatch = worker.watch(weakly(self._follow))

    def close(self) -> None:
        """Stop following the worker, and close the widget."""
        self._unwatch()
        super().close()

    def __repr__(self) -> str:
        return f"ProgressBar({self._worker.name})"

    def _follow(self, status: Status) -> None:
        if status.state == "running":
            self._move(status)
        elif status.state in ("done", "cancelled", "failed"):
            self._end(status)

    def _move(self, status: Status) -> None:
        now = time.monotonic()
        if 0 < status.done < status.total and now - self._moved < PAUSE:
            return
        self._moved = now if status.done else 0.0
        self._bar.bar_style = ""
        self._bar.value = status.done / status.total if status.total else 0
        self._label.value = f"{status.label} ({status.done} of {status.total})" if status.total else "starting"
        self._show(busy=True)

    def _end(self, status: Status) -> None:
        self._label.value = {"failed": status.label, "cancelled": "cancelled"}.get(status.state, "")
        self._bar.bar_style = "danger" if status.state == "failed" else ""
        self._show(busy=False)

    def _show(self, *, busy: bool) -> None:
        for part in (self._bar, self._button):
            part.layout.visibility = "visible" if busy else "hidden"


KEPT = {"_model_id", "_cross_validation_lock", "_repr_mimebundle_", "_name", "worker"}  # by a closed panel


class Panel(Ending, ipywidgets.VBox):  # type: ignore[misc]  # ipywidgets has no types
    """A widget of charts that a worker measures.

    A subclass calls ``Panel.__init__`` with its name, its worker if it shares another panel's, and its traits, and then
    puts together its children, `message` among them; these come last, for they are then made to end with the panel.

    `close` ends it: its widgets leave the page, its worker stops, and it lets go of the model and of all that it
    measured but the public tables. The same happens when nothing refers to it any more, and when the cell that shows
    it is run again, unless a variable still holds it.

    Attributes
    ----------
    worker : does what takes longer than a moment; panels may share one.
    lasting : a sentence that is shown where there is no other: what cannot be shown here, and why.
    """

    children: Any
    lasting = ""

    def __init__(self, name: str, worker: Worker | None = None, **traits: Any) -> None:
        self._name, self._owns_worker = name, worker is None
        self.worker = worker or Worker(f"veloxlab-{name}")
        self._message = ipywidgets.HTML()
        loosen(self._message)  # what follows may fail
        super().__init__(**traits)
        self.add_class(f"veloxlab-{name}")
        loosen(self)

    @t.observe("children")
    def _children_are_there(self, _: object) -> None:
        loosen(self)

    def close(self) -> None:
        """End it, and its work; see the class. What is asked of it then raises `InputError`."""
        if self.comm is None:
            return
        if self._owns_worker:
            self.worker.close()
        super().close()
        self.unobserve_all()
        self.children = ()
        let_go = [name for name, value in vars(self).items() if not _is_kept(name, value)]
        self._let_go = frozenset(let_go)
        for name in let_go:
            delattr(self, name)
        self.__class__ = _closed(type(self))  # type: ignore[arg-type]  # a class of traits can be hashed

    @property
    @abstractmethod
    def named(self) -> dict[str, ChartView]:
        """The charts that are there now, by name, from top to bottom."""

    @property
    def views(self) -> tuple[ChartView, ...]:
        """The charts that are there now, from top to bottom."""
        return tuple(self.named.values())

    def _submit(
        self, key: str, job: Job, *, on_done: Callable[[Any], None] = lambda _: None, ahead: bool = False
    ) -> None:
        """Ask the worker for a job of this panel; see `Worker.submit`."""
        self.worker.submit(f"{self._name}: {key}", job, on_done=on_done, on_error=weakly(self.say), ahead=ahead)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until everything that was asked for is done; False if that took longer than ``timeout`` seconds."""
        return self.worker.wait(timeout)

    @property
    def sections(self) -> list[Section]:
        """What a report says of it: its charts."""
        return [Section(chart=view.to_dict()) for view in self.views]

    def export(self, path: str | Path) -> Path:
        """Write what is seen as one HTML file that needs no network, its charts live, light and dark; give its path."""
        page = report(f"veloxlab: {self}", self.sections, ensure_bundle().read_text("utf-8"))
        write_atomically(Path(path), page.encode())
        return Path(path)

    def save_pictures(self, folder: str | Path) -> list[Path]:
        """Write each chart as SVG and PNG and its rows as Parquet into ``folder``, and give the files."""
        folder = make_folder(folder)
        files = []
        for name, view in self.named.items():
            files += [view.to_svg(folder / f"{name}.svg"), view.to_png(folder / f"{name}.png")]
            files.append(view.to_parquet(folder / f"{name}.parquet"))
        return files

    def say(self, sentence: str) -> None:
        """Show a sentence, of what went wrong or is awaited; where there is none, the `lasting` one."""
        shown = sentence or self.lasting
        self._message.value = f"<em>{html.escape(shown)}</em>" if shown else ""

    def say_always(self, sentence: str) -> None:
        """Make a sentence the `lasting` one, and show it."""
        self.lasting = sentence
        self.say("")

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        """Show the live widget, and beside it a picture and a line for places where no kernel runs."""
        keep_shown(self)
        bundle = super()._repr_mimebundle_(**kwargs) | {"text/plain": repr(self)}
        if self.views:
            still = picture.stacked([view.to_dict() for view in self.views])
            bundle["image/png"] = base64.b64encode(still).decode()
        return bundle  # type: ignore[no-any-return]

    # knobs: a trait and a control that are one ----------------------------------------------------------------------

    def _knob(self, trait: str, control: ipywidgets.Widget, tip: str = "") -> ipywidgets.Widget:
        """``control``, which shows the trait and sets it; its tooltip is ``tip`` or the trait's own help."""
        control.tooltip = tip or self.traits()[trait].help.capitalize()
        t.link((self, trait), (control, "value"))
        return control

    def _choice(self, trait: str, options: Sequence[Any], words: str = "", tip: str = "") -> ipywidgets.Dropdown:
        """A list to choose the trait from."""
        box = ipywidgets.Dropdown(options=options, value=getattr(self, trait), description=words or trait)
        return self._knob(trait, box, tip)

    def _steps(self, trait: str, options: Sequence[Any], words: str = "", tip: str = "") -> ipywidgets.SelectionSlider:
        """A slider over the values that the trait may have."""
        slider = ipywidgets.SelectionSlider(options=options, value=getattr(self, trait), description=words or trait)
        return self._knob(trait, slider, tip)

    def _number(
        self,
        trait: str,
        ends: tuple[int, int],
        words: str = "",
        tip: str = "",
        kind: type[ipywidgets.Widget] = ipywidgets.IntSlider,
        step: int = 1,
    ) -> ipywidgets.Widget:
        """A slider, or a box, for a whole number between ``ends``."""
        control = kind(value=getattr(self, trait), min=ends[0], max=ends[1], step=step, description=words or trait)
        return self._knob(trait, control, tip)


class _Closed:
    """What a closed panel becomes: it gives its tables, and a sentence for all else."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        if name in vars(self).get("_let_go", ()):
            raise InputError(f"This {type(self).__name__} is closed: make a new one.")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(closed)"

    def say(self, sentence: str) -> None:
        """Nobody sees it."""

    def close(self) -> None:
        """It is closed."""


@functools.cache
def _closed(kind: type[Panel]) -> type:
    return type(kind.__name__, (_Closed, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _is_kept(name: str, value: object) -> bool:
    return name.startswith("_trait_") or name in KEPT or (isinstance(value, pl.DataFrame) and not name.startswith("_"))


def nearest(widths: Iterable[int], width: int) -> int:
    """The one of ``widths`` that is next to ``width``."""
    return min(widths, key=lambda each: abs(each - width))


def offer(slider: ipywidgets.SelectionSlider, widths: Sequence[int]) -> None:
    """Give a slider the widths of another method, and move it to the one next to its own."""
    value = nearest(widths, slider.value)
    with slider.hold_sync():  # one message: between two, the page would send the end of its new scale back
        slider.options = list(widths)
        slider.value = value


def inside(proposal: dict[str, Any], ends: tuple[int, int]) -> int:
    """The number that a trait is proposed; raises `InputError` if it is not between ``ends``."""
    number: int = whole(*ends)(proposal["trait"].name, proposal["value"])
    return number
