"""Lines of code that a page shows, with a button that copies them."""

from __future__ import annotations

from pathlib import Path

import anywidget
import traitlets as t

STATIC = Path(__file__).parent / "static"


class CodeLines(anywidget.AnyWidget):
    """Show ``value``, lines of code, and copy them at a press of a button."""

    # text, and no path: anywidget watches a path, and its signal would hold every widget for ever
    _esm = (STATIC / "code_lines.js").read_text("utf-8")

    value = t.Unicode("", help="lines of Python").tag(sync=True)

    def __repr__(self) -> str:
        return self.value
