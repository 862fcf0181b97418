"""The laboratory answers from measurements, on whichever thread its controls change."""

import base64
import json
from html import escape

import polars as pl
import pytest

import veloxlab as vl
from tests.knobs import turn
from tests.letters import Letters
from tests.tiny_models import tiny
from veloxlab.errors import InputError
from veloxlab.views.picture import png_size


@pytest.fixture(scope="module")
def small():
    """A model with random weights, and a tokenizer: these tests do not depend on what a model has learned."""
    return tiny("llama", num_hidden_layers=9, num_attention_heads=6, num_key_value_heads=3), Letters()


@pytest.fixture(scope="module")
def lab(small):
    lab = vl.Lab(*small, tokens=96, sinks=2, window=16)
    assert lab.wait(120)
    yield lab
    lab.worker.close()


@pytest.fixture(autouse=True)
def _as_it_was(lab):
    yield
    lab.page, lab.method, lab.layer = "cache", "turboquant", None
    lab.selection.choose(own_bits={}, layer=None)
    lab.metric, lab.sinks, lab.window = "output_error", 2, 16
    lab.key_bits = lab.value_bits = 4
    assert lab.wait(120)


def mean_bits(lab, tensor: str) -> float:
    frame = lab.bits.frame.filter(tensor=tensor).group_by("layer").agg(pl.col("bits_per_value").sum())
    return frame["bits_per_value"].mean()


def last_bytes(lab, cache: str = "turboquant") -> int:
    frame = lab.memory.frame.filter(pl.col("cache").str.starts_with(cache), kind="measured")
    return frame.filter(pl.col("tokens") == pl.col("tokens").max())["bytes"].sum()


def test_moving_a_slider_twice_changes_the_charts_twice(lab):
    seen = []
    for bits in (4, 2, 6):
        turn(lab, key_bits=bits)
        errors = lab.errors.frame.filter(tensor="keys")["output_error"].mean()
        seen.append((errors, mean_bits(lab, "keys"), last_bytes(lab)))
    assert seen[1][0] > seen[0][0] > seen[2][0]
    assert [bits for _, bits, _ in seen] == [4.25, 2.25, 6.25]
    assert seen[1][2] < seen[0][2] < seen[2][2]
    assert mean_bits(lab, "values") == 4.25


def test_the_charts_show_the_measurements(lab):
    turn(lab, key_bits=3, value_bits=5)
    expected = vl.measure.layer_errors(lab.experiment.capture, key_bits=3, value_bits=5, sinks=2, window=16)
    shown = lab.errors.frame.select("layer", "head", "tensor", "output_error")
    both = shown.join(expected, on=["layer", "head", "tensor"], suffix="_expected")
    assert len(both) == len(expected) == 9 * 3 * 2
    assert both["output_error"].to_list() == pytest.approx(both["output_error_expected"].to_list(), rel=1e-6)
    cache = vl.make_cache(lab.experiment.model, key_bits=3, value_bits=5, sinks=2, window=16)
    assert vl.report(cache)["key_bits"][0] == mean_bits(lab, "keys")


def test_new_sinks_and_windows_are_measured(lab):
    before = last_bytes(lab), lab.errors.frame["output_error"].mean()
    turn(lab, window=64)
    after = last_bytes(lab), lab.errors.frame["output_error"].mean()
    assert after[0] > before[0]
    assert after[1] < before[1]
    assert lab.pages["cache"]._message.value == ""


def test_a_picked_layer_is_marked_and_its_bits_are_its_own(lab):
    turn(lab, layer=7)
    assert lab.errors.picked == 7
    turn(lab, key_bits=8)
    assert lab.layer_bits[7] == (8, 4)
    assert lab.layer_bits[6] == (4, 4)
    turn(lab, layer=None)
    assert lab.key_bits == 4
    assert lab.plan.layers[7].key_bits == 8
    assert "lab.plan" in lab.pages["cache"]._code.value
    spent = lab.bits.frame.filter(tensor="keys", part="codes").sort("layer")["bits_per_value"].to_list()
    assert spent == [4.0] * 7 + [8.0, 4.0]


def test_a_pick_in_a_chart_reaches_the_laboratory(lab):
    lab.errors.picked = 8
    assert lab.layer == 8
    lab.errors.picked_head = 2
    assert lab.selection.choice.head == 2
    assert lab.turn_to("errors").head == 2
    lab.turn_to("cache")
    lab.errors.picked_head = None  # Escape
    assert (lab.selection.choice.head, lab.errors.picked_head) == (2, 2)
    lab.errors.picked = None
    assert lab.layer is None


def test_another_metric_is_another_chart(lab):
    turn(lab, metric="rel_mse")
    assert "rel_mse" in lab.errors.frame.columns
    assert lab.errors.frame["rel_mse"].mean() == pytest.approx(0.0091 * 78 / 96, rel=0.1)  # 18 of 96 tokens are exact


def test_a_measured_setting_joins_the_frontier(lab):
    lab.measure()
    assert lab.wait(120)
    assert lab.measured["name"].to_list()[-1] == "turboquant K4 V4"
    turn(lab, key_bits=2)
    lab.measure()
    assert lab.wait(120)
    assert lab.measured["kl_mean"][-1] > lab.measured["kl_mean"][-2]
    assert len(lab.frontier.frame) == len(lab.measured)


def test_work_can_be_cancelled_and_the_laboratory_still_works(lab):
    count = len(lab.measured)
    lab.measure()
    lab.worker.cancel()
    assert lab.wait(120)
    assert len(lab.measured) == count
    turn(lab, value_bits=3)
    assert mean_bits(lab, "values") == 3.25


