"""VecInfer's own numbers: an exact transform, the distortion of its points on Gaussian numbers, and its bytes."""

import mlx.core as mx
import numpy as np
import pytest

from veloxlab.cache.layer import CompressedKVCache
from veloxlab.codecs.base import Sample
from veloxlab.codecs.parts.vector import pack_indices, train_codebook, unpack_indices
from veloxlab.codecs.vecinfer import _FEW_QUERIES, METHOD, POINTS, VecInfer, build
from veloxlab.errors import InputError


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def outliers(*shape: int, seed: int = 0) -> mx.array:
    """Return keys with a few large channels, different for each KV head."""
    loudness = np.exp(np.random.default_rng(99).standard_normal((shape[1], 1, shape[3])) * 1.5)
    return normal(*shape, seed=seed) * mx.array(loudness.astype(np.float32))


def relative_error(codec: VecInfer, x: mx.array) -> float:
    return (mx.square(codec.decode(codec.encode(x)) - x).sum() / mx.square(x).sum()).item()


@pytest.mark.parametrize("dim", [64, 80, 128])
def test_the_dual_transform_keeps_inner_products(dim):
    keys, q = outliers(1, 2, 300, dim), normal(1, 2, 5, dim, seed=1)
    codec = build(dim, 1, "keys").fit(Sample(keys))
    factors = np.array(codec.factors)
    largest = np.sqrt(np.abs(np.array(keys)).max(axis=(0, 2)))
    assert np.allclose(factors / factors[:, :1], largest / largest[:, :1], rtol=1e-5)  # λ, except for a common factor
    coded = codec._rotation.forward(keys / codec.factors[:, None])  # input of the codebook
    assert np.allclose(codec.from_codes(coded), keys, rtol=1e-4, atol=1e-4)
    exact = np.array(q @ keys.swapaxes(-1, -2))
    ours = np.array(codec.query_to_codes(q) @ coded.swapaxes(-1, -2))
    assert np.abs(ours - exact).max() < 1e-5 * np.abs(exact).max()  # float32 sums of D products


# test error of k-means on independent N(0, 1), from 250,000 vectors. A mean over 10⁵ numbers has a deviation below 1 %.
# Ours is above the table's because of a centroid that is kept at zero, of float16, and of overfitting: it sees
# 64 to 256 sub-vectors a centroid up to 10 bits, where 1 to 3 % are measured, and 8 at 12 bits, where 6 % are at d = 4
# and 4 % at d = 8. At d2b8 it is 6 % below: k-means++, the best of three, ends in better optima than the table's start,
# near the 0.0079 of the best that there are
@pytest.mark.parametrize(
    ("point", "expected", "above", "below"),
    [
        ("d2b4", 0.1089, 0.02, 0.02),
        ("d2b8", 0.00853, 0.0, 0.07),
        ("d4b8", 0.0976, 0.03, 0.01),
        ("d8b8", 0.3238, 0.03, 0.01),
        ("d4b10", 0.0512, 0.045, 0.01),
        ("d4b12", 0.0267, 0.085, 0.0),
        ("d8b12", 0.1729, 0.055, 0.0),
    ],
)
def test_distortion_of_gaussian_numbers(point, expected, above, below):
    codec = build(64, 2, "values", point=point).fit(Sample(normal(1, 1, 4096, 64)))
    error = relative_error(codec, normal(1, 1, 2048, 64, seed=1))
    assert expected * (1 - below) <= error <= expected * (1 + above)


def test_a_small_sample_is_overfitted():
    x, unseen = normal(1, 1, 1100, 64), normal(1, 1, 512, 64, seed=1)
    codec = build(64, 2, "values", point="d8b12").fit(Sample(x))
    assert codec.bits_per_value == 1.5
    assert 0.173 < relative_error(codec, unseen) < 0.3238  # worse than well trained, better than 8 bits
    assert relative_error(codec, x) < 0.154  # the training error of 250,000 vectors; here each entry has two


