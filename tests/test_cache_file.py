"""A saved cache is restored unchanged, in another process too, or is refused with a sentence."""

import json
import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import CacheList, load_prompt_cache, save_prompt_cache

import veloxlab as vl
from tests.letters import Letters
from tests.tiny_models import tiny
from veloxlab import store
from veloxlab.cache import saved
from veloxlab.cache.layer import CompressedKVCache
from veloxlab.codecs import METHODS
from veloxlab.errors import InputError
from veloxlab.mlxlm import identity

IDS = list(range(1, 90))
SOME_EXACT = {"sinks": 2, "window": 8}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "prompt.safetensors"


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


def filled(model, *arguments, **settings):
    cache = vl.make_cache(model, *arguments, **SOME_EXACT | settings)
    model(mx.array([IDS]), cache=cache)
    mx.eval([c.state for c in cache])
    return cache


def next_logits(model, cache) -> np.ndarray:
    return np.array(model(mx.array([[7, 8]]), cache=cache))


@pytest.mark.parametrize("method", METHODS)
def test_a_cache_of_every_method_is_restored_and_continues_the_same(model, file, method, calibrations):
    bits = 16 if method == "none" else 4
    fitted = None
    if METHODS[method].calibrated:
        text = "".join(chr(32 + i * i % 90) for i in range(400))
        fitted = vl.calibrate(model, Letters(), method, text, bits=bits, tokens=400, folder=calibrations)
    cache = filled(model, method, bits=bits, calibration=fitted)
    save_prompt_cache(str(file), cache, {"said": "so"})
    loaded, metadata = load_prompt_cache(str(file), return_metadata=True)
    assert metadata == {"said": "so"}
    assert [c.nbytes for c in loaded] == [c.nbytes for c in cache]
    assert np.array_equal(next_logits(model, loaded), next_logits(model, cache))
    again = vl.load_cache(file, model, method, bits=bits, calibration=fitted)
    assert again[0].offset == len(IDS)


@pytest.mark.parametrize("family", ["gemma3_text", "falcon_h1", "gemma4_text", "lfm2"])
def test_layers_of_other_kinds_are_restored_with_ours(family, file):
    model = tiny(family)
    cache = filled(model)
    save_prompt_cache(str(file), cache)
    loaded = vl.load_cache(file, model)
    assert [type(c) for c in loaded] == [type(c) for c in cache]
    assert any(isinstance(c, CacheList | CompressedKVCache) for c in loaded)
    assert np.array_equal(next_logits(model, loaded), next_logits(model, cache))


def test_an_empty_cache_is_restored_empty(model, file):
    save_prompt_cache(str(file), vl.make_cache(model))
    loaded = vl.load_cache(file, model)
    assert all(c.empty() for c in loaded)
    assert np.array_equal(next_logits(model, loaded), next_logits(model, vl.make_cache(model)))


def test_bfloat16_is_restored(file):
    model = tiny("llama")
    model.set_dtype(mx.bfloat16)
    cache = filled(model)
    save_prompt_cache(str(file), cache)
    loaded = vl.load_cache(file, model)
    assert loaded[0].recent.buffers["keys/values"].dtype == mx.bfloat16
    assert [c.nbytes for c in loaded] == [c.nbytes for c in cache]


def test_online_codecs_are_restored_as_fitted(model, file):
    cache = filled(model, "polarquant", codebook="online")
    save_prompt_cache(str(file), cache)
    loaded = vl.load_cache(file, model, "polarquant", codebook="online")
    assert loaded[0].key_codec == cache[0].key_codec
    assert np.array_equal(next_logits(model, loaded), next_logits(model, cache))


