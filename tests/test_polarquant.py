"""PolarQuant's own numbers: angles of random vectors, codebooks and distortion."""

import math

import mlx.core as mx
import numpy as np
import pytest

from veloxlab.codecs.base import Sample
from veloxlab.codecs.parts.polar import PolarTree, angle_codebook
from veloxlab.codecs.parts.scalar import quantizer_for
from veloxlab.codecs.polarquant import _MOST_VECTORS, PolarQuant, build, preset
from veloxlab.codecs.turboquant import TurboQuant
from veloxlab.errors import InputError

DIM = 128
VECTORS = 4_000
ANGLE_VARIANCE = {1: math.pi**2 / 3, 2: 0.116850, 3: 0.061295, 4: 0.031091, 5: 0.015605, 6: 0.007810, 7: 0.003906}
TWO_BITS = {  # sampled
    2: (0.3086, 0.6337, 0.9371, 1.2611),
    3: (0.4264, 0.6744, 0.8966, 1.1445),
    4: (0.5251, 0.7072, 0.8659, 1.047),
}
FULL = 6  # levels above the first, for 128 coordinates
DISTORTION = {  # bits of the levels: relative squared error, bits per value
    (4, 2, 2, 2): (0.0321, 3.875),
    (2, 2, 2, 2): (0.217, 2.875),
    (3, 2, 2, 2): (0.0699, 3.375),
    (3, 3, 3, 3): (0.0560, 3.8125),
    (4, 3, 2, 2): (0.0250, 4.125),
    (4, 3, 3, 3): (0.0181, 4.3125),
    (4, 4, 4, 4): (0.0142, 4.75),
    (4, *FULL * (2,)): (0.0351, 3.109),
    (4, *FULL * (3,)): (0.0190, 3.60),
    (4, *FULL * (4,)): (0.0145, 4.09),
}


@pytest.fixture(scope="module")
def vectors():
    return mx.array(np.random.default_rng(0).standard_normal((1, 1, VECTORS, DIM)).astype(np.float32))


def relative_error(codec, x: mx.array) -> float:
    error = mx.square(codec.decode(codec.encode(x)) - x).sum(axis=-1)
    return (error / mx.square(x).sum(axis=-1)).mean().item()


@pytest.mark.parametrize("level", ANGLE_VARIANCE)
def test_angles_have_the_variance_and_mean_of_theory(level, vectors):
    angles, _ = PolarTree(DIM, (1,) * 7).angles(vectors)
    seen = np.array(angles[level - 1]).ravel()
    # n angles: the variance of a variance is at most 2/n of its square (the tails are short), the mean's is 1/n of it
    assert seen.var() == pytest.approx(ANGLE_VARIANCE[level], rel=4 * math.sqrt(2 / seen.size))
    mean = 0 if level == 1 else math.pi / 4
    assert abs(seen.mean() - mean) < 4 * math.sqrt(ANGLE_VARIANCE[level] / seen.size)


def test_angles_and_radius_restore_the_vector(vectors):
    """Products of cosines and sines down the tree give the vector."""
    tree = PolarTree(DIM, (8,) * 7)
    angles, radius = tree.angles(vectors)
    y = np.array(radius)
    for level in reversed(angles):
        y = np.stack([y * np.cos(level), y * np.sin(level)], axis=-1).reshape(*y.shape[:-1], -1)
    assert np.allclose(y, vectors, atol=1e-5)  # float32, seven levels


def test_angles_and_radius_restore_the_vector_to_machine_precision():
    """The same in double precision, which MLX has only on the CPU."""
    x = np.random.default_rng(1).standard_normal((100, DIM))
    with mx.stream(mx.cpu):
        angles, radius = PolarTree(DIM, (8,) * 7).angles(mx.array(x, mx.float64))
        y = np.array(radius)
        assert y.dtype == np.float64
        for level in reversed(angles):
            y = np.stack([y * np.cos(level), y * np.sin(level)], axis=-1).reshape(*y.shape[:-1], -1)
    # seven levels of four roundings, which add up at random: 1e-15 of a coordinate of 1
    assert np.abs(y - x).max() <= 16 * np.finfo(float).eps * np.abs(x).max()


@pytest.mark.parametrize("level", TWO_BITS)
def test_two_bit_codebooks(level):
    angles, _ = angle_codebook(level, 2)
    assert angles == pytest.approx(TWO_BITS[level], abs=1.5e-3)  # error of the sampled ones
    assert angles + angles[::-1] == pytest.approx(math.pi / 2, abs=1e-12)  # symmetric about π/4


