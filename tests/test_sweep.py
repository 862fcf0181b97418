"""The sweep compares allocations in equal bytes, continues after a stop, and writes complete files."""

from typing import Any

import polars as pl
import pytest

import veloxlab as vl
from tests.test_calibration import TEXT, Letters
from tests.tiny_models import tiny
from veloxlab import cli
from veloxlab.allocate.sweep import SWEEP, SWEPT, sweep, swept, usual_bounds
from veloxlab.cli.tables import swept_table
from veloxlab.errors import InputError
from veloxlab.measure.experiments import mean_interval

SETTINGS: dict[str, Any] = {
    "bits": (2.5, 3.0),
    "text": TEXT,
    "calibration_text": TEXT,
    "tokens": 64,
    "windows": 3,
    "sequences": 2,
}


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sensitivities")


@pytest.fixture(scope="module")
def frame(model, folder):
    return sweep(model, Letters(), folder=folder, **SETTINGS)


def test_rows_are_windows_of_plans_with_equal_bytes(frame):
    assert frame.schema == SWEEP
    assert frame.height == 2 * 3 * 3  # widths, allocations, windows
    assert frame["positions"].unique().to_list() == [63]
    held = frame.group_by("bits").agg(pl.col("held_bytes").n_unique())
    assert held["held_bytes"].to_list() == [1, 1]
    mean_bits = (frame["key_bits"] + frame["value_bits"]) / 2
    assert mean_bits.to_list() == pytest.approx(frame["bits"].to_list())


def test_the_uniform_plan_is_turboquant(model, frame):
    row = vl.fidelity(
        model, Letters(), "turboquant", bits=3, sinks=4, window=0, text=TEXT, tokens=64, windows=3, per_token=True
    )
    expected = row.group_by("window").agg(pl.col("kl").mean()).sort("window")["kl"]
    found = frame.filter(bits=3.0, allocation="uniform").sort("window")["kl_mean"]
    assert found.to_list() == pytest.approx(expected.to_list(), rel=0.02)  # codes of separate heads round differently


def test_the_interval_is_of_differences_within_windows(frame):
    summary = swept(frame)
    assert summary.schema == SWEPT
    own, uniform = (frame.filter(bits=2.5, allocation=a).sort("window")["kl_mean"] for a in ("gradient", "uniform"))
    row = summary.filter(bits=2.5, allocation="gradient").row(0, named=True)
    found = row["kl_change"], row["kl_change_low"], row["kl_change_high"]
    assert found == pytest.approx(mean_interval((own - uniform).to_list()))
    assert row["kl_mean"] == pytest.approx(own.mean())
    assert summary.filter(allocation="uniform")["kl_change"].null_count() == 2


def test_one_window_has_no_interval(frame):
    summary = swept(frame.filter(window=0))
    assert summary["windows"].unique().to_list() == [1]
    assert summary.select(pl.col("^kl_change.*$").null_count()).row(0) == (summary.height,) * 3
    assert swept_table(summary).count("| gradient | ") == 2


def test_a_stopped_sweep_continues(model, folder, frame, tmp_path):
    unfinished = tmp_path / "sweep.json"

    def stop(done, total, label):
        if label == "3 bits, uniform":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(model, Letters(), folder=folder, unfinished=unfinished, progress=stop, **SETTINGS)
    kept = unfinished.read_text()
    assert kept.count("key_norm") == 3 + 1  # rows of one width, and the facts
    unfinished.write_text(kept.replace("sha256", "sha257"))
    with pytest.raises(InputError, match="cannot be read .*: delete it and start again"):
        sweep(model, Letters(), folder=folder, unfinished=unfinished, **SETTINGS)
    unfinished.write_text(kept)
    assert sweep(model, Letters(), folder=folder, unfinished=unfinished, **SETTINGS).equals(frame)
    shorter = SETTINGS | {"windows": 2}  # measures something else: nothing is reused
    assert sweep(model, Letters(), folder=folder, unfinished=unfinished, **shorter).height == 2 * 3 * 2


def test_the_command_writes_a_table_and_its_rows(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(vl, "load", lambda name: (model, Letters()))
    words = ["sweep", "--bits", "3", "--by", "gradient", "--tokens", "48", "--windows", "2", "--sequences", "1"]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "ratequant_smollm2-135m.md",
        "ratequant_smollm2-135m.parquet",
    ]
    written = pl.read_parquet(tmp_path / "out" / "ratequant_smollm2-135m.parquet")
    assert capsys.readouterr().out == (tmp_path / "out" / "ratequant_smollm2-135m.md").read_text()
    assert swept_table(swept(written)).count("\n| 3 | ") == 2


def test_whole_widths_can_be_integers(model, folder):
    shorter = SETTINGS | {"bits": (2, 3), "by": ("gradient",), "windows": 1, "folder": folder}
    found = sweep(model, Letters(), **shorter)
    assert found.schema == SWEEP
    assert found["bits"].unique().to_list() == [2.0, 3.0]


@pytest.mark.parametrize(("first", "others"), [("gradient", "key_norm"), ("key_norm", "gradient")])
def test_predictions_are_shown_if_they_are_in_nats(frame, first, others):
    order = {"uniform": 0, first: 1, others: 2}
    rows = frame.sort("bits", pl.col("allocation").replace_strict(order), maintain_order=True)
    lines = swept_table(swept(rows)).splitlines()[2:]
    shown = {line.split(" | ")[1] for line in lines if line.split(" | ")[4].strip()}
    assert shown == ({"uniform", "gradient"} if first == "gradient" else {"gradient"})


def test_default_bounds_are_the_papers():
    assert [(b.least_bits, b.most_bits) for b in map(usual_bounds, (2.5, 3.0, 3.5, 4.0, 5.0))] == [
        (2, 4), (2, 5), (3, 5), (3, 6), (4, 7)
    ]  # fmt: skip
    assert usual_bounds(2.0) == vl.allocate.Bounds(1, 4)


def test_widths_that_were_not_measured_are_refused(model):
    with pytest.raises(InputError, match="bits=9 are out of range: give from 1 to 7"):
        sweep(model, Letters(), bits=(3, 9))
