"""One thread that does a widget's long work.

Widget callbacks arrive on whichever thread the kernel picks, while MLX wants its lazy arrays evaluated by the thread
that made them. So callbacks only submit jobs here, and only the newest job of a kind is worth finishing. The thread
holds the line of jobs and no worker, so that a widget can be collected.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary, finalize

import mlx.core as mx

from veloxlab.errors import InputError
from veloxlab.progress import ended_by, notices_to

State = Literal["waiting", "running", "done", "cancelled", "overtaken", "failed"]
Job = Callable[["Progress"], Any]

QUIET = 0.25  # seconds without a request before a job that runs ahead begins: it would slow a hand on a slider
IDLE = 60.0  # seconds after which an idle thread looks whether its worker is still there, should it miss the news
PATIENCE = 5.0  # seconds that running jobs are given to end when Python does
log = logging.getLogger(__name__)


class Cancelled(BaseException):
    """Ends a job that was cancelled or overtaken. No ``except Exception`` inside the job can swallow it."""


@dataclass(frozen=True)
class Status:
    """Where one job stands. Both numbers of steps are 0 where the job has not said."""

    key: str  # the job's kind
    state: State  # "overtaken": by a newer job of its key
    done: int = 0  # steps finished
    total: int = 0  # steps in all
    label: str = ""  # what is being done, or the sentence of the error


@dataclass(frozen=True)
class Progress:
    """What a job calls between its steps: it tells of them, and ends the job once that is no longer wanted."""

    _tell: Callable[[int, int, str], None]
    _unwanted: threading.Event

    def __call__(self, done: int, total: int, label: str = "") -> None:
        """Tell that ``done`` of ``total`` steps are finished; raises `Cancelled` as `check` does."""
        self.check()
        self._tell(done, total, label)

    def check(self) -> None:
        """Raise `Cancelled` if the job was cancelled, or if a newer one of its key has come."""
        if self._unwanted.is_set():
            raise Cancelled


@dataclass(eq=False)
class Request:
    """A job, and whom to tell of it. ``run`` is a method of its worker, which it keeps alive."""

    run: Callable[[Request], None]
    key: str
    job: Job
    on_done: Callable[[Any], None]
    on_error: Callable[[str], None]
    ahead: bool
    first: bool
    kept: bool = False  # while it waits, when everything is cancelled
    unwanted: threading.Event = field(default_factory=threading.Event)
    why: State = "cancelled"  # it is unwanted


class Line:
    """The jobs that wait for one thread. All methods but `next` need the lock ``changed``."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.waiting: dict[str, Request] = {}
        self.running: Request | None = None
        self.closed = False
        self.asked = 0.0

    def forget(self, key: str | None, why: State) -> list[Status]:
        """Make the jobs of a key, or all, unwanted, and give the news of those that did not start."""
        spared = {each for each, request in self.waiting.items() if request.kept and key is None and not self.closed}
        waiting = [self.waiting.pop(each) for each in [*self.waiting] if key in (None, each) and each not in spared]
        running = [self.running] if self.running is not None and key in (None, self.running.key) else []
        for request in waiting + running:
            request.why = why
            request.unwanted.set()
        self.changed.notify_all()
        return [Status(request.key, why) for request in waiting]

    def close(self) -> list[Status]:
        """Let the thread end, and give the news of jobs that did not start."""
        with self.changed:
            self.closed = True
            return self.forget(None, "cancelled")

    def next(self) -> Request | None:
        """Tell that the job that ran has ended, wait for the next one and take it; None once the line is closed."""
        with self.changed:
            self.running = None
            self.changed.notify_all()
            while not self.closed:
                if not self.waiting:
                    self.changed.wait(IDLE)
                    continue
                # false sorts first, and the sort is stable: the oldest of what a person pressed a button for
                request = min(self.waiting.values(), key=lambda each: (each.ahead, not each.first))
                quiet = self.asked + QUIET - time.monotonic()
                if not request.ahead or quiet <= 0:
                    self.running = self.waiting.pop(request.key)
                    return request
                del request  # it keeps its worker alive
                self.changed.wait(quiet)
        return None


