"""Calibration: fitted to a model's activations, kept on disk, refused for another model."""

import json
import tracemalloc
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import veloxlab as vl
from tests.tiny_models import tiny
from veloxlab.codecs import METHODS
from veloxlab.codecs.base import Sample
from veloxlab.codecs.commvq_training import ENTRIES, train_tables
from veloxlab.codecs.parts import vector
from veloxlab.codecs.saving import from_parts, to_parts
from veloxlab.errors import InputError
from veloxlab.mlxlm.identity import fingerprint

TEXT = "the quick brown fox jumps over the lazy dog while 1234567890 birds watch; " * 20


class Letters:
    """A tokenizer with one token for each character."""

    def encode(self, text):
        return [ord(letter) % 96 for letter in text]


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


def calibrated(model, folder, method="spectralquant", text=TEXT, **settings):
    return vl.calibrate(model, Letters(), method, text, folder=folder, **({"bits": 2, "tokens": 300} | settings))


def test_a_fitted_calibration_is_found_again_unchanged(model, tmp_path):
    told = []
    first = calibrated(model, tmp_path, progress=lambda done, total, label: told.append((done, total)))
    assert told == [(0, 2), (1, 2), (2, 2)]
    again = calibrated(model, tmp_path, progress=lambda *_: pytest.fail("it was fitted again"))
    x = mx.random.normal((1, 2, 20, 64), key=mx.random.key(0))
    for at, codec in first.codecs.items():
        assert mx.array_equal(codec.decode(codec.encode(x)), again.codecs[at].decode(again.codecs[at].encode(x)))


VARIANTS = [(method, {}) for method in METHODS] + [
    ("turboquant", {"variant": "prod"}),
    ("turboquant", {"outliers": 16, "outlier_bits": 3}),
    ("rvq", {"variant": "refined"}),
    ("vecinfer", {"point": "d8b8", "smooth": False}),
    ("ratequant", {"head_bits": [2, 4]}),
    ("ratequant", {"head_bits": {"keys": [3, 1], "values": [2, 2]}, "variant": "prod", "sketch": "orthogonal"}),
    ("spectralquant", {"basis": "query"}),
    ("spectralquant", {"basis": "hadamard", "centred": False}),
    ("rabitq", {"centroid": True}),
    ("qjl", {"outliers": 4}),
    ("polarquant", {"codebook": "fitted"}),
    ("polarquant", {"recursion": "full"}),
    ("polarquant", {"levels": [3, 2, 2]}),
    ("commvq", {"stages": 2}),
]


@pytest.mark.parametrize(("method", "options"), VARIANTS, ids=lambda part: str(part))
def test_a_saved_calibration_is_loaded_unchanged(model, tmp_path, method, options):
    bits = next(width for width in (16, 2) if width in METHODS[method].bits)
    saved = calibrated(model, tmp_path, method, bits=bits, **options)
    (file,) = tmp_path.glob("*.safetensors")
    loaded = vl.Calibration.load(file)
    assert (loaded.method, loaded.facts, loaded.codecs.keys()) == (saved.method, saved.facts, saved.codecs.keys())
    x = mx.random.normal((1, 2, 9, 64), key=mx.random.key(1)).astype(mx.float16)
    for at, codec in saved.codecs.items():
        assert type(loaded.codecs[at]) is type(codec)
        assert to_parts(loaded.codecs[at])[0] == to_parts(codec)[0]
        assert mx.array_equal(*(c.decode(c.encode(x, 5)) for c in (codec, loaded.codecs[at])))


def test_fields_of_another_version_are_refused():
    codec = METHODS["spectralquant"].codec(64, 2, "keys")
    plain, arrays = to_parts(codec.fit(Sample(mx.random.normal((1, 2, 90, 64)))))
    for changed in ({**plain, "unknown": 1}, {name: value for name, value in plain.items() if name != "plan"}):
        with pytest.raises(ValueError, match="its fields are"):
            from_parts(codec, changed, arrays)


