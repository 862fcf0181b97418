"""How much each KV head's keys and values matter: what the loss of a model does when they change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import mlx.core as mx
import numpy as np
import polars as pl
from mlx.nn.layers.base import Module
from numpy.typing import ArrayLike, NDArray

from veloxlab.cache.plan import DEFAULT_SINKS
from veloxlab.checks import checked, choice
from veloxlab.codecs import TENSORS, Tensor, find_method
from veloxlab.errors import InputError
from veloxlab.measure.activations import Capture, Recorder, capture_layers, stretches
from veloxlab.measure.errors import layer_errors, ratio
from veloxlab.measure.predictions import check_room, divergence, log_probabilities, loss_gradients
from veloxlab.mlxlm import probe
from veloxlab.mlxlm.identity import fingerprint
from veloxlab.progress import Progress, silent
from veloxlab.store import digest, kept, kept_in, read_json, reading, write_json
from veloxlab.texts import excerpt

By = Literal["gradient", "key_norm", "attention_output", "forward_kl"]
NATS: tuple[By, By] = ("gradient", "forward_kl")  # those whose predicted losses are divergences
FORMAT = "veloxlab sensitivities 1"
LEAST_TOKENS = 16  # of a sequence behind the sinks
TRIAL = ("turboquant", 3)  # method and bits of trials

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
_Step = Callable[[str], None]
_Found = Iterator[tuple[int, Tensor, ArrayLike]]  # a layer, its keys or values, and a number for each KV head


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

    The result is kept on disk and found again by the model's weights, the text's tokens and these settings.

    Parameters
    ----------
    model, tokenizer : as `veloxlab.load` gives them.
    text : what the model reads; the shipped WikiText-2 validation excerpt by default.
    sequences, tokens : stretches of the text, one after another, and their length. One is held at a time.
    by : ``"gradient"``, E‖∂L/∂x‖² over the tokens: one forward and one backward pass for each sequence;
        ``"key_norm"``, E‖x‖², which says nothing of the loss;
        ``"attention_output"``, the relative error of a layer's output with its keys or values at 3 bits, over their
        distortion;
        ``"forward_kl"``, the divergence of the model's predictions with one layer's keys or values at 3 bits, over
        their distortion: all heads of a layer share it, and the text is read twice for each layer.
    sinks : first tokens of a sequence that are not counted.
    per_sequence : give a row for each sequence; `settled` makes means of them.
    folder : where the result is kept; the user's cache folder by default.
    progress : told of each step; what it raises ends the work and nothing is kept.

    Raises
    ------
    InputError : the text is too short; a sequence does not fit into memory; the model has no plain keys and values,
        shows no queries, or its gradient cannot be taken; gradients or activations are not finite.
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
    frame = kept(
        kept_in("sensitivities", folder) / f"{by}-{digest([FORMAT, facts])[:16]}.json",
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
    """The frame of columns in a file; in files of version 0.1 ``tensor`` is called ``side``."""
    return pl.DataFrame({"tensor" if name == "side" else name: own for name, own in columns.items()}, schema=schema)


def _loaded(path: Path) -> pl.DataFrame:
    with reading("sensitivities", path, "measure them again"):
        return frame_of(read_json(path, FORMAT)["columns"], _EACH)


def _measured(
    model: Module, read: Sequence[list[int]], by: By, sinks: int, progress: Progress
) -> Iterator[pl.DataFrame]:
    """Rows of each sequence."""
    layers = sum(f.compressible for f in probe.probe(model))
    if not layers:
        raise InputError("No layer of this model keeps plain keys and values: there is nothing to measure.")
    if by in NATS:
        check_room(model, [max(map(len, read))])
    steps = {"gradient": 1, "key_norm": 1, "attention_output": layers, "forward_kl": 2 * layers + 1}[by]
    done, total = iter(range(steps * len(read))), steps * len(read)
    for sequence, ids in enumerate(read):

        def step(label: str, sequence: int = sequence) -> None:
            progress(next(done), total, f"sequence {sequence + 1} of {len(read)}: {label}")

        rows: list[tuple[object, ...]] = []
        for layer, tensor, found in _MEASURES[by](model, ids, sinks, step):
            numbers = np.array(found, np.float64)
            if not np.isfinite(numbers).all():
                raise InputError(
                    f"The sensitivity of layer {layer}'s {tensor} by {by!r} is NaN or infinite: load the model with "
                    "dtype='bfloat16' or 'float32', or look for what is wrong with its weights."
                )
            counted = len(ids) - sinks
            rows += [
                (layer, head, tensor, number, sequence, counted, by) for head, number in enumerate(numbers.tolist())
            ]
        yield pl.DataFrame(rows, schema=_EACH, orient="row")
    progress(total, total, "done")


# kinds ----------------------------------------------------------------------------------------------------------------


def _by_gradient(model: Module, ids: Sequence[int], sinks: int, step: _Step) -> _Found:
    """E‖∂L/∂x‖² of each head."""
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
    layers = [f.layer for f in probe.probe(model) if f.compressible]
    for layer, pair in zip(layers, squares, strict=True):
        if all((square == 0).all().item() for square in pair):
            raise InputError(
                f"No gradient of the loss reaches the keys and values of layer {layer}: choose by='attention_output' "
                "or by='forward_kl'."
            )
        yield from ((layer, tensor, square) for tensor, square in zip(TENSORS, pair, strict=True))


def _by_key_norm(model: Module, ids: Sequence[int], sinks: int, step: _Step) -> _Found:
    """E‖x‖² of each head."""
    step("norms")
    for seen in capture_layers(model, ids):
        yield from ((seen.layer, tensor, mean_square(seen.vectors(tensor), sinks)) for tensor in TENSORS)


def _by_attention_output(model: Module, ids: Sequence[int], sinks: int, step: _Step) -> _Found:
    """The relative error of each KV head's attention output in a trial of keys or values, over its `_per_value`."""
    method, bits = TRIAL
    for seen in capture_layers(model, ids):
        step(f"attention of layer {seen.layer}")
        if seen.queries is None:
            raise InputError(
                f"Layer {seen.layer} of this model does not show its queries, so the error of its output cannot be "
                "measured: choose by='gradient' or by='forward_kl'."
            )
        errors = layer_errors(Capture((seen,), tuple(ids)), method, bits=bits, sinks=sinks).sort("head")
        for tensor in TENSORS:
            lost = errors.filter(tensor=tensor)["output_error"].to_numpy()
            yield seen.layer, tensor, ratio(lost, _per_value(seen.vectors(tensor), tensor, sinks))