def test_another_process_continues_the_same(model, file):
    cache = filled(model)
    save_prompt_cache(str(file), cache)
    program = (
        "import veloxlab as vl, sys, json, mlx.core as mx; from tests.tiny_models import tiny;"
        "cache = vl.load_cache(sys.argv[1], model := tiny('llama'));"
        "print(json.dumps(model(mx.array([[7, 8]]), cache=cache)[0, -1].tolist()))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=True)
    assert np.allclose(json.loads(done.stdout), next_logits(model, cache)[0, -1], atol=1e-5)


# refused files ------------------------------------------------------------------------------------------------------


def test_another_model_is_named(model, file):
    save_prompt_cache(str(file), filled(model))
    other = tiny("llama", seed=1)
    with pytest.raises(
        InputError, match=r"made for the model llama of 2 layers, \w{16}, and this is llama of 2 layers"
    ):
        vl.load_cache(file, other)


def test_mlx_lms_own_reader_refuses_the_cache_of_a_model_that_is_not_loaded(model, file, monkeypatch):
    save_prompt_cache(str(file), filled(model))
    other = tiny("qwen3")
    monkeypatch.setattr(identity, "models_here", {id(other): other})
    with pytest.raises(InputError, match=r"saved with the model llama of 2 layers, \w+, and the model here is qwen3"):
        load_prompt_cache(str(file))
    again = tiny("llama")  # the same weights, in a model without a cache so far
    assert vl.load_cache(file, again)[0].offset == len(IDS)
    monkeypatch.setattr(identity, "models_here", {})  # without any known model, the check is skipped
    assert load_prompt_cache(str(file))[0].offset == len(IDS)


def test_another_method_or_width_is_named(model, file):
    save_prompt_cache(str(file), filled(model, bits=4))
    with pytest.raises(InputError, match=r"holds turboquant at 4.25 bits a value in layer 0, and rabitq at"):
        vl.load_cache(file, model, "rabitq", bits=4)
    with pytest.raises(InputError, match=r"turboquant at 3.25 bits a value was asked for"):
        vl.load_cache(file, model, bits=3)
    with pytest.raises(InputError, match="another calibration of turboquant, or other options"):
        vl.load_cache(file, model, bits=4, seed=1)


def test_another_calibration_is_named(model, file, tmp_path):
    texts = ["".join(chr(32 + i * k % 90) for i in range(400)) for k in (7, 11)]
    first, second = (vl.calibrate(model, Letters(), "spectralquant", t, tokens=400, folder=tmp_path) for t in texts)
    save_prompt_cache(str(file), filled(model, "spectralquant", calibration=first))
    assert vl.load_cache(file, model, "spectralquant", calibration=first)
    with pytest.raises(InputError, match=r"another calibration of spectralquant, .* \(layer 0 differs\)"):
        vl.load_cache(file, model, "spectralquant", calibration=second)


def test_another_format_is_named(model, file, monkeypatch):
    cache = filled(model)
    with monkeypatch.context() as patch:
        patch.setattr(saved, "FORMAT", "veloxlab cache 0")
        save_prompt_cache(str(file), cache)
    with pytest.raises(InputError, match="it is not of the format 'veloxlab cache 2'"):
        load_prompt_cache(str(file))


def test_another_version_of_the_method_is_named_and_versions_of_others_are_ignored(model, file, monkeypatch):
    save_prompt_cache(str(file), filled(model))
    monkeypatch.setitem(METHODS, "rabitq", replace(METHODS["rabitq"], version=2))
    assert len(load_prompt_cache(str(file))) == 2
    monkeypatch.setitem(METHODS, "turboquant", replace(METHODS["turboquant"], version=2))
    with pytest.raises(
        InputError, match=r"\(it has codes of turboquant of version 1, and here they are of version 2\)"
    ):
        load_prompt_cache(str(file))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_file_that_is_cut_is_refused(model, file, share):
    save_prompt_cache(str(file), filled(model))
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match="cannot be read"):
        vl.load_cache(file, model)


def test_every_changed_byte_of_the_arrays_is_detected(model, file):
    save_prompt_cache(str(file), filled(model))
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    for place in np.random.default_rng(0).integers(start, len(content), size=20):
        content[place] ^= 1
        file.write_bytes(content)
        with pytest.raises(InputError, match="cannot be read"):
            vl.load_cache(file, model)
        content[place] ^= 1
    file.write_bytes(content)
    vl.load_cache(file, model)


def test_missing_files_and_other_files_are_named(model, file, tmp_path):
    with pytest.raises(InputError, match=r"prompt.safetensors cannot be read \(there is no such file\)"):
        vl.load_cache(file, model)
    file.write_text("no cache at all")
    with pytest.raises(InputError, match="cannot be read"):
        vl.load_cache(file, model)
    mx.save_safetensors(str(file), {"weight": mx.zeros(3)})
    with pytest.raises(InputError, match="cannot be read"):
        vl.load_cache(file, model)


def test_reading_state_for_evaluation_computes_no_checksum(model, monkeypatch):
    cache = filled(model)
    checksums = []
    monkeypatch.setattr(store, "digest", lambda *given: checksums.append(given) or "")
    states = [c.state for c in cache]
    mx.eval(states)
    assert not checksums
    assert all(json.loads("".join(iter(state[-1])))["sha256"] == "" for state in states)  # as when it is saved
    assert len(checksums) == len(cache)
