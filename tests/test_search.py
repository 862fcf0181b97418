"""The search drops only candidates that are surely beaten, and finds the same front wherever its jobs run."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import polars as pl
import pytest

import veloxlab as vl
from tests.gguf_files import write_llama
from tests.test_calibration import TEXT, Letters
from tests.tiny_models import tiny
from veloxlab import cli
from veloxlab.allocate import trials
from veloxlab.allocate.budget import PlannedModel
from veloxlab.allocate.race import GROUP, LEAST_WINDOWS, on_front, race
from veloxlab.allocate.search import SEARCHED
from veloxlab.allocate.trials import Candidate, Trials, bytes_per_token, candidates
from veloxlab.cli.tables import front_table
from veloxlab.errors import InputError
from veloxlab.measure import experiments
from veloxlab.measure.quality import fidelity_to, reference

SETTINGS: dict[str, Any] = {"bits": (2, 4), "text": TEXT, "tokens": 40, "windows": 5, "context": 300}
TWO = ("turboquant", "rabitq")


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Stopped searches continue from the user's cache folder, so each test has its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "veloxlab" / "searches"


@pytest.fixture(scope="module")
def result(model):
    return vl.search(model, Letters(), methods=TWO, **SETTINGS)


# the race, on synthetic numbers -------------------------------------------------------------------------------------


def made_up(means, noise=0.01, seed=0):
    """Return a callback and a list of its calls; it gives each entrant its mean on different windows, with noise."""
    rng = np.random.default_rng(seed)
    common, own = rng.uniform(0.5, 1.5, 50), rng.normal(0, noise, (len(means), 50))
    asked = []

    def measure(numbers, window):
        asked.append((window, list(numbers)))
        return [float(means[i] * common[window] + own[i, window]) for i in numbers]

    return measure, asked


def test_surely_beaten_entrants_are_dropped_early_and_the_front_is_measured_to_the_end():
    nbytes, means = [1, 2, 2, 3, 3], [8, 4, 9, 2, 6]
    measure, asked = made_up(means)
    entrants = race(nbytes, measure, 8)
    assert [e.state for e in entrants] == ["front", "front", "dominated", "front", "dominated"]
    counts = [len(e.kls) for e in entrants]
    assert counts == [8, 8, counts[2], 8, counts[4]]
    assert all(LEAST_WINDOWS <= n < 8 for n in (counts[2], counts[4]))
    assert asked[-1] == (7, [0, 1, 3])


def test_no_entrant_is_dropped_after_two_windows():
    entrants = race([1, 1], made_up([1, 9], noise=0)[0], LEAST_WINDOWS - 1)
    assert [e.state for e in entrants] == ["front", "close"]


def test_fewer_bytes_are_never_beaten_by_more():
    entrants = race([1, 2], made_up([9, 1])[0], 8)
    assert [e.state for e in entrants] == ["front", "front"]


def test_an_entrant_beaten_by_less_than_its_noise_is_close_and_not_dominated():
    entrants = race([1, 1], made_up([5, 5.01], noise=0.5, seed=1)[0], 8)
    assert sorted(e.state for e in entrants) == ["close", "front"]
    assert all(len(e.kls) == 8 for e in entrants)


def test_equals_are_both_on_the_front():
    assert on_front([1, 1, 2], [3.0, 3.0, 3.0]) == [True, True, False]


def test_an_equal_entrant_is_dropped_as_rarely_as_the_confidence_states():
    dropped = 0
    for seed in range(600):
        entrants = race([1, 2], made_up([5, 5], noise=0.5, seed=seed)[0], 8)
        dropped += entrants[1].state == "dominated"
    # one side of 5 %, over all rounds together; three standard deviations of 600 trials are 0.02
    assert 0 < dropped / 600 < 0.025 + 0.02


def test_under_a_floor_cheaper_ones_run_first_and_the_others_not_once_it_is_met():
    count = 3 * GROUP
    means = [10.0 - 0.5 * i for i in range(count)]
    shuffled = list(np.random.default_rng(0).permutation(count))
    nbytes, kls = [float(i) for i in shuffled], [means[i] for i in shuffled]
    measure, asked = made_up(kls, noise=0)
    entrants = race(nbytes, measure, 6, most_kl=5.0)
    states = [entrants[shuffled.index(i)].state for i in range(count)]  # by bytes
    assert set(states[:GROUP]) == {"above floor"}
    # windows weigh 0.5 to 1.5, so the measured mean decides which of the second group meets it
    means_seen = [entrants[shuffled.index(i)].mean_kl for i in range(GROUP, 2 * GROUP)]
    met = [s == "front" for s in states[GROUP : 2 * GROUP]]
    assert any(met)
    assert all(kl <= 5.0 for kl, front in zip(means_seen, met, strict=True) if front)
    assert states[2 * GROUP :] == ["not needed"] * GROUP
    assert {i for _, numbers in asked for i in numbers} == {shuffled.index(i) for i in range(2 * GROUP)}


def test_an_entrant_that_is_not_finite_is_out_at_once():
    entrants = race([1, 2], lambda numbers, window: [[float("nan"), 1.0][i] for i in numbers], 4)
    assert [(e.state, len(e.kls)) for e in entrants] == [("not finite", 1), ("front", 4)]


# candidates ---------------------------------------------------------------------------------------------------------


def test_candidates_are_all_combinations_at_widths_that_a_method_has():
    found = candidates(["turboquant", "rvq"], key_bits=[2, 3], value_bits=[4], sinks=[0, 4], protected=[(), (0, -1)])
    assert len(found) == (2 + 1) * 2 * 2  # RVQ has no odd widths
    assert Candidate("rvq", 2, 4, 4, 0, (0, -1)) in found
    assert found[0].name == "turboquant K2 V4, 0 sinks, window 0"
    named = {c.method for c in candidates()}
    assert named == {"turboquant", "rvq", "rabitq", "polarquant", "qjl"}


@pytest.mark.parametrize("protected", [(), (-1,)])
@pytest.mark.parametrize(("sinks", "window"), [(4, 0), (2, 33)])
@pytest.mark.parametrize("method", ["turboquant", "qjl"])
def test_bytes_per_token_are_those_in_a_cache_s_report(model, method, sinks, window, protected):
    tokens = 333
    plan = Candidate(method, 2, 4, sinks, window, protected).plan(PlannedModel.of(model))
    cache = vl.make_cache(model, plan, chunk="codes")
    ids = [i % 90 for i in range(tokens)]
    mx.eval(model(mx.array([ids]), cache=cache))
    assert bytes_per_token(model, plan, tokens) * tokens == pytest.approx(
        vl.report(cache)["held_bytes"].sum(), abs=1e-6
    )


def test_a_plan_leaves_protected_layers_exact(model):
    shape = PlannedModel.of(model)
    assert Candidate("rabitq", 2, 3, protected=(-1,)).within(shape).protected == (1,)
    plan = Candidate("rabitq", 2, 3, protected=(-1,)).plan(shape)
    assert plan.frame["key_method"].to_list() == ["rabitq", "none"]
    with pytest.raises(InputError, match="There is no layer 2 to protect: .* has layers 0 to 1"):
        Candidate("rabitq", 2, 3, protected=(2,)).plan(shape)


# the search ---------------------------------------------------------------------------------------------------------


def test_the_frame_has_the_results_of_fidelity(model, result):
    frame = result.frame
    assert frame.schema == SEARCHED
    assert frame.height == 2 * 4
    assert frame["bytes_per_token"].is_sorted()
    assert result.front.height >= 1
    assert on_front(result.front["bytes_per_token"].to_list(), result.front["kl"].to_list()) == [True] * len(
        result.front
    )
    exact = reference(model, Letters(), text=TEXT, tokens=40, windows=5)
    for row in result.front.iter_rows(named=True):
        found_again = fidelity_to(exact, result.plan(row["row"]), chunk="codes")
        assert found_again["kl_mean"][0] == pytest.approx(row["kl"], rel=1e-5)  # float32 sums of other lengths
        assert row["low"] <= row["kl"] <= row["high"]


def same(one, other):
    """Return all columns but the measured time."""
    return one.frame.drop("seconds").equals(other.frame.drop("seconds"))


def test_a_search_is_reproducible(model, result):
    assert same(result, vl.search(model, Letters(), methods=TWO, **SETTINGS))


def test_a_budget_skips_candidates_above_it(model, result):
    most = float(result.frame["bytes_per_token"].median())
    cheap = vl.search(model, Letters(), methods=TWO, most_bytes_per_token=most, **SETTINGS)
    over = cheap.frame.filter(pl.col("bytes_per_token") > most)
    assert over.height > 0
    assert over["state"].unique().to_list() == ["over budget"]
    assert over["windows"].sum() == 0
    assert over["kl"].null_count() == over.height


def test_a_floor_keeps_the_candidates_that_meet_it(model, result):
    most = float(result.front["kl"].median())
    good = vl.search(model, Letters(), methods=TWO, most_kl=most, **SETTINGS)
    assert (good.front["kl"] <= most).all()
    assert good.front["row"][0] == result.front.filter(pl.col("kl") <= most)["row"][0]


def test_an_impossible_goal_is_reported_in_a_sentence(model):
    with pytest.raises(InputError, match=r"No candidate holds at most 10.0 bytes a token at 300 tokens; the least is"):
        vl.search(model, Letters(), methods=TWO, most_bytes_per_token=10, **SETTINGS)
    with pytest.raises(InputError, match=r"No candidate has a KL of at most 1e-12 nats; the least is .*: allow more"):
        vl.search(model, Letters(), methods=TWO, most_kl=1e-12, **SETTINGS)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"methods": ["turbo"]}, "turbo"),
        ({"methods": ["rvq"], "bits": [3]}, "rvq has none of the widths"),
        ({"tokens": 2000}, "too few for 5 windows of 2000"),
        ({"protected": [(7,)]}, "There is no layer 7 to protect"),
    ],
)
def test_bad_input_is_refused(model, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        vl.search(model, Letters(), **(SETTINGS | {"methods": TWO} | settings))


def test_a_loaded_model_is_refused_for_workers(model):
    with (
        ThreadPoolExecutor(1) as executor,
        pytest.raises(InputError, match="with an executor, .* give its name or path"),
    ):
        vl.search(model, Letters(), executor=executor)
    with pytest.raises(InputError, match="tokenizer is missing"):
        vl.search(model)


def test_windows_are_evaluated_one_token_at_a_time(model):
    found = vl.search(
        model, Letters(), methods=["turboquant"], window=(0, 8), prompt=20, **(SETTINGS | {"bits": [2], "windows": 3})
    )
    assert found.settings["mode"] == "decode"
    exact = reference(model, Letters(), text=TEXT, tokens=40, windows=3)
    for row in found.frame.filter(windows=3).iter_rows(named=True):
        found_again = fidelity_to(exact, found.plan(row["row"]), chunk="codes", mode="decode", prompt=20)
        assert found_again["kl_mean"][0] == pytest.approx(row["kl"], rel=1e-5)


def test_a_calibrated_method_is_fitted_once_for_all_its_widths(model, tmp_path):
    settings = SETTINGS | {"windows": 3, "text": None, "tokens": 24}
    found = vl.search(model, Letters(), methods=["spectralquant"], folder=tmp_path, **settings)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    plan = found.plan(int(found.front["row"][0]))
    fitted = found.calibration(model, Letters(), "spectralquant", folder=tmp_path)
    assert plan.calibrations == {"spectralquant": fitted.identity}
    vl.make_cache(model, plan, calibration=fitted)
    with pytest.raises(InputError, match="turboquant was not calibrated"):
        found.calibration(model, Letters(), "turboquant", folder=tmp_path)


def test_fractions_of_bits_are_only_for_methods_that_support_them(model, tmp_path):
    """One calibration serves all, and the searched caches are those of `make_cache`."""
    settings = SETTINGS | {"bits": (2.5, 4), "windows": 2, "text": TEXT, "tokens": 24}
    given = {"methods": ["fisherquant", "turboquant"], "folder": tmp_path}
    fitted = vl.calibrate(model, Letters(), "fisherquant", TEXT, tokens=256, folder=tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "calibrate", lambda *_, **__: fitted)
        found = vl.search(model, Letters(), **given, **settings)
    widths = {m: {*own["key_bits"], *own["value_bits"]} for (m,), own in found.frame.group_by("method")}
    assert widths == {"fisherquant": {2.5, 4.0}, "turboquant": {4.0}}
    (row,) = found.frame.filter(method="fisherquant", key_bits=2.5, value_bits=2.5)["row"]
    cache = vl.make_cache(model, found.plan(row), calibration=fitted)
    assert np.mean([c.bits_per_value for one in cache for c in (one.key_codec, one.value_codec)]) == 2.5
    again = vl.allocate.SearchResult.load(found.save(tmp_path / "search.parquet"))
    assert again.plan(row) == found.plan(row)
    assert again.plan(int(again.frame.filter(method="turboquant")["row"][0])).layers[0].key_bits == 4


def test_it_is_saved_and_read_again(result, tmp_path):
    path = result.save(tmp_path / "search.parquet")
    again = vl.allocate.SearchResult.load(path)
    assert again.frame.equals(result.frame)
    assert again.settings == result.settings
    row = int(result.front["row"][-1])
    assert again.plan(row) == result.plan(row)
    assert repr(again) == f"SearchResult(candidates=8, front={result.front.height})"
    with pytest.raises(InputError, match="This search has no row 99"):
        result.plan(99)
    with pytest.raises(InputError, match="there is no such file"):
        vl.allocate.SearchResult.load(tmp_path / "gone.parquet")
    result.frame.write_parquet(path)
    with pytest.raises(InputError, match="cannot be read .*: make it again with vl.search"):
        vl.allocate.SearchResult.load(path)


def test_a_result_names_its_text(model, result):
    def said(text):
        fewer = SETTINGS | {"windows": 2, "bits": [2], "text": text}
        return vl.search(model, Letters(), methods=["turboquant"], **fewer).settings["text"]

    assert said(None) is None
    assert said(TEXT) == result.settings["text"] != said(TEXT[1:])
    assert len(said(TEXT)) == 16


def test_the_chart_draws_every_measured_candidate(result):
    rows = result.chart().to_dict()["datasets"]
    assert len(next(iter(rows.values()))) == result.frame.filter(pl.col("windows") > 0).height


def test_progress_counts_up_and_its_exception_ends_the_search(model):
    told = []
    vl.search(model, Letters(), methods=TWO, progress=lambda *said: told.append(said), **SETTINGS)
    measured = [done for done, _, label in told if ": " in label and label.startswith("window")]
    assert measured == list(range(len(measured)))
    assert told[-1][0] <= told[-1][1]

    def stop(done, total, label):
        if label.startswith("window 2: "):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vl.search(model, Letters(), methods=TWO, progress=stop, **SETTINGS)


def stop_at(count):
    """Return a progress callback that ends a search after ``count`` measurements."""

    def stop(done, total, label):
        if ": " in label and label.startswith("window") and done == count:
            raise KeyboardInterrupt

    return stop


def test_a_stopped_search_continues(model, result, own_cache, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        vl.search(model, Letters(), methods=TWO, progress=stop_at(11), **SETTINGS)
    (kept,) = own_cache.iterdir()
    measured = []
    before = trials.Bench.measure
    monkeypatch.setattr(trials.Bench, "measure", lambda *job: measured.append(job) or before(*job))
    told = []
    again = vl.search(model, Letters(), methods=TWO, progress=lambda *said: told.append(said), **SETTINGS)
    assert same(result, again)
    assert len(measured) == result.frame["windows"].sum() - 11
    assert told[-1][0] == result.frame["windows"].sum()
    assert not kept.exists()


@pytest.mark.parametrize("other", [{"text": TEXT[1:]}, {"mode": "decode", "prompt": 20}])
def test_measurements_of_something_else_are_not_used(model, own_cache, other):
    with pytest.raises(KeyboardInterrupt):
        vl.search(model, Letters(), methods=TWO, progress=stop_at(3), **SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        vl.search(model, Letters(), methods=TWO, progress=stop_at(1), **(SETTINGS | other))
    assert len(list(own_cache.iterdir())) == 2


def test_a_damaged_file_of_a_stopped_search_is_reported(model, own_cache):
    with pytest.raises(KeyboardInterrupt):
        vl.search(model, Letters(), methods=TWO, progress=stop_at(3), **SETTINGS)
    (kept,) = own_cache.iterdir()
    kept.write_bytes(kept.read_bytes().replace(b'"turboquant"', b'"rabitq"', 1))
    with pytest.raises(InputError, match="unfinished run .* cannot be read .*: delete it and start again"):
        vl.search(model, Letters(), methods=TWO, **SETTINGS)


def test_the_seconds_of_a_trial_are_without_its_calibration(model, tmp_path, monkeypatch):
    told = []

    def fitted(*given, **more):
        told.append("fitted")
        return vl.calibrate(*given, **more)

    def clock():
        told.append("clock")
        return time.perf_counter()

    monkeypatch.setattr(trials, "calibrate", fitted)
    monkeypatch.setattr(trials, "time", SimpleNamespace(perf_counter=clock))
    job = Trials("here", TEXT, 24, 1, "oneshot", 4, 16, (Candidate("spectralquant", 3, 3),), str(tmp_path))
    trials.Bench(job, model, Letters()).measure(Candidate("spectralquant", 3, 3), 0)
    assert told == ["fitted", "clock", "clock"]


# executors ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Return a model that workers can load, with a tokenizer of one token for each character."""
    letters = [*(chr(33 + i) for i in range(93)), "th", "Ġ", "<end>"]
    return write_llama(
        tmp_path_factory.mktemp("model") / "tiny.gguf",
        **{
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": letters,
            "tokenizer.ggml.merges": ["t h"],
            "tokenizer.ggml.token_type": [1] * 95 + [3],
            "tokenizer.ggml.eos_token_id": 95,
        },
    )


