"""Measurements: identities that a wrong formula would break, and the figures in the README."""

from typing import Any

import mlx.core as mx
import numpy as np
import polars as pl
import pytest
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache

import veloxlab as vl
from tests.test_calibration import TEXT, Letters
from tests.tiny_models import tiny
from veloxlab.codecs import find_method
from veloxlab.errors import InputError
from veloxlab.measure.activations import Capture, LayerCapture
from veloxlab.measure.errors import LAYER_ERRORS, TOKEN_ERRORS
from veloxlab.measure.memory import GROWTH, REPORT
from veloxlab.measure.quality import FIDELITY, TOKEN_FIDELITY, Reference, divergence, log_probabilities, predicted_bytes
from veloxlab.runtime import Device


@pytest.fixture(scope="module")
def capture(smollm2):
    return vl.capture(*smollm2, tokens=200)


def test_a_capture_is_what_the_models_own_cache_holds(smollm2, capture):
    model, _ = smollm2
    cache = make_prompt_cache(model)
    model(mx.array([capture.tokens]), cache=cache)
    for layer, own in zip(capture.layers, cache, strict=True):
        keys, values = own.keys_and_values()
        assert np.array_equal(layer.keys, keys)
        assert np.array_equal(layer.values, values)
    assert capture.layers[0].queries.shape == (1, 9, 200, 64)
    assert capture.layers[0].scale == pytest.approx(64**-0.5)
    assert repr(capture) == "Capture(layers=30, tokens=200, kv_heads=3, head_dim=64)"


def test_layer_errors_of_the_exact_codec_are_zero(capture):
    errors = vl.measure.layer_errors(capture, "none", bits=32)
    assert errors.schema == LAYER_ERRORS
    assert len(errors) == 30 * 3 * 2
    assert errors["rel_mse"].max() == 0
    assert errors["cosine"].min() == pytest.approx(1, abs=1e-5)
    assert errors["logit_error"].max() == 0
    assert errors["output_error"].max() == 0


def test_layer_errors_agree_with_a_plain_computation(capture):
    """One layer and head, again in NumPy."""
    errors = vl.measure.layer_errors(capture, bits=3)
    layer, head = capture.layers[11], 1
    k, v, q = (np.array(x[0], np.float64) for x in (layer.keys, layer.values, layer.queries))
    codec = find_method("turboquant").codec(64, 3, "keys")
    decoded = np.array(codec.decode(codec.encode(layer.keys)))[0, head].astype(np.float64)
    mask = np.tril(np.ones((200, 200), bool))
    logits, changed = (q[3 * head : 3 * head + 3] @ x.T * layer.scale for x in (k[head], decoded))

    def attention(s):
        s = np.where(mask, s, -np.inf)
        w = np.exp(s - s.max(axis=-1, keepdims=True))
        return w / w.sum(axis=-1, keepdims=True) @ v[head]

    row = errors.row(by_predicate=(pl.col("layer") == 11) & (pl.col("head") == head) & (pl.col("tensor") == "keys"))
    out, out_changed = attention(logits), attention(changed)
    expected = {
        "rel_mse": ((k[head] - decoded) ** 2).sum() / (k[head] ** 2).sum(),
        "logit_error": np.sqrt(((changed - logits) ** 2)[:, mask].mean()),
        "output_error": ((out - out_changed) ** 2).sum() / (out**2).sum(),
    }
    for name, value in expected.items():
        assert row[errors.columns.index(name)] == pytest.approx(value, rel=1e-3)  # float32 against float64


def test_token_errors_add_up_to_layer_errors(capture):
    tokens = vl.measure.token_errors(capture, bits=4)
    assert tokens.schema == TOKEN_ERRORS
    for sinks, window in ((0, 0), (4, 64)):
        summed = vl.measure.relative_errors(tokens, sinks=sinks, window=window)
        direct = vl.measure.layer_errors(capture, bits=4, sinks=sinks, window=window).sort("layer", "head", "tensor")
        assert np.allclose(summed["rel_mse"], direct["rel_mse"], rtol=1e-4)


