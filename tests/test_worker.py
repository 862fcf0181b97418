"""The worker: order, overtaking, cancelling and errors, with jobs from several threads at the same time."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from veloxlab.errors import InputError
from veloxlab.widgets import Progress, ProgressBar, Status, Worker

PATIENCE = 20  # seconds


class PanicException(BaseException):
    """Like Polars' own, which is not an Exception."""


@pytest.fixture
def worker():
    worker = Worker("test-worker")
    yield worker
    worker.close()


@pytest.fixture
def news(worker) -> list[Status]:
    seen: list[Status] = []
    worker.watch(seen.append)
    return seen


class Held:
    """A job that starts, then runs until it is released, and calls its progress meanwhile."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.go = threading.Event()

    def __call__(self, progress: Progress) -> str:
        self.started.set()
        for step in range(100_000):
            progress(step, 100_000, "held")
            if self.go.wait(0.001):
                return "held to the end"
        raise AssertionError("nobody let go")


def idle(worker: Worker) -> None:
    assert worker.wait(PATIENCE, ahead=True)


def test_every_job_runs_on_the_same_thread(worker):
    threads: list[threading.Thread] = []
    callers = [
        threading.Thread(target=worker.submit, args=(f"key {i}", lambda _: threads.append(threading.current_thread())))
        for i in range(8)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    idle(worker)
    assert len(threads) == 8
    assert {thread.name for thread in threads} == {"test-worker"}


def test_results_arrive_in_the_order_of_submission(worker):
    results: list[str] = []
    held = Held()
    worker.submit("a", held, on_done=results.append)
    worker.submit("b", lambda _: "b", on_done=results.append)
    worker.submit("c", lambda _: "c", on_done=results.append)
    held.go.set()
    idle(worker)
    assert results == ["held to the end", "b", "c"]


def test_a_newer_job_overtakes_the_running_one_and_waiting_ones(worker, news):
    results: list[object] = []
    held = Held()
    worker.submit("slider", held, on_done=results.append)
    assert held.started.wait(PATIENCE)
    for bits in (2, 3, 4):
        worker.submit("slider", lambda _, bits=bits: bits, on_done=results.append)
    idle(worker)
    assert results == [4]
    assert [status.state for status in news if status.state in ("overtaken", "cancelled", "done")].count("done") == 1
    assert sum(status.state == "overtaken" for status in news) == 3


def test_an_overtaken_job_without_progress_delivers_nothing(worker):
    results: list[str] = []
    started, go = threading.Event(), threading.Event()

    def deaf(_: Progress) -> str:
        started.set()
        go.wait(PATIENCE)
        return "stale"

    worker.submit("key", deaf, on_done=results.append)
    assert started.wait(PATIENCE)
    worker.submit("key", lambda _: "fresh", on_done=results.append)
    go.set()
    idle(worker)
    assert results == ["fresh"]


def test_other_keys_are_not_overtaken(worker):
    results: list[str] = []
    held = Held()
    worker.submit("a", held, on_done=results.append)
    assert held.started.wait(PATIENCE)
    worker.submit("b", lambda _: "b", on_done=results.append)
    held.go.set()
    idle(worker)
    assert results == ["held to the end", "b"]


@pytest.mark.parametrize(("key", "left"), [("held", ["other"]), ("other", ["held to the end"]), (None, [])])
def test_cancel_ends_one_key_or_all(worker, key, left):
    results: list[str] = []
    held = Held()
    worker.submit("held", held, on_done=results.append)
    assert held.started.wait(PATIENCE)
    worker.submit("other", lambda _: "other", on_done=results.append)
    worker.cancel(key)
    if key == "other":
        held.go.set()
    idle(worker)
    assert results == left


def test_a_job_ahead_yields_to_others_and_starts_again(worker, news):
    starts, go = [], threading.Event()
    asked, first = [], threading.Event()

    def ahead(progress: Progress) -> None:
        starts.append(len(asked))
        first.set()
        while not go.wait(0.001):
            progress.check()

    worker.submit("ahead", ahead, ahead=True)
    assert first.wait(PATIENCE)
    worker.submit("also ahead", lambda _: asked.append("also ahead"), ahead=True)  # does not overtake the other one
    for key in ("one", "two"):
        worker.submit(key, lambda _, key=key: (asked.append(key), asked[1:] and go.set()))
    idle(worker)
    assert asked[:2] == ["one", "two"]
    assert starts[0] == 0
    assert starts[-1] >= 2
    assert [s.state for s in news if s.key == "ahead"][-1] == "done"
    assert "cancelled" not in {s.state for s in news}


def test_a_job_of_the_user_runs_before_all_waiting_ones(worker):
    held, ran = Held(), []
    worker.submit("held", held)
    assert held.started.wait(PATIENCE)
    for name, order in (
        ("ahead", {"ahead": True}),
        ("frames", {}),
        ("pressed", {"first": True}),
        ("again", {"first": True}),
    ):
        worker.submit(name, lambda _, name=name: ran.append(name), **order)
    held.go.set()
    assert worker.wait(PATIENCE, ahead=True)
    assert ran == ["pressed", "again", "frames", "ahead"]


def test_wait_ignores_jobs_ahead_unless_they_are_included(worker):
    held = Held()
    worker.submit("ahead", held, ahead=True)
    assert worker.wait(PATIENCE)
    assert worker.wait(0.05, ahead=True) is False
    assert held.started.wait(PATIENCE)
    assert worker.wait(PATIENCE)
    held.go.set()
    idle(worker)


def test_a_job_that_yielded_can_be_cancelled_while_it_waits(worker, news):
    held, started = Held(), threading.Event()

    def ahead(progress: Progress) -> None:
        started.set()
        while True:
            progress.check()

    worker.submit("ahead", ahead, ahead=True)
    assert started.wait(PATIENCE)
    worker.submit("held", held)
    assert held.started.wait(PATIENCE)
    worker.cancel("ahead")
    held.go.set()
    idle(worker)
    assert [s.state for s in news if s.key == "ahead"][-1] == "cancelled"


def test_a_job_cannot_swallow_its_cancellation(worker, news):
    started = threading.Event()

    def stubborn(progress: Progress) -> None:
        while True:
            started.set()
            try:
                progress(0, 1)
            except Exception as error:  # noqa: BLE001 - the mistake that this is about
                pytest.fail(f"an `except Exception` caught the cancellation: {error}")

    worker.submit("key", stubborn)
    assert started.wait(PATIENCE)
    worker.cancel()
    idle(worker)
    assert news[-1].state == "cancelled"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (InputError("There are no 9 bits:\n choose 2 to 8."), "There are no 9 bits: choose 2 to 8."),
        (KeyError("layer"), "This stopped with KeyError: 'layer'."),
        (MemoryError(), "This stopped with MemoryError."),
        (SystemExit(3), "This stopped with SystemExit: 3."),
        (KeyboardInterrupt(), "This stopped with KeyboardInterrupt."),
        (PanicException("a shape is wrong"), "This stopped with PanicException: a shape is wrong."),
    ],
)
def test_an_error_becomes_a_sentence_and_the_worker_continues(worker, news, error, said):
    sentences: list[str] = []
    results: list[int] = []

    def fail(_: Progress) -> None:
        raise error

    worker.submit("bad", fail, on_error=sentences.append)
    worker.submit("good", lambda _: 1, on_done=results.append)
    idle(worker)
    assert sentences == [said]
    assert results == [1]
    assert worker.last_error is error
    assert Status("bad", "failed", label=said) in news


def test_an_error_in_a_callback_is_reported_too(worker):
    sentences: list[str] = []
    worker.submit("key", lambda _: 0, on_done=lambda result: 1 / result, on_error=sentences.append)
    idle(worker)
    assert sentences == ["This stopped with ZeroDivisionError: division by zero."]


@pytest.mark.parametrize("kind", [ValueError, SystemExit])
def test_a_failing_listener_is_logged_and_stops_no_other(worker, caplog, kind):
    results: list[int] = []

    def fail(_: Status) -> None:
        raise kind

    end = worker.watch(fail)
    with caplog.at_level(logging.ERROR):
        worker.submit("key", lambda _: 1, on_done=results.append)
        idle(worker)
    assert results == [1]
    assert "A listener of test-worker failed." in caplog.text
    end()
    caplog.clear()
    worker.submit("key", lambda _: 2, on_done=results.append)
    idle(worker)
    assert caplog.text == ""


def test_wait_gives_up_at_its_deadline(worker):
    held = Held()
    worker.submit("key", held)
    assert worker.wait(0.01) is False
    held.go.set()
    idle(worker)


def test_a_closed_worker_ends_its_thread_without_waiting_and_takes_no_job(worker, news):
    go, started = threading.Event(), threading.Event()

    def deaf(_: Progress) -> None:
        started.set()
        go.wait(PATIENCE)

    worker.submit("key", deaf)
    assert started.wait(PATIENCE)
    thread = thread_of(worker)
    worker.submit("later", Held())
    worker.close()
    assert thread.is_alive()  # in the job, which cannot be interrupted
    go.set()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert {status.key for status in news if status.state == "cancelled"} == {"key", "later"}
    with pytest.raises(InputError, match="The worker 'test-worker' is closed"):
        worker.submit("key", Held())


def thread_of(worker: Worker) -> threading.Thread:
    return next(thread for thread in threading.enumerate() if thread.name == worker.name)


@dataclass(eq=False)
class Owner:
    """Like a widget with a worker: it submits jobs and listens."""

    worker: Worker
    newest: Status | None = None

    def follow(self, status: Status) -> None:
        self.newest = status

    def job(self, progress: Progress) -> None:
        progress(1, 2)


def test_an_idle_worker_without_references_ends_its_thread():
    worker = Worker("forgotten")
    owner = Owner(worker)
    worker.watch(owner.follow)
    worker.submit("key", owner.job)
    idle(worker)
    thread, gone = thread_of(worker), weakref.ref(worker)
    del worker, owner
    gc.collect()
    assert gone() is None
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_jobs_of_a_worker_without_references_are_done():
    results: list[str] = []
    finished = threading.Event()
    Worker().submit("key", lambda _: "done", on_done=lambda result: (results.append(result), finished.set()))
    assert finished.wait(PATIENCE)
    assert results == ["done"]


SCRIPTS = {
    "left": "worker.submit('key', compute); worker.wait()",
    "closed": "worker.submit('key', compute); worker.wait(); worker.close()",
    "busy": "worker.submit('key', compute); time.sleep(0.05)",
    "forgotten": "worker.submit('key', compute); worker.wait(); del worker; gc.collect()",
}
COMPUTES = """
import gc, sys, time, types
import veloxlab
import mlx.core as mx
package = types.ModuleType("veloxlab.widgets")  # whose own imports take seconds
package.__path__ = [veloxlab.__path__[0] + "/widgets"]
sys.modules["veloxlab.widgets"] = package
from veloxlab.widgets.worker import Worker
def compute(progress):
    x = mx.random.normal((192, 192))
    for _ in range(300 if {busy} else 3):
        progress.check()
        x = x @ x / 14
        mx.eval(x)
