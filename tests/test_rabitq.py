"""RaBitQ's own numbers: its directions, its estimates and their bounds, on random unit vectors."""

import math

import mlx.core as mx
import numpy as np
import pytest

from veloxlab.cache.layer import CompressedKVCache
from veloxlab.codecs.base import Sample
from veloxlab.codecs.method import Method
from veloxlab.codecs.rabitq import EPSILON, METHOD, CentredRaBitQ, RaBitQ, _best_stretch, _tried_stretch, usual_stretch
from veloxlab.errors import InputError

PAIRS = 4000
MOMENT = 0.05  # two standard errors of a mean of 4,000 squares, √(2/4000) each, and the last digit of the table
# 1 − cos² varies by 30 % from vector to vector: three standard errors of a mean of 4,000, and the table's rounding
SPREAD = 0.02


def unit_vectors(dim: int, count: int = PAIRS, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def decoded(codec, x: np.ndarray) -> np.ndarray:
    return np.array(codec.decode(codec.encode(mx.array(x)[None, None])))[0, 0]


def walked(magnitude: np.ndarray, bits: int) -> float:
    """Return the best possible cosine, by a walk through all steps one at a time, in double precision."""
    top = 2 ** (bits - 1)
    steps = sorted((j / a, i) for i, a in enumerate(magnitude) for j in range(1, top))
    u = np.full(len(magnitude), 0.5)
    best = magnitude @ u / np.linalg.norm(u)
    for _, i in steps:
        u[i] += 1
        best = max(best, magnitude @ u / np.linalg.norm(u))
    return best / np.linalg.norm(magnitude)


@pytest.mark.parametrize(("bits", "dim"), [(2, 64), (3, 80), (4, 64), (5, 64)])
def test_the_exact_encoder_finds_the_best_direction(bits, dim):
    x = unit_vectors(dim, 8)
    codec = RaBitQ(dim, bits, encoder="exact")
    y = np.array(codec._rotation.forward(mx.array(x)))
    u = np.array(codec.expand(codec.encode(mx.array(x)[None, None])))[0, 0]
    cosine = (y * u).sum(axis=1) / np.linalg.norm(u, axis=1)
    assert cosine == pytest.approx([walked(np.abs(row), bits) for row in y.astype(np.float64)], abs=2e-6)  # float32


def test_a_vector_on_the_grid_is_kept_to_the_precision_of_its_scale():
    """Rotated, these are multiples of the grid's own points: several equal coordinates step at the same time."""
    u = np.random.default_rng(0).choice([-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5], (6, 64)).astype(np.float32)
    codec = RaBitQ(64, 3, encoder="exact")
    x = np.array(codec._rotation.inverse(mx.array(u)))
    assert decoded(codec, x) == pytest.approx(x, abs=2**-9 * float(np.abs(x).max()))


# mean 1 − cos², and d·Var of the unbiased estimate; one bit is the signs, with Lloyd–Max's 1 − cos² on the sphere
DISTORTION = {
    (128, 1): (0.36089, 0.555),
    (64, 2): (0.1126, 0.1276),
    (64, 3): (0.0330, 0.0342),
    (64, 4): (0.00870, 0.0088),
    (64, 5): (0.00215, 0.0022),
    (128, 2): (0.1156, 0.131),
    (128, 3): (0.0347, 0.0360),
    (128, 4): (0.00984, 0.0099),
    (128, 5): (0.00256, 0.0026),
}


@pytest.mark.parametrize("encoder", ["exact", "grid"])
@pytest.mark.parametrize(("dim", "bits"), DISTORTION)
def test_distortion_and_variance_are_the_papers(dim, bits, encoder):
    count = PAIRS if encoder == "grid" or bits < 4 else 1000
    x, q = unit_vectors(dim, count), unit_vectors(dim, count, seed=1)
    few = math.sqrt(PAIRS / count)
    distortion, variance = DISTORTION[dim, bits]
    least = decoded(RaBitQ(dim, bits, scale="mse", encoder=encoder), x)
    assert np.mean(((least - x) ** 2).sum(axis=1)) == pytest.approx(distortion, rel=SPREAD * few)
    errors = (q * (decoded(RaBitQ(dim, bits, encoder=encoder), x) - x)).sum(axis=1)
    assert dim * np.mean(errors**2) == pytest.approx(variance, rel=MOMENT * few)


@pytest.mark.parametrize(("bits", "distortion"), [(2, 0.1165), (3, 0.0360), (4, 0.0110), (5, 0.0035)])
def test_the_fast_encoder_has_the_paper_s_error(bits, distortion):
    x = unit_vectors(128)
    least = decoded(RaBitQ(128, bits, scale="mse", encoder="fast"), x)
    # its one constant comes from 100 vectors, which alone moves the error by about 1 %
    assert np.mean(((least - x) ** 2).sum(axis=1)) == pytest.approx(distortion, rel=SPREAD + 0.02)


@pytest.mark.parametrize(("bits", "stretch"), [(2, 0.984), (3, 1.699), (4, 3.04), (5, 5.75)])
def test_the_default_scale_of_the_grid(bits, stretch):
    assert usual_stretch(128, bits) == pytest.approx(stretch, rel=0.03)  # t varies by 10 %, over 100 vectors


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_a_search_of_a_few_scales_has_nearly_the_best_error(bits):
    a = mx.array(np.abs(unit_vectors(64, 128)))

    def error(t: mx.array) -> float:
        u = np.array(mx.minimum(mx.floor(t * a), 2 ** (bits - 1) - 1), np.float64) + 0.5
        return float(np.mean(1 - (u * np.array(a, np.float64)).sum(axis=1) ** 2 / (u * u).sum(axis=1)))

    exact, tried = error(_best_stretch(a, bits)), error(_tried_stretch(a, bits))
    assert exact * (1 - 1e-3) <= tried <= exact * (1.005 if bits <= 6 else 1.04)


@pytest.mark.parametrize(
    ("dim", "mean", "deviation"),
    [
        (64, 0.80101, 0.0262),
        (96, 0.79997, 0.0214),
        (128, 0.79944, 0.0186),
        (256, 0.79866, 0.0132),
        (1024, 0.79808, 0.0066),
    ],
)
def test_one_bit_is_the_signs_and_its_cosine_is_the_papers(dim, mean, deviation):
    formula = math.sqrt(dim / math.pi) * 2 / (dim - 1) * math.exp(math.lgamma(dim / 2) - math.lgamma((dim - 1) / 2))
    assert formula == pytest.approx(mean, abs=6e-6)  # the table's last digit
    x = unit_vectors(dim)
    codec = RaBitQ(dim, 1, bounds=True)
    code = codec.encode(mx.array(x)[None, None])
    y = np.array(codec._rotation.forward(mx.array(x)))
    assert np.array_equal(np.array(codec.expand(code))[0, 0], np.where(y >= 0, 0.5, -0.5))
    cosine = np.sqrt(1 - np.array(code.arrays["sine"], np.float64) ** 2)
    assert cosine.mean() == pytest.approx(mean, abs=3 * deviation / math.sqrt(PAIRS))
    assert cosine.std() == pytest.approx(deviation, rel=3 / math.sqrt(2 * PAIRS) + 0.008)  # the table's last digit


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_the_variance_follows_from_the_cosine(dim):
    """D·Var = (1 − c²)/c² · D/(D − 1), with each vector's own c: the error is in a random direction."""
    x, q = unit_vectors(dim), unit_vectors(dim, seed=1)
    codec = RaBitQ(dim, 1, bounds=True)
    code = codec.encode(mx.array(x)[None, None])
    sine = np.array(code.arrays["sine"], np.float64) ** 2
    errors = (q * (np.array(codec.decode(code))[0, 0] - x)).sum(axis=1)
    # the variance is a mean of 4,000 squares: three standard errors
    expected = np.mean(sine / (1 - sine)) * dim / (dim - 1)
    assert dim * np.mean(errors**2) == pytest.approx(expected, rel=3 * math.sqrt(2 / PAIRS))


@pytest.mark.parametrize(("dim", "half_width"), [(64, 0.179), (128, 0.127), (1024, 0.045)])
def test_the_bound_holds_as_often_as_for_a_gaussian(dim, half_width):
    x, q = unit_vectors(dim), unit_vectors(dim, seed=1)
    lengths = np.random.default_rng(2).uniform(0.5, 2, (PAIRS, 1)).astype(np.float32)
    codec = RaBitQ(dim, 1, bounds=True)
    code = codec.encode(mx.array(x * lengths)[None, None])
    widths = np.array(codec.half_widths(code))[0, 0] / lengths
    # the mean of a convex function of the cosine is slightly above its value at the mean cosine; half of the last
    # digit of 0.045 is 1 % of it
    assert widths.mean() == pytest.approx(half_width, rel=0.012)
    errors = (q * (np.array(codec.decode(code))[0, 0] / lengths - x)).sum(axis=1, keepdims=True)
    within = np.mean(np.abs(errors) <= widths)
    assert within == pytest.approx(0.945, abs=3 * math.sqrt(0.945 * 0.055 / PAIRS))
    assert np.std(errors / widths * EPSILON) == pytest.approx(0.994, rel=3 / math.sqrt(2 * PAIRS))
    assert mx.allclose(codec.half_widths(code, 1.0) * EPSILON, codec.half_widths(code))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_estimate_is_unbiased(bits):
    """Over rotations of one pair, the average must be right: within 3 standard errors, and float16."""
    x, q = unit_vectors(64, 2)
    q = (x + q) / np.linalg.norm(x + q)
    estimates = [float(q @ decoded(RaBitQ(64, bits, seed=seed), x[None])[0]) for seed in range(400)]
    error = np.mean(estimates) - q @ x
    assert abs(error) < 3 * np.std(estimates) / math.sqrt(len(estimates)) + 2**-11


def centred(**options: object) -> CentredRaBitQ:
    codec = METHOD.codec(64, 2, "keys", centroid=True, **options)
    assert isinstance(codec, CentredRaBitQ)
    return codec


def test_a_centroid_takes_the_mean_out_and_puts_it_back():
    rng = np.random.default_rng(0)
    means = 5 * rng.standard_normal((1, 2, 1, 64))
    x = mx.array((means + rng.standard_normal((2, 2, 400, 64))).astype(np.float32))
    plain, unfitted, fitted = METHOD.codec(64, 2, "keys"), centred(), centred().fit(Sample(x))
    assert np.allclose(fitted.centroid, means[0, :, 0], atol=5 / math.sqrt(800))  # five standard errors

    def error(codec) -> float:
        return float(mx.square(codec.decode(codec.encode(x)) - x).sum() / mx.square(x).sum())

    assert error(unfitted) == pytest.approx(error(plain), rel=1e-6)
    assert error(fitted) == pytest.approx(error(plain) / 26, rel=0.1)  # the energy about the mean is 1/26 of all
    assert fitted.bits_per_value == plain.bits_per_value
    assert fitted.shared_bytes == plain.shared_bytes + 2 * 64 * 4


def test_a_centroid_reaches_scores_and_mixes():
    x = mx.random.normal((1, 2, 1500, 64), key=mx.random.key(0)) + 3
    codec = centred(bounds=True).fit(Sample(x))
    code, q = codec.encode(x), mx.random.normal((1, 4, 3, 64), key=mx.random.key(1))
    exact = mx.repeat(codec.decode(code), 2, axis=1)
    assert np.allclose(codec.scores(q, code), q @ exact.swapaxes(-1, -2), atol=2e-3)
    p = mx.softmax(mx.random.normal((1, 4, 3, 1500), key=mx.random.key(2)), axis=-1)
    assert np.allclose(codec.mix(p, code), p @ exact, atol=1e-4)
    # the bound is for the coded vector, which is the difference from the mean
    widths = codec.half_widths(code)
    errors = mx.abs(
        (q[:, ::2] @ (codec.decode(code) - x).swapaxes(-1, -2)) / mx.linalg.norm(q[:, ::2], axis=-1)[..., None]
    )
    assert 0.9 < (errors <= widths.swapaxes(-1, -2)).mean().item() < 0.98


def test_a_fitted_codec_equals_only_itself():
    x = mx.random.normal((1, 2, 40, 64), key=mx.random.key(0))
    first, second = centred().fit(Sample(x)), centred().fit(Sample(x))
    assert first != second
    assert len({first, second}) == 2
    assert mx.array_equal(first.centroid, second.centroid)


def test_one_bit_keys_and_four_bit_values_hold_a_sixth():
    """The whole cache, from its live buffers, at head dimension 128 and 8,192 tokens."""
    method: Method = METHOD
    cache = CompressedKVCache(method.codec(128, 1, "keys"), method.codec(128, 4, "values"), sinks=0, window=0)
    for start in range(0, 8192, 2048):
        k, v = mx.random.normal((2, 1, 2, 2048, 128), key=mx.random.key(start))
        cache.update_and_fetch(k, v)
        mx.eval(cache.state)
    assert cache.fp16_bytes == 2 * 8192 * 2 * 2 * 128
    assert cache.nbytes == sum(buffer.nbytes for buffer in cache.buffers)
    shared = cache.key_codec.shared_bytes + cache.value_codec.shared_bytes
    assert cache.fp16_bytes / (cache.nbytes + shared) >= 5.9
    assert cache.fp16_bytes / cache.nbytes == pytest.approx(32 / (1.125 + 4.125), rel=1e-9)


def test_keys_get_the_unbiased_scale_and_values_the_mse_scale():
    assert METHOD.codec(64, 4, "keys").scale == "unbiased"  # type: ignore[attr-defined]
    assert METHOD.codec(64, 4, "values").scale == "mse"  # type: ignore[attr-defined]
    assert METHOD.codec(64, 4, "keys", bounds=True).bits_per_value == 4.5
    assert METHOD.codec(64, 4, "values", bounds=True).bits_per_value == 4.25


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: METHOD.codec(64, 0, "keys"), "out of range"),
        (lambda: RaBitQ(64, 4, scale="norm"), "scale='norm' cannot be used"),
        (lambda: RaBitQ(64, 4, encoder="slow"), "encoder='slow' cannot be used"),
        (lambda: RaBitQ(64, 4, rotation="kac"), "rotation='kac' cannot be used"),
        (lambda: RaBitQ(64, 4, scale="mse", bounds=True), "bounds an unbiased estimate"),
        (lambda: RaBitQ(64, 1).half_widths(RaBitQ(64, 1).encode(mx.ones((1, 1, 1, 64)))), "make the codec with bounds"),
        (lambda: centred().fit(Sample(mx.random.normal((1, 2, 5, 64)))), "cannot learn from 5 tokens .* text of 16"),
        (lambda: centred().fit(Sample(mx.ones((1, 2, 50, 64)))), "All tokens of the sample are the same"),
        (
            lambda: centred().fit(Sample(mx.random.normal((1, 2, 50, 64)))).encode(mx.ones((1, 3, 1, 64))),
            "fitted to 2 KV heads and was given 3",
        ),
    ],
)
def test_impossible_settings_are_refused(make, sentence):
    with pytest.raises(InputError, match=sentence):
        make()
