"""SpectralQuant's own numbers: water-filling, coding gain, effective dimensions, and the optimum of each basis."""

import itertools
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from veloxlab.codecs.base import Sample
from veloxlab.codecs.parts.codebooks import gaussian_codebook
from veloxlab.codecs.parts.scalar import PlannedQuantizer
from veloxlab.codecs.parts.water_filling import greedy_bits
from veloxlab.codecs.spectralquant import SpectralQuant, build, effective_dimensions
from veloxlab.errors import InputError

FLOAT32 = 2.0**-23
DIM = 64
HEADS = 2
TOKENS = 4096
SPECTRUM = 1 / np.arange(1, DIM + 1.0)  # of the synthetic vectors, steep enough for widths from 0 to 5


def correlated(seed: int, tokens: int = TOKENS, mean: float = 0.0) -> mx.array:
    """Gaussian vectors ``[1, HEADS, tokens, DIM]`` with that spectrum in a random basis of each head."""
    rng = np.random.default_rng(0)
    bases = [np.linalg.qr(rng.standard_normal((DIM, DIM)))[0] for _ in range(HEADS)]
    offset = rng.standard_normal((HEADS, 1, DIM)) * mean
    noise = np.random.default_rng(seed).standard_normal((HEADS, tokens, DIM)) * np.sqrt(SPECTRUM)
    return mx.array((noise @ np.array(bases).swapaxes(1, 2) + offset)[None].astype(np.float32))


