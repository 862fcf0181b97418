"""TurboQuant's own numbers: distortion and inner-product error on random unit vectors, with 20,000 pairs."""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from veloxlab.codecs.base import Sample
from veloxlab.codecs.parts.codebooks import gaussian_codebook, sphere_codebook
from veloxlab.codecs.saving import same_codec
from veloxlab.codecs.turboquant import METHOD, TurboQuant, TurboQuantProd, TurboQuantSplit, build
from veloxlab.errors import InputError

PAIRS = 20_000
DIM = 128
# d·E[(⟨q, k̂⟩ − ⟨q, k⟩)²] for unit vectors: norm scale, unbiased scale, prod with Gaussian and with orthogonal sketch
INNER_PRODUCT_ERROR = {
    1: (0.353, 0.555, 1.576, 0.569),
    2: (0.117, 0.133, 0.580, 0.204),
    3: (0.034, 0.0347, 0.180, 0.066),
    4: (0.0093, 0.0092, 0.0528, 0.0192),
    5: (0.0025, 0.0024, 0.0143, 0.0053),
}
# the table was sampled with the same number of pairs: a mean of squares of N values has a relative deviation of √(2/N),
# 1 %, on both sides, its last digit is rounded by up to 2 %, and a Gaussian sketch is itself one draw
TOLERANCE = 0.06