class Worker:
    """Run jobs one after another on one thread, and drop those that were overtaken.

    Every method may be called from any thread. Results, errors and news are delivered on the worker's thread, which
    ends when the worker is closed, or has no job and is referred to by nobody. ``last_error`` is what the last failed
    job raised, with its trace.

    >>> worker = Worker()
    >>> worker.submit("errors", lambda progress: measure(bits, progress), on_done=view.put)
    """

    def __init__(self, name: str = "veloxlab-worker") -> None:
        self.name = name
        self.last_error: BaseException | None = None
        self.newest: Status | None = None  # of the job that runs, for who comes to watch while it does
        self._line = Line()
        self._started = False
        self._listeners: list[Callable[[Status], None]] = []
        self._stopped: dict[str, tuple[Job, Callable[[Any], None], Callable[[str], None]]] = {}
        finalize(self, self._line.close).atexit = False  # the end of Python ends every thread

    def submit(
        self,
        key: str,
        job: Job,
        *,
        on_done: Callable[[Any], None] = lambda result: None,
        on_error: Callable[[str], None] = lambda sentence: None,
        ahead: bool = False,
        first: bool = False,
        kept: bool = False,
    ) -> None:
        """Ask for a job; an older one of the same key is dropped, or cancelled if it runs.

        ``on_done`` is given what the job returns, unless it was overtaken meanwhile; ``on_error`` a sentence if the job
        or ``on_done`` raises. A job that runs ``ahead`` has low priority: it begins after a quiet moment, makes way for
        any other job and begins anew behind it. One that comes ``first`` passes all that wait. One that is ``kept``
        goes on waiting when everything is cancelled. A job that does not run ahead ends the offer to `retry` others.
        """
        line = self._line
        with line.changed:
            if line.closed:
                raise InputError(f"The worker {self.name!r} is closed: make a new one.")
            if not ahead:
                self._stopped.clear()
            dropped = line.forget(key, "overtaken")
            line.waiting[key] = Request(self._run, key, job, on_done, on_error, ahead, first, kept)
            line.asked = time.monotonic()
            running = line.running
            if running is not None and running.ahead and not ahead and not running.unwanted.is_set():
                running.why = "waiting"
                running.unwanted.set()
            if not self._started:
                self._started = True
                thread = threading.Thread(target=_work, args=(line,), name=self.name, daemon=True)
                _threads[thread] = line
                thread.start()
        self._tell(*dropped, Status(key, "waiting"))

    def cancel(self, key: str | None = None) -> None:
        """Drop what waits and end what runs: of one key, or everything, which `retry` then brings back."""
        line = self._line
        with line.changed:
            self._stopped.pop(str(key), None)
            for each in [*line.waiting.values(), line.running] if key is None else []:
                if each and not (each.ahead or each.unwanted.is_set() or (each.kept and each is not line.running)):
                    self._stopped[each.key] = each.job, each.on_done, each.on_error
            dropped = line.forget(key, "cancelled")
        self._tell(*dropped)

    def awaits(self, begin: str) -> bool:
        """Whether a job waits, but none that runs ahead, whose key begins so."""
        with self._line.changed:
            return any(key.startswith(begin) and not each.ahead for key, each in self._line.waiting.items())

    @property
    def is_ending(self) -> bool:
        """Whether the job that runs was cancelled, and has not noticed it yet."""
        running = self._line.running
        return running is not None and running.unwanted.is_set() and running.why == "cancelled"

    @property
    def can_retry(self) -> bool:
        """Whether something was cancelled that nobody asked for since."""
        return bool(self._stopped)

    def retry(self) -> None:
        """Ask again for all that was cancelled."""
        for key, (job, on_done, on_error) in [*self._stopped.items()]:
            self.submit(key, job, on_done=on_done, on_error=on_error)

    def wait(self, timeout: float | None = None, *, ahead: bool = False) -> bool:
        """Wait for all jobs, with ``ahead`` those that run ahead too; tell whether ``timeout`` seconds were enough.

        The worker's own thread never waits for itself.
        """
        line = self._line
        if _threads.get(threading.current_thread()) is line:
            return False
        with line.changed:
            return line.changed.wait_for(
                lambda: all(each.ahead and not ahead for each in [*line.waiting.values(), line.running] if each),
                timeout,
            )

    def watch(self, listener: Callable[[Status], None]) -> Callable[[], None]:
        """Tell a function of every change of every job, and give a function that ends this."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def close(self) -> None:
        """Cancel everything and let the thread end. This does not wait; `wait` does, for a job that still runs."""
        self._tell(*self._line.close())

    def _run(self, request: Request) -> None:
        outcome, self.newest = self._outcome(request), None
        with self._line.changed:
            if outcome.state == "waiting":
                outcome = replace(outcome, state=request.why)  # it may have been cancelled since
                if request.why == "waiting" and request.key not in self._line.waiting:
                    self._line.waiting[request.key] = replace(request, unwanted=threading.Event())
        self._tell(outcome)

    def _outcome(self, request: Request) -> Status:
        newest = self.newest = Status(request.key, "running")

        def tell(done: int, total: int, label: str) -> None:
            nonlocal newest
            newest = self.newest = Status(request.key, "running", done, total, label)
            self._tell(newest)

        self._tell(newest)
        progress = Progress(tell, request.unwanted)
        try:
            with notices_to(lambda text: tell(newest.done, newest.total, text)), ended_by(progress.check):
                result = request.job(progress)
            progress.check()
            request.on_done(result)
        except BaseException as error:  # noqa: BLE001 - whatever a job raises is said to the person who waits for it
            if request.unwanted.is_set() or isinstance(error, Cancelled):
                return replace(newest, state=request.why, label="")
            self.last_error = error
            self._safely(request.on_error, sentence(error))
            return replace(newest, state="failed", label=sentence(error))
        return replace(newest, state="done", done=newest.total, label="")

    def _tell(self, *news: Status) -> None:
        for status, listener in itertools.product(news, [*self._listeners]):
            self._safely(listener, status)

    def _safely(self, tell: Callable[[Any], None], news: object) -> None:
        try:
            tell(news)
        except BaseException:
            log.exception("A listener of %s failed.", self.name)  # the jobs of others go on


def sentence(error: BaseException) -> str:
    """Say an error in one sentence: bad input in its own words, anything else with its type."""
    words = " ".join(str(error).split())
    other = f"This stopped with {type(error).__name__}{': ' + words if words else ''}."
    return words if isinstance(error, InputError) else other


_threads: WeakKeyDictionary[threading.Thread, Line] = WeakKeyDictionary()


def _work(line: Line) -> None:
    while (request := line.next()) is not None:
        request.run(request)
        del request  # an idle thread keeps no worker alive
    mx.clear_streams()  # MLX aborts the process if that ends just after a thread that has streams


@atexit.register
def _end_threads() -> None:
    """End every thread before Python ends: MLX aborts the process if one still computes."""
    for line in [*_threads.values()]:
        line.close()
    deadline = time.monotonic() + PATIENCE
    for thread in [*_threads]:
        thread.join(max(0.0, deadline - time.monotonic()))
