"""QJL's own numbers: variance and mean of its estimate on random pairs of unit vectors, and its grouped values."""

import math

import mlx.core as mx
import numpy as np
import pytest

from veloxlab.codecs.base import Sample
from veloxlab.codecs.qjl import METHOD, QJL, GroupedValues, OutlierQJL
from veloxlab.codecs.rabitq import RaBitQ
from veloxlab.errors import InputError

PAIRS = 4000
DIM = 128


def pairs(rho: float, dim: int = DIM, count: int = PAIRS) -> tuple[np.ndarray, np.ndarray]:
    """Return random unit vectors with the inner product ``rho``."""
    k, other = np.random.default_rng(77).standard_normal((2, count, dim))  # not the seed of a sketch
    k /= np.linalg.norm(k, axis=1, keepdims=True)
    other -= (other * k).sum(axis=1, keepdims=True) * k
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    return k.astype(np.float32), (rho * k + math.sqrt(1 - rho**2) * other).astype(np.float32)


def estimates(codec, k: np.ndarray, q: np.ndarray) -> np.ndarray:
    decoded = np.array(codec.decode(codec.encode(mx.array(k)[None, None])))[0, 0]
    return (decoded * q).sum(axis=1)


# m·Var of the estimate for a sketch that is drawn again for each pair. Ours is drawn once, and the pairs are random:
# this is equal for an orthogonal sketch of D rows, a rotation, and nearly equal for others.
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize(
    ("sketch", "rho", "variance"),
    [
        ("gaussian", 0.0, math.pi / 2),
        ("gaussian", 0.5, 1.321),
        ("gaussian", 0.9, 0.761),
        ("orthogonal", 0.0, 0.571),
        ("orthogonal", 0.5, 0.445),
        ("orthogonal", 0.9, 0.165),
    ],
)
def test_variance_is_the_closed_form(sketch, rho, variance, rows):
    k, q = pairs(rho)
    errors = estimates(QJL(DIM, rows, sketch), k, q) - rho
    # a mean of 4,000 squares is within 6.7 % in 99.7 of 100 draws. The numbers for an orthogonal sketch are of m = D to
    # 3 %. One Gaussian sketch of m·D numbers is itself a draw: sampled, its variance moves by 4 % at m = D.
    assert rows * DIM * np.mean(errors**2) == pytest.approx(variance, rel=0.12)


@pytest.mark.parametrize("sketch", ["gaussian", "orthogonal"])
@pytest.mark.parametrize(("rho", "dim"), [(0.0, 64), (0.9, 64), (0.9, 80)])
def test_the_estimate_is_unbiased_over_sketches(sketch, rho, dim):
    k, q = pairs(rho, dim, 16)
    means = [estimates(QJL(dim, 1, sketch, seed), k, q).mean() for seed in range(100, 160)]
    error = np.mean(means) - rho
    assert abs(error) < 3.5 * np.std(means) / math.sqrt(len(means)) + 2**-11  # and the norm's rounding


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_orthogonal_blocks_have_less_than_half_the_variance_of_gaussian_rows(rows):
    k, q = pairs(0.0)
    gaussian, orthogonal = (np.mean(estimates(QJL(DIM, rows, s), k, q) ** 2) for s in ("gaussian", "orthogonal"))
    # π/2 ÷ (π/2 − 1) = 2.75, each to 12 % as above
    assert gaussian / orthogonal == pytest.approx((math.pi / 2) / (math.pi / 2 - 1), rel=0.2)


def test_the_error_is_within_the_papers_lemma():
    """m ≥ 4/3 · (1 + ε)/ε² · log(2/δ) keeps the error below ε with probability 1 − δ (Lemma 3)."""
    epsilon, delta = 0.2, 0.05
    assert 4 * DIM >= 4 / 3 * (1 + epsilon) / epsilon**2 * math.log(2 / delta) > DIM
    k, q = pairs(0.3)
    for sketch in ("gaussian", "orthogonal"):
        assert np.mean(np.abs(estimates(QJL(DIM, 4, sketch), k, q) - 0.3) > epsilon) <= delta