def unit_vectors(seed: int, dim: int = DIM) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((PAIRS, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def pairs():
    return unit_vectors(0), unit_vectors(1)


def decoded(codec, keys: np.ndarray) -> np.ndarray:
    return np.array(codec.decode(codec.encode(mx.array(keys)[None, None])))[0, 0]


def inner_product_errors(codec, pairs) -> np.ndarray:
    keys, queries = pairs
    return (queries * (decoded(codec, keys) - keys)).sum(axis=1)


@pytest.mark.parametrize("bits", INNER_PRODUCT_ERROR)
@pytest.mark.parametrize(
    ("column", "make"),
    [
        (0, lambda b: TurboQuant(DIM, b, scale="norm")),
        (1, lambda b: TurboQuant(DIM, b, scale="unbiased")),
        (2, lambda b: TurboQuantProd(DIM, b, sketch="gaussian")),
        (3, lambda b: TurboQuantProd(DIM, b, sketch="orthogonal")),
    ],
    ids=["norm", "unbiased", "prod-gaussian", "prod-orthogonal"],
)
def test_inner_product_error(bits, column, make, pairs):
    errors = inner_product_errors(make(bits), pairs)
    assert DIM * np.mean(errors**2) == pytest.approx(INNER_PRODUCT_ERROR[bits][column], rel=TOLERANCE)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("sketch", ["gaussian", "orthogonal"])
def test_prod_is_between_the_papers_bounds(bits, sketch, pairs):
    """For unit vectors 4^−b ≤ d·D_prod (Theorem 3) and, by the upper bound of Theorem 2, at most √3·π²·4^−b."""
    error = DIM * np.mean(inner_product_errors(TurboQuantProd(DIM, bits, sketch=sketch), pairs) ** 2)
    assert 4.0**-bits <= error <= math.sqrt(3) * math.pi**2 * 4.0**-bits


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_prod_variance_follows_the_closed_form(bits, pairs):
    """(π/2)·D(b − 1)/d for the Gaussian sketch, where D(0) = 1."""
    residual = sphere_codebook(bits - 1, DIM).distortion if bits > 1 else 1.0
    errors = inner_product_errors(TurboQuantProd(DIM, bits), pairs)
    assert DIM * np.mean(errors**2) == pytest.approx(math.pi / 2 * residual, rel=TOLERANCE)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "make",
    [
        lambda b: TurboQuantProd(DIM, b, sketch="gaussian"),
        lambda b: TurboQuantProd(DIM, b, sketch="orthogonal"),
        lambda b: TurboQuant(DIM, b, scale="unbiased"),
    ],
    ids=["prod-gaussian", "prod-orthogonal", "unbiased"],
)
def test_unbiased_estimators_are_unbiased(bits, make, pairs):
    """For queries equal to the keys, where a bias is largest; within 3 standard errors and float16."""
    keys, _ = pairs
    lengths = np.random.default_rng(2).uniform(0.5, 2, (PAIRS, 1)).astype(np.float32)
    ratio = (keys * decoded(make(bits), keys * lengths) / lengths).sum(axis=1)
    standard_error = ratio.std() / math.sqrt(PAIRS)
    # lengths vary, so the rounding of scales averages out; that of a one-bit residual's norm, always √d, does not
    assert abs(ratio.mean() - 1) < 3 * standard_error + 2**-11


@pytest.mark.parametrize(("bits", "kept"), [(1, 0.6374), (2, 0.8854), (3, 0.9672), (4, 0.9913)])
def test_the_papers_norm_scale_shrinks_inner_products_by_one_minus_d(bits, kept, pairs):
    keys, _ = pairs
    ratio = (keys * decoded(TurboQuant(DIM, bits, scale="norm", codebook="gaussian"), keys)).sum(axis=1)
    assert ratio.mean() == pytest.approx(1 - gaussian_codebook(bits).distortion, abs=4e-3)  # Gaussian table, d = 128
    assert ratio.mean() == pytest.approx(kept, abs=2e-3)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("rotation", ["hadamard", "haar"])
@pytest.mark.parametrize("dim", [64, 128])
def test_distortion_is_the_tables_and_between_the_bounds(bits, rotation, dim):
    keys = unit_vectors(2, dim)
    codec = TurboQuant(dim, bits, scale="norm", rotation=rotation)
    mse = np.mean(((decoded(codec, keys) - keys) ** 2).sum(axis=1))
    assert mse == pytest.approx(sphere_codebook(bits, dim).distortion, rel=0.01)
    assert 4.0**-bits <= mse <= math.sqrt(3) * math.pi / 2 * 4.0**-bits


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_mse_scale_is_the_best_scale(bits, pairs):
    keys, _ = pairs
    errors = {
        scale: np.mean((decoded(TurboQuant(DIM, bits, scale=scale), keys) - keys) ** 2)
        for scale in ("mse", "norm", "unbiased")
    }
    assert errors["mse"] < min(errors["norm"], errors["unbiased"])


def test_two_unbiased_bits_beat_three_bits_of_prod(pairs):
    """The claim of arXiv 2604.18555."""
    two = np.mean(inner_product_errors(TurboQuant(DIM, 2, scale="unbiased"), pairs) ** 2)
    three = np.mean(inner_product_errors(TurboQuantProd(DIM, 3), pairs) ** 2)
    assert two < three


def test_keys_get_the_unbiased_scale_and_values_the_mse_scale():
    assert build(64, 4, "keys").scale == "unbiased"
    assert build(64, 4, "values").scale == "mse"
    assert build(64, 4, "values", scale="norm").scale == "norm"


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: TurboQuant(64, 4, scale="max"), "scale='max' cannot be used"),
        (lambda: TurboQuant(64, 4, codebook="uniform"), "codebook='uniform' cannot be used"),
        (lambda: TurboQuant(64, 9), "bits=9 cannot be used: give a whole number from 1 to 8"),
        (lambda: METHOD.codec(64, 0, "keys", variant="prod"), "out of range"),
        (lambda: TurboQuantProd(64, 2, sketch="sparse"), "sketch='sparse' cannot be used"),
        (lambda: build(64, 4, "keys", variant="max"), "variant='max' cannot be used"),
        (lambda: build(64, 4, "keys", variant="prod", scale="mse"), "scale='mse' is for variant='mse' alone"),
        (lambda: build(64, 4, "values", variant="prod", outlier_bits=5), "outlier_bits=5 is for variant='mse' alone"),
        (lambda: build(64, 4, "keys", sketch="orthogonal"), "sketch='orthogonal' is for variant='prod' alone"),
        (lambda: build(64, 4, "keys", sketch="gaussian", outliers=8), "sketch='gaussian' is for variant='prod' alone"),
        (lambda: build(64, 4, "keys", outlier_bits=5), "outlier_bits=5 was given without outliers"),
        (lambda: build(64, 4, "keys", outliers=8, outlier_bits=0), "bits=0 cannot be used"),
    ],
)
def test_impossible_settings_are_refused_at_once(make, sentence):
    with pytest.raises(InputError, match=sentence):
        make()


# outlier channels


def loud(channels: list[int], tokens: int = 200, dim: int = DIM) -> mx.array:
    """Return vectors ``[1, 2, tokens, dim]`` whose given channels of the first head are ten times as large."""
    x = np.random.default_rng(5).standard_normal((1, 2, tokens, dim)).astype(np.float32)
    x[:, 0, :, channels] *= 10
    return mx.array(x)


def test_two_and_a_half_bits_are_two_and_a_quarter_and_the_norms():
    codec = build(128, 2, "keys", outliers=32, outlier_bits=3)
    assert codec.bits_per_value == 2.5
    x = loud([3, 77])
    assert codec.fit(Sample(x)).encode(x).nbytes * 8 == 2.5 * x.size


