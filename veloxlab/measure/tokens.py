"""From a token to its causes: changes of predictions, errors of each head at a token, and its attention to keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
import polars as pl
from mlx.nn.layers.base import Module
from numpy.typing import NDArray

from veloxlab.cache.arithmetic import capped
from veloxlab.cache.calibration import Calibration
from veloxlab.cache.plan import Plan
from veloxlab.checks import CACHE_MAKER, CALIBRATIONS, checked, many, whole
from veloxlab.codecs import TENSORS, Tensor
from veloxlab.errors import InputError
from veloxlab.measure.activations import LayerCapture, softmax
from veloxlab.measure.errors import exact_and_decoded, ratio, with_exact_ends
from veloxlab.measure.frames import in_schema, schema
from veloxlab.measure.generation import added_text
from veloxlab.measure.quality import CacheMaker, divergence, log_probabilities, maker
from veloxlab.mlxlm.probe import own_cache
from veloxlab.progress import Progress, silent
from veloxlab.texts import Tokenizer

PREDICTIONS = schema("position token text kl flip probability exact_probability")
"""Columns of `Predictions.tokens`: position in the text of the predicted token, from 1; its id, and the text that it
adds; KL(exact ‖ compressed) of the prediction in nats; whether the most likely token changed; probability of the token
with the compressed and the exact cache."""

ALTERNATIVES = schema("position rank token text probability exact_probability came")
"""Columns of `Predictions.alternatives`: position of the predicted token; rank from 1 by the greater of both
probabilities; a token's id and text; its probability with the compressed and with the exact cache; whether it is the
token of the text."""

ERRORS_OF_TOKEN = schema("layer head tensor error")
"""Columns of `errors_of_token`: layer, KV head; "keys" and "values": ‖x − x̂‖² / ‖x‖² of the token's own key and value;
"output": ‖o − ô‖² / ‖o‖² of its attention output, over the query heads of this KV head."""

ATTENDED = schema("key key_end weight exact_weight error state")
"""Columns of `attended_keys`: position of a key, and the one after it; the token's weight of the key with compressed
and with exact keys, mean over the query heads of the KV head; ‖k − k̂‖² / ‖k‖²; "codes", or "exact" in sinks or window
(and for keys without error)."""

CALL = 512  # tokens of a call: predictions of more take much memory
BEFORE = 16  # earlier tokens that are decoded with one, because a character may have several tokens


@dataclass(frozen=True)
class Predictions:
    """Changes in the predictions of a text by a compressed cache: `token_predictions`."""

    ids: tuple[int, ...]
    tokens: pl.DataFrame  # `PREDICTIONS`
    candidates: pl.DataFrame  # `ALTERNATIVES` of all positions, with text null

    @property
    def worst(self) -> int:
        """Position of the token whose prediction moved most."""
        finite = self.tokens.filter(pl.col("kl").is_finite())
        return int((finite if finite.height else self.tokens).sort("kl", "position")["position"][-1])

    def alternatives(self, tokenizer: Tokenizer, position: int) -> pl.DataFrame:
        """Return the most likely tokens at a position, and the text's own token: `ALTERNATIVES`."""
        rows = self.candidates.filter(position=position)
        before = self.ids[max(0, position - BEFORE) : position]
        texts = [added_text(tokenizer, before, token) for token in rows["token"]]
        return rows.with_columns(text=pl.Series(texts, dtype=pl.String))


