"""The jobs of a worker and the thread that does them, which holds no worker: a widget can be collected."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import mlx.core as mx

if TYPE_CHECKING:
    from veloxlab.widgets.worker import Job

State = Literal["waiting", "running", "done", "cancelled", "overtaken", "failed"]

QUIET = 0.25  # seconds without a request before what nobody waits for begins: it would slow a hand on a slider
IDLE = 60.0  # seconds after which an idle thread looks whether its worker is still there, should it miss the news
PATIENCE = 5.0  # seconds that running jobs are given to end when Python does


@dataclass(eq=False)
class Request:
    """A job that somebody asked for, and what is to be told of it."""

    run: Callable[[Request], None]  # a method of its worker, which it keeps alive
    key: str
    job: Job
    on_done: Callable[[Any], None]
    on_error: Callable[[str], None]
    ahead: bool = False
    unwanted: threading.Event = field(default_factory=threading.Event)
    why: State = "cancelled"  # it is unwanted


class Line:
    """The jobs that wait for one thread. The thread holds this line, and a worker only while there is a job for it."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.waiting: dict[str, Request] = {}
        self.running: Request | None = None
        self.closed = False
        self.asked = 0.0

    def add(self, request: Request) -> list[Request]:
        """Put a request last, and give those that it overtakes. The lock is held."""
        overtaken = self.forget(request.key, "overtaken")
        self.waiting[request.key] = request
        self.asked = time.monotonic()
        running = self.running
        if running is not None and running.ahead and not request.ahead and not running.unwanted.is_set():
            running.why = "waiting"
            running.unwanted.set()
        self.changed.notify_all()
        return overtaken

    def forget(self, key: str | None, why: State) -> list[Request]:
        """Make the jobs of a key, or all, unwanted, and give those that did not start. The lock is held."""
        waiting = [self.waiting.pop(each) for each in [*self.waiting] if key in (None, each)]
        running = [self.running] if self.running is not None and key in (None, self.running.key) else []
        for request in waiting + running:
            request.why = why
            request.unwanted.set()
        self.changed.notify_all()
        return waiting

    def close(self) -> list[Request]:
        """Take no more jobs, let the thread end, and give the jobs that did not start."""
        with self.changed:
            self.closed = True
            return self.forget(None, "cancelled")

    def next(self) -> Request | None:
        """Wait for the next request and take it; None once the line is closed."""
        with self.changed:
            while not self.closed:
                if not self.waiting:
                    self.changed.wait(IDLE)
                    continue
                # false sorts first, and the sort is stable: the oldest of those that somebody waits for
                key = min(self.waiting, key=lambda each: self.waiting[each].ahead)
                quiet = self.asked + QUIET - time.monotonic()
                if not self.waiting[key].ahead or quiet <= 0:
                    self.running = self.waiting.pop(key)
                    return self.running
                self.changed.wait(quiet)
        return None

    def is_busy(self, *, ahead: bool) -> bool:
        """Whether a job waits or runs; those that run ahead count only with ``ahead``. The lock is held."""
        return any(ahead or not each.ahead for each in [*self.waiting.values(), self.running] if each is not None)

    def done(self) -> None:
        """Tell those who wait that the job that ran has ended."""
        with self.changed:
            self.running = None
            self.changed.notify_all()


_threads: WeakKeyDictionary[threading.Thread, Line] = WeakKeyDictionary()


def start_thread(line: Line, name: str) -> None:
    """Start the thread that does what stands in ``line`` until that is closed."""
    thread = threading.Thread(target=_work, args=(line,), name=name, daemon=True)
    _threads[thread] = line
    thread.start()


def _work(line: Line) -> None:
    while (request := line.next()) is not None:
        request.run(request)
        del request  # an idle thread keeps no worker alive
        line.done()
    mx.clear_streams()  # MLX aborts the process if that ends just after a thread that has streams


@atexit.register
def _end_threads() -> None:
    """End every thread before Python ends: MLX aborts the process if one still computes."""
    for line in [*_threads.values()]:
        line.close()
    deadline = time.monotonic() + PATIENCE
    for thread in [*_threads]:
        thread.join(max(0.0, deadline - time.monotonic()))