def test_at_one_bit_an_orthogonal_sketch_is_rabitq_up_to_the_scale():
    """Both keep the signs of a rotated key; RaBitQ's scale is for each key, QJL's constant for the mean of all."""
    k, _ = pairs(0.0, count=500)
    x = mx.array(k)[None, None]
    qjl, rabitq = QJL(DIM, 1, seed=7), RaBitQ(DIM, 1, rotation="haar", seed=7)
    codes = qjl.encode(x), rabitq.encode(x)
    assert mx.array_equal(codes[0].arrays["signs"], codes[1].arrays["codes"])
    ratio = np.array(rabitq.decode(codes[1])) / np.array(qjl.decode(codes[0]))
    # one factor for each key, within float32 of the smallest of 128 coordinates
    assert np.median(np.ptp(ratio, axis=-1) / ratio.mean(axis=-1)) < 1e-3
    # ‖k‖²/⟨k, k̂⟩ of one is c₁/cos, the other's constant is c₁/E cos: 2.3 % deviation of the cosine at D = 128
    assert np.median(ratio, axis=-1).mean() == pytest.approx(1, abs=3 * 0.0233 / math.sqrt(500))


def test_scores_are_read_from_the_signs_and_zero_has_the_sign_plus():
    codec = QJL(64, 2)
    code = codec.encode(mx.zeros((1, 1, 2, 64)))
    assert mx.array_equal(codec.expand(code), mx.ones((1, 1, 2, 128)))
    assert not codec.scores(mx.ones((1, 1, 1, 64)), code).any()


def with_outliers(bits: int = 2, outliers: int = 4, dim: int = 64) -> OutlierQJL:
    codec = METHOD.codec(dim, bits, "keys", outliers=outliers)
    assert isinstance(codec, OutlierQJL)
    return codec


def keys_with_outliers(tokens: int = 300) -> mx.array:
    x = np.random.default_rng(0).standard_normal((1, 2, tokens, 64)).astype(np.float32)
    x[:, 0, :, [3, 20, 40, 63]] *= 15
    x[:, 1, :, [0, 21, 22, 50]] *= 15
    return mx.array(x)


def test_outlier_channels_are_found_for_each_head_and_help():
    x = keys_with_outliers()
    codec = with_outliers().fit(Sample(x))
    assert codec.channels == (3, 20, 40, 63, 0, 21, 22, 50)
    q = np.array(mx.random.normal((1, 2, 300, 64), key=mx.random.key(1)))

    def error(codec) -> float:
        return float(np.mean(((np.array(codec.decode(codec.encode(x))) - np.array(x)) * q).sum(axis=-1) ** 2))

    # for the same 192 signs: one sketch has a variance in proportion to ‖k‖²/192, two have ‖inliers‖²/128 +
    # ‖outliers‖²·4/64/64, since only 4 coordinates of the query meet the outliers. With 900 and 60: 5.0 against 1.4
    assert error(codec) < error(QJL(64, 3)) / 2


def test_outliers_reach_scores_mixes_and_bits():
    x = keys_with_outliers(1500)
    codec = with_outliers().fit(Sample(x))
    code, q = codec.encode(x), mx.random.normal((1, 4, 3, 64), key=mx.random.key(1))
    exact = mx.repeat(codec.decode(code), 2, axis=1)
    assert np.allclose(codec.scores(q, code), q @ exact.swapaxes(-1, -2), atol=2e-2)  # sums of 64 products up to 200
    p = mx.softmax(mx.random.normal((1, 4, 3, 1500), key=mx.random.key(2)), axis=-1)
    assert np.allclose(codec.mix(p, code), p @ exact, atol=1e-3)
    assert codec.bits_per_value == 2 + 1 + 32 / 64
    assert code.nbytes * 8 == codec.bits_per_value * 2 * 1500 * 64
    part = codec.encode(x[:, :, 700:])
    assert all(np.mean(np.array(code.arrays[n][:, :, 700:]) == np.array(a)) > 0.99 for n, a in part.arrays.items())
    assert not codec.decode(codec.encode(mx.zeros((1, 2, 3, 64)))).any()
    assert codec.shared_bytes == 4 * (128 * 64 + 64 * 4 + 2 * 2 * 64)


