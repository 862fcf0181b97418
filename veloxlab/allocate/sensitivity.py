"""Sensitivities without a backward pass: trials that compress a little, and the length of keys and values.

Each function takes a model, the token ids of one sequence, how many first tokens do not count, and what is told of each
step; it gives for each layer with plain keys and values the sensitivities of its KV heads, of keys and of values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import mlx.core as mx
import numpy as np
import polars as pl
from mlx.nn.layers.base import Module
from numpy.typing import NDArray

from veloxlab.cache.plan import DEFAULT_SINKS
from veloxlab.checks import checked, choice
from veloxlab.codecs import Codec, Role, find_method
from veloxlab.errors import InputError
from veloxlab.measure.activations import Capture, Recorder, capture_layers, stretches
from veloxlab.measure.errors import layer_errors, ratio
from veloxlab.measure.footprint import check_room
from veloxlab.measure.gradients import loss_gradients
from veloxlab.measure.quality import divergence, log_probabilities
from veloxlab.mlxlm import probe
from veloxlab.mlxlm.identity import fingerprint
from veloxlab.progress import Progress, silent
from veloxlab.store import digest, kept, kept_in, read_json, reading, write_json
from veloxlab.texts import excerpt

Sides = tuple[NDArray[np.float64], NDArray[np.float64]]  # of keys and of values, one number a KV head
Step = Callable[[str], None]

SIDES: tuple[Role, Role] = ("keys", "values")
REFERENCE = ("turboquant", 3)  # method and bits of the trials


def by_norm(model: Module, ids: Sequence[int], sinks: int, step: Step) -> list[Sides]:
    """E‖x‖² of each head."""
    step("norms")
    return [
        (np.array(mean_square(seen.keys, sinks), np.float64), np.array(mean_square(seen.values, sinks), np.float64))
        for seen in capture_layers(model, ids)
    ]


def by_attention_output(model: Module, ids: Sequence[int], sinks: int, step: Step) -> list[Sides]:
    """The relative error of each KV head's attention output in a trial of one side, over its `per_value`."""
    method, bits = REFERENCE
    found = []
    for seen in capture_layers(model, ids):
        step(f"attention of layer {seen.layer}")
        if seen.queries is None:
            raise InputError(
                f"Layer {seen.layer} of this model does not show its queries, so the error of its output cannot be "
                "measured: choose by='gradient' or by='forward_kl'."
            )
        errors = layer_errors(Capture((seen,), tuple(ids)), method, bits=bits, sinks=sinks).sort("head")
        sides = []
        for side, x in zip(SIDES, (seen.keys, seen.values), strict=True):
            trial = _trial(x.shape[-1], side)
            sides.append(ratio(errors.filter(tensor=side)["output_error"].to_numpy(), per_value(trial, x, sinks)))
        found.append((sides[0], sides[1]))
    return found


class _Trial(Recorder):
    """Compresses one side's tokens behind the sinks, and keeps how far they went."""

    def __init__(self, facts: probe.LayerFacts, side: Role, sinks: int) -> None:
        super().__init__(facts)
        self._side, self._sinks = side, sinks
        self.moved = np.zeros(0)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        x = keys if self._side == "keys" else values
        codec = _trial(x.shape[-1], self._side)
        coded = mx.concatenate(
            [x[:, :, : self._sinks], _decoded(codec, x[:, :, self._sinks :]).astype(x.dtype)], axis=2
        )
        self.moved = per_value(codec, x, self._sinks)
        return super().update_and_fetch(*((coded, values) if self._side == "keys" else (keys, coded)))


def by_forward_kl(model: Module, ids: Sequence[int], sinks: int, step: Step) -> list[Sides]:
    """The divergence of the predictions in a trial of one layer's side, over the `per_value` of its heads."""
    x = mx.array([list(ids[:-1])])
    step("exact")
    exact = log_probabilities(model(x)[0])
    found = []
    for facts in probe.probe(model):
        if not facts.compressible:
            continue
        sides = []
        for side in SIDES:
            step(f"{side} of layer {facts.layer}")
            trial = _Trial(facts, side, sinks)
            caches = probe.with_caches(model, _instead_of(facts, trial))
            moved = divergence(exact, log_probabilities(model(x, cache=caches)[0])).mean().item()
            sides.append(np.full(facts.kv_heads, ratio(moved, trial.moved.sum())))
        found.append((sides[0], sides[1]))
    return found


def _instead_of(facts: probe.LayerFacts, trial: Recorder) -> Callable[[probe.LayerFacts], Recorder]:
    """The trial in its layer, and recorders in the others."""
    return lambda found: trial if found is facts else Recorder(found)