def test_the_same_seed_gives_the_same_codecs(model, tmp_path):
    first, second = (calibrated(model, tmp_path / name, seed=3) for name in ("a", "b"))
    for at, codec in first.codecs.items():
        ours, theirs = to_parts(codec)[1], to_parts(second.codecs[at])[1]
        assert ours
        assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("changed", [{"text": TEXT[7:]}, {"seed": 1}, {"tokens": 200}, {"bits": 3}])
def test_every_input_of_a_calibration_makes_another_one(model, tmp_path, changed):
    calibrated(model, tmp_path)
    calibrated(model, tmp_path, **changed)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_models_of_one_shape_have_different_fingerprints(model):
    other = tiny("llama")
    assert fingerprint(other) == fingerprint(model)
    other.model.layers[1].self_attn.k_proj.weight = other.model.layers[1].self_attn.k_proj.weight * 1.01
    assert fingerprint(other) != fingerprint(model)


def test_rotary_embeddings_are_part_of_the_fingerprint():
    """They are not parameters, but decide the keys."""
    scaled = {"factor": 8.0, "original_max_position_embeddings": 8192}
    llama3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0} | scaled
    configs = [
        {},
        {"rope_theta": 500_000.0},
        {"rope_traditional": True},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": llama3},
        {"rope_scaling": llama3 | {"factor": 4.0}},
        {"rope_scaling": {"type": "yarn"} | scaled},
    ]
    found = [fingerprint(tiny("llama", **config)) for config in configs]
    assert len(set(found)) == len(configs)
    assert fingerprint(tiny("llama", **configs[-1])) == found[-1]


def test_train_mode_and_use_do_not_change_the_fingerprint(model):
    before = fingerprint(model)
    model.train()
    model(mx.array([[1, 2, 3]]), cache=vl.make_cache(model, "turboquant"))
    assert fingerprint(model) == before
    model.eval()


def test_a_damaged_file_is_named_and_made_again(model, tmp_path):
    calibrated(model, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    with pytest.warns(UserWarning, match=r"spectralquant-.*\.safetensors cannot be read .* The file is made again now"):
        calibrated(model, tmp_path)
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
    ("method", "options", "field"),
    [
        ("spectralquant", {}, "plan"),
        ("polarquant", {"codebook": "fitted"}, "centroids"),
        ("turboquant", {"outliers": 8}, "channels"),
    ],
)
def test_one_changed_digit_is_found_anywhere_in_the_file(model, tmp_path, method, options, field):
    """Some fitted numbers are in the JSON, not in the tensors."""
    calibrated(model, tmp_path, method, **options)
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    arrays, metadata = mx.load(str(file), return_metadata=True)
    content = json.loads(metadata["veloxlab"])
    values = content["codecs"][-1]["fields"][field]
    values[0] += 1
    mx.save_safetensors(str(file), arrays, {"veloxlab": json.dumps(content)})
    with pytest.raises(InputError, match=rf"{method}-.*\.safetensors cannot be read \(its checksum does not match\)"):
        vl.Calibration.load(file)
    with pytest.warns(UserWarning, match=rf"{method}-.*\.safetensors cannot be read .* The file is made again now"):
        calibrated(model, tmp_path, method, **options)
    assert file.read_bytes() == whole


@pytest.mark.parametrize("content", ["3", "[]", "{}", '{"format": "veloxlab calibration 1"}', "no JSON"])
def test_a_file_without_a_calibration_is_refused(tmp_path, content):
    file = tmp_path / "some.safetensors"
    mx.save_safetensors(str(file), {"x": mx.zeros(1)}, {"veloxlab": content})
    with pytest.raises(InputError, match=rf"{file.name} cannot be read .*: make it again with vl\.calibrate"):
        vl.Calibration.load(file)


