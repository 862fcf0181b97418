"""One thread that does a widget's long work.

Widget callbacks arrive on whichever thread the kernel picks, while MLX wants its lazy arrays evaluated by the thread
that made them. So callbacks only submit jobs here, and only the newest job of a kind is worth finishing.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from veloxlab.errors import InputError

State = Literal["waiting", "running", "done", "cancelled", "overtaken", "failed"]
Job = Callable[["Progress"], Any]

QUIET = 0.25  # seconds without a request before what nobody waits for begins: it would slow a hand on a slider
log = logging.getLogger(__name__)


class Cancelled(BaseException):
    """Ends a job that was cancelled or overtaken. No ``except Exception`` inside the job can swallow it."""


@dataclass(frozen=True)
class Status:
    """Where one job stands.

    Attributes
    ----------
    key
        The job's kind.
    state
        ``"waiting"``, ``"running"``, ``"done"``, ``"cancelled"``, ``"overtaken"`` (by a newer job of its key) or
        ``"failed"``.
    done, total
        Steps finished and steps in all; both 0 where the job has not said.
    label
        What is being done, or the sentence of the error.
    """

    key: str
    state: State
    done: int = 0
    total: int = 0
    label: str = ""


@dataclass(frozen=True)
class Progress:
    """What a job calls between its steps: it tells of them, and ends the job once that is no longer wanted."""

    _tell: Callable[[int, int, str], None]
    _unwanted: threading.Event

    def __call__(self, done: int, total: int, label: str = "") -> None:
        """Tell that ``done`` of ``total`` steps are finished.

        Raises
        ------
        Cancelled
            If the job was cancelled, or a newer one of its key has come.
        """
        self.check()
        self._tell(done, total, label)

    def check(self) -> None:
        """Raise `Cancelled` if the job is no longer wanted."""
        if self._unwanted.is_set():
            raise Cancelled


@dataclass(eq=False)
class _Request:
    key: str
    job: Job
    on_done: Callable[[Any], None]
    on_error: Callable[[str], None]
    ahead: bool = False
    unwanted: threading.Event = field(default_factory=threading.Event)
    why: State = "cancelled"  # it is unwanted


class Worker:
    """Run jobs one after another on one thread, and drop those that were overtaken.

    Every method may be called from any thread. Results, errors and news are delivered on the worker's thread.

    Parameters
    ----------
    name
        Name of the thread.

    Examples
    --------
    >>> worker = Worker()
    >>> worker.submit("errors", lambda progress: measure(bits, progress), on_done=view.put)
    """

    def __init__(self, name: str = "veloxlab-worker") -> None:
        self.name = name
        self.last_error: Exception | None = None
        """What the last failed job raised, with its trace."""
        self._changed = threading.Condition()
        self._waiting: dict[str, _Request] = {}
        self._running: _Request | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self._asked = 0.0
        self._listeners: list[Callable[[Status], None]] = []

    def submit(
        self,
        key: str,
        job: Job,
        *,
        on_done: Callable[[Any], None] = lambda result: None,
        on_error: Callable[[str], None] = lambda sentence: None,
        ahead: bool = False,
    ) -> None:
        """Ask for a job; an older one of the same key is dropped, or cancelled if it runs.

        Parameters
        ----------
        key
            The job's kind, such as the view that waits for it.
        job
            A function of a `Progress`.
        on_done
            Given what the job returns, unless it was overtaken meanwhile.
        on_error
            Given a sentence if the job, or ``on_done``, raises.
        ahead
            Nobody waits for it yet: it begins after a quiet moment, makes way for any other job and begins anew behind
            it.
        """
        request = _Request(key, job, on_done, on_error, ahead)
        with self._changed:
            if self._closed:
                raise InputError(f"The worker {self.name!r} is closed: make a new one.")
            dropped = self._forget(key, "overtaken")
            self._waiting[key] = request
            self._asked = time.monotonic()
            if self._running is not None and self._running.ahead and not ahead and not self._running.unwanted.is_set():
                self._running.why = "waiting"
                self._running.unwanted.set()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self.name, daemon=True)
                self._thread.start()
                atexit.register(self.close)
            self._changed.notify_all()
        self._tell_all(dropped)
        self._tell(Status(key, "waiting"))

    def cancel(self, key: str | None = None) -> None:
        """Drop what waits and end what runs: of one key, or everything."""
        with self._changed:
            keys = [*self._waiting] + ([self._running.key] if self._running else []) if key is None else [key]
            dropped = [request for each in dict.fromkeys(keys) for request in self._forget(each, "cancelled")]
            self._changed.notify_all()
        self._tell_all(dropped)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing waits or runs, and tell whether that came before ``timeout`` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while self._waiting or self._running:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self._changed.wait(left)
        return True

    def watch(self, listener: Callable[[Status], None]) -> Callable[[], None]:
        """Tell a function of every change of every job, and give a function that ends this."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def close(self, timeout: float = 5.0) -> None:
        """Cancel everything and end the thread, which is given ``timeout`` seconds."""
        with self._changed:
            self._closed = True
        self.cancel()
        atexit.unregister(self.close)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _forget(self, key: str, why: State) -> list[_Request]:
        """Make a key's jobs unwanted, and give the one that did not start. The lock is held."""
        waiting = self._waiting.pop(key, None)
        running = self._running if self._running is not None and self._running.key == key else None
        for request in filter(None, (waiting, running)):
            request.why = why
            request.unwanted.set()
        return [waiting] if waiting else []

    def _work(self) -> None:
        while True:
            with self._changed:
                request = self._next()
                if request is None:
                    return
                self._running = request
            outcome = self._outcome(request)
            with self._changed:
                if outcome.state == "waiting":
                    outcome = replace(outcome, state=request.why)  # it may have been cancelled since
                    if request.why == "waiting" and request.key not in self._waiting:
                        self._waiting[request.key] = replace(request, unwanted=threading.Event())
            self._tell(outcome)
            with self._changed:
                self._running = None
                self._changed.notify_all()

    def _next(self) -> _Request | None:
        """Wait for the next request and take it; None once the worker is closed. The lock is held."""
        while True:
            if not self._waiting:
                if self._closed:
                    return None
                self._changed.wait()
                continue
            # false sorts first, and the sort is stable: the oldest of those that somebody waits for
            key = min(self._waiting, key=lambda each: self._waiting[each].ahead)
            quiet = self._asked + QUIET - time.monotonic()
            if not self._waiting[key].ahead or quiet <= 0:
                return self._waiting.pop(key)
            self._changed.wait(quiet)

    def _outcome(self, request: _Request) -> Status:
        key = request.key
        newest = Status(key, "running")

        def tell(done: int, total: int, label: str) -> None:
            nonlocal newest
            newest = Status(key, "running", done, total, label)
            self._tell(newest)

        progress = Progress(tell, request.unwanted)
        self._tell(newest)
        try:
            result = request.job(progress)
            progress.check()
            request.on_done(result)
        except Cancelled:
            return Status(key, request.why, newest.done, newest.total)
        except Exception as error:  # noqa: BLE001 - whatever a job raises is said to the person who waits for it
            if request.unwanted.is_set():
                return Status(key, request.why, newest.done, newest.total)
            self.last_error = error
            self._safely(request.on_error, sentence(error))
            return Status(key, "failed", newest.done, newest.total, sentence(error))
        return Status(key, "done", newest.total, newest.total)

    def _tell_all(self, dropped: list[_Request]) -> None:
        for request in dropped:
            self._tell(Status(request.key, request.why))

    def _tell(self, status: Status) -> None:
        for listener in [*self._listeners]:
            self._safely(listener, status)

    def _safely(self, tell: Callable[[Any], None], news: object) -> None:
        try:
            tell(news)
        except Exception:
            log.exception("A listener of %s failed.", self.name)  # the jobs of others go on


def sentence(error: Exception) -> str:
    """Say an error in one sentence: bad input in its own words, anything else with its type."""
    words = " ".join(str(error).split())
    if isinstance(error, InputError):
        return words
    return f"This stopped with {type(error).__name__}{': ' + words if words else ''}."
