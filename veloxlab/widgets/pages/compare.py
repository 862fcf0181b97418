"""The settings that were measured: which to take up again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets


class MeasuredPoints(ipywidgets.HBox):  # type: ignore[misc]  # ipywidgets has no types
    """A list of measured settings, and a button that takes one up again.

    Parameters
    ----------
    take : given the chosen one's settings.
    """

    def __init__(self, take: Callable[[Mapping[str, Any]], None]) -> None:
        self._settings: list[Mapping[str, Any]] = []
        self._list = ipywidgets.Dropdown(
            options=[], description="measured", tooltip="A point of the chart", layout={"width": "520px"}
        )
        self._button = ipywidgets.Button(description="Use it", tooltip="Turn the knobs to this point", disabled=True)
        self._button.on_click(lambda _: take(self._settings[self._list.value]))
        super().__init__([self._list, self._button])

    def show(self, names: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> None:
        """Offer these, the newest chosen."""
        self._settings = [*settings]
        exact = [f"{s['sinks']} sinks, window {s['window']}" for s in settings]
        options = [(f"{i + 1}: {name}, {how}", i) for i, (name, how) in enumerate(zip(names, exact, strict=True))]
        self._list.options = options
        self._list.value = len(options) - 1
        self._button.disabled = False
