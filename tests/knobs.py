"""Turns a widget's knobs as JupyterLab does."""

from __future__ import annotations

import threading
from typing import Any

from veloxlab.widgets.lifetime import parts

PATIENCE = 120  # seconds


def controls(widget: Any) -> dict[str, Any]:
    """The controls of a page, by their words."""
    found = {part: part._trait_values.get("description") for part in parts(widget)}
    return {words: part for part, words in found.items() if words}


def turn(widget: Any, **knobs: Any) -> None:
    """Set traits from a thread that is not the main one, and wait until all that they ask for is done."""

    def work() -> None:
        for name, value in knobs.items():
            setattr(widget, name, value)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert widget.wait(PATIENCE)
