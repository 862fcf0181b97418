"""One thread that does a widget's long work.

The kernel may call a widget's callback on any thread, but MLX needs its lazy arrays evaluated by the thread that
created them. So callbacks only submit jobs here, and only the newest job of a kind has to finish. The thread refers to
the line of jobs and not to the worker, so that Python can collect a widget.
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

QUIET = 0.25  # seconds without a request before a job that runs ahead begins: it would slow down a moving slider
IDLE = 60.0  # seconds after which an idle thread checks that its line is open, in case it missed the signal
PATIENCE = 5.0  # seconds that running jobs have to end when Python ends
log = logging.getLogger(__name__)


class Cancelled(BaseException):
    """Ends a job that was cancelled or overtaken. An ``except Exception`` inside the job does not catch it."""


@dataclass(frozen=True)
class Status:
    """The state of one job. Both numbers of steps are 0 until the job reports them."""

    key: str  # the job's kind
    state: State  # "overtaken": by a newer job of its key
    done: int = 0  # finished steps
    total: int = 0  # all steps
    label: str = ""  # the present step, or the sentence of the error


@dataclass(frozen=True)
class Progress:
    """A job calls this between its steps: it reports them, and ends the job if it is not wanted any more."""

    _tell: Callable[[int, int, str], None]
    _unwanted: threading.Event

    def __call__(self, done: int, total: int, label: str = "") -> None:
        """Report that ``done`` of ``total`` steps are finished; raises `Cancelled` as `check` does."""
        self.check()
        self._tell(done, total, label)

    def check(self) -> None:
        """Raise `Cancelled` if the job was cancelled, or if a newer job of its key was submitted."""
        if self._unwanted.is_set():
            raise Cancelled


@dataclass(eq=False)
class Request:
    """A job and its callbacks. ``run`` is a method of the worker, so a request keeps its worker alive."""

    run: Callable[[Request], None]
    key: str
    job: Job
    on_done: Callable[[Any], None]
    on_error: Callable[[str], None]
    ahead: bool
    first: bool
    kept: bool = False  # goes on waiting when everything is cancelled
    unwanted: threading.Event = field(default_factory=threading.Event)
    why: State = "cancelled"  # why it is unwanted


class Line:
    """The jobs that wait for one thread. Callers of `forget` hold the lock ``changed``."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.waiting: dict[str, Request] = {}
        self.running: Request | None = None
        self.closed = False
        self.asked = 0.0

    def forget(self, key: str | None, why: State) -> list[Status]:
        """Make the jobs of a key, or all jobs, unwanted, and return the states of those that did not start."""
        spared = {each for each, request in self.waiting.items() if request.kept and key is None and not self.closed}
        waiting = [self.waiting.pop(each) for each in [*self.waiting] if key in (None, each) and each not in spared]
        running = [self.running] if self.running is not None and key in (None, self.running.key) else []
        for request in waiting + running:
            request.why = why
            request.unwanted.set()
        self.changed.notify_all()
        return [Status(request.key, why) for request in waiting]

    def close(self) -> list[Status]:
        """Let the thread end, and return the states of the jobs that did not start."""
        with self.changed:
            self.closed = True
            return self.forget(None, "cancelled")

    def next(self) -> Request | None:
        """Mark the running job as ended, wait for the next job and take it; None if the line is closed."""
        with self.changed:
            self.running = None
            self.changed.notify_all()
            while not self.closed:
                if not self.waiting:
                    self.changed.wait(IDLE)
                    continue
                # False is the minimum, and of equals the oldest wins: first the jobs that the user started by a button
                request = min(self.waiting.values(), key=lambda each: (each.ahead, not each.first))
                quiet = self.asked + QUIET - time.monotonic()
                if not request.ahead or quiet <= 0:
                    self.running = self.waiting.pop(request.key)
                    return request
                del request  # the request keeps its worker alive
                self.changed.wait(quiet)
        return None