def test_more_bits_lose_less_in_every_layer(capture):
    means = [
        vl.measure.layer_errors(capture, bits=b).group_by("layer", "tensor").mean().sort("layer", "tensor")
        for b in (2, 4, 6)
    ]
    for metric in ("rel_mse", "output_error"):
        assert (means[0][metric] > means[1][metric]).all()
        assert (means[1][metric] > means[2][metric]).all()


def test_memory_growth_is_read_from_real_caches(capture):
    growth = vl.measure.memory_growth(capture, bits=4, sinks=0, window=0, upto=1024, points=4)
    assert growth.schema == GROWTH
    for side in ("keys", "values"):
        ours = growth.filter(cache="turboquant K4 V4", layer=5, tensor=side).sort("tokens")
        assert ours["tokens"].to_list() == [256, 512, 768, 1024]
        true = np.array([256, 512, 768, 1024]) * 3 * 64 * 4.25 / 8
        assert np.allclose(ours["bytes"], true, rtol=0.05)  # free space after short appends
        fp16 = growth.filter(cache="fp16", layer=5, tensor=side).sort("tokens")
        assert fp16["bytes"].to_list() == [n * 3 * 64 * 2 for n in (256, 512, 768, 1024)]


def test_a_prediction_continues_the_last_measured_line_and_is_labelled(capture):
    growth = vl.measure.memory_growth(capture, bits=4, sinks=4, window=64, upto=1024, points=4)
    ahead = vl.measure.predicted_growth(growth, 4096)
    real = vl.measure.memory_growth(capture, bits=4, sinks=4, window=64, upto=4096, points=1)
    predicted = ahead.filter(kind="predicted")
    assert predicted["tokens"].unique().to_list() == [4096]
    assert len(predicted) == len(real)
    keys = ["cache", "layer", "tensor"]
    both = predicted.join(real, on=keys, suffix="_real")
    # mlx-lm's cache grows by 256 tokens, and with 200 at a time one step can be unused: 4 % of these lengths
    assert np.allclose(both["bytes"], both["bytes_real"], rtol=0.05)
    assert vl.measure.predicted_growth(growth, 1024).equals(growth)


def test_code_bits_are_the_codecs_true_bits(capture):
    bits = vl.measure.code_bits(capture, bits=3)
    assert (
        bits.group_by("layer", "tensor").agg(pl.col("bits_per_value").sum())["bits_per_value"].unique().item() == 3.25
    )
    assert bits.filter(part="codes")["bits_per_value"].unique().to_list() == [3.0]
    exact = vl.measure.code_bits(capture, "none", bits=32)  # its numbers are floating point, without scales
    assert exact.group_by("part").agg(pl.col("bits_per_value").mean()).sort("part").rows() == [
        ("codes", 32.0),
        ("scales", 0.0),
    ]


def test_fidelity_of_the_exact_codec_is_perfect(smollm2):
    for mode in ("oneshot", "decode"):
        row = vl.fidelity(*smollm2, "none", tokens=24, prompt=16, mode=mode)
        assert row.schema == FIDELITY
        assert row["kl_max"].item() < 1e-5
        assert row["top1_flips"].item() == 0
        assert row["perplexity"].item() == pytest.approx(row["perplexity_exact"].item(), rel=1e-4)
        assert row["positions"].item() == (23 if mode == "oneshot" else 7)


