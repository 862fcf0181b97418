"""Sets a widget's controls as JupyterLab does."""

from __future__ import annotations

import threading
from typing import Any

from veloxlab.widgets.lifetime import parts

PATIENCE = 120  # seconds


def controls(widget: Any) -> dict[str, Any]:
    """Return the controls of a page by their labels."""
    found = {part: part._trait_values.get("description") for part in parts(widget)}
    return {words: part for part, words in found.items() if words}


def turn(widget: Any, **knobs: Any) -> None:
    """Set traits from a thread that is not the main one, and wait for all resulting jobs."""

    def work() -> None:
        for name, value in knobs.items():
            setattr(widget, name, value)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert widget.wait(PATIENCE)
