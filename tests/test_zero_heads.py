"""A KV head of zeros is held exactly by every method that needs no fit: its error is 0, not 0 / 0."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import polars as pl
import pytest

import veloxlab as vl
from tests.tiny_models import tiny
from veloxlab.allocate.ratequant import distortion_curves
from veloxlab.allocate.sensitivity import sensitivities
from veloxlab.codecs import METHODS
from veloxlab.measure.activations import Capture, capture_layers
from veloxlab.measure.distributions import channel_distributions, vectors
from veloxlab.measure.errors import error_densities, errors_along_position, errors_by_bits, ratio
from veloxlab.measure.spectra import dimensions, rope_pairs, spectra
from veloxlab.views import by_bits_caption, channel_map_caption, spectrum_caption
from veloxlab.widgets.pages.cache import relative as relative_at_bits
from veloxlab.widgets.pages.errors import ErrorExplorer
from veloxlab.widgets.pages.keys import KeyExplorer

IDS = [(7 * i * i + 3 * i) % 90 for i in range(96)]


class Words:
    """A tokenizer that returns `IDS` for any text."""

    def encode(self, text: str) -> list[int]:
        """Return all ids."""
        return IDS


@pytest.fixture(scope="module")
def model():
    """Return a model: the first KV head of the first layer stores zeros, as does the whole second layer."""
    model = tiny("llama")
    for layer, heads in zip(model.layers, (1, 2), strict=True):
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            kept = mx.arange(2 * 64)[:, None] >= 64 * heads
            projection.weight = mx.where(kept, projection.weight, 0.0)
    return model


@pytest.fixture(scope="module")
def seen(model):
    return Capture(tuple(capture_layers(model, IDS)), tuple(IDS))


@pytest.mark.parametrize("method", [m.id for m in METHODS.values() if not m.calibrated])
def test_a_head_of_zeros_has_no_error(seen, method):
    bits = next(b for b in METHODS[method].bits if b >= 2)
    errors = vl.measure.layer_errors(seen, method, bits=bits)
    zero = errors.filter((pl.col("layer") == 1) | (pl.col("head") == 0))
    assert zero.select("rel_mse", "cosine", "output_error").unique().rows() == [(0.0, 1.0, 0.0)]
    # its queries have keys of zeros in any case
    assert zero.filter(tensor="keys")["logit_error"].to_list() == [0.0] * 3
    other = errors.filter(layer=0, head=1)
    assert (other["rel_mse"] > 0).to_list() == [method != "none"] * 2


def test_pooled_errors_of_single_tokens_are_zero_too(seen):
    tokens = vl.measure.token_errors(seen, bits=4)
    relative = vl.measure.relative_errors(tokens, sinks=2, window=8)
    assert relative.filter(layer=1)["rel_mse"].to_list() == [0.0] * 4
    look = SimpleNamespace(layer_bits={0: (4, 4), 1: (4, 4)}, sinks=0, window=0)
    assert relative_at_bits([tokens], look).filter(tensor="values")["rel_mse"].mean() > 0
    head = tokens.filter(layer=0, head=0)
    profile = errors_along_position(head)
    assert profile.select("low", "median", "high", "not_finite").unique().rows() == [(0.0, 0.0, 0.0, 0)]
    counted = error_densities(head)
    assert counted.select("share", "zero", "not_finite").unique().rows() == [(0.0, len(IDS), 0)]
    taken = vl.measure.code_bits(seen, bits=4).with_columns(bits=pl.lit(4, pl.Int32))
    by_bits = errors_by_bits(head, taken)
    assert by_bits["error"].to_list() == [0.0, 0.0]
    assert by_bits_caption(by_bits) == "Nothing is lost; 2 not drawn: not above zero, or not finite"


def test_vectors_without_a_finite_error_have_a_null_error(seen):
    tokens = vl.measure.token_errors(seen, bits=4).with_columns(squared_error=pl.lit(float("nan"), pl.Float32))
    by_bits = errors_by_bits(tokens, vl.measure.code_bits(seen, bits=4).with_columns(bits=pl.lit(4, pl.Int32)))
    assert by_bits["error"].to_list() == [None, None]


def test_its_directions_and_pairs_have_no_energy(seen):
    found = dimensions(seen).filter(layer=0, head=0)
    assert found.select("uncentred", "centred", "mean_share").unique().rows() == [(0.0, 0.0, 0.0)]
    shares = spectra(seen).filter(layer=0, head=0, tensor="keys")
    assert shares["share"].unique().to_list() == [0.0]
    assert spectrum_caption(shares).endswith("keys 0.0 with the mean, 0.0 without it")
    pairs = rope_pairs(seen).filter(layer=0, head=0)
    assert pairs.select("energy_share", "mean_share").unique().rows() == [(0.0, 0.0)]
    channels = channel_distributions(seen, tensors=("keys",)).filter(layer=1, head=0)
    assert "0.0 times the median channel" in channel_map_caption(channels)


def test_the_other_heads_of_its_layer_have_their_own_axes(seen):
    zero, other = vectors(seen.layers[0], "keys", "eigenbasis")
    assert not zero.any()
    variances = other.var(axis=0)
    assert variances[0] > variances[-1] > 0  # along its axes, the largest first
    assert not vectors(seen.layers[1], "keys", "eigenbasis").any()


def test_its_sensitivity_for_allocation_is_zero(model, tmp_path):
    curves = distortion_curves(model, Words(), methods=("turboquant",), bits=(2,), tokens=96)
    assert curves.filter((pl.col("layer") == 1) | (pl.col("head") == 0))["relative"].to_list() == [0.0] * 6
    for by in ("attention_output", "forward_kl"):
        found = sensitivities(model, Words(), sequences=1, tokens=96, by=by, folder=tmp_path)
        assert found.filter(layer=1)["sensitivity"].to_list() == [0.0] * 4


@pytest.mark.parametrize("explorer", [ErrorExplorer, KeyExplorer])
def test_explorers_show_it_and_its_neighbours(seen, explorer):
    explorer = explorer(seen, layer=0, head=0)
    assert explorer.wait(120)
    assert (explorer.problem, explorer.worker.last_error) == ("", None)
    assert not any(word in repr(explorer).lower() for word in ("nan", "inf"))
    explorer.worker.close()


def test_a_ratio_is_infinite_only_over_zero():
    parts, wholes = np.array([0.0, 1.0, 1.0, np.nan]), np.array([0.0, 2.0, 0.0, 1.0])
    np.testing.assert_array_equal(ratio(parts, wholes), [0.0, 0.5, np.inf, np.nan])
