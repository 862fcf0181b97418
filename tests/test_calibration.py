"""Calibration: fitted from a model's activations, kept on disk, refused where it does not belong."""

import json

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.rope_utils import initialize_rope

import veloxlab as vl
from tests.tiny_models import tiny
from veloxlab import integrate
from veloxlab.calibration import fingerprint
from veloxlab.codecs import METHODS
from veloxlab.codecs.codec import Sample
from veloxlab.codecs.saving import from_parts, to_parts
from veloxlab.errors import InputError

TEXT = "the quick brown fox jumps over the lazy dog while 1234567890 birds watch; " * 20


class Letters:
    """A tokenizer of one token per character."""

    def encode(self, text):
        return [ord(letter) % 96 for letter in text]


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


def calibrated(model, folder, method="spectralquant", text=TEXT, **settings):
    return vl.calibrate(model, Letters(), method, text, folder=folder, **({"bits": 2, "tokens": 300} | settings))


def test_what_was_fitted_is_found_again_and_is_the_same(model, tmp_path):
    told = []
    first = calibrated(model, tmp_path, progress=lambda done, total, label: told.append((done, total)))
    assert told == [(0, 2), (1, 2), (2, 2)]
    again = calibrated(model, tmp_path, progress=lambda *_: pytest.fail("it was fitted again"))
    x = mx.random.normal((1, 2, 20, 64), key=mx.random.key(0))
    for at, codec in first.codecs.items():
        assert mx.array_equal(codec.decode(codec.encode(x)), again.codecs[at].decode(again.codecs[at].encode(x)))


@pytest.mark.parametrize("method", [m.id for m in METHODS.values() if m.calibrated])
def test_every_fitted_codec_survives_its_file(method):
    x = mx.random.normal((1, 2, 2200, 64), key=mx.random.key(0))
    rope = integrate.rope_of(tiny("llama"), 0)
    for role in ("keys", "values"):
        unfitted = METHODS[method].codec(64, METHODS[method].bits[0], role)
        fitted = unfitted.fit(Sample(x, queries=x, rope=rope))
        plain, arrays = to_parts(fitted)
        back = from_parts(unfitted, json.loads(json.dumps(plain)), arrays)
        assert mx.array_equal(back.decode(back.encode(x[:, :, :9], 5)), fitted.decode(fitted.encode(x[:, :, :9], 5)))


def test_the_same_seed_gives_the_same_codecs(model, tmp_path):
    first, second = (calibrated(model, tmp_path / name, seed=3) for name in ("a", "b"))
    for at, codec in first.codecs.items():
        ours, theirs = to_parts(codec)[1], to_parts(second.codecs[at])[1]
        assert ours
        assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("changed", [{"text": TEXT[7:]}, {"seed": 1}, {"tokens": 200}, {"bits": 3}])
def test_anything_it_depends_on_makes_another(model, tmp_path, changed):
    calibrated(model, tmp_path)
    calibrated(model, tmp_path, **changed)
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_models_of_one_shape_have_different_fingerprints(model):
    other = tiny("llama")
    assert fingerprint(other) == fingerprint(model)
    other.model.layers[1].self_attn.k_proj.weight = other.model.layers[1].self_attn.k_proj.weight * 1.01
    assert fingerprint(other) != fingerprint(model)


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_damaged_file_is_named_and_made_again(model, tmp_path, suffix):
    calibrated(model, tmp_path)
    (file,) = tmp_path.glob(f"*{suffix}")
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    with pytest.warns(UserWarning, match=r"spectralquant-.*\.json cannot be read .* It is made again now"):
        calibrated(model, tmp_path)
    assert file.read_bytes() == whole


def test_cancelled_work_leaves_nothing(model, tmp_path):
    class Stopped(Exception):  # noqa: N818 - it is no error
        pass

    def stop(done, total, label):
        if done == 1:
            raise Stopped

    with pytest.raises(Stopped):
        calibrated(model, tmp_path, progress=stop)
    assert not list(tmp_path.iterdir())


