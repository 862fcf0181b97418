"""Caches get into mlx-lm's models through its own interfaces, layer by layer, and are removed again."""

import inspect
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import polars as pl
import pytest
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models import base, llama
from mlx_lm.models.cache import (
    CacheList,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
    trim_prompt_cache,
)

import veloxlab as vl
from tests.small_configs import WINDOW
from tests.tiny_models import stepwise, tiny
from veloxlab.cache.layer import CompressedKVCache
from veloxlab.cache.plan import LayerSettings
from veloxlab.errors import InputError
from veloxlab.measure.activations import capture_layers
from veloxlab.mlxlm import hooks, probe
from veloxlab.mlxlm.probe import own_cache

PROMPT = "List the first ten prime numbers, then explain why 1 is not one of them."


def chat(tokenizer, text: str) -> list[int]:
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)


def test_with_the_exact_codec_generation_is_mlx_lms_own(smollm2):
    model, tokenizer = smollm2
    prompt = chat(tokenizer, PROMPT)
    own, ours = make_prompt_cache(model), vl.make_cache(model, "none", window=16)
    texts = [mlx_lm.generate(model, tokenizer, prompt, max_tokens=12, prompt_cache=c) for c in (own, ours)]
    assert texts[0] == texts[1]
    assert ours[0].offset == own[0].offset


@pytest.fixture(scope="module")
def native(smollm2):
    """Return the ids of 60 tokens, and the model's logits with its own caches."""
    model, tokenizer = smollm2
    ids = tokenizer.encode(vl.texts.excerpt())[:60]
    return ids, stepwise(model, ids, make_prompt_cache(model), [60])


@pytest.mark.parametrize("chunks", [[60], [7, 20, 33], [54] + [1] * 6])
@pytest.mark.parametrize("settings", [{}, {"sinks": 0, "window": 0, "chunk": "codes"}])
def test_with_the_exact_codec_logits_are_native_in_any_chunking(smollm2, native, chunks, settings):
    model, (ids, native) = smollm2[0], native
    ours = stepwise(model, ids, vl.make_cache(model, "none", **settings), chunks)
    assert np.abs(ours - native).max() < 5e-3  # float32 sums of 30 layers in another order; logits reach 30


@pytest.mark.parametrize("chunks", [[7, 20, 33], [54] + [1] * 6])
def test_at_eight_bits_logits_stay_close(smollm2, native, chunks):
    model, (ids, native) = smollm2[0], native
    ours = stepwise(model, ids, vl.make_cache(model, bits=8, sinks=0, window=0, chunk="codes"), chunks)
    assert np.sqrt(np.mean((ours - native) ** 2)) < 0.1  # of logits with a deviation of about 4


def test_at_four_bits_generation_says_paris(smollm2):
    model, tokenizer = smollm2
    prompt = chat(tokenizer, "What is the capital of France?")
    pieces = mlx_lm.stream_generate(
        model, tokenizer, prompt, max_tokens=10, prompt_cache=vl.make_cache(model, bits=4), prefill_step_size=16
    )
    assert "Paris" in "".join(piece.text for piece in pieces)