def test_without_a_kernel_an_image_and_a_line_of_numbers_are_saved(lab):
    bundle, metadata = lab._repr_mimebundle_()
    assert metadata["image/png"]["alt"] == bundle["text/plain"]  # nbconvert uses this text for the picture
    assert bundle["text/plain"].startswith("Lab(turboquant K4 V4, sinks=2, window=16: relative MSE of keys 0.00")
    picture = base64.b64decode(bundle["image/png"])
    width, height = png_size(picture)
    assert width == 700
    assert height > 800
    assert len(picture) < 200_000


def test_its_images_and_rows_can_be_saved(lab, tmp_path):
    files = lab.save_pictures(tmp_path / "out")
    assert {f.name for f in files} >= {"errors.svg", "errors.parquet", "bits.svg", "memory.parquet"}
    assert pl.read_parquet(tmp_path / "out" / "errors.parquet").equals(lab.errors.frame)
    assert (tmp_path / "out" / "memory.svg").read_text().startswith("<svg")


def test_its_state_can_be_saved_and_restored(lab):
    turn(lab, key_bits=3, sinks=4)
    lab.layer = 5
    turn(lab, value_bits=6)
    lab.metric = "rel_mse"
    state, plan = json.loads(json.dumps(lab.state)), lab.plan
    assert state["layers"] == {"5": [3, 6]}
    lab.layer = None
    lab.selection.choose(own_bits={}, layer=None)
    turn(lab, key_bits=8, sinks=0, metric="output_error")
    lab.restore(state)
    assert lab.wait(120)
    assert lab.state == state
    assert lab.plan == plan

    with pytest.raises(InputError, match="has no sinks, window"):
        lab.restore({name: state[name] for name in state if name not in ("sinks", "window")})
    for impossible, sentence in (
        ({"bits": [2, 2], "window": -3}, "window=-3"),
        ({"bits": [2, 77]}, "Values at bits=77 are out of range"),
        ({"layers": {"99": [2, 2]}}, "There is no layer 99"),
        ({"layers": {"3": [0, 2]}}, "Keys at bits=0 are out of range"),
        ({"method": "turbo"}, "Unknown method 'turbo'"),
        ({"method": "rabitq", "head": 5}, "There is no KV head 5"),
        ({"page": "speed"}, "page='speed' cannot be used"),
    ):
        with pytest.raises(InputError, match=sentence):
            lab.restore(state | impossible)
        assert lab.state == state
    assert lab.wait(120)
    assert lab.state == state  # no part of the refused state remains


def test_it_can_be_saved_as_one_page(lab, tmp_path):
    page = lab.export(tmp_path / "report.html").read_text()
    assert page.count('<div class="chart"') == len(lab.named)
    assert "turboquant K4 V4" in page
    folded = page[page.index("<details><summary>The plan as JSON</summary><pre>") :]
    assert escape(lab.plan.to_json()[:60]) in folded[: folded.index("</details>")]
    specs = page[page.index('id="charts"') :]
    for heading in ("Relative squared error of the output", "True bits per value", "Bytes held as the context grows"):
        assert heading in specs


@pytest.mark.parametrize(
    ("knob", "value", "sentence"),
    [
        ("key_bits", 9, "Keys at bits=9 are out of range"),
        ("window", -1, "window=-1 cannot be used: give a whole number, 0 or more"),
        ("layer", 9, "There is no layer 9: choose one from 0 to 8"),
        ("metric", "speed", "metric='speed' cannot be used"),
        ("method", "none", "'none' cannot be chosen here"),
        ("head", 3, "There is no KV head 3"),
        ("page", "speed", "page='speed' cannot be used"),
    ],
)
def test_impossible_knobs_are_refused_and_nothing_changes(lab, knob, value, sentence):
    before = lab.state, lab.plan
    with pytest.raises(InputError, match=sentence):
        setattr(lab, knob, value)
    assert (lab.state, lab.plan) == before


def test_another_method_takes_the_nearest_widths_and_appears_in_the_charts(lab):
    turn(lab, layer=7)
    turn(lab, key_bits=3)
    turn(lab, method="rvq")  # it has only even widths
    assert lab.layer_bits[7][0] in (2, 4)
    assert lab.layer_bits[6] == (4, 4)
    assert lab.name.startswith("rvq K4 V4")
    assert set(lab.memory.frame["cache"]) == {"fp16", "rvq"}
    expected = vl.measure.layer_errors(lab.experiment.capture, "rvq", bits=4, sinks=2, window=16)
    shown = lab.errors.frame.filter(layer=6, tensor="keys")["output_error"].to_list()
    assert shown == pytest.approx(expected.filter(layer=6, tensor="keys")["output_error"].to_list(), rel=1e-6)
    turn(lab, method="turboquant")
    assert set(lab.memory.frame["cache"]) == {"fp16", "turboquant"}


def test_an_impossible_laboratory_is_refused_before_any_work(small):
    with pytest.raises(InputError, match="Unknown method 'turbo'"):
        vl.Lab(*small, method="turbo")
    with pytest.raises(InputError, match="at least 2 are needed"):
        vl.Lab(*small, text="")


def test_a_calibrated_method_has_the_widths_that_were_fitted(small, tmp_path):
    calibration = vl.calibrate(*small, "spectralquant", bits=(2, 4), tokens=96, folder=tmp_path)
    lab = vl.Lab(*small, method="spectralquant", bits=2, tokens=64, sinks=0, window=0, calibration=calibration)
    try:
        assert lab.wait(300)
        before = lab.errors.frame.filter(tensor="keys")["output_error"].mean()
        lab.key_bits = 4
        assert lab.wait(300)
        assert lab.errors.frame.filter(tensor="keys")["output_error"].mean() < before / 2
        with pytest.raises(InputError, match=r"holds no values at 3 bits, only at \[2, 4\]"):
            lab.value_bits = 3
    finally:
        lab.worker.close()
