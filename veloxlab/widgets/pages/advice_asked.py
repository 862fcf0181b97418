"""The input of the page of advice: the constraints of a cache, and their controls."""

from __future__ import annotations

from typing import Any

import ipywidgets
import traitlets as t

from veloxlab.checks import WORDS, choice, real, whole
from veloxlab.measure.advise import GOALS
from veloxlab.models.shapes import SIZES
from veloxlab.runtime import device
from veloxlab.widgets.chosen import Checked
from veloxlab.widgets.layout import controls
from veloxlab.widgets.pages.memory import GIGABYTE, HERE

ASKED = ("model", "context", "batch", "memory_gb", "weight_bits", "goal")  # advice depends on these


class Constraints(t.HasTraits):
    """Traits of a `Panel` with advice."""

    model = Checked(WORDS, HERE, help="which model: this one, a usual size, or a folder, config.json or cached id")
    context = Checked(whole(1), 32_768, help="tokens of each sequence that the cache has to hold")
    batch = Checked(whole(1), 1, help="sequences at once")
    memory_gb = Checked(real(above=0), help="memory of the whole machine, GB of 10^9 bytes; the system keeps a quarter")
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
        number: dict[str, Any] = {"min": 1, "max": 2**24}
        memory: dict[str, Any] = {"min": 1e-3, "max": 1e5, "step": 1}
        return controls(
            models,
            self._control(ipywidgets.BoundedIntText, "weight_bits", "weight bits", min=1, max=32),
            self._control(ipywidgets.BoundedFloatText, "memory_gb", "RAM (GB)", **memory),
            self._control(ipywidgets.BoundedIntText, "context", "context", **number),
            self._control(ipywidgets.BoundedIntText, "batch", "sequences", min=1, max=100_000),
            self._control(ipywidgets.Dropdown, "goal", "used for", options=list(GOALS)),
        )

    @t.default("memory_gb")
    def _memory_here(self) -> float:
        return round(device().memory_bytes / GIGABYTE, 1)