@pytest.mark.parametrize("level", [2, 3, 4, 5])
def test_each_centroid_is_the_mean_of_its_cell(level):
    angles, _ = angle_codebook(level, 3)
    t = np.linspace(0, math.pi / 2, 1_000_001)
    density, cell = np.sin(2 * t) ** (2 ** (level - 1) - 1), np.searchsorted((angles[1:] + angles[:-1]) / 2, t)
    means = np.bincount(cell, density * t) / np.bincount(cell, density)
    assert angles == pytest.approx(means, abs=1e-5)


@pytest.mark.parametrize("levels", DISTORTION, ids=str)
def test_distortion(levels, vectors):
    codec = PolarQuant(DIM, levels, scale="norm")
    error, bits = DISTORTION[levels]
    expected = 2 * (1 - codec.tree.expected_cosine)
    assert expected == pytest.approx(error, rel=0.005)  # the table has three digits
    # the error of a vector varies by 40 % or less, and 4,000 are averaged
    assert relative_error(codec, vectors) == pytest.approx(expected, rel=3 * 0.4 / math.sqrt(VECTORS))
    assert bits - 0.005 <= codec.bits_per_value <= bits + 0.04  # whole bytes; the table counts bits


def test_the_first_level_is_a_circle():
    """An angle just below 2π is next to one just above 0: no centroid is farther away than half a cell."""
    tree = PolarTree(2, (3,))
    around = mx.array(np.linspace(-math.pi, math.pi, 1001, dtype=np.float32))
    points = mx.stack([mx.cos(around), mx.sin(around)], axis=-1)
    angles, _ = tree.angles(points)
    found = tree.directions(tree.assign(angles)).reshape(points.shape)
    assert (points * found).sum(axis=-1).min().item() >= math.cos(math.pi / 8) - 1e-6


def test_presets():
    assert preset(64, 4, "block") == (4, 2, 2, 2)  # the paper's
    assert preset(128, 3, "full") == (4, 2, 2, 2, 2, 2, 2)
    assert PolarQuant(128, preset(128, 4, "block")).bits_per_value == 3.875
    for dim in (64, 80, 96, 112, 128, 192, 256):
        widths = [build(dim, bits, "keys").bits_per_value for bits in range(2, 9)]
        assert widths == sorted(widths)
        # a preset has b − 1/8 bits for each value, and each row of equal width ends in a whole byte
        assert all(w <= b + 2 * 8 / dim for b, w in zip(range(2, 9), widths, strict=True))
    assert build(80, 4, "keys", levels=(5, 3)).levels == (5, 3)


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_full_recursion_comes_close_to_turboquant(bits, vectors):
    """Blocks do not: at one code bit less than that, and more bits in all, their loss is three times as large."""
    turbo = quantizer_for(DIM, bits).table.distortion
    full = PolarQuant(DIM, preset(DIM, bits, "full"), scale="norm")
    assert 2 * (1 - full.tree.expected_cosine) == pytest.approx(turbo, rel=0.02)
    assert full.bits_per_value == TurboQuant(DIM, bits).bits_per_value
    assert 2 * (1 - PolarQuant(DIM, preset(DIM, bits, "block")).tree.expected_cosine) > 3 * turbo


@pytest.mark.parametrize("levels", [(2, 2, 2, 2), (4, 2, 2, 2)])
def test_scales(levels, vectors):
    """Keys: ⟨x, x̂⟩ = ‖x‖² for each vector, within float16. Values: less squared error than with the norm."""
    unbiased = PolarQuant(DIM, levels, scale="unbiased")
    inner = (unbiased.decode(unbiased.encode(vectors)) * vectors).sum(axis=-1) / mx.square(vectors).sum(axis=-1)
    assert np.allclose(inner, 1, atol=2e-3)
    errors = {s: relative_error(PolarQuant(DIM, levels, scale=s), vectors) for s in ("mse", "norm", "unbiased")}
    assert errors["mse"] < errors["norm"] < errors["unbiased"]
    cosine = PolarQuant(DIM, levels).tree.expected_cosine
    if levels == (4, 2, 2, 2):
        assert errors["mse"] == pytest.approx(1 - cosine**2, rel=0.02)  # sampled; one scale for all would reach this


# fitted codebooks


def test_fitted_codebooks_of_random_vectors_are_the_offline_ones(vectors):
    codec = PolarQuant(DIM, codebook="fitted").fit(Sample(vectors))
    offline = np.concatenate([angle_codebook(level, 2)[0] for level in (2, 3, 4)])
    # level 4 has 32,000 angles with a deviation of 0.18: a mean of a quarter of them is accurate to 0.002
    assert np.array(codec.centroids) == pytest.approx(offline, abs=0.01)
    assert codec == PolarQuant(DIM, codebook="fitted").fit(Sample(vectors))


