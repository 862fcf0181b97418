"""RateQuant: the mathematics of sharing bits, and a codec whose KV heads have different widths."""

import itertools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import veloxlab as vl
from tests.tiny_models import tiny
from veloxlab.codecs import turboquant
from veloxlab.codecs.base import TILE, Sample
from veloxlab.codecs.parts.codebooks import gaussian_codebook, sphere_codebook
from veloxlab.codecs.parts.water_filling import (
    continuous_bits,
    fit_distortion,
    integer_bits,
    loss,
    water_filling_gain,
)
from veloxlab.codecs.ratequant import METHOD, build
from veloxlab.codecs.turboquant import TurboQuant
from veloxlab.errors import InputError

HEAD_BITS = (3, 2, 5, 2, 3)


def sensitivities(seed: int, count: int = 6, spread: float = 0.76) -> list[float]:
    return np.random.default_rng(seed).lognormal(0, spread, count).tolist()


def vectors(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)) * 3


# allocation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("widths", "alpha", "beta"), [(range(1, 6), 1.36, 3.48), (range(2, 7), 1.67, 3.68)])
def test_the_fit_of_lloyd_max(widths, alpha, beta):
    """The usual 1.36 and 3.48 are of 1 to 5 bits. At the paper's 2 to 6 it is 1.67 and 3.68: it measured 1.51, 3.57."""
    fit = fit_distortion(widths, [gaussian_codebook(b).distortion for b in widths])
    assert (fit.alpha, fit.beta) == pytest.approx((alpha, beta), abs=5e-3)
    fit = fit_distortion(widths, [sphere_codebook(b, 128).distortion for b in widths])
    assert (fit.alpha, fit.beta) == pytest.approx((alpha, beta), abs=0.02)  # at D = 128, up to 2 % less distortion


