"""Budgets in bytes are the bytes that caches really hold."""

import mlx.core as mx
import numpy as np
import pytest

import veloxlab as vl
from tests.tiny_models import tiny
from veloxlab.allocate.budget import MEGABYTE, Limit, layer_sizes
from veloxlab.cache.counts import Windows
from veloxlab.errors import InputError


def filled(model, tokens, *, one_by_one, **settings):
    """Return bytes that each layer holds after random keys and values."""
    cache = vl.make_cache(model, bits=3, **settings)
    sizes = {size.layer: size for size in layer_sizes(model)}
    for layer, size in sizes.items():
        keys, values = (mx.random.normal((1, size.kv_heads, tokens, dim)) for dim in (size.key_dim, size.value_dim))
        pieces = range(tokens) if one_by_one else [slice(None)]
        for piece in pieces:
            span = slice(piece, piece + 1) if one_by_one else piece
            cache[layer].update_and_fetch(keys[:, :, span], values[:, :, span])
            mx.eval(cache[layer].state)
    return {layer: cache[layer] for layer in sizes}


def predicted(size, held, cache):
    per_token = sum(
        codec.bits_per_value * size.kv_heads * codec.head_dim / 8 for codec in (cache.key_codec, cache.value_codec)
    )
    return held.exact * size.exact_bytes + held.packed * per_token


@pytest.mark.parametrize("tokens", [9, 70, 99, 100, 101, 333])
@pytest.mark.parametrize(("sinks", "window"), [(4, 64), (0, 0), (2, 5)])
def test_a_prompt_holds_exactly_the_counted_bytes(tokens, sinks, window):
    model = tiny("llama")
    cache = filled(model, tokens, one_by_one=False, sinks=sinks, window=window)
    for size in layer_sizes(model):
        held = Windows.of_layer(size, sinks, window).most_held(tokens, decoded=False)
        assert predicted(size, held, cache[size.layer]) == cache[size.layer].nbytes


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_no_cache_holds_more_than_the_counted_bytes(family, one_by_one):
    """For any order of tokens, and for sliding layers: never more, and not much less."""
    model = tiny(family)
    for tokens in (130, 161, 200):
        cache = filled(model, tokens, one_by_one=one_by_one, sinks=4, window=16)
        total = counted = 0
        for size in layer_sizes(model):
            own = cache[size.layer]
            bound = predicted(size, Windows.of_layer(size, 4, 16).most_held(tokens), own)
            assert own.nbytes <= bound
            total, counted = total + own.nbytes, counted + bound
        assert total > 0.6 * counted  # free space of 8 tokens in three buffers of a short text


def test_bits_and_bytes_are_of_one_token_of_all_layers():
    sizes = layer_sizes(tiny("llama"))
    values = 2 * 2 * (64 + 64)
    limit = Limit.of(vl.allocate.AverageBits(3.25), sizes, 4, 64)
    assert limit.nbytes == 3.25 * values / 8
    assert limit.tokens == (1, 1)
    assert Limit.of(vl.allocate.BytesPerToken(100), sizes, 4, 64).nbytes == 100


def test_exact_tokens_are_subtracted_from_the_memory_of_a_text():
    sizes = layer_sizes(tiny("llama"))
    limit = Limit.of(vl.allocate.TokensInMemory(1000, 0.5), sizes, 4, 64)
    held = [Windows.of_layer(size, 4, 64).most_held(1000) for size in sizes]
    left = 0.5 * MEGABYTE - sum(one.exact for one in held) * 256 * 4
    assert limit.nbytes * max(one.packed for one in held) == pytest.approx(left)
    assert max(limit.tokens) == 1
    assert min(one.packed for one in held) >= 1000 - 4 - 64 - 31


def test_a_sliding_layer_counts_the_tokens_that_it_sees():
    sizes = layer_sizes(tiny("gemma3_text"))
    limit = Limit.of(vl.allocate.TokensInMemory(5000, 5), sizes, 0, 0)
    slides = [size.max_size is not None for size in sizes]
    assert any(slides)
    for many, sliding in zip(limit.tokens, slides, strict=True):
        assert (many < 0.01) == sliding


@pytest.mark.parametrize(
    ("budget", "sentence"),
    [
        (
            lambda: vl.allocate.TokensInMemory(60, 5),
            "60 tokens are all kept exact by 4 sinks and a window of 64, in 0.139 MB",
        ),
        (lambda: vl.allocate.TokensInMemory(1000, 0.1), "0.1 MB are less than the exact tokens take"),
    ],
)
def test_budgets_that_leave_nothing_are_refused(budget, sentence):
    with pytest.raises(InputError, match=sentence):
        Limit.of(budget(), layer_sizes(tiny("llama")), 4, 64)


def test_models_without_keys_and_values_are_refused():
    with pytest.raises(InputError, match="there is nothing to allocate"):
        layer_sizes(tiny("mamba2"))


def test_exact_bytes_follow_the_dtype_of_the_model():
    model = tiny("llama")
    model.set_dtype(mx.float16)
    assert [size.exact_bytes for size in layer_sizes(model)] == [2 * 256, 2 * 256]
    assert np.unique([size.values_per_token for size in layer_sizes(model)]).tolist() == [256]
