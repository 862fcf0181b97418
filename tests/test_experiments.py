"""The runner of experiments: every job once, in any executor, from the point where a stopped run ended."""

import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context

import polars as pl
import pytest

from veloxlab.errors import InputError
from veloxlab.measure.experiments import Attempt, Experiment, possible_rows
from veloxlab.store import Unfinished

JOBS = [("a", 0), ("a", 1), ("b", 0)]


def length(job):
    return len(job[0]) + 10 * job[1]


def refusing(job):
    if job[0] == "b":
        raise InputError("It has no b.")
    return length(job)


def dying(flag, job):
    """End the process at one job, the first time or, without a flag file, every time."""
    if job == ("b", 0) and (flag is None or not flag.exists()):
        if flag is not None:
            flag.touch()
        os._exit(1)
    return length(job)


@pytest.mark.parametrize("executor", [None, ThreadPoolExecutor(2)])
def test_each_job_is_measured_once_and_reported(executor):
    told = []
    experiment = Experiment(length, executor=executor, progress=lambda *said: told.append(said))
    assert dict(experiment.run([*JOBS, JOBS[0]])) == {job: length(job) for job in JOBS}
    assert [done for done, _, _ in told] == [0, 1, 2, 3]
    assert told[0][1:] == (3, "('a', 0)")
    assert told[-1] == (3, 3, "done")
    assert list(experiment.run(JOBS[:1], done=2, total=9)) == [(JOBS[0], 1)]
    assert told[-1] == (3, 9, "done")


def test_a_job_that_fails_ends_the_run():
    with pytest.raises(InputError, match=r"It has no b\."):
        list(Experiment(refusing).run(JOBS))


def test_an_attempt_that_fails_is_left_out_and_so_are_later_ones_of_its_cache():
    def rows(job):
        return pl.DataFrame({"n": [refusing(job)]})

    told, seen = [], []
    attempts = [Attempt(*job) for job in (
        ("b", lambda: rows(("b", 0)), "1 token"), ("b", lambda: rows(("a", 0)), "2 tokens"),
        ("a", lambda: rows(("a", 1))),
    )]  # fmt: skip
    frame, left_out = possible_rows(
        attempts, 3, {"n": pl.Int64}, lambda *said: told.append(said), lambda so_far, _: seen.append(so_far.height)
    )
    assert frame["n"].to_list() == [11]
    assert left_out == {"b": "from 1 token on: It has no b."}
    assert seen == [0, 1]
    assert told == [
        (0, 3, "b at 1 token"),
        (0, 3, "b at 1 token is left out: It has no b."),
        (2, 3, "a"),
        (3, 3, "done"),
    ]


def test_a_stopped_run_continues_from_its_file(tmp_path):
    unfinished = Unfinished(tmp_path / "run.json", "test 1", {"model": "m"})

    def experiment(measure, progress):
        made = Experiment(measure, progress=progress)
        made.go_on(unfinished, lambda known: [[*job, n] for job, n in known.items()],
                   lambda rows: {(word, window): n for word, window, n in rows})  # fmt: skip
        return made

    def stop(done, total, label):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(experiment(length, stop).run(JOBS))
    measured = []
    rest = experiment(lambda job: measured.append(job) or length(job), lambda *_: None)
    assert dict(rest.run(JOBS)) == {job: length(job) for job in JOBS}
    assert measured == JOBS[2:]


def test_one_new_process_continues_after_another_died(tmp_path):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        experiment = Experiment(partial(dying, tmp_path / "flag"), executor=pool)
        with pytest.warns(UserWarning, match="A worker process died, .* one new process does the rest"):
            found = dict(experiment.run(JOBS))
        assert found == {job: length(job) for job in JOBS}
        experiment.measure, experiment.known = partial(dying, None), {}
        with pytest.raises(InputError, match=r"died again, with only this job: \('b', 0\)"):
            list(experiment.run(JOBS[::-1]))
        experiment.close()
