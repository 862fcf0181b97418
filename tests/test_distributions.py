"""Measurements of keys, values and their errors: known answers, identities, and marks of values that are not finite."""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import polars as pl
import pytest

import veloxlab as vl
from veloxlab.codecs.parts.codebooks import sphere_codebook
from veloxlab.codecs.parts.rope import Rope
from veloxlab.errors import InputError
from veloxlab.measure.activations import Capture, LayerCapture
from veloxlab.measure.distributions import (
    CHANNELS,
    DENSITIES,
    OUTLIERS,
    SPACES,
    channel_distributions,
    densities,
    outlier_channels,
    vectors,
)
from veloxlab.measure.errors import (
    ATTENTION_MAP,
    ERROR_DENSITIES,
    PROFILE,
    TOKEN_ERRORS,
    attention_map,
    block_edges,
    error_densities,
    errors_along_position,
    pooled_weights,
)
from veloxlab.measure.levels import ANGLES, LEVELS, coded_coordinates, expected_density, level_densities, polar_angles
from veloxlab.measure.spectra import (
    DIMENSIONS,
    PAIR_POINTS,
    PAIRS,
    SPECTRUM,
    dimensions,
    pair_points,
    rope_pairs,
    spectra,
    spectrum_shares,
)

HEADS, TOKENS, DIM = 2, 256, 16


def of(keys, values=None, *, rope=None, queries=None) -> Capture:
    """Return a capture of one layer from arrays ``[H, S, D]``."""
    keys, values = (mx.array(np.asarray(x, np.float32)[None]) for x in (keys, keys if values is None else values))
    queries = None if queries is None else mx.array(np.asarray(queries, np.float32)[None])
    layer = LayerCapture(3, queries, keys, values, None if queries is None else 0.25, rope)
    return Capture((layer,), tuple(range(keys.shape[2])))


@pytest.fixture
def noise():
    return np.random.default_rng(0).standard_normal((HEADS, TOKENS, DIM))


@pytest.fixture(scope="module")
def seen(smollm2):
    capture = vl.capture(*smollm2, tokens=160)
    return replace(capture, layers=capture.layers[7:9])


# spaces


def test_a_single_loud_channel_is_flat_after_signs_and_hadamard():
    one_hot = np.zeros((1, 4, DIM))
    one_hot[..., 5] = 8.0
    rotated = vectors(of(one_hot).layers[0], "keys", "rotated")
    assert np.allclose(np.abs(rotated), 8.0 / math.sqrt(DIM), rtol=1e-6)
    assert outlier_channels(of(one_hot), "rotated", tensors=("keys",))["loudest_ratio"].item() == pytest.approx(1)


def test_smoothing_divides_by_the_root_of_a_channels_peak(noise):
    noise[..., 2] *= 100
    x = vectors(of(noise).layers[0], "keys", "smoothed")
    peaks = np.abs(noise).max(axis=1)
    assert np.allclose(np.abs(x).max(axis=1), np.sqrt(peaks), rtol=1e-5)


def test_the_space_before_rope_has_the_layer_s_own_keys(noise):
    rope = Rope(DIM, base=100.0)
    after = np.array(rope.forward(mx.array(noise.astype(np.float32)[None]), 0))[0]
    before = vectors(of(after, rope=rope).layers[0], "keys", "before_rope")
    assert np.allclose(before, noise, atol=1e-4)  # float32 angles of up to 256 radians


def test_an_eigenbasis_is_centred_uncorrelated_and_sorted(noise):
    mixed = noise @ np.diag(np.arange(1, DIM + 1)) + 5
    x = vectors(of(mixed).layers[0], "keys", "eigenbasis").astype(np.float64)
    assert np.abs(x.mean(axis=1)).max() < 1e-5
    for head in x:
        covariance = head.T @ head / len(head)
        variances = np.diag(covariance)
        assert np.abs(covariance - np.diag(variances)).max() < 1e-5 * variances[0]
        assert (np.diff(variances) <= 0).all()


def test_rotations_keep_lengths(seen):
    raw = vectors(seen.layers[0], "keys", "raw")
    for space in ("before_rope", "rotated"):
        turned = vectors(seen.layers[0], "keys", space)
        assert np.allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(raw, axis=-1), rtol=1e-5)