@checked(method_or_plan=CACHE_MAKER, calibration=CALIBRATIONS, ids=many(whole(0)), most=whole(1))
def token_predictions(
    model: Module,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    method_or_plan: str | Plan | CacheMaker = "turboquant",
    *,
    most: int = 5,
    progress: Progress = silent,
    **settings: Any,
) -> Predictions:
    """Read a text with the model's own cache and with a compressed one, and compare each prediction.

    Tokens of one call see each other as the cache holds them, as in `veloxlab.fidelity`; calls have `CALL` tokens.
    ``ids``: token ids. ``most``: number of likely tokens to keep for each cache. ``settings``: of
    `veloxlab.make_cache`. Raises `InputError` as that does, and for fewer than two tokens.
    """
    if len(ids) < 2:
        raise InputError(f"The text has {len(ids)} tokens and at least 2 are needed: give a longer text.")
    exact, ours = own_cache(model), maker(method_or_plan, settings, chunk="codes")(model)
    frames: dict[str, list[pl.DataFrame]] = {"tokens": [], "candidates": []}
    for start in range(0, len(ids) - 1, CALL):
        progress(start, len(ids) - 1, "predicting the text")
        end = min(start + CALL, len(ids) - 1)
        both = [log_probabilities(model(mx.array([ids[start:end]]), cache=cache)[0]) for cache in (exact, ours)]
        kl = divergence(*both)
        mx.eval(*both, kl)
        p, q = (np.array(each) for each in both)
        rows, position = np.arange(end - start), np.arange(start, end) + 1
        came = np.asarray(ids[start + 1 : end + 1])
        of_text = {"probability": np.exp(q[rows, came]), "exact_probability": np.exp(p[rows, came])}
        found = {"position": position, "token": came, "kl": np.array(kl), "flip": p.argmax(1) != q.argmax(1), **of_text}
        frames["tokens"].append(pl.DataFrame(found))
        frames["candidates"].append(_candidates(p, q, position, came, most))
    tokens, candidates = (pl.concat(own) for own in frames.values())
    texts = [added_text(tokenizer, ids[max(0, i - BEFORE) : i], ids[i]) for i in range(1, len(ids))]
    tokens = in_schema(tokens.with_columns(text=pl.Series(texts, dtype=pl.String)), PREDICTIONS)
    progress(len(ids) - 1, len(ids) - 1, "done")
    return Predictions(tuple(ids), tokens, candidates)


def _candidates(p: Any, q: Any, position: Any, came: Any, most: int) -> pl.DataFrame:  # noqa: ANN401 - arrays
    """Return the ``most`` likely tokens by either log-probabilities ``[S, vocabulary]``, and the text's tokens."""
    most = min(most, p.shape[1])
    best = [np.argpartition(-x, most - 1, axis=1)[:, :most] for x in (p, q)]
    token = np.concatenate([*best, came[:, None]], axis=1)
    rows = np.broadcast_to(np.arange(len(p))[:, None], token.shape)
    columns = {"row": rows, "token": token, "probability": np.exp(q[rows, token])}
    columns["exact_probability"] = np.exp(p[rows, token])
    frame = pl.DataFrame({name: column.reshape(-1) for name, column in columns.items()}).unique(["row", "token"])
    frame = frame.with_columns(greatest=pl.max_horizontal("probability", "exact_probability"))
    frame = frame.sort("row", "greatest", "token", descending=[False, True, False])
    frame = frame.with_columns(
        rank=pl.int_range(pl.len()).over("row") + 1,
        position=pl.Series(position).gather(frame["row"]),
        came=pl.Series(came).gather(frame["row"]) == pl.col("token"),
    )
    return in_schema(frame, ALTERNATIVES)


def as_held(
    layer: LayerCapture,
    method: str,
    bits: tuple[float, float],
    *,
    sinks: int = 0,
    window: int = 0,
    calibration: Calibration | None = None,
    **options: object,
) -> LayerCapture:
    """Return a layer with keys and values as ``method`` holds them at ``bits`` of each, decoded in float32, evaluated.

    The first ``sinks`` and the last ``window`` tokens are exact. Raises `InputError` as `layer_errors`.
    """
    keys, values = (
        with_exact_ends(*exact_and_decoded(layer, tensor, method, width, calibration, options), sinks, window)
        for tensor, width in zip(TENSORS, bits, strict=True)
    )
    mx.eval(keys, values)
    return replace(layer, keys=keys, values=values)