worker = Worker()
{end}
"""


def test_scripts_end_with_status_0():
    """MLX 0.32.4 aborts in about a seventh of processes that end just after a thread that has computed."""

    def status(name: str) -> tuple[str, int, str]:
        script = COMPUTES.format(busy=name == "busy", end=SCRIPTS[name])
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        return name, done.returncode, done.stderr

    with ThreadPoolExecutor(4) as pool:
        ends = list(pool.map(status, [*SCRIPTS] * 5))
    assert ends == [(name, 0, "") for name in [*SCRIPTS] * 5]


# ---- the bar


def test_the_bar_follows_and_its_button_cancels(worker, news):
    bar = ProgressBar(worker)
    fill, label, button = bar.children
    assert fill.layout.visibility == button.layout.visibility == "hidden"
    halfway, go = threading.Event(), threading.Event()

    def job(progress: Progress) -> None:
        progress(1, 2, "layer 1")
        halfway.set()
        go.wait(PATIENCE)
        progress(2, 2, "layer 2")

    worker.submit("key", job)
    assert halfway.wait(PATIENCE)
    assert fill.value == 0.5
    assert label.value == "layer 1 (1 of 2)"
    assert fill.layout.visibility == button.layout.visibility == "visible"
    button.click()
    assert (button.description, button.disabled) == ("Cancelling…", True)
    assert label.value == "ends after this step: layer 1 (1 of 2)"
    bar.activate(True)  # as a page does when it is shown
    assert (button.description, button.disabled) == ("Cancelling…", True)
    go.set()
    idle(worker)
    assert label.value == "cancelled"
    assert not button.disabled
    assert (fill.layout.visibility, button.layout.visibility, button.description) == ("hidden", "visible", "Retry")
    button.click()
    idle(worker)
    assert fill.value == 1
    assert fill.layout.visibility == button.layout.visibility == "hidden"
    assert repr(bar) == "ProgressBar(test-worker)"


def test_after_cancel_the_bar_waits_for_the_end_of_the_running_job(worker):
    bar, held = ProgressBar(worker), Held()
    fill, _, button = bar.children
    worker.submit("held", held)
    assert held.started.wait(PATIENCE)
    seen = []
    worker.watch(lambda status: seen.append((status.key, status.state, fill.layout.visibility)))
    worker.submit("waits", lambda _: None)
    button.click()
    idle(worker)
    assert ("waits", "cancelled", "visible") in seen  # it waited; the running job has not ended
    assert ("held", "cancelled", "hidden") in seen


def test_a_bar_that_is_shown_again_without_a_job_is_idle(worker):
    """Even if it saw another job since."""
    bar, held = ProgressBar(worker), Held()
    fill, label, button = bar.children
    worker.submit("held", held)
    assert held.started.wait(PATIENCE)
    bar.activate(False)
    assert fill.layout.visibility == "visible"
    held.go.set()
    idle(worker)
    worker.submit("other", lambda _: None)
    idle(worker)
    bar.activate(True)
    assert (fill.layout.visibility, button.layout.visibility, label.value) == ("hidden", "hidden", "")


def test_a_later_bar_shows_the_running_job_and_can_cancel_it(worker):
    started, go = threading.Event(), threading.Event()

    def job(progress: Progress) -> None:
        progress(1, 4, "a long step")
        started.set()
        go.wait(PATIENCE)
        progress.check()

    worker.submit("key", job)
    assert started.wait(PATIENCE)
    fill, label, button = ProgressBar(worker).children
    assert (fill.layout.visibility, label.value) == ("visible", "a long step (1 of 4)")
    button.click()
    go.set()
    idle(worker)
    assert label.value == "cancelled"


def test_retry_is_offered_until_another_job_is_submitted(worker):
    bar, held = ProgressBar(worker), Held()
    button = bar.children[2]
    worker.submit("held", held)
    assert held.started.wait(PATIENCE)
    button.click()
    idle(worker)
    assert button.description == "Retry"
    worker.submit("ahead", lambda _: None, ahead=True)  # not a job of the user
    idle(worker)
    assert button.description == "Retry"
    worker.submit("other", lambda _: None)
    idle(worker)
    assert not worker.stopped()
    assert button.layout.visibility == "hidden"


def test_kept_jobs_still_wait_when_all_is_cancelled(worker, news):
    held, ran = Held(), []
    worker.submit("held", held)
    assert held.started.wait(PATIENCE)
    worker.submit("kept", lambda _: ran.append("kept"), kept=True)
    worker.submit("other", lambda _: ran.append("other"))
    worker.cancel()
    idle(worker)
    assert ran == ["kept"]
    assert {s.key for s in news if s.state == "cancelled"} == {"held", "other"}


def test_the_bar_shows_the_sentence_of_an_error_until_the_next_job(worker):
    bar = ProgressBar(worker)

    def fail(_: Progress) -> None:
        raise InputError("There are no 9 bits.")

    worker.submit("key", fail)
    idle(worker)
    assert bar.children[1].value == "There are no 9 bits."
    worker.submit("key", lambda _: None)
    idle(worker)
    assert bar.children[1].value == ""


def test_retry_repeats_cancelled_jobs_except_those_ahead_and_of_closed_pages(worker):
    gate, ran = threading.Event(), []
    worker.submit("first", lambda _: gate.wait(PATIENCE))
    for key in ("second", "third"):
        worker.submit(key, lambda _, key=key: ran.append(key))
    worker.submit("ahead", lambda _: ran.append("ahead"), ahead=True)
    worker.submit("closed", lambda _: ran.append("closed"))
    worker.cancel("closed")  # of a closed page
    worker.cancel()
    gate.set()
    idle(worker)
    assert ran == []
    assert worker.stopped()
    worker.retry()
    idle(worker)
    assert {*ran} == {"second", "third"}
    assert not worker.stopped()


def test_a_job_that_waits_for_its_own_worker_continues(worker):
    told = []
    worker.submit("key", lambda _: told.append(worker.wait()))
    idle(worker)
    assert told == [False]


def test_a_closed_bar_no_longer_follows(worker):
    bar = ProgressBar(worker)
    bar.close()
    worker.submit("key", lambda progress: progress(1, 4, "unseen"))
    idle(worker)
    assert bar.children[0].value == 0
