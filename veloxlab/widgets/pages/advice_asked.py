"""The input of the page of advice: the constraints of a cache, and their controls."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ipywidgets
import traitlets as t

from veloxlab.checks import WORDS, Check, choice, either, number_of_bits, real, whole
from veloxlab.errors import InputError
from veloxlab.measure.advice import GOALS
from veloxlab.measure.advise import SIZE_WORDS
from veloxlab.measure.planned_memory import CONTEXT
from veloxlab.models.shapes import SIZES
from veloxlab.runtime import device
from veloxlab.widgets.chosen import Checked
from veloxlab.widgets.layout import controls
from veloxlab.widgets.pages.memory import GIGABYTE, HERE

KNOWN = f"The weights of {HERE!r} are loaded, and their bytes are known: choose another model to set this."
GIGABYTES = either(
    real(above=0, most=1e5), Check(SIZE_WORDS.words, SIZE_WORDS.fits, lambda size: SIZE_WORDS.read(size) / GIGABYTE)
)
ASKED = ("model", "context", "batch", "memory_gb", "weight_bits", "goal")  # advice depends on these


class Constraints(t.HasTraits):
    """Traits of a `Panel` with advice."""

    model = Checked(WORDS, HERE, help="which model: this one, a usual size, or a folder, config.json or cached id")
    context = Checked(CONTEXT, 32_768, help="tokens of each sequence that the cache has to hold; 32k is 32,768")
    batch = Checked(whole(1, 100_000), 1, help="sequences that are held at once")
    memory_gb = Checked(GIGABYTES, help="memory of the whole machine, GB of 10^9 bytes; the system keeps a quarter")
    weight_bits = Checked(whole(1, 32), 4, help="bits of a weight; known for a loaded model")
    goal = Checked(choice(*GOALS), "chat", help="the use of the model, which decides how many nats a token it may lose")

    @property
    def wanted(self) -> dict[str, Any]:
        """The constraints as `veloxlab.advise` takes them, without the model."""
        same = {name: getattr(self, name) for name in ("context", "batch", "goal", "weight_bits")}
        return same | {"memory": self.memory_gb * GIGABYTE}

    def _constraints(self: Any) -> ipywidgets.Widget:
        models = self._control(ipywidgets.Combobox, "model", options=[HERE, *SIZES], continuous_update=False)
        models.placeholder = "a folder, a config.json, an id"
        weights = self._entry("weight_bits", "weight bits")
        tip = weights.tooltip

        def look(_: object = None) -> None:
            weights.disabled = self.model == HERE
            weights.tooltip = KNOWN if weights.disabled else tip

        self.observe(look, "model")
        look()
        return controls(
            models,
            weights,
            self._entry("memory_gb", "RAM (GB)"),
            self._entry("context", "context", "{:,}".format),
            self._entry("batch", "sequences", "{:,}".format),
            self._control(ipywidgets.Dropdown, "goal", "used for", options=list(GOALS)),
        )

    def _entry(self: Any, trait: str, words: str, form: Callable[[Any], str] = "{:g}".format) -> ipywidgets.Text:
        """A field for a number. It shows the trait's value; a refused entry becomes the message of the page."""
        tip = self.traits()[trait].help
        field = ipywidgets.Text(
            form(getattr(self, trait)),
            description=words,
            tooltip=tip[:1].upper() + tip[1:],
            continuous_update=False,
        )

        def read(change: dict[str, Any]) -> None:
            given: object = change["new"]
            if given == form(getattr(self, trait)):
                return
            with suppress(ValueError):
                given = number_of_bits(change["new"].replace(",", ""))
            try:
                setattr(self, trait, given)
            except InputError as error:
                self.say(str(error))
            field.value = form(getattr(self, trait))

        def show(change: dict[str, Any]) -> None:
            field.value = form(change["new"])

        field.observe(read, "value")
        self.observe(show, trait)
        return field

    @t.default("memory_gb")
    def _memory_here(self) -> float:
        return round(device().memory_bytes / GIGABYTE, 1)