def test_a_cache_is_made_of_it_and_generates(model, tmp_path):
    calibration = calibrated(model, tmp_path, bits=(2, 4))
    assert calibration.widths == [2, 4]
    ids = mx.array([Letters().encode(TEXT[:90])])
    for bits in (2, 4):
        cache = vl.make_cache(model, "spectralquant", bits=bits, calibration=calibration, sinks=0, window=0)
        model(ids, cache=cache)
        logits = model(ids[:, :1], cache=cache)
        assert mx.isfinite(logits).all().item()
        assert cache[0].offset == 91
        assert cache[0].key_codec is calibration.codecs[0, "keys", bits]


def test_measurements_take_it(smollm2, tmp_path):
    calibration = vl.calibrate(*smollm2, "spectralquant", bits=2, tokens=128, folder=tmp_path)
    seen = vl.capture(*smollm2, tokens=64)
    given = {"bits": 2, "calibration": calibration}
    assert vl.layer_errors(seen, "spectralquant", **given)["rel_mse"].mean() < 0.4
    assert vl.token_errors(seen, "spectralquant", **given).height == 2 * 30 * 3 * 64
    assert vl.code_bits(seen, "spectralquant", **given)["bits_per_value"].sum() == pytest.approx(60 * 2.25)
    assert vl.memory_growth(seen, "spectralquant", upto=256, points=2, **given).height == 2 * 2 * 30 * 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("too short", "has 9 tokens, too few .* at least 64 tokens; 1,024 are usual"),
        ("x", "The text has 1 tokens and at least 2 are needed"),
        ("x" * 500, "has 1 different tokens among 300, and at least 16"),
    ],
)
def test_bad_text_gets_a_sentence(model, tmp_path, text, sentence):
    with pytest.raises(InputError, match=sentence):
        calibrated(model, tmp_path, text=text)


def test_wrong_use_gets_a_sentence(model, tmp_path):
    calibration = calibrated(model, tmp_path)
    for call, sentence in (
        (
            lambda: vl.make_cache(model, "spectralquant", bits=2),
            r"SpectralQuant has to see activations .*vl\.calibrate",
        ),
        (
            lambda: vl.make_cache(model, "spectralquant", bits=4, calibration=calibration),
            "holds no keys of layer 0 at 4 bits: it has layers 0 to 1 at 2 bits",
        ),
        (lambda: vl.make_cache(model, "turboquant", calibration=calibration), "for 'spectralquant' and not for"),
        (
            lambda: vl.make_cache(model, "spectralquant", bits=2, calibration=calibration, basis="keys"),
            "basis was given beside a calibration",
        ),
        (lambda: vl.calibrate(model, Letters(), "spectral", TEXT), "Unknown method 'spectral'"),
        (lambda: calibrated(model, tmp_path, bits=99), "Keys at bits=99 are out of range"),
        (lambda: vl.Calibration.load(tmp_path / "gone.json"), "gone.json cannot be read .there is no such file"),
    ):
        with pytest.raises(InputError, match=sentence):
            call()


# the rotary embedding of a layer


@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    ],
)
def test_a_layers_rope_is_found_and_undone(model, scaling, traditional):
    block = model.model.layers[0].self_attn
    block.rope = initialize_rope(64, 10_000.0, traditional, scaling, 8192)
    rope = integrate.rope_of(model, 0)
    assert rope is not None
    x = mx.random.normal((1, 2, 5, 64), key=mx.random.key(1))
    turned = block.rope(x, offset=4000)
    back = rope.inverse(turned, 4000)
    # angles of up to 4,000 radians in float32 are good to 2e-4; undoing uses the same angles as doing
    assert mx.allclose(back * (mx.linalg.norm(x) / mx.linalg.norm(back)), x, atol=1e-4)
    assert mx.allclose(rope.forward(back, 4000), turned, atol=1e-4)


def test_a_layer_without_a_known_rope_has_none(model):
    block = model.model.layers[1].self_attn
    own = block.rope
    block.rope = nn.Identity()
    assert integrate.rope_of(model, 1) is None
    block.rope = own
