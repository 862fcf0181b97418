"""The explorer of keys and values shows measurements for its controls, from any thread."""

import base64
import html
from dataclasses import replace

import mlx.core as mx
import numpy as np
import polars as pl
import pytest

import veloxlab as vl
from tests.knobs import controls, turn
from veloxlab.errors import InputError
from veloxlab.measure.activations import Capture, LayerCapture
from veloxlab.measure.distributions import channel_distributions
from veloxlab.measure.levels import level_densities
from veloxlab.measure.spectra import rope_pairs, spectra
from veloxlab.views.picture import png_size
from veloxlab.widgets.pages.keys import KeyExplorer

FIRST = {"layer": 7, "head": 0, "tensor": "keys", "space": "raw", "method": "turboquant", "bits": 2}


@pytest.fixture(scope="module")
def seen(smollm2):
    capture = vl.capture(*smollm2, tokens=96)
    return replace(capture, layers=capture.layers[6:10])


@pytest.fixture(scope="module")
def explorer(seen):
    explorer = KeyExplorer(seen, layer=7)
    assert explorer.wait(120, ahead=True)
    yield explorer
    explorer.worker.close()


@pytest.fixture(autouse=True)
def _as_it_was(explorer):
    yield
    turn(explorer, **FIRST)


def caption(explorer, chart: str) -> str:
    return explorer.charts[chart].content["params"]["caption"]


@pytest.mark.parametrize(
    ("control", "values", "charts"),
    [
        ("layer", (8, 6), ["channels", "density", "levels", "spectrum", "pairs"]),
        ("head", (1, 2), ["channels", "density", "levels", "spectrum", "pairs"]),
        ("tensor", ("values", "keys"), ["channels", "density", "levels", "spectrum"]),
        ("space", ("before_rope", "rotated", "smoothed", "smoothed_rotated", "eigenbasis"), ["channels", "density"]),
        ("method", ("rabitq", "qjl"), ["levels"]),
        ("bits", (3, 5), ["levels"]),
    ],
)
def test_every_control_moved_twice_changes_its_charts_twice_and_no_other(explorer, control, values, charts):
    for value in values:
        before = {name: (view.revision, view.frame) for name, view in explorer.charts.items()}
        turn(explorer, **{control: value})
        for name, view in explorer.charts.items():
            revision, frame = before[name]
            assert (view.revision > revision) == (name in charts)
            assert (not view.frame.equals(frame)) == (name in charts)
    assert explorer.problem == ""


def test_the_charts_show_the_measurements(explorer, seen):
    turn(explorer, layer=8, head=1, tensor="values", space="rotated", method="rvq", bits=4)
    layer = replace(seen, layers=seen.layers[2:3])
    for chart, frame in (
        ("channels", channel_distributions(layer, "rotated", tensors=("values",))),
        ("levels", level_densities(layer, "rvq", bits=4, tensors=("values",))),
        ("spectrum", spectra(layer, tensors=("values",))),
        ("pairs", rope_pairs(layer)),
    ):
        shown = explorer.charts[chart].frame
        assert shown.equals(frame.filter(head=1).select(shown.columns))
    assert "Layer 8, KV head 1. Largest channel over the median one: rotated" in caption(explorer, "channels")
    assert "rvq at 4 bits. Layer 8, KV head 1. values: 16 levels" in caption(explorer, "levels")


def test_a_layer_that_was_shown_before_is_shown_at_once_with_the_same_spec(explorer):
    specs = {name: view.spec["id"] for name, view in explorer.charts.items()}
    explorer.layer = 8  # measured ahead, without a wait
    assert all("Layer 8" in caption(explorer, name) for name in explorer.charts)
    assert {name: view.spec["id"] for name, view in explorer.charts.items()} == specs