def test_a_trimmed_cache_continues_as_without_the_dropped_tokens(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer.encode(vl.texts.excerpt())[:60]
    cache = vl.make_cache(model, bits=4, sinks=0, window=0)
    model(mx.array([ids[:45]]), cache=cache)
    assert trim_prompt_cache(cache, 15) == 15  # type: ignore[comparison-overlap]
    again = stepwise(model, ids[30:], cache, [30])
    fresh = vl.make_cache(model, bits=4, sinks=0, window=0)
    model(mx.array([ids[:30]]), cache=fresh)
    assert np.abs(again - stepwise(model, ids[30:], fresh, [30])).max() < 5e-3


def test_mlx_lms_own_quantized_cache_still_works_beside_ours(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer.encode(vl.texts.excerpt())[:40]
    vl.mlxlm.detach()
    before = stepwise(model, ids, [QuantizedKVCache(64, 8) for _ in model.layers], [40])
    vl.make_cache(model)
    after = stepwise(model, ids, [QuantizedKVCache(64, 8) for _ in model.layers], [40])
    assert np.array_equal(before, after)


HOOKS = ("scaled_dot_product_attention", "quantized_scaled_dot_product_attention")


def test_attaching_twice_is_attaching_once_and_detaching_restores():
    vl.mlxlm.detach()
    originals = [getattr(base, name) for name in HOOKS]
    hooks.attach()
    hooked = [getattr(base, name) for name in HOOKS]
    assert llama.scaled_dot_product_attention is hooked[0] is not originals[0]  # type: ignore[attr-defined]
    hooks.attach()
    assert [getattr(base, name) for name in HOOKS] == hooked
    for _ in range(2):
        vl.mlxlm.detach()
        assert [getattr(base, name) for name in HOOKS] == originals
        assert llama.scaled_dot_product_attention is originals[0]  # type: ignore[attr-defined]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_replacement_by_another_library_is_kept(monkeypatch, wrapped):
    model = tiny("llama")
    ids = list(range(30))
    native = stepwise(model, ids, make_prompt_cache(model), [20] + [1] * 10)
    if wrapped:  # it was attached later, and calls our function
        hooks.attach()
    else:
        vl.mlxlm.detach()
    calls = []

    def theirs(*args, inner=base.scaled_dot_product_attention, **kw):
        calls.append(1)
        return inner(*args, **kw)

    monkeypatch.setattr(base, HOOKS[0], theirs)
    monkeypatch.setattr(llama, HOOKS[0], theirs)
    ours = stepwise(model, ids, vl.make_cache(model, "none"), [20] + [1] * 10)
    assert np.allclose(ours, native, atol=2e-4)
    assert np.array_equal(stepwise(model, ids, make_prompt_cache(model), [20] + [1] * 10), native)
    assert calls
    vl.mlxlm.detach()
    assert base.scaled_dot_product_attention is theirs
    monkeypatch.undo()
    vl.mlxlm.detach()
    assert np.array_equal(stepwise(model, ids, make_prompt_cache(model), [20] + [1] * 10), native)


def test_mlx_lm_still_routes_caches_with_bits_through_the_replaced_name(monkeypatch):
    """If this fails, mlx-lm has moved the functions that `hooks` relies on."""
    vl.mlxlm.detach()
    seen = []
    monkeypatch.setattr(base, HOOKS[1], lambda *args, **kw: seen.append(args[1]) or args[0])
    cache = CompressedKVCache.__new__(CompressedKVCache)
    cache.bits, cache.group_size = 0, 0
    handle = object()
    base.scaled_dot_product_attention(mx.zeros((1, 1, 1, 4)), handle, handle, cache, scale=1.0, mask=None)
    assert seen == [handle]
    assert list(inspect.signature(base.scaled_dot_product_attention).parameters) == [
        "queries", "keys", "values", "cache", "scale", "mask", "sinks",
    ]  # fmt: skip
    assert llama.scaled_dot_product_attention is base.scaled_dot_product_attention  # type: ignore[attr-defined] # imported by name


def test_sliding_layers_are_compressed_unless_exact_is_set():
    model = tiny("gemma3_text")
    assert [type(layer) for layer in vl.make_cache(model)] == [CompressedKVCache] * 3
    cache = vl.make_cache(model, "none", sliding="exact")
    kinds = [RotatingKVCache, RotatingKVCache, CompressedKVCache]
    assert all(isinstance(layer, kind) for layer, kind in zip(cache, kinds, strict=True))
    report = vl.report(cache).filter(pl.col("layer").is_not_null())
    assert report["path"].to_list() == ["own", "own", "codes"]
    assert report["reason"][0] == f"its window of {WINDOW} tokens is left exact, as asked"
    ids = list(range(40))
    native = stepwise(model, ids, own_cache(model), [30] + [1] * 10)
    assert np.allclose(stepwise(model, ids, cache, [30] + [1] * 10), native, atol=2e-4)
    plan = vl.Plan.uniform(model, "none", bits=16, sliding="exact")
    assert [type(layer) for layer in vl.make_cache(model, plan)] == [type(layer) for layer in cache]


@pytest.mark.parametrize("method", ["turboquant", "none"])
@pytest.mark.parametrize(("name", "side"), [("bits", "Keys"), ("key_bits", "Keys"), ("value_bits", "Values")])
def test_zero_bits_are_refused_and_do_not_mean_the_default(name, side, method):
    with pytest.raises(InputError, match=f"{side} at bits=0 are out of range"):
        vl.make_cache(tiny("llama"), method, **{name: 0})


@pytest.mark.parametrize("draft", [1, 4])
@pytest.mark.parametrize("method", ["none", "turboquant"])
def test_drafts_of_another_model_are_tried_and_trimmed(draft, method):
    """Speculative decoding gives the tokens of decoding; it trims the refused drafts."""
    model, drafting = tiny("llama"), tiny("llama", seed=1, num_hidden_layers=1)
    settings: dict[str, Any] = {"bits": 16 if method == "none" else 8, "sinks": 2, "window": 16}
    prompt = mx.array(list(range(50)))
    plain = [
        t for t, _ in generate_step(prompt, model, max_tokens=40, prompt_cache=vl.make_cache(model, method, **settings))
    ]
    both = vl.make_cache(model, method, **settings) + vl.make_cache(drafting, method, **settings)
    found = [
        t for t, *_ in speculative_generate_step(
            prompt, model, drafting, num_draft_tokens=draft, max_tokens=40, prompt_cache=both
        )
    ]  # fmt: skip
    assert found == plain
    assert both[0].offset == 50 + 39  # the last token was not fed


@pytest.mark.parametrize(("family", "as_plain"), [("mistral", True), ("gpt_oss", False), ("gemma3_text", False)])
def test_drafts_after_a_full_sliding_window_give_mlx_lms_own_tokens(family, as_plain):
    """In some families they differ from decoding alone: mlx-lm's window cannot restore dropped tokens."""
    model, drafting = tiny(family), tiny("llama", seed=1, num_hidden_layers=1)
    prompt = mx.array(list(range(2 * WINDOW)))

    def drafted(cache: list[Any]) -> list[int]:
        both = cache + own_cache(drafting)
        found = speculative_generate_step(prompt, model, drafting, num_draft_tokens=3, max_tokens=12, prompt_cache=both)
        return [token for token, *_ in found]

    own = drafted(own_cache(model))
    assert drafted(vl.make_cache(model, "none", sinks=2, window=8)) == own
    plain = [token for token, _ in generate_step(prompt, model, max_tokens=12, prompt_cache=own_cache(model))]
    assert (own == plain) is as_plain


@pytest.mark.parametrize("chunks", [[20, 33, *[1] * 40, 5, 3], [90, *[1] * 20], [1] * 60])
def test_a_rotating_cache_equals_mlx_lms_own(chunks):
    """With ``max_kv_size`` the first and the newest tokens stay, for any chunks."""
    model = tiny("llama")
    ids = [7 * i % 90 for i in range(sum(chunks))]
    rotating = [
        RotatingKVCache(32, keep=4) for _ in model.layers
    ]  # as mlx-lm makes them for a model without its own caches
    native = stepwise(model, ids, rotating, chunks)
    cache = vl.make_cache(model, "none", sinks=4, window=8, max_kv_size=32)
    assert np.allclose(stepwise(model, ids, cache, chunks), native, atol=2e-4)
    lossy = vl.make_cache(model, bits=4, max_kv_size=32)
    stepwise(model, ids, lossy, chunks)
    assert lossy[0].size() == 32
    assert lossy[0].nbytes < cache[0].nbytes


def test_generation_continues_past_the_trained_length():
    model = tiny("llama", max_position_embeddings=64)
    native, ours = (stepwise(model, [i % 90 for i in range(200)], c, [100] + [1] * 100) for c in (
        own_cache(model), vl.make_cache(model, "none", sinks=2, window=16)
    ))  # fmt: skip
    assert np.allclose(ours, native, atol=2e-4)


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("length", [1, 17, 2048])
def test_any_batch_and_length_of_one_call(batch, length):
    model = tiny("llama", num_hidden_layers=1)
    ids = mx.array([[(3 * i + b) % 90 for i in range(length)] for b in range(batch)])
    after = mx.array([[b + 1] for b in range(batch)])
    rows = []
    for cache in (own_cache(model), vl.make_cache(model, "none", sinks=2, window=16)):
        model(ids, cache=cache)
        rows.append(np.array(model(after, cache=cache)))
    assert np.allclose(rows[0], rows[1], atol=2e-4)


def test_thirty_two_thousand_tokens_in_one_layer():
    """Too many for the model's own code on a CPU, which computes all logits of a chunk: 2,048 at a time."""
    model = tiny("llama", num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    count = 2**15
    ids = [(7 * i * i + i) % 90 for i in range(count + 3)]
    rows = []
    for cache in (own_cache(model), vl.make_cache(model, bits=8)):
        for start in range(0, count, 2048):
            model(mx.array([ids[start : start + 2048]]), cache=cache)
            mx.eval([c.state for c in cache])
        rows.append(np.array(model(mx.array([ids[count:]]), cache=cache)))
        assert cache[0].offset == count + 3
    assert np.sqrt(np.mean((rows[0] - rows[1]) ** 2)) < 0.01 * rows[0].std()  # 8 bits: 0.5 % of a vector


def test_the_dry_run_computes_nothing_and_is_done_once(smollm2):
    model, _ = smollm2
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    facts = probe.probe(model)
    assert probe.probe(model) is facts
    assert mx.get_peak_memory() - before < 2**20
    assert (facts[0].kv_heads, facts[0].key_dim, facts[0].value_dim) == (3, 64, 64)


def test_the_report_adds_up_to_the_live_buffers(smollm2):
    model, tokenizer = smollm2
    cache = vl.make_cache(model, bits=3, sinks=0, window=0)
    model(mx.array([tokenizer.encode(vl.texts.excerpt())[:256]]), cache=cache)
    mx.eval([layer.state for layer in cache])
    report = vl.report(cache)
    layers, shared = report.filter(pl.col("layer").is_not_null()), report.filter(pl.col("path") == "shared")
    assert layers["held_bytes"].sum() == sum(a.nbytes for layer in cache for a in layer.buffers)
    assert layers["held_bytes"].sum() == 30 * 256 * 3 * 2 * 64 * 3.25 / 8
    assert layers["fp16_bytes"].sum() == 30 * 256 * 3 * 2 * 64 * 2
    assert layers["key_bits"].unique().to_list() == [3.25]
    assert 0 < shared["held_bytes"].item() < 2**20


def test_a_report_of_mlx_lms_caches_counts_their_bytes_and_sixteen_bits_beside(smollm2):
    model, tokenizer = smollm2
    for cache in ([KVCache() for _ in model.layers], [QuantizedKVCache(64, 4) for _ in model.layers]):
        model(mx.array([tokenizer.encode(vl.texts.excerpt())[:256]]), cache=cache)
        report = vl.report(cache)
        assert report["fp16_bytes"].sum() == 30 * 256 * 3 * 2 * 64 * 2
        assert report["held_bytes"].sum() == sum(layer.nbytes for layer in cache)
        assert report["tokens"].unique().to_list() == [256]


def test_a_model_that_cannot_run_is_refused_in_a_sentence():
    class Broken(nn.Module):
        layers = (1,)

        def __call__(self, tokens, cache):
            raise TypeError("no such thing")

    with pytest.raises(InputError, match="does not run on one token with its own caches: no such thing"):
        probe.probe(Broken())


class TwoCaches(nn.Module):
    """A model whose only layer attends twice, with a cache for each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.layers = [nn.Linear(64, 64)]

    def __call__(self, ids: mx.array, cache: list[CacheList]) -> mx.array:
        x = self.embed(ids)
        for one in cache[0].caches:
            heads = mx.unflatten(self.layers[0](x), -1, (4, 16)).swapaxes(1, 2)
            mask = base.create_attention_mask(x, one)
            keys, values = one.update_and_fetch(heads, -heads)
            out = base.scaled_dot_product_attention(heads, keys, values, cache=one, scale=0.25, mask=mask)
            x = x + mx.flatten(out.swapaxes(1, 2), -2)
        return self.embed.as_linear(x)

    def make_cache(self) -> list[CacheList]:
        return [CacheList(KVCache(), KVCache())]


class Numbers:
    """A tokenizer of `TwoCaches`: a token for each letter."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 32 for letter in text]


def test_two_caches_of_a_layer_count_as_two_layers(tmp_path):
    """Plans, calibrations and captures count each: each has its own codecs."""
    model, ids = TwoCaches(), list(range(1, 31))
    cache = vl.make_cache(model, "none")
    assert vl.report(cache)["layer"].to_list()[:2] == [0, 1]
    native = stepwise(model, ids, model.make_cache(), [30])
    assert np.allclose(stepwise(model, ids, cache, [20, 10]), native, atol=1e-4)  # float32 sums in another order
    first, second = capture_layers(model, ids)
    wanted = mx.unflatten(model.layers[0](model.embed(mx.array([ids]))), -1, (4, 16)).swapaxes(1, 2)
    assert np.allclose(first.keys, wanted, atol=1e-6)
    assert (first.layer, second.layer) == (0, 1)
    planned = vl.make_cache(model, vl.Plan.uniform(model, bits=2).with_layer(1, key_bits=8))
    assert vl.report(planned)["key_bits"].to_list()[:2] == [3.0, 9.0]  # and a scale of 16 bits for 16 numbers
    fitted = vl.calibrate(model, Numbers(), "spectralquant", bits=2, tokens=128, folder=tmp_path)
    own = vl.make_cache(model, "spectralquant", bits=2, calibration=fitted)[0].caches
    assert [one.key_codec for one in own] == [fitted.codecs[layer, "keys", 2] for layer in (0, 1)]


def test_mlx_lms_server_makes_no_batches_for_a_model_without_them():
    """It checks each cache for ``merge``: Llama 4's own have none, and its attention takes one position."""
    batched = [[hasattr(cache, "merge") for cache in make(tiny("llama4"))] for make in (own_cache, vl.make_cache)]
    assert batched == [[False] * 3 + [True]] * 2


def test_the_mask_of_a_chunked_layer_is_valid_for_other_layers():
    model = tiny("llama4")
    cache = vl.make_cache(model)
    stepwise(model, list(range(60)), cache, [60])
    assert cache[0].make_mask(5) == cache[3].make_mask(5) == "causal"  # mlx-vlm takes the first layer's for the last


def test_a_saved_cache_with_exchanged_parts_is_refused(tmp_path):
    model, file = TwoCaches(), tmp_path / "two.safetensors"
    cache = vl.make_cache(model, bits=2)
    stepwise(model, list(range(1, 31)), cache, [30])
    vl.save_cache(file, cache)
    assert [slot.offset for slot in vl.load_cache(file, model)[0].caches] == [30, 30]
    vl.save_cache(file, [CacheList(*reversed(cache[0].caches))])
    with pytest.raises(InputError, match="layer 1 is in the place of layer 0"):
        vl.load_cache(file, model)


@dataclass(frozen=True)
class Foreign:
    """A user's own plan that does not check the model."""

    sinks: int = 2
    window: int = 8
    chunk: str = "exact"
    sliding: str = "compressed"
    calibrations: dict = field(default_factory=dict)

    def settings_for(self, model):
        return [LayerSettings("turboquant", 4, "turboquant", 2) for _ in model.layers]


def test_a_plan_without_a_check_of_the_model_makes_its_cache():
    cache = vl.make_cache(tiny("llama"), Foreign())
    assert [(one.key_codec.bits, one.value_codec.bits, one.window) for one in cache] == [(4, 2, 8)] * 2
