"""Figures in the README are those of the committed results, and files named in it and in CONTRIBUTING exist."""

import json
import math
import re
from pathlib import Path

import polars as pl
import pytest

from veloxlab.allocate.budget import BytesPerToken
from veloxlab.allocate.rates import RateBudget
from veloxlab.allocate.search import SearchResult
from veloxlab.allocate.sensitivity import settled
from veloxlab.allocate.sweep import swept, usual_bounds
from veloxlab.cli.tables import bench_tables, compared_table, front_table, lengths_table, ratio_table, swept_table
from veloxlab.codecs import METHODS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


RESULTS = ROOT / "data" / "results"


def test_the_tables_of_results_are_the_committed_measurements():
    compared = (RESULTS / "compare_smollm2-135m.md").read_text()
    assert compared_table(pl.read_parquet(RESULTS / "compare_smollm2-135m.parquet")) in compared
    assert ratio_table(pl.read_parquet(RESULTS / "byte_ratios.parquet")) in compared
    swept_rows = swept(pl.read_parquet(RESULTS / "ratequant_smollm2-135m.parquet"))
    assert (RESULTS / "ratequant_smollm2-135m.md").read_text() == swept_table(swept_rows) + "\n"
    front = SearchResult.load(RESULTS / "search_smollm2-135m.parquet").front
    assert (RESULTS / "search_smollm2-135m.md").read_text() == front_table(front) + "\n"


def test_the_times_on_a_gpu_are_the_committed_measurements():
    results = json.loads((RESULTS / "bench_h200.json").read_text())
    assert {part["facts"]["device"] for part in results.values()} == {"NVIDIA H200"}
    for name in ("h200", "cpu"):
        results = json.loads((RESULTS / f"bench_{name}.json").read_text())
        assert (RESULTS / f"bench_{name}.md").read_text() == bench_tables(results) + "\n"


def test_the_peaks_of_memory_are_the_committed_measurements():
    results = json.loads((RESULTS / "memory_h200.json").read_text())
    assert results["facts"]["device"] == "NVIDIA H200"
    assert lengths_table(pl.DataFrame(results["smollm2-135m"])) in (RESULTS / "memory_h200.md").read_text()
    for name in ("memory_h200.json", "memory_cpu.json"):
        rows = pl.DataFrame(json.loads((RESULTS / name).read_text())["smollm2-135m"])
        exact, ours = (rows.filter(pl.col("cache").str.starts_with(n)).sort("tokens") for n in ("exact", "turboquant"))
        assert (ours["prefill_peak_bytes"] < exact["prefill_peak_bytes"]).all()
        assert (ours["decode_peak_bytes"] < exact["decode_peak_bytes"]).all()


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_every_method_is_listed_and_has_its_notebook():
    names = [name for name in METHODS if name != "none"]
    assert [name for name in names if f"| `{name}` |" in README] == names
    for number, name in enumerate((name for name in names if "20" in METHODS[name].paper), start=1):  # with a year
        assert (ROOT / "notebooks" / f"{number:02}_{name}.ipynb").is_file()


def test_allocated_bits_lose_less_than_uniform_ones_in_the_committed_sweep():
    """At 2.5 bits and more, beyond chance; by the length of keys always less than by gradients."""
    frame = swept(pl.read_parquet(ROOT / "data" / "results" / "ratequant_smollm2-135m.parquet"))
    assert frame.group_by("bits").agg(pl.col("held_bytes").n_unique())["held_bytes"].to_list() == [1] * 5
    for bits in (2.5, 3.0, 3.5, 4.0):
        gradient, proxy = (frame.filter(bits=bits, allocation=by).row(0, named=True) for by in ("gradient", "key_norm"))
        assert gradient["kl_change_high"] < 0
        assert gradient["kl_mean"] < proxy["kl_mean"]


def test_the_committed_tables_predict_the_committed_sweep():
    results = ROOT / "data" / "results"
    rates = RateBudget.load(results / "rates_smollm2-135m.json")
    bytes_of_widths = rates.frontier().filter(kind="uniform").sort("true_bits")["bytes_per_token"].to_list()
    frame = swept(pl.read_parquet(results / "ratequant_smollm2-135m.parquet"))
    for bits in (2, 3, 4):
        budget = BytesPerToken(bytes_of_widths[bits - 1])
        for allocation, plan in (
            ("uniform", rates.uniform(budget)),
            ("gradient", rates.plan(budget, usual_bounds(bits))),
        ):
            expected = frame.filter(bits=bits, allocation=allocation)["predicted_loss"].item()
            # the two were measured separately: gradients in float32 differ in their last digits
            assert rates.predicted_loss(plan) == pytest.approx(expected, rel=1e-3)


def test_the_committed_sensitivities_are_those_of_the_committed_tables():
    results = ROOT / "data" / "results"
    rates = RateBudget.load(results / "rates_smollm2-135m.json")
    each = pl.read_parquet(results / "sensitivities_smollm2-135m.parquet")
    assert set(each["by"]) == {"gradient", "key_norm", "attention_output", "forward_kl"}
    both = settled(each.filter(by="gradient"), 8).join(rates.sensitivities, on=["layer", "head", "tensor"])
    assert both.height == 180
    assert both["sensitivity"].to_list() == pytest.approx(both["sensitivity_right"].to_list(), rel=1e-3)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_named_files_exist(document):
    """Paths in code marks; ``<name>`` matches any name."""
    path = r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|h|ipynb)|(?:[\w.-]+/)+)`"
    named = re.findall(path, (ROOT / document).read_text())
    folders = [ROOT, ROOT / "notebooks", *(ROOT / "veloxlab" / part for part in ("", "kernels", "kernels/source"))]
    assert len(named) > 2
    assert [name for name in named if not any((folder / name).exists() for folder in folders)] == []


def test_keys_get_the_odd_bit_in_the_committed_search():
    frame = pl.read_parquet(RESULTS / "search_smollm2-135m.parquet").filter(pl.col("protected").list.len() == 0)
    assert "K4 V3 loses half of what K3 V4 does" in " ".join(README.split())
    for method in ("turboquant", "rabitq"):
        for sinks in (0, 4):
            pairs = frame.filter(method=method, sinks=sinks)
            more, fewer = (pairs.filter(key_bits=k, value_bits=7 - k)["kl"].item() for k in (4, 3))
            assert more < 0.55 * fewer


def test_keys_take_a_bit_of_the_values_in_the_committed_windows():
    rows = pl.read_ndjson(RESULTS / "surprises.ndjson").unnest("cache").filter(method="turboquant", sinks=4, text="256")
    losses = rows.select("part", "key_bits", "value_bits", kl=pl.col("found").struct.field("kl"))
    more, same = (losses.filter(key_bits=k, value_bits=8 - k).sort("part") for k in (5, 4))
    assert more["part"].to_list() == same["part"].to_list()
    assert "K5 V3 seven tenths of what K4 V4 does" in " ".join(README.split())
    assert math.exp((more["kl"] / same["kl"]).log().mean()) == pytest.approx(0.7, abs=0.05)
