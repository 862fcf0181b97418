"""The benchmark's rows, at small sizes."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from tests.tiny_models import tiny
from veloxlab import cli
from veloxlab.cache.attention import History
from veloxlab.cache.counts import BLOCK
from veloxlab.cli import times
from veloxlab.cli.tables import lengths_table
from veloxlab.codecs import METHODS
from veloxlab.kernels import devices
from veloxlab.measure import compare as measured_speed
from veloxlab.measure.activations import LayerCapture
from veloxlab.measure.bench import builds, cpu, cpu_decode, host, models, shapes, timing, turns
from veloxlab.texts import shipped_folder

SMALL = shapes.Shape(4, 2, 128)
SMALL_MODEL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(timing, "REPEATS", 1)
    monkeypatch.setattr(timing, "IN_A_ROW", 2)
    monkeypatch.setattr(timing, "IN_A_ROW", 2)
    monkeypatch.setattr(timing, "bandwidth", lambda: 100.0)
    monkeypatch.setattr(turns, "_TURN", 2)
    monkeypatch.setattr(turns, "_FIRST", 1)
    monkeypatch.setattr(
        models,
        "random_model",
        lambda _shape, **changes: tiny(
            "llama", **changes, num_key_value_heads=8, num_attention_heads=32, head_dim=128, hidden_size=64
        ),
    )


def test_attention_is_timed_against_exact_and_mlx_lms_own(quick):
    rows = timing.decode_attention([SMALL], [512], [4], progress=lambda _: None)
    assert [row["cache"] for row in rows] == [
        "exact 16 bit",
        "mlx-lm 4 bit",
        "mlx-lm 8 bit",
        "turboquant 4 bit",
        "fisherquant 2.25 bit",
    ]
    exact, _, _, ours, _ = rows
    assert exact["ratio"] == 1
    assert ours["ratio"] == pytest.approx(ours["microseconds"] / exact["microseconds"])
    # 16 bits against 4 and a 16-bit scale for 128 coordinates
    assert exact["bytes"] / ours["bytes"] == pytest.approx(16 / (4 + 16 / 128))
    fastest = max(100.0, *(row["gigabytes_per_second"] for row in rows))  # GB/s are kB a µs, by a thousand
    assert ours["roofline_microseconds"] == pytest.approx(ours["bytes"] / fastest / 1e3)
    assert min(row["microseconds"] / row["roofline_microseconds"] for row in rows) >= 1 - 1e-9


def test_a_disturbed_row_gives_no_negative_time(quick, monkeypatch):
    seconds = iter(2 * [4e-3] * (timing.FIRST_TRIES + 1) + [8e-3] * (timing.FIRST_TRIES + 1))
    monkeypatch.setattr(timing, "_timed", lambda _: (1e-3, next(seconds)))
    times = timing.microseconds([lambda: None])
    assert times.evaluating == pytest.approx(4e3 / (timing.LONGER * timing.IN_A_ROW))  # the mean of the longer row
    assert times.making == pytest.approx(1e3 / (timing.LONGER * timing.IN_A_ROW))
    assert times.alone == pytest.approx(9e3)


def test_the_time_of_building_a_graph_is_not_in_the_time_of_its_evaluation(quick, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def slow():
        clock[0] += 0.02
        return mx.array(1.0) + 1

    times = timing.microseconds([slow])
    assert times.making == pytest.approx(20_000)
    assert times.evaluating == 0
    assert times.alone == pytest.approx(20_000)


def test_attention_of_methods_reads_codes_of_their_own(quick):
    rows = timing.attention_of_methods(["spectralquant", "qjl"], SMALL, 700, progress=lambda _: None)
    assert [row["cache"] for row in rows] == ["exact 16 bit", "spectralquant 4 bit", "qjl 4 bit"]
    assert rows[1]["ratio"] == pytest.approx(rows[1]["microseconds"] / rows[0]["microseconds"])
    values = 2 * SMALL.kv_heads * 700 * SMALL.head_dim
    assert rows[1]["bytes"] == values * (4 + 16 / 128) / 8


@pytest.mark.parametrize("method", [name for name in METHODS if name != "none"])
def test_every_method_can_be_fitted_to_random_vectors(method):
    for tensor in ("keys", "values"):
        codec = timing.fitted(method, shapes.Shape(2, 1, 64), tensor, bits=2)
        assert codec.encode(mx.ones((1, 1, 3, 64))).tokens == 3


def test_decoding_is_timed_with_caches_that_are_full(quick):
    told: list[str] = []
    rows = models.decode_steps([96], {"one layer of 7B": 1, "smollm2-135m": models.LAYERS + 1}, 1, told.append)
    assert [(row["shape"], row["tokens"]) for row in rows] == [("one layer of 7B", 96)] * 4 + [
        ("smollm2-135m", 1024)
    ] * 2
    exact, _, ours, _, small, _ = rows
    assert exact["ratio"] == small["ratio"] == 1
    assert ours["ratio"] > 0
    assert ours["held_bytes"] < exact["held_bytes"]
    assert all(0 < row["milliseconds"] <= row["slowest_milliseconds"] for row in rows)
    assert len(told) == len(rows)


def test_a_token_that_is_slow_in_one_run_alone_is_not_the_slowest():
    runs = [[[1, 2, 9, 2, 1]], [[1, 9, 2, 5, 1]], [[9, 1, 1, 4, 1]]]  # the fourth is slow in two of three
    assert turns._of_runs(runs, runs, 7)[:4] == (2, 4, 1, 7)


def test_a_ratio_is_of_neighbouring_turns_while_the_processor_changes_its_speed():
    first = [[[10.0] * 4, [20.0] * 4, [20.0] * 4], [[20.0] * 4, [10.0] * 4, [10.0] * 4]]
    other = [[[12.0] * 4, [24.0] * 4, [12.0] * 4], [[24.0] * 4, [12.0] * 4, [12.0] * 4]]
    assert turns._of_runs(other, first, 7).ratio == pytest.approx(1.2)


def test_a_cache_that_fails_is_tried_once_and_the_others_take_turns():
    class Model:
        def __call__(self, token, cache):
            log.append(cache[0].name)
            if cache[0].name == "fails":
                raise RuntimeError("no such product")
            return mx.zeros((*token.shape, 3))

    log: list[str] = []
    told: list[str] = []
    made = {name: lambda name=name: [SimpleNamespace(name=name, nbytes=5)] for name in ("first", "fails", "other")}
    found = turns.in_turn(Model(), made, 2, told.append)
    assert [*found] == ["first", "other"]
    assert found["first"].ratio == 1
    assert told == ["fails fails: no such product"]
    changes = [name for i, name in enumerate(log) if not i or log[i - 1] != name]
    assert changes == ["first", "fails", "other", *["first", "other"] * 3, *["first", "other"] * 4]


def test_a_step_of_a_batch_is_timed(quick):
    exact, ours = models.batch_steps([(3, 96)], 1, 1, lambda _: None)
    assert (exact["sequences"], exact["ratio"]) == (3, 1)
    assert ours["ratio"] > 0
    assert ours["held_bytes"] < exact["held_bytes"]


def test_reading_a_prompt_is_timed(quick):
    exact, ours = models.read_prompts(1, 100, [4], 1, lambda _: None)
    assert exact["ratio"] == exact["peak_ratio"] == 1
    assert ours["ratio"] == pytest.approx(ours["seconds"] / exact["seconds"])


def test_encoding_is_timed_beside_attention(quick):
    rows = timing.encode_steps(SMALL, 96, 5, progress=lambda _: None)
    assert [row["cache"].split()[0] for row in rows[::2]] == list(timing.ENCODED)
    assert [row["tokens"] for row in rows] == [BLOCK, 5] * len(timing.ENCODED)
    assert {row["layers"] for row in rows} == {2}
    for row in rows:
        assert row["ratio"] == pytest.approx(row["microseconds"] / row["attention_microseconds"] / BLOCK)


def test_a_session_of_a_method_is_timed_twice_in_a_process_of_its_own():
    told: list[str] = []
    (row,) = builds.builds(["rabitq"], told.append)
    assert row["cache"] == "rabitq"
    assert row["kernels"] == 0  # a CPU builds loops instead
    assert told == [f"rabitq: 0 kernels are built in {row['seconds']:.1f} s"]


def test_a_timed_session_finds_compiled_kernels_of_mlx_alone(tmp_path, monkeypatch):
    (tmp_path / "a long name").mkdir()
    for name in ("own.ptx", "a long name/own.ptx", "custom_kernel_veloxlab_attend_1.ptx"):
        (tmp_path / name).touch()
    found = []

    def run(command, env, **_):
        own = Path(env["MLX_PTX_CACHE_DIR"])
        found.extend(sorted(str(path.relative_to(own)) for path in own.rglob("*.ptx")))
        return subprocess.CompletedProcess(command, 0, "3 1.5")

    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", run)
    assert builds.builds(["rabitq"], found.append) == [{"cache": "rabitq", "kernels": 3, "seconds": 1.5}]
    assert found == ["a long name/own.ptx", "own.ptx", "rabitq: 3 kernels are built in 1.5 s"]


def test_the_command_writes_its_measurements_and_can_measure_a_part_again(monkeypatch, tmp_path):
    names = (
        "decode_attention",
        "attention_of_methods",
        "encode_steps",
        "decode_steps",
        "read_prompts",
        "batch_steps",
        "builds",
        "host",
    )
    for name in names:
        module = next(each for each in (timing, models, builds, host) if hasattr(each, name))
        monkeypatch.setattr(module, name, lambda *given, name=name, **named: [{"of": name, **named}])
    monkeypatch.setattr(times, "bench_picture", lambda results: str(len(results)).encode())
    monkeypatch.setattr(times.tables, "bench_tables", lambda results: f"{len(results)} parts")  # type: ignore[attr-defined]
    monkeypatch.setattr(times.runtime, "backend", lambda: "cuda")  # type: ignore[attr-defined]
    path = tmp_path / "bench.json"
    assert cli.main(["bench", "--json", str(path), "--tokens", "64"]) == 0
    assert path.with_suffix(".md").read_text() == "8 parts\n"
    results = json.loads(path.read_text())
    assert [part["rows"][0]["of"] for part in results.values()] == [*names]
    assert path.with_suffix(".png").read_bytes() == b"8"
    assert all(part["facts"]["backend"] in ("cpu", "cuda", "metal") for part in results.values())
    assert all(part["facts"]["seconds"] >= 0 for part in results.values())
    assert results["attention"]["rows"] == [{"of": "decode_attention", "tokens": [64]}]
    assert results["decode"]["rows"] == [{"of": "decode_steps", "tokens": [64]}]

    assert cli.main(["bench", "--json", str(path), "--tokens", "32", "--only", "decode"]) == 0
    again = json.loads(path.read_text())
    assert again["decode"]["rows"] == [{"of": "decode_steps", "tokens": [32]}]
    assert {name: part for name, part in again.items() if name != "decode"} == {
        name: part for name, part in results.items() if name != "decode"
    }


@pytest.fixture
def small_cpu(monkeypatch):
    """Small parts of a CPU run: two methods, a layer of two heads, and few tokens."""
    for name, value in {
        "SHAPE": shapes.Shape(2, 1, 64),
        "SAMPLE": 192,
        "LAYERS": 2,
        "ROUNDS": 2,
        "OPS_ROUNDS": 1,
        "bandwidth": lambda: 10.0,
        "METHODS": {name: METHODS[name] for name in ("turboquant", "spectralquant", "none")},
        "_codecs": {},
    }.items():
        monkeypatch.setattr(cpu, name, value)
    for name, value in {"VOCABULARY": 96, "ROUNDS": 2, "STEPS": 2, "bandwidth": lambda: 10.0}.items():
        monkeypatch.setattr(cpu_decode, name, value)
    monkeypatch.setitem(shapes.MODELS, "smollm2-135m", SMALL_MODEL)


def test_a_cpu_is_measured_by_one_command_and_no_parts_only_write_the_file_again(small_cpu, tmp_path, capsys):
    path = tmp_path / "bench_cpu.json"
    words = ["bench", "--json", str(path), "--tokens", "96", "320"]
    assert cli.main([*words, "--caches", "turboquant:4", "qjl:2", "--busy"]) == 0
    results = json.loads(path.read_text())
    assert [*results] == ["decode", "attention", "encode", "fit", "host"]
    decode, attention, encode, fit, on_host = (part["rows"] for part in results.values())
    names = ["exact 32 bit", "mlx-lm 4 bit", "turboquant 4 bit", "qjl 2 bit"]
    assert [(row["tokens"], row["cache"]) for row in decode] == [(n, name) for n in (96, 320) for name in names]
    for exact, theirs, ours, _ in (decode[:4], decode[4:]):
        assert ours["ratio"] == pytest.approx(ours["milliseconds"] / exact["milliseconds"])
        assert ours["of_mlx_lm"] == pytest.approx(ours["milliseconds"] / theirs["milliseconds"])
        assert ours["busy_ratio"] == pytest.approx(ours["busy_milliseconds"] / ours["milliseconds"])
        weights = [row["roofline_milliseconds"] * 10 * 1e6 - row["held_bytes"] for row in (exact, ours)]
        assert weights[0] == pytest.approx(weights[1])
    assert decode[4]["held_bytes"] > decode[0]["held_bytes"]

    few, most = attention[:4], attention[4:]
    assert [row["cache"] for row in few] == [*names[:3], "spectralquant 4 bit"]
    assert [row["bytes"] for row in most] == [row["bytes"] * 320 // 96 for row in few]
    assert most[0]["ratio"] == most[0]["slope_ratio"] == 1
    slopes = [most[i]["microseconds"] - few[i]["microseconds"] for i in (0, 2)]
    assert most[2]["slope_ratio"] == pytest.approx(slopes[1] / slopes[0])
    assert most[2]["of_ops"] == pytest.approx(most[2]["microseconds"] / most[2]["ops_microseconds"])
    assert ["of_ops" in row for row in few] == [False, False, True, True]
    assert [row["cache"] for row in encode] == ["turboquant 4 bit", "spectralquant 4 bit"]
    assert [row["cache"] for row in fit] == ["spectralquant 4 bit"]
    assert [row["cache"] for row in on_host] == 3 * ["exact 32 bit", "turboquant 4 bit", "spectralquant 4 bit"]
    assert [row["sequences"] for row in on_host] == [1, 1, 1, 8, 8, 8, 32, 32, 32]
    for rows in (on_host[:3], on_host[3:6], on_host[6:]):
        assert [row["beyond_exact"] for row in rows] == [row["microseconds"] - rows[0]["microseconds"] for row in rows]
    assert all(0 < row["microseconds"] <= row["most_microseconds"] for row in on_host)
    assert devices.BACKENDS["cpu"] is devices.CPU

    written = path.with_suffix(".md").read_text()
    assert f"| qjl 2 bit | 320 | {decode[-1]['milliseconds']:.1f} |" in written
    path.with_suffix(".md").unlink()
    assert cli.main([*words, "--only"]) == 0
    assert path.with_suffix(".md").read_text() == written
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(path.read_text()) == results

    capsys.readouterr()
    assert cli.main([*words, "--only", "read"]) == 2
    assert "no part 'read'" in capsys.readouterr().err
    assert cli.main([*words, "--caches", "turboquant"]) == 2
    assert "'turboquant' is no compressed cache: give METHOD:BITS" in capsys.readouterr().err


def test_a_killed_measurement_leaves_no_core_busy():
    code = """
