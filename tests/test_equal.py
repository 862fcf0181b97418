"""Methods at equal bits: interpolated between measured caches, ranked, and measured where points are missing."""

import polars as pl
import pytest

import veloxlab as vl
from tests.letters import Letters
from tests.test_runs import run
from tests.tiny_models import tiny
from veloxlab.errors import InputError
from veloxlab.measure.equal import EQUAL, POINTS, at_equal_bits
from veloxlab.widgets.pages.equal_bits import around, comparable, equal_said
from veloxlab.widgets.selection import Choice


def points(**methods: dict[float, list[float]]) -> pl.DataFrame:
    """Return `POINTS` of methods: by held bits, the KL of each window."""
    rows = [
        (method, bits, window, kl)
        for method, caches in methods.items()
        for bits, windows in caches.items()
        for window, kl in enumerate(windows)
    ]
    return pl.DataFrame(rows, schema=POINTS, orient="row")


def test_a_method_is_read_along_the_logarithm_between_its_nearest_caches():
    known = points(
        rvq={2.0: [0.4, 0.8], 4.0: [0.1, 0.2], 5.0: [0.09, 0.1]},
        rabitq={1.0: [9.0, 9.0], 3.0: [0.3, 0.2]},
        qjl={3.5: [0.01, 0.01], 4.0: [0.001, 0.001]},
        polarquant={2.0: [0.4, 0.4], 3.2: [0.0, 0.1]},
    )
    found = at_equal_bits(known, 3)
    assert found.schema == EQUAL
    assert found["method"].to_list() == ["rabitq", "rvq"]  # the others do not have caches on both sides
    assert found.select("below", "above").rows() == [(3, 3), (2, 4)]
    assert found["kl_mean"].to_list() == pytest.approx([0.25, 0.3])  # of rvq the geometric means .2 and .4
    assert found["difference"].to_list() == pytest.approx([0, 0.05])
    assert found["low"][1] < 0 < found["high"][1]  # -.1 and .2: not significant
    assert at_equal_bits(known, 2.5).filter(method="rvq")["kl_mean"].item() == pytest.approx(0.6 * 2**-0.5)
    assert at_equal_bits(points(), 3).is_empty()
    one = at_equal_bits(points(rvq={2.0: [0.4], 4.0: [0.1]}, qjl={3.0: [0.1]}), 3)
    assert one["low"].is_null().all()


def test_only_caches_that_differ_in_their_bits_alone_are_compared():
    newest = run(method="rvq", key_bits=3, value_bits=3)
    assert comparable(run(method="qjl", key_bits=2, value_bits=2), newest)
    for other in (
        run(method="rvq", key_bits=3, value_bits=2),
        run(method="rvq", key_bits=3, value_bits=3, own_bits={1: (2, 2)}),
        run(sinks=0),
        run(window=0),
        run(text="u"),
        run(kl=(0.5,)),
    ):
        assert not comparable(other, newest)


def test_caches_around_some_bits_are_the_nearest_ones_on_either_side():
    choices = [Choice(key_bits=bits) for bits in (1, 2, 3)]
    held = [1.5, 2.5, 3.5]
    assert around(2.6, choices, held) == choices[1:]
    assert around(2.5, choices, held) == [choices[1]]
    assert around(4, choices, held) == around(1, choices, held) == []


def test_the_ranking_says_what_held_bits_are_and_why_a_row_has_no_interval():
    def said(*windows: float) -> str:
        known = points(rvq={2.0: [*windows], 4.0: [*windows]}, qjl={3.0: [1.0] * len(windows)})
        return equal_said(at_equal_bits(known, 3), known, run(), 3, 4096, 1e6)

    assert "Held bits count codes, scales, sinks and window" in said(0.1)
    assert said(0.1).count("none: one window") == said(0.1).count("reference") == 1
    assert "one window" not in said(0.1, 0.2)
    assert "0.21 to 1.5</td>" in said(0.1, 0.2)  # 0.85, with the 12.7 standard errors of 0.05 of two windows


def test_the_page_measures_missing_points_of_a_ranking_once():
    lab = vl.Lab(tiny("llama", num_hidden_layers=1), Letters(), tokens=64, sinks=0, window=0)
    page = lab.turn_to("compare")
    page.context, page.equal_bits = 1000, 3
    assert page.ranked.is_empty()
    page.compare_equal()
    assert lab.wait(300)
    ranked, measured = page.ranked, lab.measured
    assert {*ranked["method"]} >= {"turboquant", "rvq", "rabitq", "polarquant"}
    assert (ranked["below"] <= 3).all()
    assert (ranked["above"] >= 3).all()
    assert ranked["kl_mean"].is_sorted()
    assert "At 3 held bits a value" in page._equal.value
    best = ranked.row(0, named=True)
    ends = measured.filter(pl.col("name").str.starts_with(best["method"]))["kl_mean"]
    assert ends.min() <= best["kl_mean"] <= ends.max()
    page.compare_equal()
    assert lab.wait(300)
    assert len(lab.measured) == len(measured)
    page.equal_bits = 0.5
    assert "Measure at equal bits" in page._equal.value
    with pytest.raises(InputError, match="context=16777217 cannot be used: give a whole number from 1 to 16777216"):
        page.context = 2**24 + 1
    lab.close()


def test_methods_that_need_a_calibration_are_named_and_measured_on_request(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lab = vl.Lab(tiny("llama", num_hidden_layers=1), Letters(), tokens=64, sinks=0, window=0)
    page = lab.turn_to("compare")
    assert "Left out unless calibrated: vecinfer, spectralquant, commvq, fisherquant." in page._left_out.value
    assert "20 seconds to 3 minutes at each width for SmolLM2-135M" in page._left_out.value
    lab.selection.methods = ["rvq", "spectralquant"]
    page.context, page.equal_bits = 1000, 3
    for act in (page.compare, page.compare_equal):
        act()
        assert lab.wait(300)
        assert {run.choice.method for run in lab.points.every} == {"rvq"}
    page.calibrate = True
    assert "Missing calibrations are made first, of spectralquant;" in page._left_out.value
    page.compare_equal()
    assert lab.wait(300)
    assert "spectralquant is not ranked at 3 bits: it holds 3.86 to 10.9 at 1,000 tokens." in page._message.value
    page.context = 100_000  # where its tables are relatively small
    page.compare_equal()
    assert lab.wait(300)
    assert {*page.ranked["method"]} == {"rvq", "spectralquant"}
    assert "Missing calibrations are made first, of spectralquant;" in page._left_out.value  # of other widths
    monkeypatch.setattr(lab.selection.fitting, "is_ready", lambda *_: True)
    page.compare()
    assert lab.wait(300)
    assert page._left_out.value == ""
    lab.close()


def test_a_method_that_cannot_be_measured_is_named_and_the_others_are_measured(monkeypatch):
    lab = vl.Lab(tiny("llama", num_hidden_layers=1), Letters(), tokens=64)
    page, fit = lab.turn_to("compare"), lab.selection.fitting.calibration

    def refuses(method, *given):
        if method == "rvq":
            raise InputError("It cannot be.")
        return fit(method, *given)

    monkeypatch.setattr(lab.selection.fitting, "calibration", refuses)
    page.compare()
    assert lab.wait(300)
    assert {run.choice.method for run in lab.points.every} >= {"turboquant", "polarquant"}
    assert page._message.value == "<em>rvq K4 V4 was left out: It cannot be.</em>"
    lab.close()