def test_a_calibration_of_another_version_is_refused_and_not_found(model, tmp_path, monkeypatch):
    calibrated(model, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    monkeypatch.setitem(METHODS, "turboquant", replace(METHODS["turboquant"], version=2))
    vl.Calibration.load(file)
    monkeypatch.setitem(METHODS, "spectralquant", replace(METHODS["spectralquant"], version=2))
    with pytest.raises(InputError, match="codes of spectralquant of version 1, and here they are of version 2"):
        vl.Calibration.load(file)
    calibrated(model, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_a_calibration_of_another_model_is_refused(model, calibrations):
    fitted = calibrated(model, calibrations)
    other = tiny("llama", rope_theta=500_000.0)
    plan = vl.Plan.uniform(model, "turboquant").with_layer(0, key_method="spectralquant", value_method="spectralquant")
    for asked in ("spectralquant", plan):
        with pytest.raises(InputError) as refused:
            vl.make_cache(other, asked, calibration=fitted)
        sentence = str(refused.value)
        assert f"'spectralquant' was made with the model {fingerprint(model)}" in sentence
        assert fingerprint(other) in sentence
        assert "vl.calibrate(model, tokenizer, 'spectralquant', bits=[2])" in sentence
        assert sentence.count(". ") == 0


def test_a_failed_save_leaves_no_file(model, tmp_path):
    fitted = calibrated(model, tmp_path / "kept")
    at = (0, "keys", 2)
    broken = replace(fitted, codecs={at: replace(fitted.codecs[at], seed=object())})
    (tmp_path / "empty").mkdir()
    with pytest.raises(TypeError, match="not JSON serializable"):
        broken.save(tmp_path / "empty" / "some.json")
    assert not list((tmp_path / "empty").iterdir())


def test_options_that_cannot_be_saved_are_refused(model, tmp_path):
    with pytest.raises(InputError, match=r"options .*head_bits.* cannot be written .* plain numbers"):
        calibrated(model, tmp_path, "ratequant", head_bits={2, 4})


@pytest.mark.parametrize(("tensor", "projection"), [("queries", "q_proj"), ("keys", "k_proj"), ("values", "v_proj")])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["turboquant", "spectralquant"])
def test_activations_that_are_not_finite_are_named(tmp_path, tensor, projection, number, method):
    sick = tiny("llama")
    weight = getattr(sick.model.layers[1].self_attn, projection).weight
    weight[0, 0] = number
    with pytest.raises(InputError, match=rf"The {tensor} of layer 1 hold numbers that are NaN or infinite.*dtype="):
        calibrated(sick, tmp_path, method)
    assert not list(tmp_path.iterdir())


def test_cancelled_work_leaves_no_file(model, tmp_path):
    class Stopped(Exception):  # noqa: N818 - it is not an error
        pass

    def stop(done, total, label):
        if done == 1:
            raise Stopped

    with pytest.raises(Stopped):
        calibrated(model, tmp_path, progress=stop)
    assert not list(tmp_path.iterdir())


def test_a_cache_with_a_calibration_generates(model, calibrations):
    calibration = calibrated(model, calibrations, bits=(2, 4))
    assert calibration.widths == [2, 4]
    ids = mx.array([Letters().encode(TEXT[:90])])
    for bits in (2, 4):
        cache = vl.make_cache(model, "spectralquant", bits=bits, calibration=calibration, sinks=0, window=0)
        model(ids, cache=cache)
        logits = model(ids[:, :1], cache=cache)
        assert mx.isfinite(logits).all().item()
        assert cache[0].offset == 91
        assert cache[0].key_codec is calibration.codecs[0, "keys", bits]


def test_measurements_accept_a_calibration(smollm2, calibrations):
    calibration = vl.calibrate(*smollm2, "spectralquant", bits=2, tokens=128, folder=calibrations)
    seen = vl.capture(*smollm2, tokens=64)
    given: dict[str, Any] = {"bits": 2, "calibration": calibration}
    assert vl.measure.layer_errors(seen, "spectralquant", **given)["rel_mse"].mean() < 0.4
    assert vl.measure.token_errors(seen, "spectralquant", **given).height == 2 * 30 * 3 * 64
    assert vl.measure.code_bits(seen, "spectralquant", **given)["bits_per_value"].sum() == pytest.approx(60 * 2.25)
    assert vl.measure.memory_growth(seen, "spectralquant", upto=256, points=2, **given).height == 2 * 2 * 30 * 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("too short", "has 9 tokens, too few .* at least 64 tokens; 1,024 are usual"),
        ("", "has 0 tokens, too few .* at least 64 tokens"),
        ("x", "has 1 token, too few .* at least 64 tokens"),
        ("x" * 500, "has 1 different tokens among 300, and at least 16"),
    ],
)
def test_a_bad_text_is_refused_in_a_sentence(model, tmp_path, text, sentence):
    with pytest.raises(InputError, match=sentence):
        calibrated(model, tmp_path, text=text)