def errors_of_token(pairs: Sequence[tuple[LayerCapture, LayerCapture]], position: int) -> pl.DataFrame:
    """Return the errors of each layer and KV head at one position: `ERRORS_OF_TOKEN`.

    ``pairs``: each layer as captured, and `as_held`. Rows "output" are missing if a model shows no queries.
    """
    frames = []
    for exact, held in pairs:
        rows: dict[str, Any] = {}
        for tensor in TENSORS:
            x, y = (_at(each, tensor, position) for each in (exact, held))
            rows[tensor] = ratio(np.square(x - y).sum(axis=-1), np.square(x).sum(axis=-1))
        if exact.queries is not None:
            o, p = (_output(exact, each, position) for each in (exact, held))
            rows["output"] = ratio(np.square(o - p).sum(axis=(1, 2)), np.square(o).sum(axis=(1, 2)))
        for part, error in rows.items():
            place = {"layer": exact.layer, "tensor": part, "head": np.arange(len(error))}
            frames.append(in_schema(pl.DataFrame(place | {"error": error}), ERRORS_OF_TOKEN))
    return pl.concat(frames)


def attended_keys(exact: LayerCapture, held: LayerCapture, position: int, head: int) -> pl.DataFrame:
    """Return the keys that one KV head attends to from a position, with exact and compressed weights: `ATTENDED`.

    ``exact``, ``held``: a layer as captured, and `as_held`. Raises `InputError` if it does not show its queries.
    """
    exact.shown_queries("its attention cannot be seen")
    exact_weight, weight = (np.array(_weights(exact, each, position)[head].mean(axis=0)) for each in (exact, held))
    x, y = (np.array(each.vectors("keys")[0, head, : position + 1]) for each in (exact, held))
    error = ratio(np.square(x - y).sum(axis=-1), np.square(x).sum(axis=-1))
    key = np.arange(position + 1)
    columns = {"key": key, "key_end": key + 1, "weight": weight, "exact_weight": exact_weight, "error": error}
    return in_schema(pl.DataFrame(columns | {"state": np.where(error == 0, "exact", "codes")}), ATTENDED)


def pooled_keys(attended: pl.DataFrame, blocks: int) -> pl.DataFrame:
    """Pool `attended_keys` into at most ``blocks`` blocks of keys, each with its greatest weights and errors."""
    size = -(-attended.height // blocks)
    pooled = attended.group_by(pl.col("key") // size * size, maintain_order=True).agg(
        pl.col("key_end", "weight", "exact_weight", "error").max(), pl.col("state").first()
    )
    return in_schema(pooled, ATTENDED)


def worst_of_blocks(tokens: pl.DataFrame, blocks: int) -> pl.DataFrame:
    """Return the token whose prediction moved most from each of at most ``blocks`` blocks of `Predictions.tokens`."""
    size = -(-tokens.height // blocks)
    ranked = tokens.sort(pl.col("kl").fill_nan(np.inf), descending=True, maintain_order=True)
    block = ((pl.col("position") - 1) // size).alias("block")
    return ranked.group_by(block, maintain_order=True).first().drop("block").sort("position")


def _at(layer: LayerCapture, tensor: Tensor, position: int) -> NDArray[Any]:
    """Return the key or value of one token ``[H, D]``, the only one converted to float32."""
    x = layer.keys if tensor == "keys" else layer.values
    return np.array(x[0, :, position].astype(mx.float32))


def _weights(own: LayerCapture, seen: LayerCapture, position: int) -> mx.array:
    """Return attention weights of a layer's queries at a position over keys up to it ``[H, Hq/H, position + 1]``."""
    keys = seen.keys[0, :, : position + 1].astype(mx.float32)
    assert own.queries is not None
    queries = own.queries[0, :, position].astype(mx.float32).reshape(keys.shape[0], -1, keys.shape[-1])
    return softmax(capped(queries @ keys.swapaxes(-1, -2) * own.scale, own.cap))  # type: ignore[operator]


def _output(own: LayerCapture, seen: LayerCapture, position: int) -> NDArray[Any]:
    values = seen.values[0, :, : position + 1].astype(mx.float32)
    return np.array(_weights(own, seen, position) @ values)