def queries(seed: int, tokens: int = TOKENS) -> mx.array:
    """Return queries ``[1, 3·HEADS, tokens, DIM]`` along few directions, other than those where keys vary most."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(np.random.default_rng(99).standard_normal((DIM, DIM)))[0]
    weighted = rng.standard_normal((3 * HEADS, tokens, DIM)) * np.sqrt(SPECTRUM)
    return mx.array((weighted @ basis.T)[None].astype(np.float32))


def relative_error(codec, x: mx.array) -> float:
    return (mx.square(codec.decode(codec.encode(x)) - x).sum() / mx.square(x).sum()).item()


def test_greedy_bits_follow_the_reverse_water_filling_of_the_text():
    assert greedy_bits([16, 4, 1, 0.25], 6) == (3, 2, 1, 0)  # .5.4, D = 1: all errors are 0.25
    assert greedy_bits([1, 1, 1, 1], 6) == (2, 2, 1, 1)  # ties to the lowest index
    assert greedy_bits([100, 1, 1], 10, most=4) == (4, 3, 3)
    assert greedy_bits([100, 1, 1], 6, least=2) == (2, 2, 2)
    for budget in (-1, 33):
        with pytest.raises(InputError, match=f"A budget of {budget} bits does not fit 4 components"):
            greedy_bits([1, 1, 1, 1], budget)


@pytest.mark.parametrize("rates", [4.0, (3.57, 3.57, 3.57, 5.09, 5.09, 5.09)], ids=["one-rate", "keys-and-values"])
@pytest.mark.parametrize("seed", range(5))
def test_greedy_bits_are_as_good_as_any(seed, rates):
    weights = np.random.default_rng(seed).lognormal(0, 2, 6)
    cost = lambda widths: float((weights * np.array(rates) ** -np.array(widths)).sum())  # noqa: E731
    best = min(cost(w) for w in itertools.product(range(1, 5), repeat=6) if sum(w) == 13)
    assert cost(greedy_bits(list(weights), 13, rates=rates, least=1, most=4)) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("widths", [(8, 5, 3, 3, 1, 0, 0), (3,) * 64, (7,) * 30 + (1,) * 14, (0, 8, 0, 2), (8,) * 256])
def test_a_bit_string_without_gaps_restores_the_codes(widths):
    quantizer = PlannedQuantizer(widths)
    codes = np.random.default_rng(0).integers(0, 1 << np.array(widths), (2, 3, 5, len(widths)))
    words = quantizer.pack(mx.array(codes))
    assert words.shape[-1] == -(-sum(widths) // 32)
    text = "".join(format(w, "032b")[::-1] for w in np.array(words)[1, 2, 4])  # LSB first
    expected = "".join(format(c, f"0{w}b")[::-1] for c, w in zip(codes[1, 2, 4], widths, strict=True) if w)
    assert text.rstrip("0") == expected.rstrip("0")
    assert mx.array_equal(quantizer.expand(words), quantizer.levels_of(mx.array(codes).astype(mx.uint32)))


def test_each_coordinate_has_the_distortion_of_its_width():
    widths = (8, 6, 4, 3, 2, 1, 0)
    quantizer = PlannedQuantizer(widths)
    y = mx.random.normal((200_000, len(widths)), key=mx.random.key(0))
    error = np.square(np.array(quantizer.expand(quantizer.pack(quantizer.assign(y))) - y)).mean(axis=0)
    expected = [gaussian_codebook(w).distortion if w else 1.0 for w in widths]
    # three standard errors of a mean of 200,000 squares: 0.3 % without bits, 0.95 % at 6 bits, measured, where
    # values beyond the last level weigh most
    assert error == pytest.approx(expected, rel=0.03)


def test_the_gain_over_one_width_is_the_codebooks_coding_gain():
    """The predicted error Σ λ·D(b) is right within 5 %: a normalised vector is not quite Gaussian (2.9 %)."""
    x = correlated(1)
    for bits in (2, 3):
        codec = SpectralQuant(DIM, bits, centred=False, damping=0).fit(Sample(correlated(0)))
        assert sum(codec.plan) == bits * DIM
        assert list(codec.plan) == sorted(codec.plan, reverse=True)
        distortion = [gaussian_codebook(b).distortion if b else 1.0 for b in codec.plan]
        promised = (SPECTRUM * distortion).sum() / SPECTRUM.sum()
        assert relative_error(codec, x) == pytest.approx(promised, rel=0.05)
        gain = SPECTRUM.mean() / np.exp(np.log(SPECTRUM).mean())  # AM/GM, 1.9: the loss of one width with any rotation
        assert promised == pytest.approx(gaussian_codebook(bits).distortion / gain, rel=0.1)
        # D(b) is not 4^−b: few bits are used better than many, and the plan has both. Measured: 6 % at 2 bits, 7 % at 3


def test_the_plan_is_a_water_filling_of_the_spectrum():
    codec = SpectralQuant(DIM, 2, centred=False, damping=0).fit(Sample(correlated(0)))
    ideal = greedy_bits(list(SPECTRUM), 2 * DIM)
    assert np.abs(np.array(codec.plan) - ideal).max() <= 1  # a sampled spectrum of vectors with one length


def test_a_separate_mean_reduces_the_error_if_there_is_one():
    train, x = correlated(0, mean=1.0), correlated(1, mean=1.0)
    apart = SpectralQuant(DIM, 2).fit(Sample(train))
    papers = SpectralQuant(DIM, 2, centred=False).fit(Sample(train))
    assert relative_error(apart, x) < 0.6 * relative_error(papers, x)  # measured: 0.52


def test_damping_flattens_the_plan_and_helps_on_other_vectors():
    """Calibrated on one spectrum, tested on vectors that are the same in all directions."""
    other = mx.random.normal((1, HEADS, 512, DIM), key=mx.random.key(5))
    bare, damped = (SpectralQuant(DIM, 3, damping=share).fit(Sample(correlated(0))) for share in (0, 0.2))
    assert np.std(damped.plan) < np.std(bare.plan)
    assert relative_error(damped, other) < 0.75 * relative_error(bare, other)  # measured: 0.64


def test_each_basis_is_best_at_its_own_criterion():
    train, x = correlated(0), correlated(1)
    asked, q = queries(2), queries(3, 256)
    exact = q.reshape(1, HEADS, -1, DIM) @ x.swapaxes(-1, -2)
    errors = {}
    for basis in ("pca", "query", "hadamard"):
        codec = SpectralQuant(DIM, 2, basis=basis).fit(Sample(train, asked))
        scores = codec.scores(q, codec.encode(x)).reshape(exact.shape)
        errors[basis] = relative_error(codec, x), mx.square(scores - exact).mean().item()
    assert errors["pca"][0] < min(errors["query"][0], errors["hadamard"][0])
    # measured: 0.070, 0.084, 0.106 of the vectors; 0.024, 0.013, 0.037 in the scores
    assert errors["query"][1] < 0.65 * min(errors["pca"][1], errors["hadamard"][1])


def test_bases_are_inverted_exactly():
    x = correlated(0, 128)
    length = mx.linalg.norm(x, axis=-1).max().item()
    for basis in ("pca", "query", "hadamard"):
        codec = SpectralQuant(DIM, 2, basis=basis).fit(Sample(x, queries(0)))
        # float32 sums of 64 products: at most 1.4 and 4.5 steps of the length and its square, measured
        assert np.allclose(codec.from_codes(x @ codec.forward), x, rtol=0, atol=8 * FLOAT32 * length)
        products = codec.query_to_codes(x) @ (x @ codec.forward).swapaxes(-1, -2)
        assert np.allclose(products, x @ x.swapaxes(-1, -2), rtol=0, atol=16 * FLOAT32 * length**2)


def test_effective_dimensions_in_both_conventions():
    flat = mx.random.normal((1, 2, 20_000, 8), key=mx.random.key(0))
    # (Σλ)²/Σλ²; for equal variances D, over 1 + D/N from sampling
    assert effective_dimensions(flat).uncentred == pytest.approx([8, 8], rel=0.01)
    x = correlated(0, 20_000)
    expected = SPECTRUM.sum() ** 2 / np.square(SPECTRUM).sum()
    found = effective_dimensions(x)
    # each λ is known to √(2/20,000) = 1 %, and the largest, six tenths of Σλ², counts there twice: 1 % in all; measured
    # 0.6 % and 1.2 %
    assert found.uncentred == pytest.approx([expected] * HEADS, rel=0.03)
    assert found.centred == pytest.approx(found.uncentred, rel=2e-4)  # the sample's own mean has 1/20,000 of the energy
    with_mean = effective_dimensions(correlated(0, 20_000, mean=3.0))
    assert (with_mean.uncentred < 1.1).all()  # "3 %" is the mean vector
    assert with_mean.centred == pytest.approx(found.centred, rel=1e-6)  # float32 with a mean of 3


def test_the_tables_of_a_layer_are_kept_however_many_layers_there_are():
    codec = SpectralQuant(DIM, 2).fit(Sample(correlated(0)))
    code = codec.encode(correlated(1, 3))
    plan = codec.reader(code).plan
    for i in range(130):
        moved = list(codec.plan)
        moved[0], moved[1 + i % 60], moved[-1] = i // 60, 8, 7
        replace(codec, plan=tuple(moved)).reader(code)
    assert codec.reader(code).plan is plan


def test_tables_for_kernels_are_counted_once_they_exist():
    codec = SpectralQuant(DIM, 2).fit(Sample(correlated(0)))
    before, encoder = codec.shared_bytes, codec._encoder
    positions = encoder.tables["first_bits"].size + encoder.tables["first_codes"].size
    assert codec.shared_bytes - before == 4 * (2 * 511 + positions)
    code, before = codec.encode(correlated(1, 3)), codec.shared_bytes
    reader = codec.reader(code)
    assert codec.shared_bytes - before == reader.plan.nbytes + reader.fit.nbytes == 4 * (DIM + 511 + HEADS * DIM * 2)


def test_insufficient_samples_are_refused_with_the_required_size():
    with pytest.raises(InputError, match="must be fitted to activations"):
        SpectralQuant(DIM, 2).encode(correlated(0, 4))
    with pytest.raises(InputError, match="cannot learn from 63 tokens .* text of 64"):
        SpectralQuant(DIM, 2).fit(Sample(correlated(0, 63)))
    with pytest.raises(InputError, match="All tokens of the sample are the same"):
        SpectralQuant(DIM, 2).fit(Sample(mx.ones((1, 1, 100, DIM))))
    with pytest.raises(InputError, match="needs the model's queries"):
        SpectralQuant(DIM, 2, basis="query").fit(Sample(correlated(0, 100)))
    with pytest.raises(InputError, match="fitted to 2 KV heads and was given 1"):
        SpectralQuant(DIM, 2).fit(Sample(correlated(0, 100))).encode(correlated(0, 4)[:, :1])


def test_options_are_checked_and_values_have_no_queries():
    for options in ({"basis": "svd"}, {"scale": "max"}, {"damping": -1}):
        with pytest.raises(InputError, match="cannot be used"):
            build(DIM, 2, "keys", **options)
    assert build(DIM, 2, "values", basis="query").basis == "pca"
    assert build(DIM, 2, "keys", basis="query").basis == "query"