def test_an_impossible_chart_gives_a_sentence_and_the_others_follow(explorer):
    turn(explorer, space="before_rope")
    turn(explorer, tensor="values")
    assert explorer.problem == "Values go through no RoPE: choose keys, or the space 'raw' (as cached)."
    assert explorer.problem in html.unescape(explorer._message.value)
    assert "keys" not in set(explorer.charts["spectrum"].frame["tensor"])
    assert set(explorer.charts["channels"].frame["tensor"]) == {"keys"}  # the older choice
    turn(explorer, method="polarquant")
    with pytest.raises(InputError, match="Values at bits=1 are out of range: PolarQuant takes"):
        explorer.bits = 1
    turn(explorer, tensor="keys", bits=4)
    assert (explorer.problem, explorer._message.value) == ("", "")
    assert "polarquant at 4 bits" in caption(explorer, "levels")


def test_controls_and_traits_have_the_same_values(explorer):
    boxes = controls(explorer)
    boxes["space"].value = "rotated"
    boxes["K bits (all)"].value = 5
    assert explorer.wait(120)
    assert (explorer.space, explorer.bits) == ("rotated", 5)
    explorer.layer = 9
    assert boxes["layer"].value == 9


@pytest.mark.parametrize(
    ("control", "value", "sentence"),
    [
        ("layer", 30, "There is no layer 30: choose one from 6 to 9"),
        ("head", 3, "There is no KV head 3: choose one from 0 to 2"),
        ("tensor", "queries", "tensor='queries' cannot be used: give 'keys' or 'values'"),
        ("space", "fourier", "space='fourier' cannot be used: give 'raw', "),
        ("method", "turbo", "Unknown method 'turbo'"),
        ("method", "commvq", "'commvq' cannot be chosen here: choose one of turboquant, "),
        ("method", "none", "'none' cannot be chosen here"),
        ("bits", 9, "Keys at bits=9 are out of range"),
    ],
)
def test_impossible_choices_are_refused_and_nothing_changes(explorer, control, value, sentence):
    before = {name: getattr(explorer, name) for name in FIRST}
    with pytest.raises(InputError, match=sentence):
        setattr(explorer, control, value)
    assert {name: getattr(explorer, name) for name in FIRST} == before


def test_an_impossible_explorer_is_refused_in_a_sentence(seen):
    with pytest.raises(InputError, match="There is no layer 1"):
        KeyExplorer(seen, layer=1)
    with pytest.raises(InputError, match="Values go through no RoPE"):
        KeyExplorer(seen, tensor="values", space="before_rope")


def test_a_capture_without_rope_has_no_pairs():
    x = mx.array(np.random.default_rng(0).standard_normal((1, 2, 80, 16)).astype(np.float32))
    explorer = KeyExplorer(Capture((LayerCapture(0, None, x, x, None),), tuple(range(80))))
    try:
        assert list(explorer.charts) == ["channels", "density", "levels", "spectrum"]
        turn(explorer, space="before_rope")
        assert explorer.problem == "Layer 0 has no rotary embedding that is known: choose the space 'raw' (as cached)."
    finally:
        explorer.worker.close()


def test_a_calibrated_method_can_be_seen_with_its_calibration(smollm2, seen, calibrations):
    calibration = vl.calibrate(*smollm2, "spectralquant", bits=2, tokens=96, folder=calibrations)
    explorer = KeyExplorer(seen, method="spectralquant", bits=2, calibration=calibration)
    try:
        assert "spectralquant at 2 bits. Layer 6, KV head 0. keys: no common levels" in caption(explorer, "levels")
        with pytest.raises(InputError, match=r"The calibration holds no keys at 3 bits, only at \[2\]"):
            explorer.bits = 3
    finally:
        explorer.worker.close()


def test_without_a_kernel_an_image_and_a_line_of_numbers_are_saved(explorer, tmp_path):
    bundle, _ = explorer._repr_mimebundle_()
    line = "KeyExplorer(keys, as cached, turboquant at 2 bits: Layer 7, KV head 0. Largest channel over the median one:"
    assert bundle["text/plain"].startswith(line)
    picture = base64.b64decode(bundle["image/png"])
    assert png_size(picture)[0] == pytest.approx(700, abs=2)  # whole pixels of a scaled drawing
    assert len(picture) < 200_000
    path = explorer.charts["channels"].to_parquet(tmp_path / "channels.parquet")
    assert pl.read_parquet(path).height == 64