def _trial(head_dim: int, side: Role) -> Codec:
    method, bits = REFERENCE
    return find_method(method).codec(head_dim, bits, side)


def _decoded(codec: Codec, x: mx.array) -> mx.array:
    return codec.decode(codec.encode(x))


def per_value(codec: Codec, x: mx.array, sinks: int) -> NDArray[np.float64]:
    """½·E‖x − x̂‖²/D of each head: what a sensitivity is multiplied with."""
    behind = x[:, :, sinks:].astype(mx.float32)
    return np.array(mean_square(behind - _decoded(codec, behind), 0), np.float64) / (2 * x.shape[-1])


def mean_square(x: mx.array, sinks: int) -> mx.array:
    """E‖x‖² of each head ``[H]`` of ``[1, H, S, D]`` over the tokens behind the sinks."""
    return mx.square(x[0, :, sinks:].astype(mx.float32)).sum(axis=-1).mean(axis=-1)


By = Literal["gradient", "key_norm", "attention_output", "forward_kl"]
NATS: tuple[By, By] = ("gradient", "forward_kl")  # those whose predicted losses are divergences

FORMAT = "veloxlab sensitivities 1"
LEAST_TOKENS = 16  # of a sequence behind the sinks

SENSITIVITIES = {
    "layer": pl.Int32,
    "head": pl.Int32,  # KV head
    "tensor": pl.String,  # "keys" or "values"
    "sensitivity": pl.Float64,  # what a token loses for ½·E‖x − x̂‖²/D, in nats by `NATS`; of "key_norm", E‖x‖²
    "sequences": pl.Int32,  # that it is the mean of
    "tokens": pl.Int32,  # of each sequence that were counted, those behind the sinks
    "by": pl.String,
}
"""Columns of `sensitivities`; with ``per_sequence``, ``sequence`` (from 0) is in the place of ``sequences``."""

_EACH = {"sequence" if name == "sequences" else name: dtype for name, dtype in SENSITIVITIES.items()}


@checked(by=choice(*get_args(By)))
def sensitivities(
    model: Module,
    tokenizer: Any,  # noqa: ANN401
    text: str | None = None,
    *,
    sequences: int = 8,
    tokens: int = 512,
    by: By = "gradient",
    sinks: int = DEFAULT_SINKS,
    per_sequence: bool = False,
    folder: str | Path | None = None,
    progress: Progress = silent,
) -> pl.DataFrame:
    """Measure the sensitivity of every KV head's keys and values: `SENSITIVITIES`, sorted by layer, tensor and head.

    The result is kept on disk and found again by the model's weights, the text's tokens and these settings. One
    sequence is held at a time.

    Parameters
    ----------
    model, tokenizer : as `veloxlab.load` gives them.
    text : what the model reads; the shipped WikiText-2 validation excerpt by default.
    sequences, tokens : stretches of the text, one after another, and their length.
    by : ``"gradient"``, E‖∂L/∂x‖² over the tokens: one forward and one backward pass for each sequence;
        ``"key_norm"``, E‖x‖², which says nothing of the loss;
        ``"attention_output"``, the relative error of a layer's output with one side at 3 bits, over its distortion;
        ``"forward_kl"``, the divergence of the model's predictions with one layer's keys or values at 3 bits, over
        their distortion: all heads of a layer share it, and the text is read twice for each layer.
    sinks : first tokens of a sequence that are not counted.
    per_sequence : give a row for each sequence; `settled` makes means of them.
    folder : where to keep the result; the user's cache folder by default. Where it cannot be written a warning says so.
    progress : told of each step; what it raises ends the work and nothing is kept.

    Raises
    ------
    InputError : ``by`` is unknown; the text is too short; a sequence does not fit into memory; the model has no plain
        keys and values, shows no queries, or its gradient cannot be taken; gradients or activations are not finite.
    """
    if tokens - sinks < LEAST_TOKENS:
        raise InputError(
            f"tokens={tokens} with sinks={sinks} say too little: take {LEAST_TOKENS} tokens more than the sinks."
        )
    read = stretches(tokenizer, excerpt("validation") if text is None else text, tokens, sequences, name="sequences")
    facts = {
        "model": fingerprint(model),
        "text": digest(read),
        "sequences": sequences,
        "tokens": tokens,
        "sinks": sinks,
        "by": by,
    }
    path = kept_in("sensitivities", folder) / f"{by}-{digest([FORMAT, facts])[:16]}.json"
    frame = kept(
        path,
        _loaded,
        lambda: pl.concat(_measured(model, read, by, sinks, progress)),
        lambda made, path: write_json(path, FORMAT, {"facts": facts, "columns": made.to_dict(as_series=False)}),
    )
    return frame if per_sequence else settled(frame, sequences)


