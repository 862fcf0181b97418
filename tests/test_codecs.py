"""The matrix that every algorithm passes through, whatever it is."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import veloxlab as vl
from veloxlab.codecs import METHODS, find_method
from veloxlab.codecs.codec import TILE
from veloxlab.errors import InputError

DIMS = [64, 80, 96, 112, 128, 192, 256]
VARIANTS = [(method.id, {}) for method in METHODS.values()] + [
    ("turboquant", {"variant": "prod"}),
    ("turboquant", {"variant": "prod", "sketch": "orthogonal"}),
    ("turboquant", {"rotation": "haar", "codebook": "gaussian"}),
]


def codecs(dim: int):
    for name, options in VARIANTS:
        method = find_method(name)
        for bits in {method.bits[0], method.bits[len(method.bits) // 2], method.bits[-1]}:
            for role in ("keys", "values"):
                yield method.codec(dim, bits, role, **options)


def vectors(*shape: int, seed: int = 0, dtype: mx.Dtype = mx.float32) -> mx.array:
    return (mx.random.normal(shape, key=mx.random.key(seed)) * 3).astype(dtype)


@pytest.mark.parametrize("dim", DIMS)
def test_true_bits_are_the_bytes_held(dim):
    for codec in codecs(dim):
        code = codec.encode(vectors(2, 3, 10, dim, dtype=mx.float16 if codec.bits_per_value == 16 else mx.float32))
        assert code.nbytes * 8 == pytest.approx(codec.bits_per_value * 2 * 3 * 10 * dim, rel=1e-12)
        assert code.tokens == 10


@pytest.mark.parametrize("dim", DIMS)
def test_more_bits_lose_less_and_eight_lose_next_to_nothing(dim):
    x = vectors(1, 2, 64, dim)
    for name, options in VARIANTS:
        method = find_method(name)
        errors = []
        for bits in method.bits:
            codec = method.codec(dim, bits, "values", **options)
            errors.append(mx.square(codec.decode(codec.encode(x)) - x).mean().item())
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 1e-3 * mx.square(x).mean().item()


@pytest.mark.parametrize("tokens", [0, 1, 33, TILE, TILE + 5])
def test_scores_and_mix_are_decode_then_matmul(tokens):
    batch, kv_heads, group, queries = 2, 2, 3, 2
    for codec in codecs(64):
        code = codec.encode(vectors(batch, kv_heads, tokens, 64))
        exact = codec.decode(code)
        q = vectors(batch, kv_heads * group, queries, 64, seed=1)
        grouped = q.reshape(batch, kv_heads, group * queries, 64)
        expected = (grouped @ exact.swapaxes(-1, -2)).reshape(batch, kv_heads * group, queries, tokens)
        scores = codec.scores(q, code)
        assert scores.shape == expected.shape
        # float32 sums of 64 products of size up to 50, in another order
        assert np.allclose(scores, expected, atol=2e-3)
        p = mx.softmax(vectors(batch, kv_heads * group, queries, tokens, seed=2), axis=-1) if tokens else scores
        mixed = (p.reshape(batch, kv_heads, group * queries, tokens) @ exact).reshape(q.shape)
        assert np.allclose(codec.mix(p, code), mixed, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 40),
    cut=st.integers(0, 40),
    seed=st.integers(0, 1000),
    variant=st.sampled_from(VARIANTS),
    width=st.integers(0, 7),
)
def test_a_cut_code_is_the_code_of_the_cut(tokens, cut, seed, variant, width):
    """Every vector is coded by itself: that is what lets a cache append, trim and tile."""
    name, options = variant
    method = find_method(name)
    codec = method.codec(64, method.bits[width % len(method.bits)], "keys", **options)
    x = vectors(1, 2, tokens, 64, seed=seed)
    whole, part = codec.encode(x)[cut:], codec.encode(x[:, :, cut:])
    assert whole.arrays.keys() == part.arrays.keys()
    for array in whole.arrays:
        # bits may differ where a sum of the transform rounds differently for another number of rows
        same = np.array(whole.arrays[array]) == np.array(part.arrays[array])
        assert same.mean() > 0.99 if same.size else True


def test_encoding_twice_gives_the_same_code():
    x = vectors(1, 2, 50, 80)
    for codec in codecs(80):
        first, second = codec.encode(x), codec.encode(x)
        assert all(mx.array_equal(first.arrays[n], second.arrays[n]) for n in first.arrays)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_any_float_dtype_is_taken(dtype):
    x = vectors(1, 1, 20, 64, dtype=dtype)
    for codec in codecs(64):
        if codec.bits_per_value > 8:
            error = codec.decode(codec.encode(x)).astype(mx.float32) - x.astype(mx.float32)
            assert mx.square(error).mean().item() < 1e-3 * mx.square(x.astype(mx.float32)).mean().item()


@pytest.mark.parametrize("size", [1e-8, 1e-3, 1e5, 1e9])
def test_scales_neither_overflow_nor_vanish(size):
    x = vectors(1, 1, 8, 128) / 3 * size
    for codec in codecs(128):
        relative = mx.square((codec.decode(codec.encode(x)) - x) / size).mean().item()
        assert relative < 2  # one bit of `prod` has π/2 and its sampling error; a scale out of range has 1e3 or NaN


def test_a_zero_vector_decodes_to_zero():
    for codec in codecs(64):
        assert not codec.decode(codec.encode(mx.zeros((1, 1, 3, 64)))).any()


def test_codecs_are_values():
    """Equal settings are equal codecs, copies cost nothing, and calibration-free ones fit to themselves."""
    for first, second in zip(codecs(64), codecs(64), strict=True):
        assert first == second
        assert hash(first) == hash(second)
        assert copy.deepcopy(first) == first
        assert first.fit(vectors(1, 1, 4, 64)) is first


def test_a_wrong_head_dimension_is_refused():
    for codec in codecs(64):
        with pytest.raises(InputError, match=r"heads of dimension 64.*was given \[1, 2, 3, 80\]"):
            codec.encode(vectors(1, 2, 3, 80))


def test_unknown_methods_options_and_widths_are_named_with_the_known_ones():
    with pytest.raises(InputError, match="Unknown method 'turbo'. Known methods: turboquant, none"):
        find_method("turbo")
    with pytest.raises(InputError, match="TurboQuant has no option 'rotate'. Its options are: variant, scale"):
        find_method("turboquant").codec(64, 4, "keys", rotate="haar")
    for bits in (0, 9, 2.5, True):
        with pytest.raises(InputError, match=r"Keys at bits=.* from 1 to 8"):
            find_method("turboquant").codec(64, bits, "keys")


def test_methods_lists_the_registry():
    frame = vl.methods()
    assert frame["id"].to_list() == list(METHODS)
    assert frame.filter(id="turboquant").select("least_bits", "most_bits").row(0) == (1, 8)