def test_a_fit_finds_what_made_its_points():
    fit = fit_distortion([2, 3, 5], [1.5 * 3.58**-b for b in (2, 3, 5)])
    assert (fit.alpha, fit.beta) == pytest.approx((1.5, 3.58), rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_uniform_loses_the_ratio_of_the_means_more_than_the_optimum(seed):
    weights = sensitivities(seed, 40)
    bits = continuous_bits(weights, 3, 3.5)
    assert bits.mean() == pytest.approx(3, abs=1e-12)
    assert loss(weights, [3] * 40, 3.5) / loss(weights, bits, 3.5) == pytest.approx(
        water_filling_gain(weights), rel=1e-5
    )


def test_the_gain_of_a_known_spectrum():
    """λ ∝ 1/i, d = 128: 2.05, which is 3.12 dB or half a bit for each dimension."""
    gain = water_filling_gain([1 / i for i in range(1, 129)])
    assert gain == pytest.approx(2.05, abs=5e-3)
    assert 10 * np.log10(gain) == pytest.approx(3.12, abs=0.01)
    assert np.log2(gain) / 2 == pytest.approx(0.52, abs=5e-3)


@pytest.mark.parametrize(("least", "most"), [(2, 4), (2, 3.2), (2.9, 8), (-np.inf, 3.5), (2.5, np.inf)])
def test_bounded_widths_keep_the_budget_and_are_best(least, most):
    weights = np.array(sensitivities(1, 20))
    bits = continuous_bits(weights.tolist(), 3, 3.5, least=least, most=most)
    assert bits.mean() == pytest.approx(3, abs=1e-9)
    assert ((bits >= least - 1e-12) & (bits <= most + 1e-12)).all()
    # the conditions of the optimum: one marginal loss for all inside, less on the lower bound, more on the upper
    marginal = weights * 3.5**-bits
    low, high = bits < least + 1e-9, bits > most - 1e-9
    inside = ~low & ~high
    assert np.ptp(np.log(marginal[inside])) < 1e-9
    assert (marginal[low] <= marginal[inside].min() + 1e-12).all()
    assert (marginal[high] >= marginal[inside].max() - 1e-12).all()


def test_components_with_rates_of_their_own_save_the_same_with_one_more_bit():
    weights, rates = sensitivities(2, 12), [3.57] * 6 + [5.09] * 6
    bits = continuous_bits(weights, 3, rates)
    assert bits.mean() == pytest.approx(3, abs=1e-12)
    assert np.ptp(np.log(weights) + np.log(np.log(rates)) - bits * np.log(rates)) < 1e-9
    assert continuous_bits(weights, 3, [3.5] * 12) == pytest.approx(continuous_bits(weights, 3, 3.5), abs=1e-12)
    bounded = continuous_bits(weights, 3, rates, least=2, most=4)
    assert loss(weights, bits, rates) < loss(weights, bounded, rates) <= loss(weights, [3] * 12, rates)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("separate", [False, True], ids=["one-rate", "keys-and-values"])
def test_marginal_gain_is_as_good_as_any_allocation(seed, separate):
    weights = sensitivities(seed, spread=2.0)
    beta = [3.57, 3.57, 3.57, 5.09, 5.09, 5.09] if separate else 3.5
    bits = integer_bits(weights, 4, beta, least=2, most=8)
    every = np.array([w for w in itertools.product(range(2, 9), repeat=6) if sum(w) == 24])
    best = (np.array(weights) * np.asarray(beta, float) ** -every).sum(axis=1).min()
    assert sum(bits) == 24
    assert loss(weights, bits, beta) == pytest.approx(best, rel=1e-12)


def test_a_wrong_rate_changes_the_spread_and_never_the_order():
    weights = sensitivities(0, 20)
    order = np.argsort(weights)
    narrow, wide = (continuous_bits(weights, 3, beta) for beta in (5.0, 2.5))
    assert (np.diff(narrow[order]) >= 0).all()
    assert (np.diff(wide[order]) >= 0).all()
    assert np.std(wide) / np.std(narrow) == pytest.approx(np.log(5) / np.log(2.5))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: fit_distortion([2, 2], [0.1, 0.1]), "at two widths or more"),
        (lambda: fit_distortion([2, 3], [0.1, 0.0]), "distortions above 0"),
        (lambda: continuous_bits([1, 2], 3, 1.0), r"beta=1\.0 does not fall"),
        (lambda: continuous_bits([1, 2], 3, 3.5, most=2), "does not fit widths from -inf to 2"),
        (lambda: integer_bits([1, 2], 9, 3.5), "budget of 18 bits does not fit 2 components"),
        (lambda: water_filling_gain([]), "one or more weights above 0"),
    ],
)
def test_what_has_no_answer_is_refused(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()


# the codec ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["keys", "values"])
def test_every_head_is_what_turboquant_makes_of_it(role):
    x = vectors(2, len(HEAD_BITS), 33, 64)
    codec = build(64, 3, role, head_bits=HEAD_BITS)
    decoded = codec.decode(codec.encode(x))
    for head, bits in enumerate(HEAD_BITS):
        alone = build(64, bits, role)
        assert isinstance(alone, TurboQuant)
        one = x[:, head : head + 1]
        # a code may differ by one level where a sum rounds differently for another number of rows
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


def test_a_cut_code_is_the_code_of_the_cut():
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


def test_keys_and_values_of_one_plan_have_their_own_widths():
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
        (lambda: build(64, 3, "keys", head_bits=3), "head_bits=3 is no list of widths"),
    ],
)
def test_widths_that_do_not_fit_are_refused(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()


def test_a_plan_with_widths_for_heads_runs():
    """Attached, the cache of that layer holds the mean of its heads' widths."""
    llama = tiny("llama")
    plan = vl.Plan.uniform(llama, "ratequant", bits=3)
    plan = plan.with_layer(0, options={"head_bits": {"keys": [4, 2], "values": [3, 2]}})
    cache = vl.make_cache(llama, plan, sinks=0, window=0)
    llama(mx.array([[1, 2, 3, 4, 5]]), cache=cache)
    report = vl.report(cache).filter(layer=0)
    dim = cache[0].key_codec.head_dim
    assert report["key_bits"][0] == pytest.approx(3 + 16 / dim)
    assert report["value_bits"][0] == pytest.approx(2.5 + 16 / dim)
