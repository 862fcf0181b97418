"""Sensitivities: the change of the loss when keys or values move, by autograd and by trials."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import polars as pl
import pytest

import veloxlab as vl
from tests.test_calibration import TEXT, Letters
from tests.tiny_models import tiny
from veloxlab.allocate.sensitivity import SENSITIVITIES, settled
from veloxlab.errors import InputError
from veloxlab.measure.activations import Recorder, capture_layers
from veloxlab.measure.derivative import loss_gradients
from veloxlab.mlxlm import probe

SHORT = {"sequences": 2, "tokens": 48, "sinks": 4}
IDS = [7 * i % 90 for i in range(40)]
ATTEND = [
    "llama",
    "mistral",
    "qwen3",
    "phi",
    "gemma2",
    "gemma3_text",
    "gemma3n",
    "gpt_oss",
    "falcon_h1",
    "lfm2",
    "qwen3_next",
]


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


def measured(model, folder, **settings):
    return vl.allocate.sensitivities(model, Letters(), TEXT, folder=folder, **(SHORT | settings))


class Moved(Recorder):
    """Adds a fixed array to the keys or the values of its layer."""

    def __init__(self, facts, tensor, change):
        super().__init__(facts)
        self.tensor, self.change = tensor, change

    def update_and_fetch(self, keys, values):
        return super().update_and_fetch(
            *((keys + self.change, values) if self.tensor == 0 else (keys, values + self.change))
        )


def loss_when(model, layer, tensor, change):
    facts = [f for f in probe.probe(model) if f.compressible]
    caches = probe.with_caches(model, lambda f: Moved(f, tensor, change if f is facts[layer] else mx.zeros(1)))
    logits = model(mx.array([IDS[:-1]]), cache=caches)[0].astype(mx.float32)
    return nn.losses.cross_entropy(logits, mx.array(IDS[1:]), reduction="sum").item()


@pytest.mark.parametrize("family", ATTEND)
def test_gradients_agree_with_finite_differences(family):
    """Also through layers that slide, that share keys, that have sinks, and with state layers between."""
    model = tiny(family)
    gradients = loss_gradients(model, IDS)
    facts = [f for f in probe.probe(model) if f.compressible]
    assert len(gradients) == len(facts) > 0
    for layer, pair in enumerate(gradients):
        for tensor, gradient in enumerate(pair):
            assert gradient.shape == (
                1,
                facts[layer].kv_heads,
                len(IDS) - 1,
                (facts[layer].key_dim, facts[layer].value_dim)[tensor],
            )
            norm = mx.linalg.norm(gradient).item()
            assert norm > 0
            step = gradient * (0.0125 / norm)  # so small that no token goes to another expert
            slope = (loss_when(model, layer, tensor, step) - loss_when(model, layer, tensor, -step)) / 0.025
            assert slope == pytest.approx(norm, rel=0.01, abs=5e-3)  # losses of 180 nats are accurate to 2e-5, twice


def test_blocks_of_queries_attend_as_all_at_once(model, monkeypatch):
    whole = loss_gradients(model, IDS)
    mx.eval(whole)
    monkeypatch.setattr("veloxlab.measure.derivative._BLOCK", 16)
    for pairs in zip(loss_gradients(model, IDS), whole, strict=True):
        assert all(mx.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*pairs, strict=True))


def test_quantized_weights_have_the_gradients_of_decoded_ones():
    model, plain = tiny("llama"), tiny("llama")
    nn.quantize(model, group_size=32, bits=8)
    for name, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            weight = mx.dequantize(module.weight, module.scales, module.biases, module.group_size, module.bits)
            dict(plain.named_modules())[name].weight = weight
    for ours, expected in zip(loss_gradients(model, IDS), loss_gradients(plain, IDS), strict=True):
        for a, b in zip(ours, expected, strict=True):
            assert mx.allclose(a, b, rtol=1e-3, atol=1e-4 * mx.abs(b).max().item())


def test_the_frame_is_the_mean_square_of_the_gradients_after_the_sinks(model, tmp_path):
    frame = measured(model, tmp_path)
    assert frame.schema == SENSITIVITIES
    assert frame.height == 2 * 2 * 2  # layers, sides, heads
    assert frame.select("sequences", "tokens", "by").unique().row(0) == (2, 44, "gradient")
    ids = Letters().encode(TEXT)
    squares = [
        np.square(np.array(loss_gradients(model, ids[i * 48 : (i + 1) * 48])[1][0][0, :, 4:])).sum(-1).mean(-1)
        for i in (0, 1)
    ]
    found = frame.filter(layer=1, tensor="keys").sort("head")["sensitivity"]
    assert found.to_list() == pytest.approx(np.mean(squares, axis=0).tolist(), rel=1e-4)


def test_the_mean_can_be_of_fewer_sequences(model, tmp_path):
    each = measured(model, tmp_path, per_sequence=True)
    assert each["sequence"].unique().sort().to_list() == [0, 1]
    first = settled(each, 1)
    assert (
        first["sensitivity"].to_list()
        == each.filter(sequence=0).sort("layer", "tensor", "head")["sensitivity"].to_list()
    )
    assert settled(each, 2).equals(measured(model, tmp_path))
    with pytest.raises(InputError, match="sequences=3 are not in this frame, which has 2"):
        settled(each, 3)


def test_key_norms_are_those_of_a_capture(model, tmp_path):
    frame = measured(model, tmp_path, by="key_norm", sequences=1)
    (_, second) = capture_layers(model, Letters().encode(TEXT)[:48])
    expected = np.square(np.array(second.values[0, :, 4:])).sum(-1).mean(-1)
    assert frame.filter(layer=1, tensor="values")["sensitivity"].to_list() == pytest.approx(expected.tolist(), rel=1e-5)


def test_forward_kl_predicts_the_cost_of_a_layer_s_own_trial(model, tmp_path):
    """w·½·E‖x − x̂‖²/D, summed over a layer's heads, is the divergence with its keys or values at 3 bits."""
    frame = measured(model, tmp_path, by="forward_kl", sequences=1)
    assert (frame.group_by("layer", "tensor").agg(pl.col("sensitivity").n_unique())["sensitivity"] == 1).all()
    plan = vl.Plan.uniform(model, "none", bits=32, sinks=4, window=0)
    plan = plan.with_layer(1, value_method="turboquant", value_bits=3)
    row = vl.fidelity(model, Letters(), plan, text=TEXT, tokens=48)
    errors = vl.measure.token_errors(vl.capture(model, Letters(), TEXT, tokens=48), bits=3).filter(
        layer=1, tensor="values"
    )
    distortion = (
        errors.filter(pl.col("position").is_between(4, 46)).group_by("head").agg(pl.col("squared_error").mean())
    )
    predicted = frame.filter(layer=1, tensor="values")["sensitivity"][0] * distortion["squared_error"].sum() / (2 * 64)
    assert predicted == pytest.approx(row["kl_mean"][0], rel=0.02)  # the last token's error is in one of the means only


