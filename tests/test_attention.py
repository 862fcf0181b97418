"""Attention over exact and packed segments is attention over their decoded tokens."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.base import create_causal_mask

from veloxlab.cache.attention import FEW_QUERIES
from veloxlab.cache.layer import CompressedKVCache
from veloxlab.codecs import find_method
from veloxlab.kernels.devices import device_backend, expanded_bytes

HEADS, GROUP, DIM = 2, 3, 64


def filled(count: int, path: str = "codes", value_dim: int = DIM, batch: int = 1) -> CompressedKVCache:
    method = find_method("turboquant")
    codecs = method.codec(DIM, 3, "keys"), method.codec(value_dim, 2, "values")
    cache = CompressedKVCache(*codecs, sinks=2, window=8, chunk="codes", path=path)
    cache.update_and_fetch(normal(batch, HEADS, count, DIM, seed=1), normal(batch, HEADS, count, value_dim, seed=2))
    return cache


def normal(*shape: int, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def reference(q: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float, allowed: np.ndarray) -> np.ndarray:
    keys, values = np.repeat(keys, GROUP, axis=1), np.repeat(values, GROUP, axis=1)
    scores = np.where(allowed, q @ keys.swapaxes(-1, -2) * scale, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ values


@pytest.mark.parametrize("queries", [1, 2, FEW_QUERIES, FEW_QUERIES + 1, 60])
@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "additive", "padded"])
@pytest.mark.parametrize("value_dim", [64, 96])
def test_attend_equals_softmax_over_the_decoded_tokens(queries, mask, value_dim):
    batch, count = 2, 150
    cache = filled(count, value_dim=value_dim, batch=batch)
    history = cache._history()
    keys, values = (np.array(x) for x in cache.decoded())
    q = normal(batch, HEADS * GROUP, queries, DIM, seed=3)
    allowed = {
        "none": np.ones((queries, count), bool),
        "causal": np.array(create_causal_mask(queries, count - queries)),
        "boolean": np.random.default_rng(0).random((queries, count)) < 0.7,
        "additive": np.random.default_rng(1).random((queries, count)) < 0.7,
        "padded": np.arange(count)[None, None, None] >= np.array([0, 40])[:, None, None, None],
    }[mask]
    given = {
        "none": None,
        "causal": "causal",
        "additive": mx.array(np.where(allowed, 0.0, -1e9).astype(np.float32)),
    }.get(mask, mx.array(allowed))
    out = history.attend(q, DIM**-0.5, given)
    assert out.shape == (batch, HEADS * GROUP, queries, value_dim)
    assert np.allclose(out, reference(np.array(q), keys, values, DIM**-0.5, allowed), atol=2e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_the_output_has_the_dtype_of_the_queries(dtype):
    out = filled(50)._history().attend(normal(1, HEADS * GROUP, 1, DIM, seed=3).astype(dtype), 0.125, None)
    assert out.dtype == dtype


def test_decoding_holds_no_decoded_history():
    """The peak while one query reads 32k tokens stays far below the size of the decoded keys alone."""
    cache = filled(32_768)
    mx.eval(cache.state)
    q = normal(1, HEADS * GROUP, 1, DIM, seed=3)
    mx.eval(q, cache._history().attend(q, 0.125, None))  # builds the shared tables
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(cache._history().attend(q, 0.125, None))
    transient = mx.get_peak_memory() - before
    decoded_keys = 32_768 * HEADS * DIM * 4
    assert transient < 0.5 * decoded_keys


def test_causal_masks_with_a_window_see_the_newest_only():
    mask = np.array(filled(3).make_mask(3, window_size=2))
    assert mask.astype(int).tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1]]


@pytest.mark.parametrize("queries", [1, FEW_QUERIES, FEW_QUERIES + 1])
@pytest.mark.parametrize("mask", ["none", "padded"])
def test_attention_sinks_take_their_share_of_each_heads_weights(queries, mask):
    """As in gpt_oss: a logit for each head that belongs to no token, so that weights sum to less than one."""
    batch, count = 2, 100
    cache = filled(count, batch=batch)
    keys, values = (np.array(x) for x in cache.decoded())
    q = normal(batch, HEADS * GROUP, queries, DIM, seed=3)
    sinks = 3 * normal(HEADS * GROUP, seed=4)
    allowed = np.arange(count)[None, None, None] >= np.array([0, 40])[:, None, None, None]
    allowed = np.ones((queries, count), bool) if mask == "none" else allowed
    out = cache._history().attend(q, DIM**-0.5, None if mask == "none" else mx.array(allowed), sinks)
    with_zero = (np.concatenate([x, np.zeros_like(x[:, :, :1])], axis=2) for x in (keys, values))
    # the sink's logit is added to the score of a token with a key of zeros
    scores_beside = np.broadcast_to(np.array(sinks)[None, :, None, None], (batch, HEADS * GROUP, queries, 1))
    expected = reference_beside(np.array(q), *with_zero, DIM**-0.5, allowed, scores_beside)  # type: ignore[call-arg]
    assert np.allclose(out, expected, atol=2e-5)


def reference_beside(q, keys, values, scale, allowed, beside) -> np.ndarray:
    keys, values = np.repeat(keys, GROUP, axis=1), np.repeat(values, GROUP, axis=1)
    scores = q @ keys.swapaxes(-1, -2) * scale
    scores[..., :-1] = np.where(allowed, scores[..., :-1], -np.inf)
    scores[..., -1:] = beside
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ values


@pytest.mark.parametrize("method", [("turboquant", {}), ("polarquant", {}), ("ratequant", {"head_bits": (2, 4)})])
@pytest.mark.parametrize("mask", ["causal", "array"])
def test_kv_heads_may_be_expanded_one_after_another(monkeypatch, method, mask):
    """One after another if the codec codes them alike; otherwise all at once, with the same result."""
    name, options = method
    codecs = (find_method(name).codec(DIM, 4, role, **options) for role in ("keys", "values"))
    cache = CompressedKVCache(*codecs, sinks=2, window=8)
    cache.update_and_fetch(normal(1, HEADS, 90, DIM, seed=1), normal(1, HEADS, 90, DIM, seed=2))
    q, sinks = normal(1, HEADS * GROUP, 40, DIM, seed=3), normal(HEADS * GROUP, seed=4)
    given = "causal" if mask == "causal" else normal(1, HEADS * GROUP, 40, 90, seed=5)
    together = cache._history().attend(q, 0.1, given, sinks)
    monkeypatch.setattr("veloxlab.cache.attention.expanded_bytes", lambda: 1)
    apart = cache._history().attend(q, 0.1, given, sinks)
    assert np.allclose(together, apart, atol=1e-5)


@pytest.mark.parametrize(("said", "size"), [("3", 3_000_000), ("0", None), ("much", None), ("", None)])
def test_the_memory_for_decoded_tokens_can_be_set(said, size, monkeypatch):
    monkeypatch.setenv("VELOXLAB_EXPANDED_MB", said)
    assert expanded_bytes() == (size or device_backend().expanded_bytes)
