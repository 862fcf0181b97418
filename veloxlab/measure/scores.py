"""Causes of one head's logit error: shares of RoPE pairs, and of coordinates in the space of the codes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import polars as pl
from mlx_lm.models.base import create_causal_mask
from numpy.typing import NDArray

from veloxlab.cache.calibration import Calibration
from veloxlab.cache.expand import expanded
from veloxlab.cache.plan import usual_bits
from veloxlab.checks import checked
from veloxlab.codecs import Codec, Tensor
from veloxlab.codecs.base import per_kv_head
from veloxlab.codecs.none import Exact
from veloxlab.measure.activations import Capture, Columns, LayerCapture, by_head
from veloxlab.measure.distributions import Floats
from veloxlab.measure.errors import exact_and_codec, ratio
from veloxlab.measure.frames import PLACE, schema
from veloxlab.measure.levels import code_axes
from veloxlab.measure.spectra import turned_pairs
from veloxlab.progress import Progress, silent

SCORE_ERRORS = schema(PLACE + "kind place wavelength bits share rms")
"""Columns of `score_errors`: "pair", of channels that RoPE rotates, the fastest first, or "coordinate", in the space of
the codes; its number; tokens for one full turn of a pair; code bits of the coordinate; its share of the mean squared
error of a logit, negative if it cancels others (shares sum to 1, or for pairs to less if RoPE
does not rotate all channels); and the RMS error of a logit in nats that it would make alone."""

QUERIES = 256  # of a head at a time: their logits are one array


@checked()
def score_errors(
    capture: Capture,
    method: str = "turboquant",
    *,
    bits: int | None = None,
    calibration: Calibration | None = None,
    progress: Progress = silent,
    **options: object,
) -> pl.DataFrame:
    """Split the error of each KV head's logits over causal pairs of query and key: `SCORE_ERRORS`.

    All keys are in codes; a soft cap of logits is ignored. A layer without a known RoPE has no pairs. Raises
    `InputError` as `veloxlab.measure.layer_errors`, and for a layer that does not show its queries.
    """
    width = usual_bits(method, capture.exact_bits, bits)

    def columns(layer: LayerCapture, tensor: Tensor) -> Iterator[Columns]:
        shown = layer.shown_queries("its logits cannot be seen")
        assert layer.scale is not None  # a layer has both or none
        x, codec = exact_and_codec(layer, tensor, method, width, calibration, options)
        decoded = expanded([(codec, codec.encode(x))], mx.float32, slice(None), None)
        lost, heads = np.array((x - decoded)[0]), x.shape[1]
        queries = layer.scale * per_kv_head(shown, heads)  # [1, H, Hq/H · S, D]
        if layer.rope is not None:
            pairs = np.stack(turned_pairs(layer.rope, x.shape[-1]), axis=-1)
            shares, rms = _split(np.array(queries[0]), lost, pairs)
            turn = 2 * math.pi / np.asarray(layer.rope.angles)
            yield {"kind": "pair", "place": np.arange(len(pairs)), "wavelength": turn, "share": shares, "rms": rms}
        given = _bits_given(codec, width, heads)
        # the space of the codes may have more coordinates, which are exact
        in_codes = lost @ np.linalg.pinv(code_axes(codec, heads)[:, : given.shape[1]])
        ours = np.array(codec.query_to_codes(queries)[0])[..., : given.shape[1]]
        shares, rms = _split(ours, in_codes, np.arange(given.shape[1])[:, None])
        yield {"kind": "coordinate", "place": np.arange(given.shape[1]), "bits": given, "share": shares, "rms": rms}

    frame = by_head(SCORE_ERRORS, capture.layers, columns, ("keys",), progress=progress, label="logits of ")
    return frame.with_columns(pl.col("wavelength", "bits").fill_nan(None))


def _bits_given(codec: Codec, bits: float, heads: int) -> Floats:
    """Return code bits of each coded coordinate ``[H, coordinates]``."""
    size = codec.head_dim if isinstance(codec, Exact) else codec.code_dim
    each = codec.head_plans or [[bits * codec.head_dim / size] * size]  # a sketch has more coordinates than the head
    return np.broadcast_to(np.asarray(each, np.float32), (heads, len(each[0])))


def _split(q: Floats, lost: Floats, parts: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Return shares of the mean squared error of q · lost over causal pairs, and the RMS error of each part alone.

    Both are ``[H, P]``. ``q`` ``[H, G·S, D]``, ``lost`` ``[H, S, D]``; a row of ``parts`` holds coordinates.
    """
    tokens, heads = lost.shape[1], len(lost)
    causal = np.array(create_causal_mask(tokens)).astype(np.float32)
    own, alone, total = (np.zeros((heads, *shape)) for shape in ((q.shape[-1],), (len(parts),), ()))
    until = {}
    for one, other in {(a, b) for a in range(parts.shape[1]) for b in range(a, parts.shape[1])}:
        products = lost[..., parts[:, one]] * lost[..., parts[:, other]]
        until[one, other] = (1 + (one != other)) * np.cumsum(products, axis=1, dtype=np.float64)  # over keys so far
    for start in range(0, q.shape[1], QUERIES):
        some = q[:, start : start + QUERIES]
        at = np.arange(start, start + some.shape[1]) % tokens
        errors = (some @ lost.swapaxes(1, 2)) * causal[at]
        own += (some * (errors @ lost)).sum(axis=1, dtype=np.float64)
        total += np.square(errors).sum(axis=(1, 2), dtype=np.float64)
        for (one, other), sums in until.items():
            alone += (some[..., parts[:, one]] * some[..., parts[:, other]] * sums[:, at]).sum(axis=1)
    pairs = q.shape[1] * (tokens + 1) / 2
    shares = ratio(own[:, parts].sum(axis=-1), total[:, None])
    return shares.astype(np.float32), np.sqrt(np.maximum(alone, 0) / pairs).astype(np.float32)