def test_attention_output_is_its_error_over_the_distortion(model, tmp_path):
    frame = measured(model, tmp_path, by="attention_output", sequences=1)
    seen = vl.capture(model, Letters(), TEXT, tokens=48)
    errors = vl.measure.layer_errors(seen, bits=3, sinks=4).filter(layer=0, tensor="keys").sort("head")["output_error"]
    tokens = vl.measure.token_errors(seen, bits=3).filter(pl.col("position") >= 4, layer=0, tensor="keys")
    distortion = tokens.group_by("head").agg(pl.col("squared_error").mean()).sort("head")["squared_error"] / 128
    assert frame.filter(layer=0, tensor="keys")["sensitivity"].to_list() == pytest.approx(
        (errors / distortion).to_list(), rel=1e-3
    )


def test_measurements_are_found_again_and_a_damaged_file_is_named(model, tmp_path):
    told = []
    first = measured(model, tmp_path, progress=lambda done, total, label: told.append((done, total)))
    assert told == [(0, 2), (1, 2)]
    assert measured(model, tmp_path, progress=lambda *_: pytest.fail("it was measured again")).equals(first)
    file, _ = tmp_path.iterdir()
    file.write_text(file.read_text().replace('"head": [\n   0', '"head": [\n   1', 1))
    with pytest.warns(
        UserWarning, match="cannot be read .its checksum does not match.: measure them again. The file is"
    ):
        assert measured(model, tmp_path).equals(first)


def test_another_model_of_the_same_shape_is_measured_anew(model, tmp_path):
    assert not measured(tiny("llama", seed=1), tmp_path).equals(measured(model, tmp_path))
    assert len(list(tmp_path.iterdir())) == 2 * SHORT["sequences"]


def test_cancelled_work_continues_after_the_finished_sequences(model, tmp_path):
    def stop(done, total, label):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(model, tmp_path, progress=stop)
    assert len(list(tmp_path.iterdir())) == 1
    told = []
    again = measured(model, tmp_path, progress=lambda done, total, label: told.append((done, total, label)))
    assert told == [(1, 2, "sequence 2 of 2: gradients")]
    assert again.equals(measured(model, tmp_path / "new"))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"tokens": 10}, "tokens=10 with sinks=4 are too few"),
        ({"sequences": 99}, r"The text has \d+ tokens, too few for 99 sequences of 48"),
    ],
)
def test_impossible_measurements_are_refused(model, tmp_path, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        measured(model, tmp_path, **settings)


def test_an_unsupported_model_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(InputError, match="No layer of this model keeps plain keys and values"):
        measured(tiny("mamba2"), tmp_path)
    with pytest.raises(InputError, match="Layer 0 of this model does not show its queries"):
        measured(tiny("deepseek_v3"), tmp_path, by="attention_output")


def test_a_model_that_cannot_be_differentiated_is_refused(model, tmp_path, monkeypatch):
    def no_vjp(*_):
        raise RuntimeError("[Primitive::vjp] Not implemented for Kernel.")

    monkeypatch.setattr(mx, "value_and_grad", no_vjp)
    with pytest.raises(InputError, match="cannot be differentiated .*Kernel.*: choose by='attention_output'"):
        measured(model, tmp_path)

    def refuse(*_):
        raise InputError("This sentence is whole.")

    monkeypatch.setattr(mx, "value_and_grad", refuse)
    with pytest.raises(InputError, match="^This sentence is whole.$"):
        measured(model, tmp_path)


def test_activations_that_are_not_finite_are_refused(tmp_path):
    model = tiny("llama")
    model.model.layers[1].self_attn.k_proj.weight = mx.full((128, 64), float("nan"))
    with pytest.raises(InputError, match="The sensitivity of layer 0's keys by 'gradient' is NaN or infinite"):
        measured(model, tmp_path)


def test_half_precision_changes_sensitivities_only_slightly(tmp_path):
    """bfloat16 has 8 bits of precision; squares of gradients through two layers are accurate to a few hundredths."""
    exact, half = tiny("llama"), tiny("llama")
    half.set_dtype(mx.bfloat16)
    ours, expected = (measured(model, tmp_path)["sensitivity"].to_numpy() for model in (half, exact))
    assert np.abs(np.log(ours / expected)).max() < 0.1