@pytest.fixture(scope="module")
def here(file):
    return vl.search(file, methods=TWO, **SETTINGS)


@pytest.fixture(scope="module")
def processes():
    """Return a pool of processes, which take time to start."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def test_a_pool_of_processes_gives_the_same_results_and_errors(file, here, processes, tmp_path):
    assert same(here, vl.search(file, methods=TWO, executor=processes, **SETTINGS))
    with pytest.raises(InputError, match=r"gone\.gguf"):
        vl.search(tmp_path / "gone.gguf", methods=TWO, executor=processes, **SETTINGS)


def test_threads_give_the_same_and_share_calibrations_by_their_folder(file, tmp_path):
    settings = SETTINGS | {"methods": ("rabitq", "spectralquant"), "folder": tmp_path}
    with ThreadPoolExecutor(3) as pool:
        there = vl.search(file, executor=pool, **settings)
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    here = vl.search(file, **settings)
    assert same(here, there)
    assert here.calibrations == there.calibrations
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == kept  # found, and not computed again


def test_a_worker_that_dies_ends_no_search(file, here, processes):
    """It also ends the pool: this is the last test that uses it."""
    killed = []

    def kill(done, total, label):
        if label.startswith("window 2: ") and not killed:
            killed.extend(processes._processes)
            os.kill(killed[0], signal.SIGKILL)

    with pytest.warns(UserWarning, match="A worker process died, .* one new process does the rest"):
        found = vl.search(file, methods=TWO, executor=processes, progress=kill, **SETTINGS)
    assert same(here, found)


class Dying(ThreadPoolExecutor):
    """Breaks at its first job that measures a candidate, like a pool whose process dies."""

    def __init__(self, *args, **more):
        super().__init__(1)

    def submit(self, do, *job):  # type: ignore[override]
        if job[0].window is not None and job[0].some[0].method == "rabitq":
            broken = Future()
            broken.set_exception(BrokenExecutor())
            return broken
        return super().submit(do, *job)


def test_a_job_that_kills_a_process_twice_is_named_and_the_other_results_are_kept(file, own_cache, monkeypatch):
    monkeypatch.setattr(experiments, "ProcessPoolExecutor", Dying)
    with (
        Dying() as pool,
        pytest.warns(UserWarning, match="A worker process died"),
        pytest.raises(InputError, match="died again, with only this job: window 1: rabitq K. V., 4 sinks"),
    ):
        vl.search(file, methods=TWO, executor=pool, **SETTINGS)
    (kept,) = own_cache.iterdir()
    assert kept.read_text().count('"turboquant"') == 4


@pytest.fixture
def own_environment() -> Iterator[None]:
    """Dask sets the number of BLAS threads of its workers in this process's environment, and leaves it there."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("own_environment")