def settled(each: pl.DataFrame, sequences: int) -> pl.DataFrame:
    """Means over the first ``sequences`` of a frame that has a row for each: `SENSITIVITIES`."""
    there = each["sequence"].n_unique()
    if not 1 <= sequences <= there:
        raise InputError(f"sequences={sequences} are not in this frame, which has {there}: take from 1 to {there}.")
    return (
        each.filter(pl.col("sequence") < sequences)
        .group_by("layer", "tensor", "head", "tokens", "by")
        .agg(pl.col("sensitivity").mean(), sequences=pl.len().cast(pl.Int32))
        .sort("layer", "tensor", "head")
        .select(list(SENSITIVITIES))
    )


def frame_of(columns: Mapping[str, Any], schema: Mapping[str, Any]) -> pl.DataFrame:
    """The frame of columns in a file; files of before call ``tensor`` ``side``."""
    return pl.DataFrame({"tensor" if name == "side" else name: own for name, own in columns.items()}, schema=schema)


def _loaded(path: Path) -> pl.DataFrame:
    """What was kept."""
    with reading("sensitivities", path, "measure them again"):
        return frame_of(read_json(path, FORMAT)["columns"], _EACH)


def _measured(
    model: Module, read: Sequence[list[int]], by: By, sinks: int, progress: Progress
) -> Iterator[pl.DataFrame]:
    """Rows of each sequence."""
    layers = [f.layer for f in probe.probe(model) if f.compressible]
    if not layers:
        raise InputError("No layer of this model keeps plain keys and values: there is nothing to measure.")
    if by in ("gradient", "forward_kl"):
        check_room(model, [max(map(len, read))])
    each = {"gradient": 1, "key_norm": 1, "attention_output": len(layers), "forward_kl": 2 * len(layers) + 1}[by]
    total = each * len(read)
    for i, ids in enumerate(read):
        done = iter(range(i * each, (i + 1) * each))

        def step(label: str, i: int = i, done: Iterator[int] = done) -> None:
            progress(next(done), total, f"sequence {i + 1} of {len(read)}: {label}")

        yield _rows(layers, _MEASURES[by](model, ids, sinks, step), i, len(ids) - sinks, by)
    progress(total, total, "done")


def _rows(layers: Sequence[int], found: Sequence[Sides], sequence: int, tokens: int, by: By) -> pl.DataFrame:
    rows: list[tuple[object, ...]] = []
    for layer, sides in zip(layers, found, strict=True):
        for side, numbers in zip(SIDES, sides, strict=True):
            if not np.isfinite(numbers).all():
                raise InputError(
                    f"The sensitivity of layer {layer}'s {side} by {by!r} is NaN or infinite: load the model with "
                    "dtype='bfloat16' or 'float32', or look for what is wrong with its weights."
                )
            rows += [(layer, h, side, float(number), sequence, tokens, by) for h, number in enumerate(numbers)]
    return pl.DataFrame(rows, schema=_EACH, orient="row")


def _by_gradient(model: Module, ids: Sequence[int], sinks: int, step: Step) -> list[Sides]:
    step("gradients")
    try:
        gradients = loss_gradients(model, ids)
    except InputError:
        raise
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"The loss of this model ({type(model).__module__}) cannot be differentiated ({error}): choose "
            "by='attention_output' or by='forward_kl'."
        ) from error
    squares = [[mean_square(gradient, sinks) for gradient in pair] for pair in gradients]
    mx.eval(squares)
    found = [(np.array(keys, np.float64), np.array(values, np.float64)) for keys, values in squares]
    reached = [max(keys.max(), values.max()) != 0 for keys, values in found]  # NaN is told elsewhere
    if not all(reached):
        layer = [f.layer for f in probe.probe(model) if f.compressible][reached.index(False)]
        raise InputError(
            f"No gradient of the loss reaches the keys and values of layer {layer}: choose by='attention_output' or "
            "by='forward_kl'."
        )
    return found


_MEASURES: dict[By, Callable[[Module, Sequence[int], int, Step], list[Sides]]] = {
    "gradient": _by_gradient,
    "key_norm": by_norm,
    "attention_output": by_attention_output,
    "forward_kl": by_forward_kl,
}