@pytest.mark.parametrize("bits", [1, 3, 4, 8, 10, 12])
@pytest.mark.parametrize("count", [8, 10, 16])
def test_indices_are_packed_tight_and_least_significant_bit_first(bits, count):
    indices = np.random.default_rng(0).integers(0, 1 << bits, (3, count)).astype(np.uint32)
    words = pack_indices(mx.array(indices), bits)
    assert np.array_equal(unpack_indices(words, bits, count), indices)
    for row, packed in zip(indices, np.array(words), strict=True):
        whole = sum(int(index) << (bits * i) for i, index in enumerate(row))
        assert packed.tobytes() == whole.to_bytes(-(-count * bits // 32) * 4, "little")


@pytest.mark.parametrize("queries", [1, _FEW_QUERIES, _FEW_QUERIES + 1])
@pytest.mark.parametrize("point", ["d8b8", "d4b8", "d2b4"])
def test_tables_and_expanded_tiles_give_the_same_scores(queries, point):
    codec = build(64, 2, "keys", point=point).fit(Sample(outliers(1, 2, 600, 64)))
    code = codec.encode(outliers(2, 2, 1100, 64, seed=1))
    q = normal(2, 2, queries, 64, seed=2)
    expected = np.array(q @ codec.decode(code).swapaxes(-1, -2))
    assert np.abs(np.array(codec.scores(q, code)) - expected).max() < 1e-5 * np.abs(expected).max()


def test_one_bit_keys_take_a_fifteenth_of_their_bytes_with_codebooks():
    heads, tokens, dim = 2, 8192, 128  # fewer heads share a codebook than in most models
    keys = build(dim, 1, "keys").fit(Sample(normal(1, heads, 64, dim)))
    values = build(dim, 1, "values").fit(Sample(normal(1, heads, 64, dim)))
    cache = CompressedKVCache(keys, values, sinks=0, window=0)
    x = normal(1, heads, tokens, dim, seed=1)
    cache.update_and_fetch(x, x)
    mx.eval(cache.state)
    assert cache.offset == tokens
    assert 2 * heads * tokens * dim >= 15.5 * (cache.tensor_nbytes("keys") + keys.shared_bytes)


def test_a_codebook_has_a_zero_and_serves_every_entry():
    points = np.random.default_rng(0).standard_normal((5000, 4)).astype(np.float32)
    codebook = train_codebook(points, 64, seed=3)
    assert not codebook[0].any()
    assert np.array_equal(codebook, train_codebook(points, 64, seed=3))
    nearest = ((points[:, None] - codebook) ** 2).sum(axis=-1).argmin(axis=1)
    assert len(np.unique(nearest)) == 64


def test_defaults_are_those_of_the_paper():
    assert POINTS == {1: "d8b8", 2: "d4b8", 3: "d4b12", 4: "d2b8"}
    assert [METHOD.codec(128, bits, "keys").bits_per_value for bits in METHOD.bits] == [1, 2, 3, 4]
    keys, values = build(64, 2, "keys"), build(64, 2, "values")
    assert (keys.smooth, keys.hadamard, values.smooth, values.hadamard) == (True, True, False, False)


def test_keys_and_values_have_separate_points():
    """The paper's 1.25 bits: twelve bits for eight coordinates of keys, eight for those of values."""
    point = {"keys": "d8b12", "values": "d8b8"}
    sides = [METHOD.codec(128, 1, role, point=point) for role in ("keys", "values")]
    assert [(codec.sub_dim, codec.index_bits) for codec in sides] == [(8, 12), (8, 8)]  # type: ignore[attr-defined]
    assert sum(codec.bits_per_value for codec in sides) / 2 == 1.25
    assert METHOD.codec(64, 2, "values", point={"keys": "d4b10"}).index_bits == 8  # type: ignore[attr-defined] # that of bits=2


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (lambda: build(64, 2, "keys", point={"key": "d4b8"}), "point has no part 'key': give one for 'keys'"),
        (lambda: build(64, 2, "keys", point={"keys": 48}), "point=48 is not a point of VecInfer"),  # type: ignore[dict-item]
        (lambda: build(64, 2, "keys", point=["d4b8", "d8b8"]), r"point=\['d4b8', 'd8b8'\] is not a point of VecInfer"),
        (lambda: build(64, 2, "keys", point="4x8"), "not a point of VecInfer"),
        (lambda: build(64, 2, "keys", point="d7b8"), "do not divide a head dimension of 64: .* point='d4b8'"),
        (lambda: build(66, 2, "keys"), "Sub-vectors of 4 do not divide a head dimension of 66: .* point='d2b8'"),
        (lambda: build(81, 2, "keys"), "Sub-vectors of 4 do not divide a head dimension of 81: .* point='d1b8'"),
        (lambda: build(64, 2, "keys", point="d8b9"), "An index of 9 bits"),
        (lambda: build(64, 2, "keys").encode(normal(1, 1, 4, 64)), "VecInfer must be fitted to activations.*calibrate"),
        (lambda: build(64, 2, "keys").fit(Sample(normal(1, 1, 20, 64))), "at least 32 tokens"),
        (lambda: build(64, 3, "keys").fit(Sample(normal(1, 3, 20, 64))), "at least 171 tokens"),
        (  # each token twice, as in a text; a third more of it has a third more different ones
            lambda: build(64, 3, "keys").fit(Sample(mx.tile(normal(1, 3, 128, 64), (1, 1, 2, 1)))),
            "256 tokens have 6,144: .* at least 342 tokens",
        ),
        (
            lambda: build(64, 1, "values").fit(Sample(mx.ones((1, 1, 900, 64)))),
            "900 tokens have 1: .* at least 901 tokens",
        ),
        (lambda: build(64, 1, "values").fit(Sample(normal(1, 1, 90, 64) / 0)), "NaN or infinite"),
        (
            lambda: build(64, 1, "keys").fit(Sample(normal(1, 2, 90, 64))).encode(normal(1, 3, 4, 64)),
            "fitted to 2 KV heads and was given 3",
        ),
    ],
)
def test_impossible_settings_are_refused(act, sentence):
    with pytest.raises(InputError, match=sentence):
        act()