def test_fidelity_at_four_bits_meets_the_bar_and_beats_mlx_lms_cache(smollm2):
    """WikiText-2 test text, everything compressed. The bar of 0.07 nats is the best 4-bit cache known before ours."""
    exact = vl.measure.reference(*smollm2, tokens=256)
    ours = vl.measure.fidelity_to(exact, bits=4, sinks=0, window=0)
    theirs = vl.measure.fidelity_to(exact, lambda m: [QuantizedKVCache(64, 4) for _ in m.layers], name="mlx-lm 4")
    assert ours["kl_mean"].item() < 0.07
    assert ours["kl_mean"].item() < theirs["kl_mean"].item()
    assert ours["held_bytes"].item() < theirs["held_bytes"].item()
    assert ours.select("name", "chunk").row(0) == ("turboquant K4 V4", "codes")
    # 4 bits, and a 32-bit scale and bias for 64 values: the model runs in float32
    assert theirs.select("name", "chunk", "key_bits").row(0) == ("mlx-lm 4", None, 5.0)


def test_a_divergence_is_never_below_zero_and_is_nan_for_a_nan_prediction():
    exact = log_probabilities(mx.random.normal((64, 500), key=mx.random.key(1)))
    assert (mx.exp(exact) * (exact - exact.astype(mx.float16).astype(mx.float32))).sum(-1).min() < 0
    nearby = divergence(exact, exact.astype(mx.float16).astype(mx.float32))
    assert (nearby >= 0).all()
    assert mx.isnan(divergence(exact, exact * mx.nan)).all()


def test_the_summary_of_nan_predictions_is_nan(smollm2):
    class Poisoned(KVCache):
        def update_and_fetch(self, keys, values):
            keys, values = super().update_and_fetch(keys, values)
            return keys, values * mx.nan

    row = vl.fidelity(*smollm2, lambda m: [Poisoned() for _ in m.layers], tokens=8).row(0, named=True)
    assert all(np.isnan(row[name]) for name in ("kl_mean", "kl_median", "kl_p99", "kl_max"))


def test_one_reference_serves_many_caches(smollm2):
    exact = vl.measure.reference(*smollm2, tokens=24, windows=2)
    vl.measure.fidelity_to(exact, bits=6, sinks=0, window=0)
    once = vl.measure.fidelity_to(exact, bits=3, sinks=0, window=0)
    assert once.equals(vl.fidelity(*smollm2, bits=3, sinks=0, window=0, tokens=24, windows=2))


def test_decoding_token_by_token_is_as_good_as_one_shot(smollm2):
    """Both read codes of the same tokens; a drift between them would be a defect of the decode path.

    They are not equal to the last bit: a rounding error in one layer moves a code by one level in a later one.
    """
    settings: dict[str, Any] = {"bits": 4, "sinks": 0, "window": 0, "tokens": 60, "prompt": 36}
    one_shot = vl.fidelity(*smollm2, per_token=True, **settings).filter(pl.col("position") >= 36)
    decoded = vl.fidelity(*smollm2, per_token=True, mode="decode", **settings)
    assert decoded.schema == TOKEN_FIDELITY
    assert decoded["kl"][0] == pytest.approx(one_shot["kl"][0], abs=1e-4)
    assert decoded["kl"].mean() == pytest.approx(one_shot["kl"].mean(), rel=0.2)
    assert decoded["nll"].mean() == pytest.approx(one_shot["nll"].mean(), abs=0.02)
    assert one_shot["position"].to_list() == decoded["position"].to_list()


def test_progress_is_reported_and_can_stop_the_work(smollm2, capture):
    class Stopped(Exception):  # noqa: N818 - it is not an error
        pass

    def stop_at_ten(done, total, label):
        assert 0 <= done <= total
        assert label
        if done == 10:
            raise Stopped

    for work in (
        lambda: vl.capture(*smollm2, tokens=16, progress=stop_at_ten),
        lambda: vl.measure.layer_errors(capture, progress=stop_at_ten),
        lambda: vl.measure.token_errors(capture, progress=stop_at_ten),
        lambda: vl.fidelity(*smollm2, mode="decode", tokens=24, prompt=4, progress=stop_at_ten),
    ):
        with pytest.raises(Stopped):
            work()