def test_a_capture_knows_its_layers_rope(seen, smollm2):
    model, _ = smollm2
    rope = seen.layers[0].rope
    assert rope.dims == 64
    module = model.layers[7].self_attn.rope
    x = mx.random.normal((1, 3, 5, 64), key=mx.random.key(1))
    assert np.allclose(rope.forward(x, 2), module(x, offset=2), atol=1e-5)


# distributions


def test_channels_of_a_known_ramp():
    ramp = np.arange(101.0)[None, :, None] * np.array([1.0, -2.0, 0.0, 1.0])
    frame = channel_distributions(of(ramp), tensors=("keys",))
    assert frame.schema == CHANNELS
    first = frame.row(0, named=True)
    assert [first[n] for n in ("mean", "least", "low", "median", "high", "most")] == [50, 0, 1, 50, 99, 100]
    assert first["rms"] == pytest.approx(math.sqrt(np.square(np.arange(101)).mean()))
    assert frame.row(1, named=True)["high"] == -2
    assert frame["layer"].unique().to_list() == [3]


@pytest.mark.parametrize("space", SPACES)
def test_every_space_has_its_frames(seen, space):
    channels, coordinates, loud = (f(seen, space) for f in (channel_distributions, densities, outlier_channels))
    assert channels.schema == CHANNELS
    assert coordinates.schema == DENSITIES
    assert loud.schema == OUTLIERS
    tensors = ["keys"] if space == "before_rope" else ["keys", "values"]
    assert channels["tensor"].unique(maintain_order=True).to_list() == tensors
    assert len(channels) == 2 * len(tensors) * 3 * 64
    assert (channels["least"] <= channels["low"]).all()
    assert (channels["high"] <= channels["most"]).all()
    # every finite coordinate is in a bin or counted outside of them
    parts = (pl.col("density") * pl.col("width")).sum() + pl.col("below").first() + pl.col("above").first()
    whole = coordinates.group_by("layer", "head", "tensor").agg(parts.alias("whole"))["whole"]
    assert np.allclose(whole, 1, atol=1e-9)


def test_values_that_are_not_finite_are_counted_and_left_out(noise):
    noise[0, 7, 3], noise[0, 9, 3] = np.nan, np.inf
    channels = channel_distributions(of(noise), tensors=("keys",)).filter(head=0, channel=3)
    assert channels["not_finite"].item() == 2
    known = np.delete(noise[0, :, 3], [7, 9])
    assert channels["mean"].item() == pytest.approx(known.mean(), rel=1e-5)
    assert channels["most"].item() == pytest.approx(known.max(), rel=1e-6)
    assert densities(of(noise), tensors=("keys",)).filter(head=0)["not_finite"].unique().to_list() == [2]
    assert outlier_channels(of(noise), tensors=("keys",))["not_finite"].to_list() == [2, 0]


def test_a_channel_without_a_finite_token_has_no_quantiles(noise):
    noise[1, :, 4] = np.nan
    row = channel_distributions(of(noise), tensors=("keys",)).filter(head=1, channel=4).row(0, named=True)
    assert row["not_finite"] == TOKENS
    assert [row[name] for name in ("mean", "rms", "least", "median", "most")] == [None] * 5


def test_coordinates_outside_the_bins_are_counted(noise):
    noise[0, 0, :3] = 1e6, 1e6, -1e6
    frame = densities(of(noise), tensors=("keys",)).filter(head=0)
    half = frame["width"][0] / 2
    low, high = frame["value"].min() - half, frame["value"].max() + half
    assert -10 < low < high < 10
    assert frame["above"][0] == pytest.approx((noise[0] > high).mean())
    assert frame["below"][0] == pytest.approx((noise[0] < low).mean())


def test_a_constant_head_still_has_a_density():
    frame = densities(of(np.full((1, 8, DIM), 3.0)), tensors=("keys",))
    inside = frame.filter(pl.col("density") > 0)
    assert len(inside) == 1
    assert abs(inside["value"].item() - 3.0) <= inside["width"].item()


def test_the_loudest_channel_is_found(noise):
    noise[0, :, 11] *= 50
    row = outlier_channels(of(noise), tensors=("keys",)).row(0, named=True)
    assert (row["loudest"], row["outlier_channels"]) == (11, 1)
    assert row["loudest_ratio"] == pytest.approx(50, rel=0.15)  # for 256 draws
    calm = outlier_channels(of(noise), "rotated", tensors=("keys",)).row(0, named=True)
    assert calm["loudest_ratio"] < 1.5
    assert calm["peak_ratio"] < row["peak_ratio"]


# spectra


