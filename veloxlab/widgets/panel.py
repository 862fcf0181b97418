"""What every larger widget has: a worker, a place for a sentence, and a picture where no kernel runs."""

from __future__ import annotations

import base64
import html
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import ipywidgets
import traitlets as t

from veloxlab.errors import InputError
from veloxlab.files import write_atomically
from veloxlab.views import picture
from veloxlab.views.report import Section, report
from veloxlab.widgets.chart_view import ChartView
from veloxlab.widgets.vega_bundle import ensure_bundle
from veloxlab.widgets.worker import Job, Worker


class Panel(ipywidgets.VBox):  # type: ignore[misc]  # ipywidgets has no types
    """A widget of charts that a worker measures.

    A subclass calls ``Panel.__init__`` with its name, its worker if it shares another panel's, and its traits, and then
    puts together its children, `message` among them.

    Attributes
    ----------
    worker : does what takes longer than a moment; panels may share one.
    lasting : a sentence that is shown where there is no other: what cannot be shown here, and why.
    """

    lasting = ""

    def __init__(self, name: str, worker: Worker | None = None, **traits: Any) -> None:
        self._name = name
        self.worker = worker or Worker(f"veloxlab-{name}")
        self._message = ipywidgets.HTML()
        super().__init__(**traits)
        self.add_class(f"veloxlab-{name}")

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
        self.worker.submit(f"{self._name}: {key}", job, on_done=on_done, on_error=self.say, ahead=ahead)

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
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
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
    name, number = proposal["trait"].name, proposal["value"]
    if not ends[0] <= number <= ends[1]:
        raise InputError(f"{name}={number} is out of range: give a whole number from {ends[0]} to {ends[1]}.")
    return int(number)