@pytest.mark.parametrize(("dim", "outliers"), [(80, 8), (96, 5), (128, 8), (256, 3)])
def test_outlier_bits_are_the_bytes_held_at_any_shape(dim, outliers):
    x = mx.random.normal((2, 3, 40, dim), key=mx.random.key(0))
    codec = with_outliers(2, outliers, dim).fit(Sample(x))
    assert codec.encode(x).nbytes * 8 == pytest.approx(codec.bits_per_value * 2 * 3 * 40 * dim, rel=1e-12)


@pytest.mark.parametrize("levels", ["centres", "ends"])
@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grouped_values_are_within_half_a_step(bits, dim, levels):
    x = np.random.default_rng(0).standard_normal((1, 2, 50, dim)).astype(np.float32) + 0.5
    codec = GroupedValues(dim, bits, levels)
    decoded = np.array(codec.decode(codec.encode(mx.array(x))))
    for first in range(0, dim, 32):  # the last group of 80 has 16
        group, back = x[..., first : first + 32], decoded[..., first : first + 32]
        spread = np.ptp(group, axis=-1, keepdims=True)
        step = spread / (2**bits - (levels == "ends"))
        kept = 2**-9 * (spread + np.abs(group).max())  # float16 rounding of the squares of two roots
        assert (np.abs(group - back) <= step / 2 + kept).all()


def test_grouped_values_count_both_numbers_of_each_group():
    assert METHOD.codec(128, 2, "values").bits_per_value == 3
    assert METHOD.codec(80, 2, "values").bits_per_value == 2 + 3 * 32 / 80  # groups of 32, 32 and 16
    assert GroupedValues(128, 2, group=128).layout["least"].count == 1


def test_levels_in_the_middle_of_steps_lose_a_third_less_at_two_bits():
    """As in plain arithmetic on the same groups, within float16 rounding of the ends."""
    x = np.random.default_rng(0).standard_normal((1, 1, 2000, 128)).astype(np.float32)
    groups = x.reshape(-1, 32)
    least, spread = groups.min(axis=1, keepdims=True), np.ptp(groups, axis=1, keepdims=True)
    ends = least + np.round((groups - least) / spread * 3) / 3 * spread
    centres = least + (np.minimum(np.floor((groups - least) / spread * 4), 3) + 0.5) / 4 * spread
    errors = [np.mean((groups - levels) ** 2) for levels in (ends, centres)]
    assert errors[1] < 0.7 * errors[0]
    for levels, expected in zip(("ends", "centres"), errors, strict=True):
        codec = GroupedValues(128, 2, levels)
        decoded = np.array(codec.decode(codec.encode(mx.array(x))))
        assert np.mean((decoded - x) ** 2) == pytest.approx(expected, rel=0.01)


def test_options_of_keys_and_of_values():
    assert METHOD.codec(64, 2, "keys") == QJL(64, 2)
    assert METHOD.codec(64, 2, "keys", outliers=0) == QJL(64, 2)
    assert METHOD.codec(64, 2, "keys", sketch="gaussian", levels="ends") == QJL(64, 2, "gaussian")
    assert METHOD.codec(64, 2, "values", sketch="gaussian", levels="ends") == GroupedValues(64, 2, "ends")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: METHOD.codec(64, 9, "keys"), "out of range"),
        (lambda: QJL(64, 2, sketch="sparse"), "sketch='sparse' cannot be used"),
        (lambda: GroupedValues(64, 2, levels="edges"), "levels='edges' cannot be used"),
        (lambda: GroupedValues(64, 2, group=0), "group=0 cannot be used: give a whole number, 1 or more"),
        (lambda: with_outliers(outliers=33), "outliers=33 of 64 channels do not leave two parts.* from 1 to 32"),
        (lambda: with_outliers().encode(mx.ones((1, 2, 3, 64))), "vl.calibrate.*'qjl', bits=2, outliers=4"),
        (lambda: with_outliers().fit(Sample(mx.ones((1, 2, 3, 64)))), "cannot learn from 3 tokens .* text of 16"),
        (lambda: with_outliers().fit(Sample(mx.ones((1, 2, 50, 64)))), "All tokens of the sample are the same"),
        (
            lambda: with_outliers().fit(Sample(keys_with_outliers())).encode(mx.ones((1, 3, 3, 64))),
            "fitted to 2 KV heads and was given 3",
        ),
    ],
)
def test_impossible_settings_are_refused(make, sentence):
    with pytest.raises(InputError, match=sentence):
        make()