def test_the_spectrum_of_a_known_covariance():
    deviations = np.array([4.0, 2.0, 1.0, 1.0])
    x = np.vstack([np.diag(deviations), -np.diag(deviations)])  # second moments are diag(deviations²)
    assert np.allclose(spectrum_shares(x), np.square(deviations) / np.square(deviations).sum())


def test_a_mean_vector_is_one_direction_about_the_origin_and_none_about_the_mean():
    spread = np.concatenate([np.eye(DIM), -np.eye(DIM)])[None]
    mean = np.zeros(DIM)
    mean[2] = 7.0
    capture = of(spread + mean)
    frame = dimensions(capture, tensors=("keys",))
    assert frame.schema == DIMENSIONS
    row = frame.row(0, named=True)
    assert row["centred"] == pytest.approx(DIM)
    moments = np.full(DIM, 1 / DIM)
    moments[2] += 49
    assert row["uncentred"] == pytest.approx(moments.sum() ** 2 / np.square(moments).sum())
    assert row["mean_share"] == pytest.approx(49 / 50)
    shares = spectra(capture, tensors=("keys",))
    assert shares.schema == SPECTRUM
    assert shares.filter(about="origin", rank=1)["share"].item() == pytest.approx(moments[2] / moments.sum())
    assert np.allclose(shares.filter(about="mean")["share"], 1 / DIM)


def test_shares_of_real_spectra_add_up_and_give_the_effective_dimensions(seen):
    shares = spectra(seen).group_by("layer", "head", "tensor", "about", maintain_order=True)
    counted = shares.agg(pl.col("share").sum(), d=1 / pl.col("share").pow(2).sum())
    assert np.allclose(counted["share"], 1)
    found = dimensions(seen).sort("tensor", "layer", "head")
    for about, name in (("origin", "uncentred"), ("mean", "centred")):
        assert np.allclose(counted.filter(about=about).sort("tensor", "layer", "head")["d"], found[name], rtol=1e-6)


# pairs