def _by_forward_kl(model: Module, ids: Sequence[int], sinks: int, step: _Step) -> _Found:
    """The divergence of predictions in a trial of one layer's keys or values, over the `_per_value` of its heads."""
    x = mx.array([list(ids[:-1])])
    step("exact")
    exact = log_probabilities(model(x)[0])
    for facts in [found for found in probe.probe(model) if found.compressible]:
        for tensor in TENSORS:
            step(f"{tensor} of layer {facts.layer}")
            trial = _Trial(facts, tensor, sinks)

            def recorder(of: probe.LayerFacts, own: probe.LayerFacts = facts, trial: _Trial = trial) -> Recorder:
                return trial if of is own else Recorder(of)

            caches = probe.with_caches(model, recorder)
            lost = divergence(exact, log_probabilities(model(x, cache=caches)[0])).mean().item()
            yield facts.layer, tensor, np.full(facts.kv_heads, ratio(lost, trial.per_value.sum()))


_MEASURES: dict[By, Callable[[Module, Sequence[int], int, _Step], _Found]] = {
    "gradient": _by_gradient,
    "key_norm": _by_key_norm,
    "attention_output": _by_attention_output,
    "forward_kl": _by_forward_kl,
}


class _Trial(Recorder):
    """Compresses keys or values behind the sinks, and keeps how far they moved."""

    def __init__(self, facts: probe.LayerFacts, tensor: Tensor, sinks: int) -> None:
        super().__init__(facts)
        self._tensor, self._sinks = tensor, sinks
        self.per_value = np.zeros(0)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        x = keys if self._tensor == "keys" else values
        coded = _compressed(x[:, :, self._sinks :], self._tensor).astype(x.dtype)
        x_coded = mx.concatenate([x[:, :, : self._sinks], coded], axis=2)
        self.per_value = _per_value(x, self._tensor, self._sinks)
        return super().update_and_fetch(*((x_coded, values) if self._tensor == "keys" else (keys, x_coded)))


def _compressed(x: mx.array, tensor: Tensor) -> mx.array:
    method, bits = TRIAL
    codec = find_method(method).codec(x.shape[-1], bits, tensor)
    return codec.decode(codec.encode(x))


def _per_value(x: mx.array, tensor: Tensor, sinks: int) -> NDArray[np.float64]:
    """½·E‖x − x̂‖²/D of each head in a trial: what a sensitivity is multiplied with."""
    behind = x[:, :, sinks:].astype(mx.float32)
    return np.array(mean_square(behind - _compressed(behind, tensor), 0), np.float64) / (2 * x.shape[-1])


def mean_square(x: mx.array, sinks: int) -> mx.array:
    """E‖x‖² of each head ``[H]`` of ``[1, H, S, D]`` over the tokens behind the sinks."""
    return mx.square(x[0, :, sinks:].astype(mx.float32)).sum(axis=-1).mean(axis=-1)