def test_outliers_are_the_channels_of_most_energy_in_each_head():
    channels = [1, 40, 41, 90, 127]
    codec = TurboQuantSplit(DIM, 2, 5, 3).fit(Sample(loud(channels)))
    assert codec.channels[:5] == tuple(channels)
    assert same_codec(codec, TurboQuantSplit(DIM, 2, 5, 3).fit(Sample(loud(channels))))
    assert not same_codec(codec, TurboQuantSplit(DIM, 2, 5, 3))


def test_each_part_is_turboquant_of_its_channels():
    x = loud(list(range(8)))
    codec = TurboQuantSplit(DIM, 2, 8, 4).fit(Sample(x))
    assert codec.channels[:8] == tuple(range(8))
    parts = [(TurboQuant(8, 4), x[:, :1, :, :8]), (TurboQuant(DIM - 8, 2), x[:, :1, :, 8:])]
    expected = mx.concatenate([part.decode(part.encode(half)) for part, half in parts], axis=-1)
    assert np.allclose(codec.decode(codec.encode(x))[:, :1], expected, atol=1e-4)


def test_a_split_reduces_the_error_only_with_outlier_channels():
    """Against one instance with 3 bits everywhere: 3.125 bits for each value, and 2.5 with the split."""
    x = loud(list(range(0, 128, 4)), tokens=1000)
    split = TurboQuantSplit(DIM, 2, 32, 3, scale="mse").fit(Sample(x))
    whole = TurboQuant(DIM, 3, scale="mse")
    error = {c: mx.square(c.decode(c.encode(x)) - x).mean(axis=(0, 2, 3)).tolist() for c in (split, whole)}
    assert error[split][0] < 1.05 * error[whole][0]  # head 0 has outliers: 97 % of its energy gets 3 bits
    assert error[split][1] > 2 * error[whole][1]  # head 1 has none


def test_scores_and_mix_of_a_split_are_decode_then_matmul():
    x = loud([7, 8, 9, 60], tokens=70)
    codec = TurboQuantSplit(DIM, 2, 4, 5).fit(Sample(x))
    code, q = codec.encode(x), mx.random.normal((1, 6, 2, DIM), key=mx.random.key(1))
    exact = mx.repeat(codec.decode(code), 3, axis=1)
    assert np.allclose(codec.scores(q, code), q @ exact.swapaxes(-1, -2), atol=5e-3)  # sums of up to 1,000
    p = mx.softmax(codec.scores(q, code) / 10, axis=-1)
    assert np.allclose(codec.mix(p, code), p @ exact, atol=1e-3)
    assert not codec.decode(codec.encode(mx.zeros((1, 2, 3, DIM)))).any()


def test_tables_of_a_split_are_made_once_however_many_layers_there_are():
    """They were cached for 128 codecs, keys' and values': of 65 layers, none was found again at the next token."""
    unfitted = build(8, 2, "keys", outliers=4)
    codecs = [replace(unfitted, channels=(0, 1, 2, 3) * (1 + i)) for i in range(300)]
    first = [codec._order(1 + i)[0] for i, codec in enumerate(codecs)]
    assert all(codec._order(1 + i)[0] is kept for i, (codec, kept) in enumerate(zip(codecs, first, strict=True)))
    assert all(codec.parts is codec.parts for codec in codecs)


def test_a_split_needs_a_fit_to_activations():
    codec = build(64, 2, "keys", outliers=16)
    assert codec.outlier_bits == 3
    one_head_of_zeros = mx.random.normal((1, 2, 16, 64)) * mx.array([0, 1])[:, None, None]
    with pytest.raises(InputError, match="must be fitted to activations before it can encode"):
        codec.encode(mx.zeros((1, 2, 3, 64)))
    with pytest.raises(InputError, match="cannot learn from 0 tokens that are not zero"):
        codec.fit(Sample(one_head_of_zeros))
    with pytest.raises(InputError, match="fitted to 2 KV heads and was given 3"):
        codec.fit(Sample(mx.random.normal((1, 2, 16, 64)))).encode(mx.zeros((1, 3, 1, 64)))
    for outliers in (1, 62):
        with pytest.raises(InputError, match="do not leave two parts: choose a whole number from 4 to 60"):
            build(64, 2, "keys", outliers=outliers)
    with pytest.raises(InputError, match="outliers=16 is for variant='mse' alone, and the variant is 'prod'"):
        build(64, 2, "keys", variant="prod", outliers=16)