def test_the_energy_of_a_single_pair():
    x = np.zeros((1, 32, DIM))
    x[..., 3], x[..., 3 + DIM // 2] = 3.0, 4.0  # pair 3 of the half-split layout, before RoPE
    rope = Rope(DIM, base=100.0)
    after = np.array(rope.forward(mx.array(x.astype(np.float32)[None]), 0))[0]
    frame = rope_pairs(of(after, rope=rope))
    assert frame.schema == PAIRS
    assert np.allclose(frame["energy_share"], np.eye(DIM // 2)[3], atol=1e-6)
    row = frame.filter(pair=3).row(0, named=True)
    assert (row["first"], row["second"]) == (3, 11)
    assert row["mean_share"] == pytest.approx(1, abs=1e-5)
    assert row["wavelength"] == pytest.approx(2 * math.pi * 100 ** (3 / 8))
    points = pair_points(of(after, rope=rope).layers[0], 0, 3)
    assert points.schema == PAIR_POINTS
    assert np.allclose(points.filter(stage="before RoPE").select("x", "y"), [[3.0, 4.0]] * 32, atol=1e-5)
    angle = np.arange(32) * 100 ** (-3 / 8)
    turned = np.stack([3 * np.cos(angle) - 4 * np.sin(angle), 3 * np.sin(angle) + 4 * np.cos(angle)], axis=1)
    assert np.allclose(points.filter(stage="after RoPE").select("x", "y"), turned, atol=1e-4)


def test_pairs_of_neighbours_and_channels_without_rotation(noise):
    frame = rope_pairs(of(noise, rope=Rope(8, traditional=True, base=100.0))).filter(head=0)
    assert frame.select("first", "second").rows() == [(0, 1), (2, 3), (4, 5), (6, 7)]
    expected = np.square(noise[0, :, :8]).sum() / np.square(noise[0]).sum()
    assert frame["energy_share"].sum() == pytest.approx(expected, rel=1e-5)


def test_many_tokens_are_thinned():
    points = pair_points(of(np.ones((1, 2000, DIM)), rope=Rope(DIM)).layers[0], 0, 0)
    assert len(points) == 2 * 667
    assert points["position"].to_list()[:3] == [0, 3, 6]


# levels and angles


def test_the_levels_of_turboquant_are_its_codebooks(seen):
    frame = level_densities(seen, "turboquant", bits=2)
    assert frame.schema == LEVELS
    levels = frame.filter(kind="level", layer=7, head=1, tensor="values")
    expected = sphere_codebook(2, 64).levels
    assert np.allclose(levels["value"], expected, rtol=1e-3)  # the table is stored in 16 bits
    assert levels["share"].sum() == pytest.approx(1)
    assert frame.filter(kind="exact").group_by("layer", "head", "tensor").len()["len"].unique().to_list() == [80]


@pytest.mark.parametrize("method", ["turboquant", "rvq", "rabitq", "ratequant", "polarquant", "qjl"])
@pytest.mark.parametrize("side", ["keys", "values"])
def test_shown_coordinates_are_those_that_the_method_codes(seen, method, side):
    """More bits bring the decoded coordinates closer to the exact ones in the shown space."""
    errors = []
    for bits in (2, 4):
        exact, decoded = coded_coordinates(seen.layers[0], side, method, bits)
        assert exact.shape == decoded.shape
        errors.append(np.square(exact - decoded).mean() / np.square(exact).mean())
    if (method, side) == ("qjl", "keys"):
        # more rows of a sketch do not make signs finer: for a Gaussian g, E(√(2/π)·g − sign g)² / E(2/π)g² = π/2 − 1
        assert errors == pytest.approx([math.pi / 2 - 1] * 2, rel=0.05)
    else:
        assert errors[1] < errors[0] / 4


def test_a_vector_code_has_a_density_and_no_levels(seen):
    frame = level_densities(replace(seen, layers=seen.layers[:1]), "polarquant", bits=4)
    assert frame["kind"].unique(maintain_order=True).to_list() == ["exact", "decoded"]


def test_angles_of_gaussians_are_as_expected():
    x = np.random.default_rng(0).standard_normal((1, 4096, DIM))
    frame = polar_angles(of(x), levels=3, tensors=("keys",))
    assert frame.schema == ANGLES
    for level in (1, 2, 3):
        own = frame.filter(level=level)
        step = own["angle"][1] - own["angle"][0]
        assert (own["density"] * step).sum() == pytest.approx(1)
        assert (own["expected"] * step).sum() == pytest.approx(1, abs=1e-3)  # a sum for an integral
        count = 4096 * DIM / 2**level
        # half the summed distance of 48 bins with Poisson counts n is near √(48 / (2π·count)); three times that
        apart = (own["density"] - own["expected"]).abs().sum() * step / 2
        assert apart < 3 * math.sqrt(48 / (2 * math.pi * count))


def test_expected_angles_of_the_second_level_are_a_sine():
    angle = np.linspace(0, math.pi / 2, 9)
    assert np.allclose(expected_density(angle, 2), np.sin(2 * angle), atol=1e-6)
    assert np.allclose(expected_density(angle, 1), 1 / (2 * math.pi))


# attention


def test_an_attention_map_of_exact_keys_is_attention(noise):
    queries = np.random.default_rng(1).standard_normal((4, 48, DIM))
    capture = of(noise[:, :48], queries=queries)
    frame = attention_map(capture.layers[0], 3, "none", bits=32, blocks=48)
    assert frame.schema == ATTENTION_MAP
    exact = frame.filter(kind="exact")
    logits = queries[3] @ noise[1, :48].T * 0.25  # query head 3 of 4 reads KV head 1 of 2
    weights = np.exp(logits) * np.tri(48)
    weights /= weights.sum(axis=1, keepdims=True)
    assert np.allclose(exact["weight"], weights[exact["query"], exact["key"]], atol=1e-6)
    assert frame["moved"].max() == 0
    assert frame.filter(kind="difference")["weight"].abs().max() == 0


def test_pooled_attention_adds_up_and_moved_attention_is_measured_before_pooling(seen):
    layer = seen.layers[0]
    frame = attention_map(layer, 4, bits=2)
    assert len(frame) == 3 * 32 * 33 / 2
    sums = frame.group_by("kind", "query").agg(pl.col("weight").sum())
    assert np.allclose(sums.filter(kind="compressed")["weight"], 1, atol=1e-5)
    assert np.allclose(sums.filter(kind="difference")["weight"], 0, atol=1e-5)
    apart = frame.filter(kind="difference").group_by("query").agg(pl.col("weight").abs().sum() / 2).sort("query")
    moved = frame.filter(kind="exact").group_by("query").agg(pl.col("moved").first()).sort("query")
    assert (moved["moved"] >= apart["weight"] - 1e-9).all()
    assert moved["moved"].mean() > attention_map(layer, 4, bits=4)["moved"].mean() > 0


def test_blocks_are_whole_tokens_and_none_is_empty():
    assert block_edges(10, 4).tolist() == [0, 2, 5, 8, 10]
    assert block_edges(3, 32).tolist() == [0, 1, 2, 3]
    weights = np.array([[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]])
    assert np.allclose(pooled_weights(weights, np.array([0, 1, 3])), [[1.0, 0.0], [0.35, 0.65]])


# errors of single tokens


def token_frame(errors, tensor="keys") -> pl.DataFrame:
    count = len(errors)
    columns = {"layer": [0] * count, "head": [0] * count, "tensor": [tensor] * count, "bits": [2] * count}
    columns |= {"position": range(count), "squared_error": errors, "squared_norm": [2.0] * count}  # type: ignore[dict-item]
    return pl.DataFrame(columns, schema=TOKEN_ERRORS)


def test_errors_along_position_are_quantiles_of_blocks():
    frame = errors_along_position(token_frame([1.0] * 10 + [3.0] * 9 + [math.nan]), blocks=2)
    assert frame.schema == PROFILE
    assert frame.select("position", "position_end", "median", "not_finite").rows() == [
        (0, 10, 0.5, 0),
        (10, 20, 1.5, 1),
    ]


def test_error_densities_count_every_vector(seen):
    frame = error_densities(token_frame([0.0, 1.0, 2.0, 2.0, math.inf]))
    assert frame.schema == ERROR_DENSITIES
    assert frame["share"].sum() == pytest.approx(1)
    assert frame.filter(pl.col("share") > 0)["share"].to_list() == pytest.approx([1 / 3, 2 / 3])
    assert (frame["zero"][0], frame["not_finite"][0]) == (1, 1)
    real = error_densities(vl.measure.token_errors(seen, bits=3))
    assert np.allclose(real.group_by("tensor").agg(pl.col("share").sum())["share"], 1)


# refusals


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda c: channel_distributions(c, "rotten"), "There is no space 'rotten': choose one of raw, before_rope"),
        (lambda c: channel_distributions(c, "before_rope"), "Layer 3 has no rotary embedding that is known"),
        (lambda c: channel_distributions(c, "before_rope", tensors=("values",)), "Values go through no RoPE"),
        (lambda c: densities(c, bins=1), "bins=1 cannot be used: give a whole number, 2 or more"),
        (lambda c: rope_pairs(c), "No layer of this capture has a rotary embedding"),
        (lambda c: level_densities(c, "none", bits=32), "'none' keeps vectors as they are"),
        (lambda c: level_densities(c, "commvq", bits=2), "CommVQ must be fitted to activations"),
        (lambda c: polar_angles(c, levels=5), "levels=5 does not fit a head dimension of 16: choose 1 to 4"),
        (lambda c: attention_map(c.layers[0], 0), "Layer 3 does not show its queries"),
        (lambda c: errors_along_position(token_frame([])), "There are no rows to pool"),
        (lambda c: error_densities(token_frame([0.0]), bins=1), "bins=1 cannot be used"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(noise, call, sentence):
    with pytest.raises(InputError, match=sentence):
        call(of(noise))


def test_a_capture_that_is_not_finite_has_no_spectrum_axes_or_angles(noise):
    noise[0, 3, 1] = np.nan
    for call in (
        lambda: spectra(of(noise)),
        lambda: vectors(of(noise).layers[0], "keys", "eigenbasis"),
        lambda: polar_angles(of(noise)),
        lambda: level_densities(of(noise)),
    ):
        with pytest.raises(InputError, match="NaN or infinite"):
            call()
    with pytest.raises(InputError, match="does not vary"):
        dimensions(of(np.ones((1, 32, DIM))))


def test_a_missing_head_or_pair_is_refused(noise):
    layer = of(noise, rope=Rope(DIM), queries=noise).layers[0]
    for call, sentence in (
        (lambda: pair_points(layer, 2, 0), "There is no KV head 2: choose one from 0 to 1"),
        (lambda: pair_points(layer, 0, 8), "There is no pair 8: choose one from 0 to 7"),
        (lambda: attention_map(layer, 2), "There is no query head 2: choose one from 0 to 1"),
        (lambda: attention_map(layer, 0, blocks=1), "blocks=1 cannot be used: give a whole number, 2 or more"),
    ):
        with pytest.raises(InputError, match=sentence):
            call()