import time
from veloxlab.measure.bench import cpu_decode
with cpu_decode._other_process() as other, cpu_decode._running(other):
    print(other.pid, flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as measuring:
        assert measuring.stdout
        other = int(measuring.stdout.readline())
        os.kill(other, 0)
        measuring.kill()
    state = Path(f"/proc/{other}/stat") if sys.platform == "linux" else None
    for _ in range(600):
        try:
            os.kill(other, 0)
        except ProcessLookupError:
            return
        if state and state.read_text().rsplit(")", 1)[1].split()[0] == "Z":  # a zombie: ended
            return
        time.sleep(0.1)
    pytest.fail(f"process {other} still runs")


def test_long_contexts_are_not_timed_beside_another_process(small_cpu, monkeypatch):
    monkeypatch.setattr(cpu_decode, "BUSY_TOKENS", 96)
    rows = cpu_decode.decode((96, 97), ("turboquant:4",), busy=True, progress=lambda _: None)
    assert [(row["tokens"], "busy_ratio" in row) for row in rows] == 3 * [(96, True)] + 3 * [(97, False)]


def test_mlx_operations_are_timed_without_kernels_and_only_they(small_cpu, monkeypatch):
    monkeypatch.delenv("VELOXLAB_KERNELS", raising=False)
    seen = []
    work = lambda: seen.append(os.environ.get("VELOXLAB_KERNELS"))  # noqa: E731
    assert [row["cache"] for row in cpu._in_turn({"it": [work]}, {"it": work})] == ["it"]
    assert seen == [None, None, "0", None]


def test_attention_by_mlx_operations_uses_a_new_history(small_cpu, monkeypatch):
    """A kernel that has read a history reads it again, so the benchmark needs another history."""
    asked, kernel = [], History._attend_in_kernel

    def counted(own, *given):
        found = kernel(own, *given)
        asked.append((os.environ.get("VELOXLAB_KERNELS"), found is not None))
        return found

    monkeypatch.delenv("VELOXLAB_KERNELS", raising=False)
    monkeypatch.setattr(History, "_attend_in_kernel", counted)
    cpu.attention_of_methods((96,), lambda _: None)
    assert set(asked) == {(None, True), ("0", False)}


def test_the_other_process_keeps_a_core_busy_only_while_it_runs():
    with cpu_decode._other_process() as other:
        with cpu_decode._running(other):
            for _ in range(200):
                if _state(other.pid) == "R":
                    break
                time.sleep(0.01)
            assert _state(other.pid) == "R"
        for _ in range(200):
            if _state(other.pid) == "T":
                break
            time.sleep(0.01)
        assert _state(other.pid) == "T"
    assert other.returncode is not None


def _state(pid: int) -> str:
    """Return the state of a process as Linux's letter."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_module_is_the_command():
    asked = [sys.executable, "-m", "veloxlab.cli", "bench", "--help"]
    assert "--busy" in subprocess.run(asked, capture_output=True, text=True, check=True).stdout


def test_the_committed_times_can_be_drawn():
    results = json.loads((shipped_folder("data") / "results" / "bench_h200.json").read_text())
    assert times.bench_picture(results).startswith(b"\x89PNG")


def test_memory_is_measured_by_length_and_a_failing_step_is_no_number(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(shapes.MODELS, "smollm2-135m", SMALL_MODEL)
    monkeypatch.setitem(shapes.MODELS, "one layer of 7B", SMALL_MODEL | {"num_hidden_layers": 1})
    path = tmp_path / "memory.json"
    words = ["memory", "--random", "--tokens", "200", "70", "--layer-tokens", "64", "--quantized", "4"]
    assert cli.main([*words, "--quantized-upto", "100", "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    rows = [(row["cache"], row["tokens"]) for row in results["smollm2-135m"]]
    exact, ours = (tuple((name, n) for n in (70, 200)) for name in ("exact 16 bit", "turboquant 4 bit"))
    assert rows == [*exact, ("mlx-lm 4 bit", 70), *ours]
    held = {(row["cache"], row["tokens"]): row["held_bytes"] for row in results["smollm2-135m"]}
    assert held["turboquant 4 bit", 200] < held["exact 16 bit", 200]
    assert all(row["prefill_peak_bytes"] >= row["held_bytes"] for row in results["smollm2-135m"])
    assert [row["tokens"] for row in results["one layer of 7B"]] == [64] * 3
    assert "| turboquant 4 bit | 200 |" in capsys.readouterr().out


class Failing(KVCache):
    def update_and_fetch(self, keys, values):
        if keys.shape[2] == 1:
            raise RuntimeError("no product for one query")
        return super().update_and_fetch(keys, values)


def test_a_cache_that_cannot_decode_has_no_time():
    model = tiny("llama")
    frame = models.costs_by_length(model, {"it": lambda: [Failing(), Failing()]}, [8, 16])
    assert frame["tokens"].to_list() == [8, 16]
    assert frame["decode_seconds"].to_list() == frame["decode_peak_bytes"].to_list() == [None, None]
    assert "| it | 8 |" in lengths_table(frame)
    assert "| fails | fails |" in lengths_table(frame)


@pytest.mark.parametrize("way", [timing.exact, timing.mlx_lm, timing.over_codes])
def test_a_call_leaves_the_query_unchanged_for_the_next(way):
    bits = () if way is timing.exact else (4,)
    call = timing.calls(SMALL, partial(way, SMALL, 64, *bits))[0][0]
    first, second = call(), call()
    assert mx.array_equal(first, second)
    assert mx.abs(first).max() > 0


@pytest.mark.parametrize("make", [KVCache, lambda: QuantizedKVCache(64, 4)])
def test_every_timed_query_is_the_same(make, monkeypatch):
    seen = []

    def spied(queries, *arguments, **options):
        seen.append(np.array(queries))
        return original(queries, *arguments, **options)

    original = measured_speed.scaled_dot_product_attention  # type: ignore[attr-defined]
    monkeypatch.setattr(measured_speed, "scaled_dot_product_attention", spied)
    x = mx.random.normal((1, 2, 16, 64))
    measured_speed.cache_seconds(LayerCapture(0, None, x, x, None), make)
    assert len(seen) > 1
    assert all(np.array_equal(query, seen[0]) for query in seen)


def test_caches_are_timed_in_turn_and_the_time_to_make_one_does_not_count(monkeypatch):
    made, timed = [], []

    def seconds(work):
        before = len(made)
        mx.eval(work())
        assert len(made) == before
        timed.append(work.__qualname__.split(".")[-1])
        return float(len(timed))

    monkeypatch.setattr(measured_speed, "seconds", seconds)
    x = mx.random.normal((1, 2, 16, 64))
    makes = [lambda: made.append(1) or KVCache()] * 2
    first, second = measured_speed.cache_seconds(LayerCapture(0, None, x, x, None), *makes)
    assert made
    assert timed[:4] == ["store", "attend"] * 2
    assert (first.attend - first.store, second.store - first.store) == (1, 2)  # medians over the same rounds


@pytest.mark.parametrize("family", ["falcon_h1", "qwen3_next", "mistral", "gemma3n"])
def test_lengths_of_layers_of_every_kind_are_measured(family):
    """States and sliding windows cannot be trimmed: tokens that decoding reads there stay."""
    model, told = tiny(family), {}
    caches = models.makers(model, theirs=(4,))
    frame = models.costs_by_length(model, caches, [8, 40], on_rows=lambda rows, left_out: told.update(left_out))
    slides = family in ("mistral", "gemma3n")
    assert [*told] == ["mlx-lm 4 bit"] * slides
    assert frame["cache"].to_list() == [name for name in caches if name not in told for _ in range(2)]
    assert frame["decode_seconds"].null_count() == 0


def test_lengths_that_need_an_impossible_trim_are_left_out():
    model, told = tiny("falcon_h1"), {}
    caches = {"own": models.makers(model)["exact 32 bit"]}
    frame = models.costs_by_length(model, caches, [8, 10], on_rows=lambda rows, left_out: told.update(left_out))
    assert frame["tokens"].to_list() == [8]
    assert "from 10 tokens on: it cannot be trimmed, and has read 17 tokens" in told["own"]


def test_lengths_are_written_one_by_one(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(shapes.MODELS, "smollm2-135m", SMALL_MODEL | {"head_dim": 80})
    words = ["memory", "--random", "--tokens", "16", "--json", str(tmp_path / "memory.json")]
    assert cli.main(words) == 0
    results = json.loads((tmp_path / "memory.json").read_text())
    reason = "mlx-lm has no 4-bit cache for this model: keys of layer 0 have head dimension 80, no multiple of"
    assert reason in results["left_out"]["smollm2-135m"]["mlx-lm 4 bit"]
    assert reason in capsys.readouterr().out
    measured = (tmp_path / "memory.json").read_text()

    def stopped(done, total, label):
        if done == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(times, "say", stopped)
    with pytest.raises(KeyboardInterrupt):
        cli.main(words)
    (unfinished,) = tmp_path.glob("*.unfinished.json")
    assert [row["cache"] for row in json.loads(unfinished.read_text())["smollm2-135m"]] == ["exact 16 bit"]
    assert (tmp_path / "memory.json").read_text() == measured
    assert cli.main(["memory", "--random", "--model", "unknown"]) == 2
    assert "No shape of 'unknown' is known" in capsys.readouterr().err