def near_one_direction(dim: int) -> tuple[mx.array, mx.array]:
    """Return two sets of vectors ``[1, 1, 800, dim]`` near one direction, so that their angles are not random."""
    rng = np.random.default_rng(3)
    near = rng.standard_normal(dim) + 0.3 * rng.standard_normal((2, 1, 1, 800, dim))
    seen, new = (mx.array(x.astype(np.float32)) for x in near)
    return seen, new


def test_fitted_codebooks_lose_less_where_angles_are_not_random():
    seen, new = near_one_direction(DIM)
    offline, fitted = (PolarQuant(DIM, scale="mse", codebook=c) for c in ("offline", "fitted"))
    assert offline.fit(Sample(seen)) is offline
    assert relative_error(fitted.fit(Sample(seen)), new) < relative_error(offline, new)


def test_a_sample_of_many_vectors_is_read_in_part():
    x = mx.random.normal((1, 4, 5 * _MOST_VECTORS // 4, 16), key=mx.random.key(0))
    codec = PolarQuant(16, codebook="fitted")
    assert codec.fit(Sample(x)) == codec.fit(Sample(x[:, :, ::5]))
    assert codec.fit(Sample(x)) != codec.fit(Sample(x[:, :, ::4]))


def test_an_online_codec_uses_offline_tables_until_it_is_fitted():
    online, x = PolarQuant(64, codebook="online"), near_one_direction(64)[0]
    offline, fitted = PolarQuant(64), online.fit(Sample(x))
    assert (online.online, fitted.online, offline.online) == (True, False, False)
    assert mx.array_equal(online.decode(online.encode(x)), offline.decode(offline.encode(x)))
    assert fitted.centroids == PolarQuant(64, codebook="fitted").fit(Sample(x)).centroids
    assert fitted.tree.nbytes == offline.tree.nbytes
    assert relative_error(fitted, x) < relative_error(offline, x)


def test_an_online_codec_keeps_the_offline_angles_of_a_level_with_too_few_angles():
    codec, x = PolarQuant(64, codebook="online"), near_one_direction(64)[0]
    fitted = codec.fit(Sample(x[:, :, :5]))  # 80, 40 and 20 angles of levels 2 to 4, where 32 are needed
    angles = np.split(np.array(fitted.centroids), 3)
    known = [angle_codebook(level, 2)[0] for level in (2, 3, 4)]
    assert [np.array_equal(a, b) for a, b in zip(angles, known, strict=True)] == [False, False, True]
    nothing = codec.fit(Sample(x[:, :, :1]))
    assert not nothing.online
    assert mx.array_equal(nothing.decode(nothing.encode(x)), PolarQuant(64).decode(PolarQuant(64).encode(x)))


def test_a_codec_of_one_level_needs_no_fit():
    x = near_one_direction(64)[0]
    for codebook in ("online", "fitted"):
        codec = PolarQuant(64, (4,), codebook=codebook)
        assert not codec.online
        assert mx.array_equal(codec.decode(codec.encode(x)), PolarQuant(64, (4,)).decode(codec.encode(x)))


def test_fitted_codebooks_need_a_sample():
    codec = PolarQuant(64, codebook="fitted")
    x = mx.random.normal((1, 1, 4, 64), key=mx.random.key(0))
    with pytest.raises(InputError, match="must be fitted to activations before it can encode"):
        codec.encode(x)
    with pytest.raises(InputError, match="16 different angles of level 4, .* at least 8 tokens"):
        codec.fit(Sample(x))
    with pytest.raises(InputError, match="too few to fit"):
        codec.fit(Sample(mx.ones((1, 1, 500, 64))))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: PolarQuant(80, (4,) * 5), "5 levels .* head dimension of 80: give the bits of 1 to 4"),
        (lambda: build(72, 4, "keys"), r"of 72: give the bits of 1 to 3 levels, such as levels=\(4, 2, 2\)\."),
        (lambda: build(66, 4, "keys"), r"of 66: give the bits of one level, such as levels=\(4,\)\."),
        (lambda: build(81, 4, "keys"), "of 81: it is odd, so choose another method"),
        (lambda: PolarQuant(64, ()), "0 levels"),
        (lambda: PolarQuant(64, (4, 0)), "bits=0 cannot be used"),
        (
            lambda: PolarQuant(64, codebook="prompt"),
            "codebook='prompt' cannot be used.*'offline', 'online' or 'fitted'",
        ),
        (lambda: PolarQuant(64, scale="max"), "scale='max' cannot be used"),
        (lambda: build(64, 4, "keys", recursion="half"), "recursion='half' cannot be used"),
    ],
)
def test_impossible_settings_are_refused_at_once(make, sentence):
    with pytest.raises(InputError, match=sentence):
        make()
