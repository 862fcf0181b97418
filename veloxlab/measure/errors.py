"""Errors of compression in a captured run, by layer, KV head, tensor and token, and their summaries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import polars as pl
from mlx_lm.models.base import create_causal_mask
from numpy.typing import ArrayLike, NDArray

from veloxlab.cache.arithmetic import capped
from veloxlab.cache.calibration import Calibration
from veloxlab.cache.expand import expanded
from veloxlab.cache.plan import tensor_bits, usual_bits
from veloxlab.checks import checked, instance, measured, whole
from veloxlab.codecs import TENSORS, Codec, Tensor
from veloxlab.codecs.base import fitted_online
from veloxlab.errors import InputError
from veloxlab.measure.activations import Capture, Columns, LayerCapture, by_head, softmax
from veloxlab.measure.frames import PLACE, in_schema, schema
from veloxlab.progress import Progress, silent

LAYER_ERRORS = schema(PLACE + "rel_mse cosine logit_error output_error")
"""Columns of `layer_errors`: Σ‖x − x̂‖² / Σ‖x‖² over the tokens of the compressed tensor, 0 without loss; mean
of cos(x, x̂); for keys, RMS change of scale·q·k over causal pairs, in nats; Σ‖o − ô‖² / Σ‖o‖² of the attention
output over the query heads of this KV head, with the other tensor exact."""

TOKEN_ERRORS = schema(PLACE + "bits position squared_error squared_norm")
"""Columns of `token_errors`: code bits of a coordinate, position of the token in the text, ‖x − x̂‖² and ‖x‖²."""

PROFILE = schema("tensor bits position position_end low median high not_finite")
"""Columns of `errors_along_position`: first position of a block, and the one after its last; the 10 %, 50 % and 90 %
quantiles of ‖x − x̂‖² / ‖x‖² over layers, heads and tokens, null if none is finite; vectors whose error is not."""

ERROR_DENSITIES = schema("tensor bits least most share zero not_finite")
"""Columns of `error_densities`: ends of a bin of relative squared error, equal on a log scale; share of the vectors
with an error above 0; vectors without error, which a log scale cannot show, and vectors whose error is not finite."""

ERRORS_BY_BITS = schema("tensor bits error true_bits not_finite")
"""Columns of `errors_by_bits`: Σ‖x − x̂‖² / Σ‖x‖² over all vectors with a finite error, null if there are none; true
bits of a value; vectors with an error that is not finite."""

ATTENTION_MAP = schema("kind query query_end key key_end weight moved")
"""Columns of `attention_map`: "exact", "compressed", or "difference", compressed minus exact; first position of a block
of queries, and the one after its last; the same of keys, at or before the queries; attention to the keys, mean over
the queries of the block, so that rows sum to 1; ½ Σ|p − p̂| over single keys, mean over the queries of the row."""

BLOCKS, BINS = 64, 60
MAP_BLOCKS = 32  # per side: three triangles of 528 cells
GROUP = ["tensor", "bits"]
TOKENS = measured(TOKEN_ERRORS, "vl.measure.token_errors")


def ratio(part: ArrayLike, whole: ArrayLike) -> NDArray[Any]:
    """Return ``part / whole`` by element: 0 if ``part`` is 0, infinite if only ``whole`` is 0."""
    part, whole = np.asarray(part), np.asarray(whole)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(part == 0, 0, part / whole))


def ratio_of(part: pl.Expr, whole: pl.Expr) -> pl.Expr:
    """Return `ratio` of two columns."""
    return pl.when(part == 0).then(0.0).otherwise(part / whole)


RELATIVE = ratio_of(pl.col("squared_error").cast(pl.Float64), pl.col("squared_norm").cast(pl.Float64))


@checked()
def layer_errors(
    capture: Capture,
    method: str = "turboquant",
    *,
    bits: int | None = None,
    key_bits: int | None = None,
    value_bits: int | None = None,
    sinks: int = 0,
    window: int = 0,
    calibration: Calibration | None = None,
    progress: Progress = silent,
    **options: object,
) -> pl.DataFrame:
    """Measure the error of each layer, KV head and tensor when ``method`` compresses the captured keys or values.

    The first ``sinks`` and the last ``window`` tokens stay exact, and count with an error of 0. Attention is causal
    over the captured queries, in float32. Columns: `LAYER_ERRORS`; ``logit_error`` and ``output_error`` are null if the
    model does not show its queries. ``calibration``: from `veloxlab.calibrate`. Raises `InputError` for an
    unknown method or option, and for bits out of range.
    """
    widths = tensor_bits(method, capture.exact_bits, bits, key_bits, value_bits)

    def columns(layer: LayerCapture, tensor: Tensor) -> Iterator[Columns]:
        x, decoded = exact_and_decoded(layer, tensor, method, widths[tensor], calibration, options)
        decoded = with_exact_ends(x, decoded, sinks, window)
        error = mx.square(x - decoded).sum(axis=-1)[0]
        norm, decoded_norm = mx.linalg.norm(x, axis=-1)[0], mx.linalg.norm(decoded, axis=-1)[0]
        cosine = mx.where(error == 0, 1.0, (x * decoded).sum(axis=-1)[0] / mx.maximum(norm * decoded_norm, 1e-30))
        errors = _attention_errors(layer, tensor, decoded) | {
            "rel_mse": ratio(error.sum(axis=-1), mx.square(norm).sum(axis=-1)),
            "cosine": cosine.mean(axis=-1),
        }
        yield {name: np.array(column)[:, None] for name, column in errors.items()}

    return by_head(LAYER_ERRORS, capture.layers, columns, progress=progress, label="errors of ")


@checked()
def token_errors(
    capture: Capture,
    method: str = "turboquant",
    *,
    bits: int | None = None,
    calibration: Calibration | None = None,
    progress: Progress = silent,
    **options: object,
) -> pl.DataFrame:
    """Measure squared error and norm of each captured key and value, all compressed: `TOKEN_ERRORS`. Rows add up."""
    width = usual_bits(method, capture.exact_bits, bits)

    def columns(layer: LayerCapture, tensor: Tensor) -> Iterator[Columns]:
        x, decoded = exact_and_decoded(layer, tensor, method, width, calibration, options)
        sums = {"squared_error": mx.square(x - decoded), "squared_norm": mx.square(x)}
        place = {"bits": width, "position": np.arange(x.shape[2])}
        yield place | {name: np.array(squares.sum(axis=-1)[0]) for name, squares in sums.items()}  # [H, S]

    return by_head(TOKEN_ERRORS, capture.layers, columns, progress=progress, label=f"{width} bits, ")


@checked(tokens=TOKENS)
def relative_errors(tokens: pl.DataFrame, *, sinks: int = 0, window: int = 0) -> pl.DataFrame:
    """Return ``layer, head, tensor, bits, rel_mse`` from `token_errors`, sorted, with exact sinks and recent tokens."""
    last = pl.col("position").max()
    packed = (pl.col("position") >= sinks) & (pl.col("position") <= last - window)
    error = ratio_of((pl.col("squared_error") * packed).sum(), pl.col("squared_norm").sum())
    return tokens.group_by("layer", "head", "tensor", "bits").agg(rel_mse=error).sort("layer", "head", "tensor", "bits")


def exact_and_codec(layer: LayerCapture, tensor: Tensor, *settings: Any) -> tuple[mx.array, Codec]:
    """Return exact vectors ``[1, H, S, D]`` of one layer in float32, and their codec: see `exact_and_decoded`."""
    x = layer.vectors(tensor)
    return x, fitted_online(layer.codec(tensor, *settings), x)


def exact_and_decoded(layer: LayerCapture, tensor: Tensor, *settings: Any) -> tuple[mx.array, mx.array]:
    """Return exact and decoded ``[1, H, S, D]`` of one layer, both float32; ``settings``: of `LayerCapture.codec`."""
    x, codec = exact_and_codec(layer, tensor, *settings)
    return x, expanded([(codec, codec.encode(x))], mx.float32, slice(None), None)


def with_exact_ends(x: mx.array, decoded: mx.array, sinks: int, window: int) -> mx.array:
    """Return decoded ``[1, H, S, D]`` with the first ``sinks`` and the last ``window`` tokens of ``x``."""
    position = mx.arange(x.shape[2])[:, None]
    return mx.where((position < sinks) | (position >= x.shape[2] - window), x, decoded)


def _attention_errors(layer: LayerCapture, tensor: Tensor, decoded: mx.array) -> dict[str, ArrayLike]:
    """Return logit error and attention-output error of each KV head ``[H]``; empty if the model shows no queries."""
    if layer.queries is None or layer.scale is None:
        return {}
    given = {name: layer.vectors(name) for name in TENSORS} | {tensor: decoded}
    lost = mx.square(layer.output - layer.attend(**given)).sum(axis=(1, 2, 3))
    errors: dict[str, ArrayLike] = {"output_error": ratio(lost, mx.square(layer.output).sum(axis=(1, 2, 3)))}
    if tensor == "keys":
        changed = mx.square(layer.logits(decoded) - layer.logits(layer.vectors("keys")))
        _, group, tokens, _ = changed.shape
        pairs = group * tokens * (tokens + 1) / 2
        causal = mx.where(create_causal_mask(tokens), changed, 0.0)
        errors["logit_error"] = mx.sqrt(causal.sum(axis=(1, 2, 3)) / pairs)
    return errors


def _some(tokens: pl.DataFrame) -> pl.DataFrame:
    if tokens.is_empty():
        raise InputError("There are no rows to pool: give token_errors with rows.")
    return tokens


@checked(tokens=TOKENS, blocks=whole(1))
def errors_along_position(tokens: pl.DataFrame, *, blocks: int = BLOCKS) -> pl.DataFrame:
    """Return quantiles of the error of `token_errors` in blocks of positions: `PROFILE`; `InputError` without rows."""
    size = -(-(_some(tokens)["position"].max() + 1) // blocks)  # type: ignore[operator]
    finite = pl.col("error").is_finite()
    error = pl.col("error").filter(finite)
    quantiles = {"low": error.quantile(0.1), "median": error.median(), "high": error.quantile(0.9)}
    blocked = tokens.with_columns(error=RELATIVE, block=pl.col("position") // size * size).group_by(*GROUP, "block")
    pooled = blocked.agg(position_end=pl.col("position").max() + 1, not_finite=(~finite).sum(), **quantiles)
    return in_schema(pooled.rename({"block": "position"}).sort(*GROUP, "position"), PROFILE)


@checked(tokens=TOKENS)
def errors_by_bits(tokens: pl.DataFrame, true_bits: pl.DataFrame) -> pl.DataFrame:
    """Return the error at each width of `veloxlab.token_errors`, with the true bits from `veloxlab.code_bits`.

    Columns: `ERRORS_BY_BITS`. Both frames have rows of several widths, so ``true_bits`` needs a column ``bits`` too.
    """
    finite = pl.col("squared_error").is_finite()
    sums = (pl.col(f"squared_{of}").filter(finite).cast(pl.Float64).sum() for of in ("error", "norm"))
    error = pl.when(finite.any()).then(ratio_of(*sums))
    errors = _some(tokens).group_by(GROUP).agg(error=error, not_finite=(~finite).sum())
    layers = true_bits.group_by(*GROUP, "layer").agg(true_bits=pl.col("bits_per_value").sum())
    taken = layers.group_by(GROUP).agg(pl.col("true_bits").mean()).with_columns(pl.col("bits").cast(pl.Float64))
    return in_schema(errors.join(taken, on=GROUP).sort(GROUP), ERRORS_BY_BITS)


@checked(tokens=TOKENS, bins=whole(2))
def error_densities(tokens: pl.DataFrame, *, bins: int = BINS) -> pl.DataFrame:
    """Return the distribution of relative errors of single vectors in `veloxlab.token_errors`: `ERROR_DENSITIES`."""
    errors = _some(tokens).select(*GROUP, error=RELATIVE)
    drawn = errors.filter(pl.col("error").is_finite() & (pl.col("error") > 0))["error"]
    low, high = (float(end) for end in (drawn.min() or 1.0, drawn.max() or 1.0))  # type: ignore[arg-type]
    edges = np.geomspace(low / 1.01, high * 1.01, bins + 1)  # a small margin, so that the ends are inside
    frames = []
    for (tensor, bits), own in errors.sort(GROUP, maintain_order=True).group_by(GROUP, maintain_order=True):
        error = own["error"].to_numpy()
        positive = error[np.isfinite(error) & (error > 0)]
        counts, _ = np.histogram(positive, edges)
        columns = {"least": edges[:-1], "most": edges[1:], "share": counts / max(positive.size, 1)}
        place = {"tensor": tensor, "bits": bits, "zero": (error == 0).sum(), "not_finite": (~np.isfinite(error)).sum()}
        frames.append(in_schema(pl.DataFrame(columns | place), ERROR_DENSITIES))
    return pl.concat(frames)


@checked(layer=instance(LayerCapture, "a layer of a result of vl.measure.capture"), blocks=whole(2))
def attention_map(
    layer: LayerCapture,
    head: int,
    method: str = "turboquant",
    *,
    bits: int | None = None,
    calibration: Calibration | None = None,
    blocks: int = MAP_BLOCKS,
    **options: object,
) -> pl.DataFrame:
    """Return causal attention of a query head over exact keys, over keys compressed by ``method``, and the difference.

    All keys are compressed, without a window. Columns: `ATTENTION_MAP`. Raises `InputError` as `layer_errors`, for a
    layer that does not show its queries, and if there is no such head.
    """
    shown = layer.shown_queries("there is no attention map: take another")
    assert layer.scale is not None  # a layer has both or none
    heads, kv_heads = shown.shape[1], layer.keys.shape[1]
    if not 0 <= head < heads:
        raise InputError(f"There is no query head {head}: choose one from 0 to {heads - 1}.")
    width = usual_bits(method, 8 * layer.keys.dtype.size, bits)
    both = exact_and_decoded(layer, "keys", method, width, calibration, options)
    exact, compressed = (_weights(shown[0, head], x[0, head * kv_heads // heads], layer.scale, layer.cap) for x in both)
    edges = block_edges(len(exact), blocks)
    moved = np.add.reduceat(np.abs(exact - compressed).sum(axis=1) / 2, edges[:-1]) / np.diff(edges)
    pooled = {"exact": pooled_weights(exact, edges), "compressed": pooled_weights(compressed, edges)}
    pooled["difference"] = pooled["compressed"] - pooled["exact"]
    rows, columns = np.tril_indices(len(edges) - 1)
    queries = {"query": edges[rows], "query_end": edges[rows + 1], "moved": moved[rows]}
    cells = pl.DataFrame(queries | {"key": edges[columns], "key_end": edges[columns + 1]})
    frames = [cells.with_columns(kind=pl.lit(k), weight=pl.Series(w[rows, columns])) for k, w in pooled.items()]
    return in_schema(pl.concat(frames), ATTENTION_MAP)


def block_edges(tokens: int, blocks: int) -> NDArray[np.int64]:
    """Return the starts of blocks and the end of the last one: sizes as equal as possible, none empty."""
    return np.round(np.linspace(0, tokens, min(blocks, tokens) + 1)).astype(np.int64)


def pooled_weights(weights: NDArray[np.float64], edges: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sum over the keys of each block, mean over its queries: ``[S, S]`` to ``[blocks, blocks]``."""
    summed = np.add.reduceat(np.add.reduceat(weights, edges[:-1], axis=1), edges[:-1], axis=0)
    return np.asarray(summed / np.diff(edges)[:, None])


def _weights(q: mx.array, k: mx.array, scale: float, cap: float | None) -> NDArray[np.float64]:
    scores = mx.where(create_causal_mask(len(q), len(k) - len(q)), capped((q @ k.T) * scale, cap), -mx.inf)
    return np.array(softmax(scores)).astype(np.float64)
