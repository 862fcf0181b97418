"""A method that learns keys after RoPE says how far its calibration reaches, and a cache warns beyond."""

import warnings
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import veloxlab as vl
from tests.letters import Letters
from tests.tiny_models import tiny
from veloxlab.cache import reach
from veloxlab.codecs import METHODS
from veloxlab.codecs.base import Sample
from veloxlab.codecs.parts.rope import Rope

TEXT = "the quick brown fox jumps over the lazy dog while 1234567890 birds watch; " * 20
TOKENS = 128  # of a calibration
NO_WINDOW = {"sinks": 4, "window": 0}
MEAN, SPREADS = np.random.default_rng(0).normal(0, [[2.0], [0.5]], (2, 64))


@pytest.fixture(autouse=True)
def nothing_told_before(monkeypatch):
    monkeypatch.setattr(reach, "_warned", set())


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


def caches(model, folder, method="spectralquant", windows=NO_WINDOW, **options):
    """Two caches with a calibration of 128 tokens."""
    fitted = vl.calibrate(model, Letters(), method, TEXT, bits=2, tokens=TOKENS, folder=folder, **options)
    return [vl.make_cache(model, method, bits=2, calibration=fitted, **windows) for _ in range(2)]


def read(model, cache, count):
    model(mx.array([[i % 50 + 1 for i in range(count)]]), cache=cache)


def keys(count: int, start: int, seed: int) -> mx.array:
    """Keys with a mean and different channels, rotated from position ``start`` on."""
    noise = np.random.default_rng(seed).standard_normal((1, 2, count, 64)) * np.exp(SPREADS)
    return Rope(64).forward(mx.array((MEAN + noise).astype(np.float32)), start)


def loss(codec, start: int) -> float:
    x = keys(256, start, seed=2)
    return (mx.square(codec.decode(codec.encode(x, start)) - x).sum() / mx.square(x).sum()).item()


@pytest.mark.parametrize(
    ("method", "options"),
    [*((m, {}) for m in METHODS), ("rabitq", {"centroid": True}), ("fisherquant", {"basis": "before_rope"})],
)
def test_a_codec_without_a_limit_codes_late_keys_as_well_as_early_ones(method, options):
    """Declare it in ``reaches_by`` if a new method fails here. RVQ loses 15 % more, the others 10 % at most."""
    bits = METHODS[method].bits[0] if method == "none" else 4
    codec = METHODS[method].codec(64, bits, "keys", **options).fit(Sample(keys(512, 0, 0), keys(512, 0, 1), Rope(64)))
    assert codec.reach(512) is not None or loss(codec, 4096) <= 1.3 * loss(codec, 0)


def test_only_keys_after_rope_limit_fisherquant():
    build = METHODS["fisherquant"].codec
    assert build(64, 2, "keys").reach(16384) == 8192
    assert build(64, 2, "keys", positions=100).reach(16384) == 512  # a window of the calibration text
    assert build(64, 2, "keys", basis="before_rope").reach(16384) is None
    assert build(64, 2, "values").reach(16384) is None


@pytest.mark.parametrize(
    ("method", "options", "way_out"),
    [
        ("spectralquant", {}, "tokens=N, or take commvq, or fisherquant with basis='before_rope'"),
        ("vecinfer", {"point": "d2b4"}, "tokens=N"),
        ("rabitq", {"centroid": True}, "tokens=N"),
        ("fisherquant", {"positions": TOKENS}, "basis='before_rope', or take commvq"),
    ],
)
def test_a_key_beyond_the_calibration_warns_once(model, calibrations, method, options, way_out):
    first, other = caches(model, calibrations, method, **options)
    read(model, first, TOKENS)
    said = f"{METHODS[method].name} learned the keys of the first 128 positions .* up to position 129,.* with {way_out}"
    with pytest.warns(UserWarning, match=said) as told:
        read(model, first, 1)
    assert len(told) == 1  # of both layers
    read(model, other, TOKENS + 1)


@pytest.mark.parametrize(
    ("method", "options"), [("rabitq", {}), ("fisherquant", {"basis": "before_rope", "positions": TOKENS})]
)
def test_a_method_that_learns_no_positions_does_not_warn(model, calibrations, method, options):
    cache, _ = caches(model, calibrations, method, **options)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        read(model, cache, 2 * TOKENS)
    assert not told
    assert all(layer.packed.tokens > TOKENS for layer in cache)  # later keys were encoded


def test_exact_tokens_do_not_count(model, calibrations):
    cache, _ = caches(model, calibrations, windows={"sinks": 4, "window": 16})
    read(model, cache, TOKENS + 16)
    with pytest.warns(UserWarning, match="up to position 132"):
        read(model, cache, 16)


def test_a_prompt_in_a_batch_warns(model, calibrations):
    cache, other = caches(model, calibrations)
    merged = [one.merge([one, two]) for one, two in zip(cache, other, strict=True)]
    with pytest.warns(UserWarning, match="up to position 129"):
        model(mx.ones((2, TOKENS + 1), mx.int32), cache=merged)


def test_a_loaded_cache_whose_calibration_is_unknown_does_not_warn(model, calibrations, tmp_path):
    cache, _ = caches(model, calibrations)
    read(model, cache, TOKENS)
    loaded = vl.load_cache(vl.save_cache(tmp_path / "saved", cache), model)
    read(model, loaded, TOKENS)
    assert loaded[0].offset == 2 * TOKENS


def test_a_model_without_rope_does_not_warn(calibrations):
    model = tiny("gpt2")
    cache, _ = caches(model, calibrations)
    read(model, cache, TOKENS + 1)
    assert cache[0].key_codec.reach(TOKENS) == TOKENS


@pytest.mark.parametrize(("tensor", "told"), [("key", 0), ("value", 1)])
def test_the_rotated_part_of_latent_attention_is_stored_as_values(calibrations, tensor, told):
    model = tiny("deepseek_v3")
    fitted = vl.calibrate(model, Letters(), "spectralquant", TEXT, bits=2, tokens=TOKENS, folder=calibrations)
    plan = vl.Plan.uniform(model, "turboquant", bits=2, **NO_WINDOW)
    changes: dict[str, Any] = {f"{tensor}_method": "spectralquant"}
    for layer in range(len(plan.layers)):
        plan = plan.with_layer(layer, **changes)
    cache = vl.make_cache(model, plan, calibration=[fitted])
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        read(model, cache, TOKENS + 1)
    assert ["SpectralQuant learned" in str(one.message) for one in found] == [True] * told


def test_a_registered_method_is_a_way_to_long_texts(monkeypatch):
    method = replace(METHODS["commvq"], id="another", long_texts="another with turns=False")
    monkeypatch.setitem(METHODS, "another", method)
    assert reach.others("commvq") == "fisherquant with basis='before_rope', or another with turns=False"