def test_dask_gives_the_same_also_where_a_worker_is_lost(file, here):
    from distributed import Client, LocalCluster

    killed = []

    def kill(done, total, label):
        if label.startswith("window 2: ") and not killed:
            killed.extend(client.run(os.getpid).values())
            os.kill(killed[0], signal.SIGKILL)

    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        found = vl.search(file, methods=TWO, executor=client.get_executor(), progress=kill, **SETTINGS)
    assert same(here, found)
    assert len(killed) == 1


RESTARTED = """
import os, signal, sys
import veloxlab as vl
from tests.test_search import SETTINGS, TWO

def kill(done, total, label):
    if label.startswith("window 2: "):
        os.kill(os.getpid(), signal.SIGKILL)

vl.search(sys.argv[1], methods=TWO, progress=kill, **SETTINGS)
"""


def test_measurements_before_a_restart_of_the_machine_are_not_repeated(file, here, own_cache):
    ended = subprocess.run([sys.executable, "-c", RESTARTED, str(file)], check=False, cwd=Path(__file__).parents[1])
    assert ended.returncode == -signal.SIGKILL
    told = []
    found = vl.search(file, methods=TWO, progress=lambda done, total, label: told.append(label), **SETTINGS)
    assert same(here, found)
    assert not [label for label in told if label.startswith("window 1: ")]


