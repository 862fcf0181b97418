"""A bar that follows a worker: how far, what is being done, and a button that ends it."""

from __future__ import annotations

import time
from typing import Any

import ipywidgets

from veloxlab.widgets.lifetime import weakly
from veloxlab.widgets.worker import Status, Worker

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
