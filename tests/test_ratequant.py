"""RateQuant: a codec whose KV heads have different widths."""

import itertools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import veloxlab as vl
from tests.tiny_models import tiny
from veloxlab.codecs import turboquant
from veloxlab.codecs.base import TILE, Sample
from veloxlab.codecs.ratequant import METHOD, build
from veloxlab.codecs.turboquant import TurboQuant
from veloxlab.errors import InputError

HEAD_BITS = (3, 2, 5, 2, 3)


def vectors(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)) * 3


@pytest.mark.parametrize("role", ["keys", "values"])
def test_every_head_equals_turboquant(role):
    x = vectors(2, len(HEAD_BITS), 33, 64)
    codec = build(64, 3, role, head_bits=HEAD_BITS)
    decoded = codec.decode(codec.encode(x))
    for head, bits in enumerate(HEAD_BITS):
        alone = build(64, bits, role)
        assert isinstance(alone, TurboQuant)
        one = x[:, head : head + 1]
        # a code can differ by one level if a sum rounds differently for another number of rows
        assert np.isclose(decoded[:, head], alone.decode(alone.encode(one))[:, 0], atol=1e-3).mean() > 0.99


@pytest.mark.parametrize("dim", [64, 80, 128])
def test_true_bits_are_the_bytes_held_and_the_mean_of_the_heads(dim):
    codec = build(dim, 4, "keys", head_bits=HEAD_BITS)
    code = codec.encode(vectors(2, len(HEAD_BITS), 10, dim))
    assert code.tokens == 10
    assert code.nbytes * 8 == pytest.approx(codec.bits_per_value * 2 * len(HEAD_BITS) * 10 * dim, rel=1e-12)
    if dim != 80:  # no padding
        assert codec.bits_per_value == pytest.approx(3 + 16 / dim)


@pytest.mark.parametrize("tokens", [0, 1, TILE + 5])
def test_scores_and_mix_are_decode_then_matmul(tokens):
    heads, group, length = len(HEAD_BITS), 3, 2
    codec = build(64, 3, "keys", head_bits=HEAD_BITS)
    code = codec.encode(vectors(2, heads, tokens, 64))
    exact = codec.decode(code)
    q = vectors(2, heads * group, length, 64, seed=1)
    scores = codec.scores(q, code)
    expected = (q.reshape(2, heads, -1, 64) @ exact.swapaxes(-1, -2)).reshape(2, heads * group, length, tokens)
    assert scores.shape == expected.shape
    assert np.allclose(scores, expected, atol=2e-3)  # sums of 64 products of size up to 50, in another order
    p = mx.softmax(vectors(2, heads * group, length, tokens, seed=2), axis=-1) if tokens else scores
    mixed = (p.reshape(2, heads, group * length, tokens) @ exact).reshape(q.shape)
    assert np.allclose(codec.mix(p, code), mixed, atol=1e-4)


def test_a_slice_of_a_code_is_the_code_of_the_slice():
    codec = build(64, 3, "keys", head_bits=HEAD_BITS)
    x = vectors(1, len(HEAD_BITS), 40, 64)
    whole, part = codec.encode(x)[7:], codec.encode(x[:, :, 7:], 7)
    assert whole.arrays.keys() == part.arrays.keys()
    assert whole.start == part.start
    for name in whole.arrays:
        assert (np.array(whole.arrays[name]) == np.array(part.arrays[name])).mean() > 0.99


def test_the_layout_of_a_layer_is_kept_however_many_layers_there_are():
    codec = build(64, 3, "keys", head_bits=HEAD_BITS)
    code = codec.encode(vectors(1, 5, 3, 64))
    heads = codec.reader(code).heads
    for others in itertools.islice(itertools.product((2, 3, 4), repeat=5), 130):
        build(64, 3, "keys", head_bits=others).reader(code)
    assert codec.reader(code).heads is heads


def test_without_widths_it_is_turboquant():
    assert METHOD.codec(64, 3, "keys") == TurboQuant(64, 3, scale="unbiased")
    assert METHOD.codec(64, 3, "values", head_bits={"keys": [2, 3]}) == TurboQuant(64, 3, scale="mse")


def test_keys_and_values_of_one_plan_have_separate_widths():
    plan = {"keys": [3, 2], "values": [2, 2]}
    keys, values = (METHOD.codec(64, 3, role, head_bits=plan) for role in ("keys", "values"))
    assert keys == build(64, 3, "keys", head_bits=(3, 2))
    assert values.head_bits == (2, 2)  # type: ignore[attr-defined]
    assert keys.fit(Sample(vectors(1, 2, 4, 64))) is keys
    assert isinstance(hash(keys), int)
    assert [(codec.bits, codec.scale) for codec in keys.base] == [(2, "unbiased"), (3, "unbiased")]
    assert [(codec.bits, codec.scale) for codec in values.base] == [(2, "mse")]  # type: ignore[attr-defined]


def test_the_bases_options_are_turboquants_own():
    options: dict[str, Any] = {"variant": "prod", "sketch": "orthogonal", "seed": 5}
    codec = METHOD.codec(64, 3, "keys", head_bits=(3, 2), **options)
    assert codec.base == tuple(turboquant.build(64, bits, "keys", **options) for bits in (2, 3))  # type: ignore[attr-defined]
    assert codec == build(64, 3, "keys", head_bits=[3, 2], **dict(reversed(options.items())))
    assert codec != build(64, 3, "keys", head_bits=(3, 2))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: build(64, 3, "keys", head_bits=()), "widths for no KV heads"),
        (lambda: build(64, 3, "keys", head_bits=(3, 9)), "bits=9 cannot be used"),
        (lambda: build(64, 3, "keys", head_bits={"queries": [3]}), "no part 'queries'"),
        (lambda: build(64, 3, "keys", head_bits=(3, 2)).encode(vectors(1, 3, 4, 64)), "2 KV heads and was given 3"),
        (lambda: build(64, 3, "keys", head_bits=(True, 1)), "bits=True cannot be used"),
        (lambda: build(64, 3, "keys", head_bits=3), "head_bits=3 is not a list of widths"),
    ],
)
def test_widths_that_do_not_fit_are_refused(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()


def test_a_plan_with_widths_for_heads_runs():
    """The cache of that layer holds the mean of its heads' widths."""
    llama = tiny("llama")
    plan = vl.Plan.uniform(llama, "ratequant", bits=3)
    plan = plan.with_layer(0, options={"head_bits": {"keys": [4, 2], "values": [3, 2]}})
    cache = vl.make_cache(llama, plan, sinks=0, window=0)
    llama(mx.array([[1, 2, 3, 4, 5]]), cache=cache)
    report = vl.report(cache).filter(layer=0)
    dim = cache[0].key_codec.head_dim
    assert report["key_bits"][0] == pytest.approx(3 + 16 / dim)
    assert report["value_bits"][0] == pytest.approx(2.5 + 16 / dim)
