"""Comparison of two benchmark runs: ratios that moved beyond the measured noise, and no times."""

import json

import pytest

from veloxlab import cli
from veloxlab.cli.tables import against_table
from veloxlab.measure.bench.against import AGAINST, LEAST, WIDER, against
from veloxlab.measure.bench.timing import spread


def run(ratio=0.5, times=1.0, noise: float | None = 0.03, **more):
    """Return results of a run on a machine that is ``times`` times as slow."""
    of_noise = {} if noise is None else {"spread": noise}
    rows = [
        {"cache": "exact 32 bit", "tokens": 512, "milliseconds": 10 * times, "ratio": 1.0, **of_noise},
        {"cache": "ours 4 bit", "tokens": 512, "milliseconds": 10 * ratio * times, "ratio": ratio, **of_noise, **more},
    ]
    return {"decode": {"facts": {}, "rows": rows}}


def moved(before, now):
    return against(before, now).filter("moved")["name"].to_list()


def test_a_slower_machine_moves_nothing_and_a_slower_kernel_does():
    assert moved(run(), run(times=3)) == []
    assert moved(run(), run(ratio=0.7)) == ["ratio"]
    (row,) = against(run(), run(ratio=0.7)).rows(named=True)
    assert row["change"] == pytest.approx(1.4)
    assert row["noise"] == pytest.approx(WIDER * 0.03 * 2)  # two times in each of two ratios
    assert row["case"] == "ours 4 bit, 512 tokens"


def test_changes_within_the_noise_are_not_reported():
    assert moved(run(), run(ratio=0.55)) == []
    assert moved(run(noise=0.001), run(noise=0.001, ratio=0.55)) == ["ratio"]
    assert moved(run(noise=0.001), run(noise=0.001, ratio=0.5 * (1 + WIDER * LEAST))) == []  # resolution of clocks


def test_a_run_without_noise_uses_the_others_noise_and_two_without_are_marked():
    assert moved(run(noise=None), run(ratio=0.7)) == ["ratio"]
    frame = against(run(noise=None), run(noise=None, ratio=5))
    assert frame.schema == AGAINST
    assert frame["noise"].to_list() == [None]
    assert against_table(frame) == (
        "0 of 1 ratios moved beyond their noise. Of 1 neither run measured the noise: give a newer file, or measure "
        "again."
    )


def test_rows_of_one_run_alone_are_left_out():
    now = run()
    now["decode"]["rows"][1]["tokens"] = 2048
    assert against(run(), now).is_empty()
    assert against({"read": now["decode"]}, run()).is_empty()


def test_the_spread_is_half_of_the_interquartile_range():
    assert spread([9.0, 10.0, 11.0, 10.0, 10.0, 30.0, 8.0]) == pytest.approx(0.05)
    assert spread([5.0]) == 0


def test_the_command_compares_a_file_with_an_earlier_one(tmp_path, capsys):
    before, now = tmp_path / "before.json", tmp_path / "now.json"
    before.write_text(json.dumps(run()))
    now.write_text(json.dumps(run(ratio=0.8)))
    assert cli.main(["bench", "--only", "--json", str(now), "--against", str(before)]) == 0
    told = capsys.readouterr().out
    assert "1 of 1 ratios moved" in told
    assert "| decode | ours 4 bit, 512 tokens | ratio | 0.5 | 0.8 | 1.60× | ± 0.12 |" in told
    before.write_text("[]")
    assert cli.main(["bench", "--only", "--json", str(now), "--against", str(before)]) == 2
    assert "cannot be read" in capsys.readouterr().err
