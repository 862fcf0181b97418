"""Models that store latents (MLA): the latent is read packed, and the rotary part of the keys is decoded beside it."""

from typing import Any

import mlx.core as mx
import numpy as np
import polars as pl
import pytest
from mlx_lm.models.cache import save_prompt_cache

import veloxlab as vl
from tests.families import CHUNKS, IDS, SOME_EXACT, as_arrays
from tests.test_batch import LENGTHS, WANTED, alone, together
from tests.test_without_queries import Letters
from tests.tiny_models import stepwise, tiny
from veloxlab.cache.layer import CompressedKVCache
from veloxlab.errors import InputError
from veloxlab.mlxlm.probe import own_cache, slots_of
from veloxlab.mlxlm.quantized import quantized_cache

LATENTS = ("deepseek_v3", "glm4_moe_lite", "mistral4", "kimi_linear", "longcat_flash")


@pytest.fixture(params=LATENTS)
def model(request):
    return tiny(request.param)


def packed(cache: list[Any]) -> list[CompressedKVCache]:
    return [slot for slot in slots_of(cache) if isinstance(slot, CompressedKVCache)]


def test_latents_are_read_packed_and_logits_stay(model):
    """A prompt in two parts, single tokens, and drafts of several."""
    native = stepwise(model, IDS, own_cache(model), CHUNKS)
    exact = vl.make_cache(model, "none", **SOME_EXACT)
    assert {slot.path for slot in packed(exact)} == {"latents"}
    unit = native.std()
    assert np.abs(stepwise(model, IDS, exact, CHUNKS) - native).max() < 1e-4 * unit  # float32 sums in another order
    errors = {}
    for bits in (8, 4):
        coded = stepwise(model, IDS, vl.make_cache(model, bits=bits, sinks=0, window=0, chunk="codes"), CHUNKS)
        decoded = as_arrays(vl.make_cache(model, bits=bits, sinks=0, window=0, chunk="codes"))
        assert np.abs(coded - stepwise(model, IDS, decoded, CHUNKS)).max() < 1e-2 * unit  # a step of a later code
        errors[bits] = np.sqrt(np.mean((coded - native) ** 2)) / unit
    assert errors[8] < 0.06  # as for all families: 0.5 % of a vector
    assert errors[4] < 0.6  # a step is 16 times wider


def test_each_sequence_of_a_batch_gets_the_tokens_it_gets_alone(model):
    prompts = [np.random.default_rng(n).integers(1, 90, size=n).tolist() for n in LENGTHS]
    caches = [vl.make_cache(model, **SOME_EXACT) for _ in range(2 * len(prompts))]
    expected = [alone(model, p, n, c) for p, n, c in zip(prompts, WANTED, caches[: len(prompts)], strict=True)]
    assert together(model, prompts, WANTED, caches[len(prompts) :]) == expected


def test_a_saved_cache_continues_the_same(model, tmp_path):
    cache = vl.make_cache(model, **SOME_EXACT)
    stepwise(model, IDS[:40], cache, [40])
    save_prompt_cache(str(tmp_path / "latents.safetensors"), cache)
    read = vl.load_cache(tmp_path / "latents.safetensors", model)
    ahead = [stepwise(model, IDS[40:], some, [1] * len(IDS[40:])) for some in (cache, read)]
    assert np.array_equal(*ahead)


def test_the_newest_tokens_can_be_dropped():
    model = tiny("deepseek_v3")
    cache = vl.make_cache(model, "none", **SOME_EXACT)
    stepwise(model, [*IDS[:40], 3, 4, 5], cache, [40, 1, 1, 1])
    assert [slot.trim(3) for slot in cache] == [3, 3]
    native = stepwise(model, IDS, own_cache(model), CHUNKS)
    assert np.allclose(stepwise(model, IDS[40:], cache, [1] * len(IDS[40:])), native[40:], atol=2e-4)


def test_four_bits_take_less_than_three_tenths_of_the_models_own_bytes():
    model = tiny("deepseek_v3", num_hidden_layers=1, **{"kv_lora_rank": 512, "qk_rope_head_dim": 64})  # as real ones
    model.set_dtype(mx.bfloat16)
    native, ours = own_cache(model), vl.make_cache(model)
    for cache in (native, ours):
        model(mx.array([[7 * i % 90 for i in range(2048)]]), cache=cache)
    assert native[0].nbytes == 2048 * (512 + 64) * 2
    assert ours[0].nbytes <= 0.3 * native[0].nbytes
    report = vl.report(ours).filter(pl.col("path") == "latents")
    assert report["held_bytes"].to_list() == [ours[0].nbytes]
    assert report["fp16_bytes"].to_list() == [native[0].nbytes]
    assert report.select("key_bits", "value_bits").row(0) == (4 + 16 / 512, 4 + 16 / 64)


def test_measurements_of_latents_are_labelled():
    model = tiny("deepseek_v3")
    seen = vl.capture(model, Letters(), tokens=64)
    assert [(s.queries, s.rope, s.keys.shape[1:], s.values.shape[-1]) for s in seen.layers] == [
        (None, None, (1, 64, 16), 32)
    ] * 2
    with pytest.raises(InputError, match="in layer 0 attention reads the codes of the latent"):
        quantized_cache(model, 4)
    assert vl.measure.plan_memory(model, context=1000).filter(pl.col("cache") == "turboquant K4 V4").height


def test_the_laboratory_opens():
    lab = vl.Lab(tiny("deepseek_v3"), Letters(), tokens=64, window=8)
    try:
        assert lab.wait(120)
        assert (lab.metric, lab.worker.last_error) == ("rel_mse", None)
    finally:
        lab.worker.close()
