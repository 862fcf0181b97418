"""The worker: order, overtaking, cancelling and errors, asked for from several threads at once."""

from __future__ import annotations

import logging
import threading

import pytest

from veloxlab.errors import InputError
from veloxlab.widgets import Progress, ProgressBar, Status, Worker

PATIENCE = 20  # seconds


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
    """A job that starts, then runs until it is let go, calling its progress all the while."""

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
    assert worker.wait(PATIENCE)


def test_every_job_runs_on_the_one_thread_whoever_asks(worker):
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


def test_results_come_in_the_order_of_asking(worker):
    results: list[str] = []
    held = Held()
    worker.submit("a", held, on_done=results.append)
    worker.submit("b", lambda _: "b", on_done=results.append)
    worker.submit("c", lambda _: "c", on_done=results.append)
    held.go.set()
    idle(worker)
    assert results == ["held to the end", "b", "c"]


def test_a_newer_job_overtakes_the_running_one_and_those_that_wait(worker, news):
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


def test_a_job_that_never_tells_of_its_progress_delivers_nothing_once_it_is_overtaken(worker):
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


def test_what_nobody_waits_for_makes_way_and_begins_anew(worker, news):
    starts, go = [], threading.Event()
    asked, first = [], threading.Event()

    def ahead(progress: Progress) -> None:
        starts.append(len(asked))
        first.set()
        while not go.wait(0.001):
            progress.check()

    worker.submit("ahead", ahead, ahead=True)
    assert first.wait(PATIENCE)
    worker.submit("also ahead", lambda _: asked.append("also ahead"), ahead=True)  # takes nobody's place
    for key in ("one", "two"):
        worker.submit(key, lambda _, key=key: (asked.append(key), asked[1:] and go.set()))
    idle(worker)
    assert asked[:2] == ["one", "two"]
    assert starts[0] == 0
    assert starts[-1] >= 2
    assert [s.state for s in news if s.key == "ahead"][-1] == "done"
    assert "cancelled" not in {s.state for s in news}


def test_what_made_way_can_be_cancelled_while_it_waits(worker, news):
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
    ],
)
def test_an_error_becomes_a_sentence_and_the_worker_goes_on(worker, news, error, said):
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


def test_an_error_in_a_callback_is_said_too(worker):
    sentences: list[str] = []
    worker.submit("key", lambda _: 0, on_done=lambda result: 1 / result, on_error=sentences.append)
    idle(worker)
    assert sentences == ["This stopped with ZeroDivisionError: division by zero."]


def test_a_listener_that_fails_is_logged_and_stops_nobody(worker, caplog):
    results: list[int] = []
    end = worker.watch(lambda status: 1 / 0)
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


def test_a_closed_worker_has_no_thread_and_takes_no_job():
    worker = Worker("closing")
    held = Held()
    worker.submit("key", held)
    assert held.started.wait(PATIENCE)
    worker.close()
    assert "closing" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(InputError, match="The worker 'closing' is closed"):
        worker.submit("key", held)


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
    go.set()
    idle(worker)
    assert label.value == "cancelled"
    assert fill.layout.visibility == button.layout.visibility == "hidden"
    assert repr(bar) == "ProgressBar(test-worker)"


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


def test_a_closed_bar_no_longer_follows(worker):
    bar = ProgressBar(worker)
    bar.close()
    worker.submit("key", lambda progress: progress(1, 4, "unseen"))
    idle(worker)
    assert bar.children[0].value == 0
