"""What every larger widget has: a worker, a place for a sentence, and a picture where no kernel runs."""

from __future__ import annotations

import base64
import html
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import ipywidgets
import traitlets as t

from veloxlab.codecs import Method
from veloxlab.errors import InputError
from veloxlab.views import picture
from veloxlab.widgets.chart_view import ChartView
from veloxlab.widgets.worker import Worker


class Panel(ipywidgets.VBox):  # type: ignore[misc]  # ipywidgets has no types
    """A widget of charts that a worker measures.

    A subclass calls ``Panel.__init__`` with its worker's name and its traits, and then puts together its children,
    `message` among them.

    Attributes
    ----------
    worker : does what takes longer than a moment; widgets of one panel share it.
    """

    def __init__(self, name: str, **traits: Any) -> None:
        self.worker = Worker(f"veloxlab-{name}")
        self._message = ipywidgets.HTML()
        super().__init__(**traits)
        self.add_class(f"veloxlab-{name}")

    @property
    @abstractmethod
    def views(self) -> Sequence[ChartView]:
        """The charts that are there now, from top to bottom."""

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until everything that was asked for is done; False if that took longer than ``timeout`` seconds."""
        return self.worker.wait(timeout)

    def _say(self, sentence: str) -> None:
        """Show a sentence, of what went wrong or is awaited, or none."""
        self._message.value = f"<em>{html.escape(sentence)}</em>" if sentence else ""

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


def offer(slider: ipywidgets.SelectionSlider, method: Method) -> None:
    """Give a slider the widths of another method, and move it to the one next to its own."""
    nearest = min(method.bits, key=lambda width: abs(width - slider.value))
    slider.options = list(method.bits)
    slider.value = nearest


def inside(proposal: dict[str, Any], ends: tuple[int, int]) -> int:
    """The number that a trait is proposed; raises `InputError` if it is not between ``ends``."""
    name, number = proposal["trait"].name, proposal["value"]
    if not ends[0] <= number <= ends[1]:
        raise InputError(f"{name}={number} is out of range: give a whole number from {ends[0]} to {ends[1]}.")
    return int(number)
