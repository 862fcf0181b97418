"""One thread that does a widget's long work.

Widget callbacks arrive on whichever thread the kernel picks, while MLX wants its lazy arrays evaluated by the thread
that made them. So callbacks only submit jobs here, and only the newest job of a kind is worth finishing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import finalize

from veloxlab.errors import InputError
from veloxlab.widgets.line import Line, Request, State, start_thread

Job = Callable[["Progress"], Any]
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


class Worker:
    """Run jobs one after another on one thread, and drop those that were overtaken.

    Every method may be called from any thread. Results, errors and news are delivered on the worker's thread, which
    ends when the worker is closed, or has no job and is referred to by nobody.

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
        self.last_error: BaseException | None = None
        """What the last failed job raised, with its trace."""
        self._line = Line()
        self._started = False
        finalize(self, self._line.close).atexit = False  # the end of Python ends every thread
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
        with self._line.changed:
            if self._line.closed:
                raise InputError(f"The worker {self.name!r} is closed: make a new one.")
            dropped = self._line.add(Request(self._run, key, job, on_done, on_error, ahead))
            if not self._started:
                self._started = True
                start_thread(self._line, self.name)
        self._tell_all(dropped)
        self._tell(Status(key, "waiting"))

    def cancel(self, key: str | None = None) -> None:
        """Drop what waits and end what runs: of one key, or everything."""
        with self._line.changed:
            dropped = self._line.forget(key, "cancelled")
        self._tell_all(dropped)

    def wait(self, timeout: float | None = None, *, ahead: bool = False) -> bool:
        """Wait until what was asked for is done, and tell whether that came before ``timeout`` seconds.

        Jobs that run ahead are waited for only with ``ahead``.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._line.changed:
            while self._line.is_busy(ahead=ahead):
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self._line.changed.wait(left)
        return True

    def watch(self, listener: Callable[[Status], None]) -> Callable[[], None]:
        """Tell a function of every change of every job, and give a function that ends this."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def close(self) -> None:
        """Cancel everything and let the thread end. This does not wait; `wait` does, for a job that still runs."""
        self._tell_all(self._line.close())

    def _run(self, request: Request) -> None:
        outcome = self._outcome(request)
        with self._line.changed:
            if outcome.state == "waiting":
                outcome = replace(outcome, state=request.why)  # it may have been cancelled since
                if request.why == "waiting" and request.key not in self._line.waiting:
                    self._line.waiting[request.key] = replace(request, unwanted=threading.Event())
        self._tell(outcome)

    def _outcome(self, request: Request) -> Status:
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
        except BaseException as error:  # noqa: BLE001 - whatever a job raises is said to the person who waits for it
            if request.unwanted.is_set():
                return Status(key, request.why, newest.done, newest.total)
            self.last_error = error
            self._safely(request.on_error, sentence(error))
            return Status(key, "failed", newest.done, newest.total, sentence(error))
        return Status(key, "done", newest.total, newest.total)

    def _tell_all(self, dropped: list[Request]) -> None:
        for request in dropped:
            self._tell(Status(request.key, request.why))

    def _tell(self, status: Status) -> None:
        for listener in [*self._listeners]:
            self._safely(listener, status)

    def _safely(self, tell: Callable[[Any], None], news: object) -> None:
        try:
            tell(news)
        except BaseException:
            log.exception("A listener of %s failed.", self.name)  # the jobs of others go on


def sentence(error: BaseException) -> str:
    """Say an error in one sentence: bad input in its own words, anything else with its type."""
    words = " ".join(str(error).split())
    if isinstance(error, InputError):
        return words
    return f"This stopped with {type(error).__name__}{': ' + words if words else ''}."
