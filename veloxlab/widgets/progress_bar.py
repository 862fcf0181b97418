"""A progress bar of a worker, with a button that cancels its work or starts it again."""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import ipywidgets

from veloxlab.widgets.layout import button
from veloxlab.widgets.lifetime import weakly
from veloxlab.widgets.worker import Status, Worker

ENDED = ("done", "cancelled", "failed")
STOPS = "Stop the work{} that runs now, and all that waits; a new page that waits still gets its charts"
PAUSE = 0.05  # seconds between two moves of the bar: a page needs no more


class ProgressBar(ipywidgets.HBox):  # type: ignore[misc]  # ipywidgets has no types
    """Show the progress of a worker's jobs, with a button that cancels or retries. The bar keeps its place at rest.

    ``retry``: called by *Retry*; by default it submits all cancelled jobs again. ``can_retry``: whether there are any.
    ``own``: the prefix of the keys of a page's jobs. ``before`` is a widget for the page: it names the job that the
    page's own job waits for. A hidden bar sends nothing until it is activated again.
    """

    def __init__(
        self,
        worker: Worker,
        retry: Callable[[], None] | None = None,
        can_retry: Callable[[], object] | None = None,
        own: str = "",
        **layout: Any,
    ) -> None:
        self._worker, self._moved, self._busy = worker, 0.0, ""  # busy: the key of the running job
        self._own, self.before = own, ipywidgets.HTML()
        self._ended: Status | None = None  # the job that ended last
        self._active, self._changing = True, threading.Lock()
        self._retry = retry or worker.retry
        self._can_retry = can_retry or (lambda: worker.stopped(own))
        self._bar = ipywidgets.FloatProgress(0, min=0, max=1, layout={"flex": "0 1 120px", "margin": "0 8px 0 0"})
        self._label = ipywidgets.Label(layout={"flex": "1 1 auto", "min_width": "0"})
        self._button = button("Cancel", "", self._pressed, width="90px")
        layout = {"align_items": "center", "height": "28px", "overflow": "hidden", **layout}
        super().__init__([self._bar, self._label, self._button], layout=layout)
        self._show()
        self._unwatch = worker.watch(weakly(self._follow))
        if (now := worker.newest) is not None:
            self._follow(now)

    def close(self) -> None:
        self._unwatch()
        super().close()

    def __repr__(self) -> str:
        return f"ProgressBar({self._worker.name})"

    def activate(self, active: bool) -> None:
        """Start to follow the worker, first with the newest state; or stop."""
        with self._changing:
            self._active = active
            if active:
                self._busy, self._label.value = "", ""  # a job may have ended while the bar was hidden
                newest = self._worker.newest or self._ended
                (self._show if newest is None else partial(self._tell, newest))()

    def _follow(self, status: Status) -> None:
        with self._changing:
            self._ended = status if status.state in ENDED else self._ended
            if self._active:
                self._tell(status)

    def _tell(self, status: Status) -> None:
        now, part_way = time.monotonic(), 0 < status.done < status.total
        if status.state == "running" and part_way and now - self._moved < PAUSE:
            return
        self._tell_before()
        if status.state == "running":
            self._moved = now if status.done else 0.0
            self._bar.bar_style = ""
            self._bar.value = status.done / status.total if status.total else 0
            self._label.value = _said(status)
            self._show(status.key)
        elif status.state in ENDED and self._busy in ("", status.key):
            self._label.value = {"failed": status.label, "cancelled": "cancelled"}.get(status.state, "")
            self._bar.bar_style = "danger" if status.state == "failed" else ""
            self._show()

    def _tell_before(self) -> None:
        """Show which job the page's own job waits for."""
        runs = self._worker.newest
        waits = runs is not None and not runs.key.startswith(self._own) and self._worker.awaits(self._own)
        said = html.escape(_said(runs)) if runs is not None and waits else ""
        self.before.value = f"<em>This page waits for other work: {said}. Cancel ends it.</em>" if said else ""

    def _show(self, busy: str = "") -> None:
        again = not busy and self._can_retry()
        self._busy = busy
        self._bar.layout.visibility = "visible" if busy else "hidden"
        self._button.layout.visibility = "visible" if busy or again else "hidden"
        self._tell_button("Retry" if again else "Cancelling\u2026" if busy and self._worker.is_ending else "Cancel")
        title = self._worker.titles.get(busy.partition(":")[0], "")
        self._button.tooltip = (
            "Start the cancelled work again" if again else STOPS.format(f" of the page {title}" if title else "")
        )

    def _tell_button(self, words: str) -> None:
        self._button.description, self._button.disabled = words, words == "Cancelling\u2026"

    def _pressed(self) -> None:
        with self._changing:
            busy = self._busy
            if busy:
                self._tell_button("Cancelling\u2026")  # at once: the step that runs may take long to end
                self._label.value = f"ends after this step: {self._label.value}"
        (self._worker.cancel if busy else self._retry)()


def _said(status: Status) -> str:
    """The present step of a running job, and its number."""
    return f"{status.label} ({status.done} of {status.total})" if status.total else "starting"
