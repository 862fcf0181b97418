"""The benchmark's rows, at sizes that take no time."""

import json

import pytest

from tests.tiny_models import tiny
from veloxlab import cli
from veloxlab.measure import bench

SMALL = bench.Shape(4, 2, 128)


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


def test_the_command_writes_what_it_measured(quick, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "SHAPES", (SMALL,))
    monkeypatch.setattr(bench, "copy_bandwidth", lambda: 1.0)
    assert cli.main(["bench", "--json", str(tmp_path / "bench.json"), "--tokens", "64"]) == 0
    results = json.loads((tmp_path / "bench.json").read_text())
    assert results["facts"]["backend"] in ("cpu", "cuda", "metal")
    assert {row["tokens"] for row in results["attention"]} == {64}
    assert "turboquant 4 bit" in capsys.readouterr().out
