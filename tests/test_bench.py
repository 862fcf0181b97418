"""The benchmark's rows, at sizes that take no time."""

import json

import pytest
from mlx_lm.models.cache import KVCache

from tests.tiny_models import tiny
from veloxlab import cli
from veloxlab.measure import bench, lengths

SMALL = bench.Shape(4, 2, 128)
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
    monkeypatch.setattr(bench, "REPEATS", 1)
    monkeypatch.setattr(bench, "IN_A_ROW", 2)
    monkeypatch.setattr(
        bench,
        "_model",
        lambda layers: tiny(
            "llama", num_key_value_heads=8, num_attention_heads=32, head_dim=128, num_hidden_layers=layers
        ),
    )


def test_attention_is_timed_against_exact_and_mlx_lms_own(quick):
    rows = bench.decode_attention([SMALL], [512], [4], progress=lambda _: None)
    assert [row["cache"] for row in rows] == ["exact 16 bit", "mlx-lm 4 bit", "mlx-lm 8 bit", "turboquant 4 bit"]
    exact, _, _, ours = rows
    assert exact["ratio"] == 1
    assert ours["ratio"] == pytest.approx(ours["microseconds"] / exact["microseconds"])
    # 16 bits against 4 and a 16-bit scale for 128 coordinates
    assert exact["bytes"] / ours["bytes"] == pytest.approx(16 / (4 + 16 / 128))


def test_decoding_is_timed_with_caches_that_are_full(quick):
    rows = bench.decode_steps(1, [96], [4], progress=lambda _: None)
    exact, _, ours = rows
    assert exact["ratio"] == 1
    assert ours["held_bytes"] < exact["held_bytes"]


def test_encoding_is_timed_against_the_attention_of_the_same_layers(quick):
    rows = bench.encode_steps(SMALL, 96, 5, progress=lambda _: None)
    assert [row["cache"].split()[0] for row in rows[::2]] == list(bench.ENCODED)
    assert [row["tokens"] for row in rows] == [1, 5] * len(bench.ENCODED)
    assert len({row["attention_microseconds"] for row in rows}) == 1
    for row in rows:
        assert row["layers"] == 2
        assert row["ratio"] == pytest.approx(row["microseconds"] / row["attention_microseconds"])


def test_the_command_writes_what_it_measured(quick, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "SHAPES", (SMALL,))
    monkeypatch.setattr(bench, "LONGEST_DECODE", 96)
    monkeypatch.setattr(bench, "CHUNK", 5)
    monkeypatch.setattr(bench, "copy_bandwidth", lambda: 1.0)
    assert cli.main(["bench", "--json", str(tmp_path / "bench.json"), "--tokens", "64"]) == 0
    results = json.loads((tmp_path / "bench.json").read_text())
    assert results["facts"]["backend"] in ("cpu", "cuda", "metal")
    assert {row["tokens"] for row in results["attention"]} == {64}
    assert {row["tokens"] for row in results["encode"]} == {1, 5}
    assert "turboquant 4 bit" in capsys.readouterr().out


def test_memory_is_measured_by_length_and_a_failing_step_is_no_number(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(lengths.SHAPES, "smollm2-135m", SMALL_MODEL)
    monkeypatch.setitem(lengths.SHAPES, "one layer of 7B", SMALL_MODEL | {"num_hidden_layers": 1})
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
    frame = lengths.costs_by_length(model, {"it": lambda: [Failing(), Failing()]}, [8, 16])
    assert frame["tokens"].to_list() == [8, 16]
    assert frame["decode_seconds"].to_list() == frame["decode_peak_bytes"].to_list() == [None, None]
    assert "| it | 8 |" in cli.lengths_table(frame)
    assert "| fails | fails |" in cli.lengths_table(frame)