def test_waiting_jobs_are_cancelled_when_progress_raises(file):
    def stop(done, total, label):
        if label.startswith("window 1: ") and done:
            raise KeyboardInterrupt

    stopped = threading.Event()

    class Counted(ThreadPoolExecutor):
        futures = ()

        def submit(self, do, *job):  # type: ignore[override]
            waits = job[0].window is not None and self.futures
            future = super().submit(lambda: (waits and stopped.wait(60), do(*job))[1])
            self.futures = (*self.futures, future) if job[0].window is not None else self.futures  # type: ignore[assignment]
            return future

    with Counted(1) as pool:
        with pytest.raises(KeyboardInterrupt):
            vl.search(file, methods=TWO, executor=pool, progress=stop, **SETTINGS)
        assert sum(future.cancelled() for future in pool.futures) == 6  # of eight, one is done and one runs
        stopped.set()


def test_jobs_are_equal_after_a_transfer_to_another_process(file):
    job = Trials(str(file), None, 8, 2, "oneshot", 4, 16, (Candidate("spectralquant", 2, 3),))
    there = pickle.loads(pickle.dumps(job))
    assert (there, hash(there)) == (job, hash(job))  # the key of a worker's loaded models


# the command --------------------------------------------------------------------------------------------------------


def test_the_command_prints_the_front_and_writes_all(file, tmp_path, capsys):
    words = ["search", "--model", str(file), "--methods", "turboquant", "--bits", "2", "4", "--sinks", "0"]
    words += ["--tokens", "24", "--windows", "3", "--protected", "none", "0,-1", "--out", str(tmp_path)]
    assert cli.main(words) == 0
    written = vl.allocate.SearchResult.load(tmp_path / "search_tiny.parquet")
    assert written.frame.height == 4 * 2
    assert capsys.readouterr().out == front_table(written.front) + "\n"
    with pytest.raises(SystemExit, match="2"):
        cli.main([*words, "--protected", "first"])
    assert "--protected: first is not a list of layers" in capsys.readouterr().err