def test_wrong_use_is_refused_in_a_sentence(model, tmp_path):
    calibration = calibrated(model, tmp_path)
    for call, sentence in (
        (
            lambda: vl.make_cache(model, "spectralquant", bits=2),
            r"SpectralQuant must be fitted to activations .*vl\.calibrate",
        ),
        (
            lambda: vl.make_cache(model, "spectralquant", bits=4, calibration=calibration),
            "holds no keys of layer 0 at 4 bits: it has layers 0 to 1 at 2 bits",
        ),
        (lambda: vl.make_cache(model, "turboquant", calibration=calibration), "for 'spectralquant' and not for"),
        (
            lambda: vl.make_cache(model, "spectralquant", bits=2, calibration=calibration, basis="pca"),
            "basis was given with a calibration",
        ),
        (lambda: vl.calibrate(model, Letters(), "spectral", TEXT), "Unknown method 'spectral'"),
        (lambda: calibrated(model, tmp_path, bits=99), "Keys at bits=99 are out of range"),
        (lambda: vl.Calibration.load(tmp_path / "gone.json"), "gone.json cannot be read .there is no such file"),
    ):
        with pytest.raises(InputError, match=sentence):
            call()


# memory


def traced_peak(act):
    """Return the most bytes that NumPy held at once during ``act()``."""
    tracemalloc.start()
    act()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize(("count", "dim"), [(256, 8), (4096, 4)])
def test_training_a_codebook_holds_no_distances_of_all_pairs(count, dim):
    points = np.random.default_rng(0).standard_normal((20_000, dim)).astype(np.float32)
    vector.train_codebook(points, count, seed=0)  # before the measurement, so that Numba's compilation does not count
    # some copies of the points, and one product's distances
    bound = 4 * points.nbytes + 4 * vector._PRODUCT
    assert traced_peak(lambda: vector.train_codebook(points, count, seed=0)) < bound
    assert bound < 4 * len(points) * count / 5  # differences would need `dim` times as many


def test_training_tables_holds_no_differences_to_all_entries():
    points = np.random.default_rng(0).standard_normal((1024, 64)).astype(np.float32)
    train_tables(points, 2, np.arange(64), seed=0)  # before the measurement, so that Numba's compilation does not count
    trained = 3 * points.nbytes  # with the synthetic vectors
    # for each vector some distances to 64 entries, as large as itself, and some copies
    assert traced_peak(lambda: train_tables(points, 2, np.arange(64), seed=0)) < 12 * trained < ENTRIES * trained / 5


def test_the_nearest_centroid_is_found_in_bounded_memory():
    points, centroids = (mx.random.normal((n, 4), key=mx.random.key(n)) for n in (30_000, 4096))
    mx.eval(points, centroids)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(vector.nearest(points, centroids))
    chunk = 4 * vector._DISTANCES
    bound = 12 * chunk  # MLX's CPU back end starts ten operations ahead of the one that runs
    assert mx.get_peak_memory() - before < bound < 4 * len(points) * len(centroids) / 2
