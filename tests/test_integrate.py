"""Caches get into mlx-lm's models by its own doors, layer by layer, and out again."""

import mlx.core as mx
import mlx_lm
import numpy as np
import polars as pl
import pytest
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache, make_prompt_cache, trim_prompt_cache

import veloxlab as vl
from tests.tiny_models import tiny
from veloxlab import integrate
from veloxlab.cache import CompressedKVCache
from veloxlab.errors import InputError

PROMPT = "List the first ten prime numbers, then explain why 1 is not one of them."


def chat(tokenizer, text: str) -> list[int]:
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)


def stepwise(model, ids: list[int], cache, chunks: list[int]) -> np.ndarray:
    """Logits of all ``ids``, fed in ``chunks``."""
    rows, start = [], 0
    for count in chunks:
        rows.append(np.array(model(mx.array([ids[start : start + count]]), cache=cache)[0].astype(mx.float32)))
        start += count
    return np.concatenate(rows)


def test_with_the_exact_codec_generation_is_mlx_lms_own(smollm2):
    model, tokenizer = smollm2
    prompt = chat(tokenizer, PROMPT)
    own, ours = make_prompt_cache(model), vl.make_cache(model, "none")
    texts = [mlx_lm.generate(model, tokenizer, prompt, max_tokens=40, prompt_cache=c) for c in (own, ours)]
    assert texts[0] == texts[1]
    assert ours[0].offset == own[0].offset


@pytest.mark.parametrize("chunks", [[60], [7, 20, 33], [48] + [1] * 12])
@pytest.mark.parametrize("settings", [{}, {"sinks": 0, "window": 0, "chunk": "codes"}])
def test_with_the_exact_codec_logits_are_native_in_any_chunking(smollm2, chunks, settings):
    model, tokenizer = smollm2
    ids = tokenizer.encode(vl.excerpt())[:60]
    native = stepwise(model, ids, make_prompt_cache(model), [60])
    ours = stepwise(model, ids, vl.make_cache(model, "none", **settings), chunks)
    assert np.abs(ours - native).max() < 5e-3  # float32 sums of 30 layers in another order; logits reach 30


@pytest.mark.parametrize("chunks", [[7, 20, 33], [48] + [1] * 12])
def test_at_eight_bits_logits_stay_close(smollm2, chunks):
    model, tokenizer = smollm2
    ids = tokenizer.encode(vl.excerpt())[:60]
    native = stepwise(model, ids, make_prompt_cache(model), [60])
    ours = stepwise(model, ids, vl.make_cache(model, bits=8, sinks=0, window=0, chunk="codes"), chunks)
    assert np.sqrt(np.mean((ours - native) ** 2)) < 0.1  # of logits with a deviation of about 4


def test_at_four_bits_generation_says_paris(smollm2):
    model, tokenizer = smollm2
    prompt = chat(tokenizer, "What is the capital of France?")
    pieces = mlx_lm.stream_generate(
        model, tokenizer, prompt, max_tokens=20, prompt_cache=vl.make_cache(model, bits=4), prefill_step_size=16
    )
    assert "Paris" in "".join(piece.text for piece in pieces)