def test_a_layer_that_hides_its_queries_has_no_attention_errors():
    x = mx.random.normal((1, 2, 20, 64), key=mx.random.key(0))
    errors = vl.measure.layer_errors(Capture((LayerCapture(0, None, x, x, None),), tuple(range(20))))
    assert errors["logit_error"].null_count() == errors["output_error"].null_count() == 4
    assert errors["rel_mse"].null_count() == 0


def test_bad_settings_are_refused_before_the_model_runs(smollm2):
    def running(done, total, label):
        pytest.fail("the model runs")

    for settings in ({"bits": 99}, {"method_or_plan": "turbo"}):
        with pytest.raises(InputError):
            vl.fidelity(*smollm2, **settings, progress=running)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m, t: vl.capture(m, t, ""), "The text has 0 tokens and at least 2 are needed"),
        (lambda m, t: vl.fidelity(m, t, text=""), "The text has 0 tokens"),
        (lambda m, t: vl.fidelity(m, t, text="Some words.", windows=5), "too few for 5 windows of 512"),
        (lambda m, t: vl.fidelity(m, t, mode="decode", tokens=10, prompt=10), "prompt=10 leaves nothing to decode"),
        (lambda m, t: vl.fidelity(m, t, "turbo"), "Unknown method 'turbo'"),
        (lambda m, t: vl.fidelity(m, t, make_prompt_cache, bits=3), "takes no settings, but 'bits' was given"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(smollm2, call, sentence):
    with pytest.raises(InputError, match=sentence):
        call(*smollm2)


@pytest.mark.parametrize("width", [1, 2])
def test_predictions_that_do_not_fit_are_refused_before_they_are_made(monkeypatch, tmp_path, width):
    model, ids = tiny("llama"), [1, 2, 3] * 20
    needed = 4 * (96 * 60 * width + 4 * 60**2)  # bytes: predictions, and the logits of a layer's four heads
    room = mx.get_active_memory() + 2 * needed  # more than the exact size, because other threads allocate too
    monkeypatch.setattr("veloxlab.runtime.device", lambda: Device("cpu", "it", room, 1))
    assert predicted_bytes(model, [60] * width) == needed
    assert len(Reference.of(model, [ids] * width).log_probs) == width
    monkeypatch.setattr("veloxlab.runtime.device", lambda: Device("cpu", "small", 4096, 1))
    with pytest.raises(InputError, match=f"of up to 60 tokens take {needed:,} bytes at least, and 0 are left here"):
        Reference.of(model, [ids] * width)
    with pytest.raises(InputError, match=r"1 window of up to 40 tokens take .* bytes at least"):
        vl.allocate.sensitivities(model, Letters(), TEXT, sequences=1, tokens=40, folder=tmp_path)


def test_predicted_memory_is_not_above_the_real_one(smollm2):
    """It is a lower bound: refused work could not have run."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    exact = vl.measure.reference(*smollm2, tokens=128, windows=2)
    vl.measure.fidelity_to(exact, "turboquant", bits=4)
    taken = mx.get_peak_memory() - before
    assert 0.7 < predicted_bytes(exact.model, [128, 128]) / taken < 1


def test_a_short_last_window_is_reported():
    model = tiny("llama")
    with pytest.warns(UserWarning, match="The text ends early: the last of 2 windows has 20 tokens, and not 60"):
        exact = vl.measure.reference(model, Letters(), text="abcd" * 20, tokens=60, windows=2)
    assert list(map(len, exact.stretches)) == [60, 20]


def test_the_report_of_a_short_text_states_why_it_is_not_smaller():
    model = tiny("llama")
    cache = vl.make_cache(model)
    for count, words in ((3, "no token is in codes yet"), (197, "attention reads the codes")):
        model(mx.array([[1] * count]), cache=cache)
        assert vl.report(cache)["reason"][0].startswith(words)


def test_the_report_has_its_documented_columns(smollm2):
    assert vl.report(vl.make_cache(smollm2[0])).schema == REPORT
