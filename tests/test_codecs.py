"""The matrix that every algorithm passes through, whatever it is."""

import copy
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import veloxlab as vl
from veloxlab.codecs import METHODS, find_method
from veloxlab.codecs.codec import TILE, Codec, Sample
from veloxlab.codecs.qjl import QJL
from veloxlab.codecs.rope import Rope
from veloxlab.errors import InputError

DIMS = [64, 80, 96, 112, 128, 192, 256]
VARIANTS = [(method.id, {}) for method in METHODS.values()] + [
    ("turboquant", {"variant": "prod"}),
    ("turboquant", {"variant": "prod", "sketch": "orthogonal"}),
    ("turboquant", {"rotation": "haar", "codebook": "gaussian"}),
    ("rvq", {"variant": "refined"}),
    ("polarquant", {"recursion": "full"}),
    ("rabitq", {"bounds": True}),
    ("qjl", {"sketch": "gaussian", "levels": "ends"}),
]


CALIBRATED = [method for method in METHODS.values() if method.calibrated]
KV_HEADS = 2  # of every array that the matrix encodes: a fitted codec may hold one entry per KV head
SAMPLE = 512  # tokens that calibrated methods are fitted to: enough to work with, too few to be good


def codecs(dim: int, size: float = 3.0):
    """Every variant, at few widths and both roles; calibrated methods are fitted to vectors of that ``size``."""
    for name, options in VARIANTS:
        bits = find_method(name).bits
        widths = {bits[0], bits[len(bits) // 2], bits[-1]}
        if find_method(name).calibrated:  # fitting takes time: two widths, and one where many dimensions are tried
            widths = {bits[0], bits[len(bits) // 2]} if dim in (64, 128) and size == 3.0 else {bits[0]}
        for width in sorted(widths):
            for role in ("keys", "values"):
                yield ready(name, dim, width, role, tuple(options.items()), size)


@cache
def ready(name: str, dim: int, bits: int, role: str, options: tuple = (), size: float = 3.0) -> Codec:
    """A codec that can encode: fitted once for all tests, if its method is calibrated."""
    method = find_method(name)
    codec = method.codec(dim, bits, role, **dict(options))
    return codec.fit(sample(dim, size)) if method.calibrated else codec


def sample(dim: int, size: float = 3.0, tokens: int = SAMPLE) -> Sample:
    x, queries = (vectors(1, heads, tokens, dim, seed=7 + heads) / 3 * size for heads in (KV_HEADS, 3 * KV_HEADS))
    return Sample(x, queries, Rope(dim))


def vectors(*shape: int, seed: int = 0, dtype: mx.Dtype = mx.float32) -> mx.array:
    return (mx.random.normal(shape, key=mx.random.key(seed)) * 3).astype(dtype)


@pytest.mark.parametrize("dim", DIMS)
def test_true_bits_are_the_bytes_held(dim):
    for codec in codecs(dim):
        code = codec.encode(
            vectors(2, KV_HEADS, 10, dim, dtype=mx.float16 if codec.bits_per_value == 16 else mx.float32)
        )
        assert code.nbytes * 8 == pytest.approx(codec.bits_per_value * 2 * KV_HEADS * 10 * dim, rel=1e-12)
        assert code.tokens == 10


@pytest.mark.parametrize("dim", DIMS)
def test_more_bits_lose_less_and_eight_lose_next_to_nothing(dim):
    x = vectors(1, KV_HEADS, 64, dim)
    for name, options in VARIANTS:
        method = find_method(name)
        if method.calibrated and dim != 64:
            continue  # a fit for each width
        errors = []
        for bits in method.bits[:2] if method.calibrated else method.bits:
            codec = ready(name, dim, bits, "values", tuple(options.items()))
            errors.append(mx.square(codec.decode(codec.encode(x)) - x).mean().item())
        assert errors == sorted(errors, reverse=True)
        if not method.calibrated and method.bits[-1] >= 8:
            assert errors[-1] < 1e-3 * mx.square(x).mean().item()


@pytest.mark.parametrize("tokens", [0, 1, 33, TILE, TILE + 5])
def test_scores_and_mix_are_decode_then_matmul(tokens):
    batch, kv_heads, group, queries = 2, KV_HEADS, 3, 2
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
    bits = find_method(name).bits
    bits = bits[:2] if find_method(name).calibrated else bits
    codec = ready(name, 64, bits[width % len(bits)], "keys", tuple(options.items()))
    x = vectors(1, KV_HEADS, tokens, 64, seed=seed)
    whole, part = codec.encode(x)[cut:], codec.encode(x[:, :, cut:], cut)
    assert whole.arrays.keys() == part.arrays.keys()
    assert whole.start == part.start
    for array in whole.arrays:
        # bits may differ where a sum of the transform rounds differently for another number of rows
        same = np.array(whole.arrays[array]) == np.array(part.arrays[array])
        assert same.mean() > 0.99 if same.size else True


def test_encoding_twice_gives_the_same_code():
    x = vectors(1, KV_HEADS, 50, 80)
    for codec in codecs(80):
        first, second = codec.encode(x), codec.encode(x)
        assert all(mx.array_equal(first.arrays[n], second.arrays[n]) for n in first.arrays)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_any_float_dtype_is_taken(dtype):
    x = vectors(1, KV_HEADS, 20, 64, dtype=dtype)
    for codec in codecs(64):
        same = codec.decode(codec.encode(x)), codec.decode(codec.encode(x.astype(mx.float32)))
        assert mx.array_equal(*(decoded.astype(dtype) for decoded in same))
        # eight signs a coordinate estimate inner products well, and restore the vector itself to 7 %
        if codec.bits_per_value > 8 and not isinstance(codec, QJL):
            error = codec.decode(codec.encode(x)).astype(mx.float32) - x.astype(mx.float32)
            assert mx.square(error).mean().item() < 1e-3 * mx.square(x.astype(mx.float32)).mean().item()


@pytest.mark.parametrize("size", [1e-8, 1e-3, 1e5, 1e9])
def test_scales_neither_overflow_nor_vanish(size):
    x = vectors(1, KV_HEADS, 8, 128) / 3 * size
    for codec in codecs(128, size):
        relative = mx.square((codec.decode(codec.encode(x)) - x) / size).mean().item()
        assert relative < 2  # one bit of `prod` has π/2 and its sampling error; a scale out of range has 1e3 or NaN


def test_a_zero_vector_decodes_to_zero():
    for codec in codecs(64):
        assert not codec.decode(codec.encode(mx.zeros((1, KV_HEADS, 3, 64)))).any()


def test_codecs_that_need_no_calibration_are_values():
    """Equal settings are equal codecs, copies cost nothing, and they fit to themselves."""
    for name, options in VARIANTS:
        method = find_method(name)
        if not method.calibrated:
            first, second = (method.codec(64, method.bits[0], "keys", **options) for _ in range(2))
            assert first == second
            assert hash(first) == hash(second)
            assert copy.deepcopy(first) == first
            assert first.fit(Sample(vectors(1, 1, 4, 64))) is first


@pytest.mark.parametrize("role", ["keys", "values"])
@pytest.mark.parametrize("method", CALIBRATED, ids=lambda method: method.id)
def test_a_calibrated_method_says_so_and_needs_a_sample_worth_the_name(method, role):
    codec = method.codec(64, method.bits[0], role)
    with pytest.raises(InputError, match="calibrate"):
        codec.encode(vectors(1, KV_HEADS, 4, 64))
    for tokens in (0, 1, 4):
        with pytest.raises(InputError, match="tokens"):
            codec.fit(sample(64, tokens=tokens))
    same = mx.broadcast_to(vectors(1, KV_HEADS, 1, 64), (1, KV_HEADS, SAMPLE, 64))
    same = same if role == "values" else mx.zeros_like(same)  # keys that are the same with RoPE and without
    with pytest.raises(InputError, match="tokens"):
        codec.fit(Sample(same, vectors(1, KV_HEADS, SAMPLE, 64), Rope(64)))


@pytest.mark.parametrize("role", ["keys", "values"])
@pytest.mark.parametrize("method", CALIBRATED, ids=lambda method: method.id)
def test_fitting_twice_gives_the_same_codec(method, role):
    x = vectors(1, KV_HEADS, 50, 64)
    first = ready(method.id, 64, method.bits[0], role)
    second = method.codec(64, method.bits[0], role).fit(sample(64))
    codes = first.encode(x), second.encode(x)
    assert all(mx.array_equal(codes[0].arrays[n], codes[1].arrays[n]) for n in codes[0].arrays)


def test_a_wrong_head_dimension_is_refused():
    for codec in codecs(64):
        with pytest.raises(InputError, match=r"heads of dimension 64.*was given \[1, 2, 3, 80\]"):
            codec.encode(vectors(1, 2, 3, 80))


def test_unknown_methods_options_and_widths_are_named_with_the_known_ones():
    with pytest.raises(InputError, match=f"Unknown method 'turbo'. Known methods: {', '.join(METHODS)}"):
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