def test_a_trimmed_cache_continues_as_if_the_rest_had_never_been(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer.encode(vl.excerpt())[:120]
    cache = vl.make_cache(model, bits=4, sinks=0, window=0)
    model(mx.array([ids[:90]]), cache=cache)
    assert trim_prompt_cache(cache, 30) == 30
    again = stepwise(model, ids[60:120], cache, [60])
    fresh = vl.make_cache(model, bits=4, sinks=0, window=0)
    model(mx.array([ids[:60]]), cache=fresh)
    assert np.abs(again - stepwise(model, ids[60:120], fresh, [60])).max() < 5e-3


def test_mlx_lms_own_quantized_cache_still_works_beside_ours(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer.encode(vl.excerpt())[:40]
    vl.detach()
    before = stepwise(model, ids, [QuantizedKVCache(64, 8) for _ in model.layers], [40])
    vl.make_cache(model)
    after = stepwise(model, ids, [QuantizedKVCache(64, 8) for _ in model.layers], [40])
    assert np.array_equal(before, after)


def test_attaching_twice_is_attaching_once_and_detaching_restores():
    vl.detach()
    original = base.quantized_scaled_dot_product_attention
    integrate.attach()
    hooked = base.quantized_scaled_dot_product_attention
    integrate.attach()
    assert base.quantized_scaled_dot_product_attention is hooked is not original
    vl.detach()
    assert base.quantized_scaled_dot_product_attention is original
    vl.detach()
    assert base.quantized_scaled_dot_product_attention is original


def test_mlx_lm_still_routes_caches_with_bits_through_the_name_we_replace(monkeypatch):
    """The canary: when it fails, mlx-lm has moved the hook that `integrate` relies on."""
    seen = []
    monkeypatch.setattr(base, integrate._HOOK, lambda *args, **kw: seen.append(args[1]) or args[0])
    cache = CompressedKVCache.__new__(CompressedKVCache)
    cache.bits, cache.group_size = 0, 0
    handle = object()
    base.scaled_dot_product_attention(mx.zeros((1, 1, 1, 4)), handle, handle, cache, scale=1.0, mask=None)
    assert seen == [handle]


@pytest.mark.parametrize(
    ("family", "config", "path"),
    [
        ("llama", {}, "codes"),
        ("qwen2", {}, "codes"),
        ("qwen3", {"max_position_embeddings": 512, "rope_theta": 1e4, "tie_word_embeddings": True}, "codes"),
        ("gemma", {}, "codes"),
        ("gemma2", {"query_pre_attn_scalar": 64}, "arrays"),  # softcaps its logits by its own arithmetic
    ],
)
def test_each_family_takes_its_path_and_keeps_its_logits(family, config, path):
    model = tiny(family, **config)
    cache = vl.make_cache(model, "none", sinks=2, window=8)
    report = vl.report(cache).filter(pl.col("layer").is_not_null())
    assert report["path"].unique().to_list() == [path]
    ids = list(range(50))
    native = stepwise(model, ids, make_prompt_cache(model), [20, 20] + [1] * 10)
    ours = stepwise(model, ids, cache, [20, 20] + [1] * 10)
    assert np.allclose(ours, native, atol=2e-4)


def test_layers_without_plain_keys_and_values_keep_the_models_own_cache():
    model = tiny(
        "gemma3_text", num_hidden_layers=6, sliding_window=16, sliding_window_pattern=3, query_pre_attn_scalar=64
    )
    cache = vl.make_cache(model, "none")
    kinds = [type(layer) for layer in cache]
    assert kinds == [RotatingKVCache, RotatingKVCache, CompressedKVCache] * 2
    report = vl.report(cache).filter(pl.col("layer").is_not_null())
    assert report["reason"].to_list()[:3] == [
        "the model's own RotatingKVCache",
        "the model's own RotatingKVCache",
        "attention reads the codes",
    ]
    ids = list(range(40))
    native = stepwise(model, ids, make_prompt_cache(model), [30] + [1] * 10)
    assert np.allclose(stepwise(model, ids, cache, [30] + [1] * 10), native, atol=2e-4)


def test_the_dry_run_computes_nothing_and_is_done_once(smollm2):
    model, _ = smollm2
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    facts = integrate.probe(model)
    assert integrate.probe(model) is facts
    assert mx.get_peak_memory() - before < 2**20
    assert (facts[0].kv_heads, facts[0].key_dim, facts[0].value_dim) == (3, 64, 64)


def test_the_report_adds_up_to_the_live_buffers(smollm2):
    model, tokenizer = smollm2
    cache = vl.make_cache(model, bits=3, sinks=0, window=0)
    model(mx.array([tokenizer.encode(vl.excerpt())[:1024]]), cache=cache)
    mx.eval([layer.state for layer in cache])
    report = vl.report(cache)
    layers, shared = report.filter(pl.col("layer").is_not_null()), report.filter(pl.col("path") == "shared")
    assert layers["held_bytes"].sum() == sum(a.nbytes for layer in cache for a in layer.buffers)
    assert layers["held_bytes"].sum() == 30 * 1024 * 3 * 2 * 64 * 3.25 / 8
    assert layers["fp16_bytes"].sum() == 30 * 1024 * 3 * 2 * 64 * 2
    assert layers["key_bits"].unique().to_list() == [3.25]
    assert 0 < shared["held_bytes"].item() < 2**20


def test_a_report_of_mlx_lms_caches_counts_their_bytes_and_sixteen_bits_beside(smollm2):
    model, tokenizer = smollm2
    for cache in ([KVCache() for _ in model.layers], [QuantizedKVCache(64, 4) for _ in model.layers]):
        model(mx.array([tokenizer.encode(vl.excerpt())[:256]]), cache=cache)
        report = vl.report(cache)
        assert report["fp16_bytes"].sum() == 30 * 256 * 3 * 2 * 64 * 2
        assert report["held_bytes"].sum() == sum(layer.nbytes for layer in cache)
        assert report["tokens"].unique().to_list() == [256]


def test_a_model_that_cannot_run_says_so():
    class Broken:
        layers = (1,)

        def __call__(self, tokens, cache):
            raise TypeError("no such thing")

    with pytest.raises(InputError, match="does not run on one token with its own caches: no such thing"):
        integrate.probe(Broken())