class Worker:
    """Run jobs one after another on one thread, and drop jobs that were overtaken.

    You can call each method from any thread. Results, errors and states are delivered on the worker's thread. That
    thread ends when the worker is closed, or when it has no job and nothing refers to the worker. ``last_error`` is the
    exception of the last failed job, with its trace.

    >>> worker = Worker()
    >>> worker.submit("errors", lambda progress: measure(bits, progress), on_done=view.put)
    """

    def __init__(self, name: str = "veloxlab-worker") -> None:
        self.name = name
        self.last_error: BaseException | None = None
        self.newest: Status | None = None  # of the running job, for a listener that is added while it runs
        self.titles: dict[str, str] = {}  # by the begin of a key: the page whose jobs these are, as users know it
        self._line = Line()
        self._started = False
        self._listeners: list[Callable[[Status], None]] = []
        self._stopped: dict[str, tuple[Job, Callable[[Any], None], Callable[[str], None]]] = {}
        finalize(self, self._line.close).atexit = False  # at the end of Python, `_end_threads` closes all lines

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
        """Submit a job; an older job of the same key is dropped, or cancelled if it runs.

        ``on_done`` gets the result of the job, unless the job was overtaken. ``on_error`` gets a sentence if the job or
        ``on_done`` raises. A job that runs ``ahead`` has low priority: it begins after a time without requests, stops
        for any other job, and starts again after it. A job with ``first`` goes before all jobs that wait. A job that is
        ``kept`` goes on waiting when everything is cancelled. After a job that does not run ahead, `retry` forgets the
        jobs that were cancelled before.
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
        """Drop waiting jobs and end the running job: those of one key, or all, which `retry` can submit again."""
        line = self._line
        with line.changed:
            self._stopped.pop(str(key), None)
            for each in [*line.waiting.values(), line.running] if key is None else []:
                if each and not (each.ahead or each.unwanted.is_set() or (each.kept and each is not line.running)):
                    self._stopped[each.key] = each.job, each.on_done, each.on_error
            dropped = line.forget(key, "cancelled")
        self._tell(*dropped)

    def awaits(self, begin: str) -> bool:
        """Whether a job waits whose key begins so; jobs that run ahead do not count."""
        with self._line.changed:
            return any(key.startswith(begin) and not each.ahead for key, each in self._line.waiting.items())

    @property
    def is_ending(self) -> bool:
        """Whether the running job was cancelled and has not ended yet."""
        running = self._line.running
        return running is not None and running.unwanted.is_set() and running.why == "cancelled"

    def stopped(self, begin: str = "") -> set[str]:
        """The keys that begin so of cancelled jobs, which `retry` submits again."""
        return {key for key in [*self._stopped] if key.startswith(begin)}

    def retry(self) -> None:
        """Submit all cancelled jobs again."""
        for key, (job, on_done, on_error) in [*self._stopped.items()]:
            self.submit(key, job, on_done=on_done, on_error=on_error)

    def wait(self, timeout: float | None = None, *, ahead: bool = False) -> bool:
        """Wait for all jobs, with ``ahead`` also for those that run ahead; return whether ``timeout`` was enough.

        ``timeout`` is in seconds. On the worker's own thread it returns False at once.
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
        """Call ``listener`` after each change of each job; return a function that ends this."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def close(self) -> None:
        """Cancel everything and let the thread end. This does not wait; use `wait` for a job that still runs."""
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
        except BaseException as error:  # noqa: BLE001 - the user who waits for a job sees any error of it
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
            log.exception("A listener of %s failed.", self.name)  # other jobs go on


def sentence(error: BaseException) -> str:
    """An error as one sentence: the message of an `InputError`; for other errors also the type."""
    words = " ".join(str(error).split())
    other = f"This stopped with {type(error).__name__}{': ' + words if words else ''}."
    return words if isinstance(error, InputError) else other


_threads: WeakKeyDictionary[threading.Thread, Line] = WeakKeyDictionary()


def _work(line: Line) -> None:
    while (request := line.next()) is not None:
        request.run(request)
        del request  # an idle thread keeps no worker alive
    mx.clear_streams()  # MLX aborts if the process ends just after a thread that has streams


@atexit.register
def _end_threads() -> None:
    """End each thread before Python ends: MLX aborts the process if a thread still computes."""
    for line in [*_threads.values()]:
        line.close()
    deadline = time.monotonic() + PATIENCE
    for thread in [*_threads]:
        thread.join(max(0.0, deadline - time.monotonic()))
