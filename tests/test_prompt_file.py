"""A prompt cache file is checked as a whole: every layer, exact ones too, must be of this model and unchanged."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import CacheList, QuantizedKVCache, load_prompt_cache, make_prompt_cache, save_prompt_cache

import veloxlab as vl
from tests.tiny_models import tiny
from veloxlab.errors import InputError

IDS = list(range(1, 90))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "prompt.safetensors"


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


def read_by(model, cache, ids=IDS):
    model(mx.array([ids]), cache=cache)
    mx.eval([c.state for c in cache])
    return cache


def next_logits(model, cache):
    return np.array(model(mx.array([[7, 8]]), cache=cache))


EXACT = [
    ("gemma3_text", {"sliding": "exact"}),
    ("falcon_h1", {}),
    ("lfm2", {}),
    ("mamba2", {}),
    ("deepseek_v3", {}),
]


@pytest.mark.parametrize(("family", "settings"), EXACT)
def test_every_changed_byte_of_an_exact_layer_is_detected(family, settings, file):
    model = tiny(family)
    cache = read_by(model, vl.make_cache(model, sinks=2, window=8, **settings))
    save_prompt_cache(str(file), cache)
    for loaded in (vl.load_cache(file, model), load_prompt_cache(str(file))):
        assert [type(c) for c in loaded] == [type(c) for c in cache]
        assert [type(c) for c in vl.make_cache(model, **settings)] == [type(c) for c in loaded]
    expected = next_logits(model, cache)
    assert np.array_equal(next_logits(model, loaded), expected)
    whole = file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in np.random.default_rng(0).integers(start, len(whole), size=15):
        content = bytearray(whole)
        content[place] ^= 1 << int(place) % 8
        file.write_bytes(content)
        with pytest.raises(InputError, match="cannot be read"):
            vl.load_cache(file, model)
        with pytest.raises(
            (InputError, ValueError), match=r"cannot be read|chr\(\) arg not in range"
        ):  # mlx-lm's message
            load_prompt_cache(str(file))


@pytest.mark.parametrize(("family", "settings"), EXACT)
def test_exact_layers_name_their_model(family, settings, file):
    model, other = tiny(family), tiny(family, seed=1)
    cache = read_by(model, vl.make_cache(model, **settings))
    save_prompt_cache(str(file), cache)
    with pytest.raises(InputError, match=rf"made for the model {family} of \d layers, \w+, and this is {family} of"):
        vl.load_cache(file, other)


def test_layers_in_one_entry_have_checksums_too(file):
    model = tiny("falcon_h1")
    cache = read_by(model, vl.make_cache(model))
    assert isinstance(cache[0], CacheList)
    assert [type(slot).__name__ for slot in cache[0].caches] == ["SealedArraysCache", "CompressedKVCache"]


def test_a_restored_exact_cache_states_its_reason(file):
    model = tiny("lfm2")
    cache = vl.make_cache(model)
    save_prompt_cache(str(file), cache)
    assert vl.report(vl.load_cache(file, model))["reason"].to_list() == vl.report(cache)["reason"].to_list()


# caches that mlx-lm makes itself


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "falcon_h1", "mamba2", "deepseek_v3", "gemma3n", "gpt_oss"])
def test_caches_of_mlx_lm_are_read_unchanged(family, file):
    model = tiny(family)
    cache = read_by(model, make_prompt_cache(model))
    save_prompt_cache(str(file), cache)
    assert np.array_equal(next_logits(model, vl.load_cache(file, model)), next_logits(model, cache))


@pytest.mark.parametrize("kind", ["quantized", "bounded"])
def test_other_kinds_of_keys_and_values_are_read(kind, model, file):
    cache = make_prompt_cache(model, max_kv_size=40) if kind == "bounded" else [QuantizedKVCache(64, 4) for _ in "ab"]
    save_prompt_cache(str(file), read_by(model, cache))
    assert vl.load_cache(file, model)[0].offset == len(IDS)


def test_batches_are_read(model, file):
    rows = [read_by(model, vl.make_cache(model), IDS[:count]) for count in (20, 30)]
    batch = [layers[0].merge(layers) for layers in zip(*rows, strict=True)]
    save_prompt_cache(str(file), batch)
    assert vl.load_cache(file, model, bits=4)[1].offset.tolist() == [20, 30]
    with pytest.raises(InputError, match="turboquant at 3.25 bits a value was asked for"):
        vl.load_cache(file, model, bits=3)
    with pytest.raises(InputError, match="made for the model llama"):
        vl.load_cache(file, tiny("llama", seed=1))


@pytest.mark.parametrize(
    ("other", "misfit"),
    [
        (lambda: tiny("llama", num_hidden_layers=3), "it has 3 layers and the model has 2"),
        (
            lambda: tiny("llama", num_key_value_heads=4),
            "keys of 4 heads, 64 wide, in float32, and the model's keys of 2",
        ),
        (
            lambda: tiny("llama", head_dim=32),
            "holds keys of 2 heads, 32 wide, in float32, and the model's keys of 2 heads",
        ),
        (lambda: tiny("mamba2"), "layer 0 holds states, and the model's keys and values"),
        (lambda: tiny("falcon_h1"), "layer 0 holds states and keys and values, and the model's keys and values"),
    ],
)
def test_a_file_of_another_model_of_mlx_lm_is_refused(other, misfit, model, file):
    other = other()
    save_prompt_cache(str(file), read_by(other, make_prompt_cache(other)))
    with pytest.raises(InputError, match=misfit):
        vl.load_cache(file, model)


def test_a_state_of_another_shape_and_another_dtype_are_refused(file):
    save_prompt_cache(str(file), read_by(model := tiny("mamba2"), make_prompt_cache(model)))
    with pytest.raises(InputError, match=r"layer 0 holds a state of \(2, 384\), and the model's a state of \(2, 256\)"):
        vl.load_cache(file, tiny("mamba2", state_size=16))
    save_prompt_cache(str(file), read_by(model := tiny("llama"), make_prompt_cache(model)))
    model.set_dtype(mx.bfloat16)
    with pytest.raises(InputError, match="in float32, and the model's keys of 2 heads, 64 wide, in bfloat16"):
        vl.load_cache(file, model)


# all layers together


def swapped(model):
    return read_by(model, vl.make_cache(model))[::-1]


def without_the_last(model):
    return read_by(model, vl.make_cache(model))[:-1]


def of_two_lengths(model):
    return [read_by(model, vl.make_cache(model), IDS[:count])[layer] for layer, count in enumerate((40, 50))]


def of_two_lengths_by_mlx_lm(model):
    return [read_by(model, make_prompt_cache(model), IDS[:count])[layer] for layer, count in enumerate((40, 50))]


@pytest.mark.parametrize(
    ("layers", "misfit"),
    [
        (swapped, "layer 1 is in the place of layer 0"),
        (without_the_last, "it has 1 layers and the model has 2"),
        (of_two_lengths, "layer 1 has read 50 tokens, and those before it 40"),
        (of_two_lengths_by_mlx_lm, "layer 1 has read 50 tokens, and those before it 40"),
    ],
)
def test_layers_that_do_not_belong_together_are_refused(layers, misfit, model, file):
    save_prompt_cache(str(file), layers(model))
    with pytest.raises(InputError, match=f"because {misfit}: load the model that it was made for, or make it again"):
        vl.load_cache(file, model)


def test_exact_layers_are_refused_if_compressed_ones_are_requested(model, file):
    save_prompt_cache(str(file), read_by(model, make_prompt_cache(model)))
    with pytest.raises(InputError, match="layers of other kinds than what was asked for"):
        vl.load_cache(file, model, bits=4)
