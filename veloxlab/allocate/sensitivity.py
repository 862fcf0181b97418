"""The sensitivity of a model's loss to errors in each KV head's keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import mlx.core as mx
import numpy as np
import polars as pl
from mlx.nn.layers.base import Module
from numpy.typing import NDArray

from veloxlab.allocate.budget import layer_sizes
from veloxlab.cache.plan import DEFAULT_SINKS
from veloxlab.checks import checked, choice
from veloxlab.codecs import TENSORS, Tensor, find_method
from veloxlab.errors import InputError
from veloxlab.measure.activations import NOT_FINITE, Capture, Recorder, capture_layers, stretches
from veloxlab.measure.derivative import loss_gradients
from veloxlab.measure.errors import layer_errors, ratio
from veloxlab.measure.frames import PLACE, in_schema, schema
from veloxlab.measure.quality import check_room, divergence, log_probabilities
from veloxlab.mlxlm import probe
from veloxlab.mlxlm.identity import fingerprint
from veloxlab.progress import Progress, silent
from veloxlab.store import digest, kept, kept_in, read_json, reading, write_json
from veloxlab.texts import Tokenizer, excerpt

By = Literal["gradient", "key_norm", "attention_output", "forward_kl"]
NATS: tuple[By, By] = ("gradient", "forward_kl")  # those whose predicted losses are divergences
FORMAT = "veloxlab sensitivities 1"
OTHERS = "choose by='attention_output' or by='forward_kl'."  # for models without gradients
LEAST_TOKENS = 16  # of a sequence after the sinks
TRIAL = ("turboquant", 3)  # method and bits of trials

SENSITIVITIES = schema(PLACE + "sensitivity sequences tokens by") | {"sequences": pl.Int32, "by": pl.String}
"""Columns of `sensitivities`: the loss of a token divided by ½·E‖x − x̂‖²/D, in nats for `NATS` (E‖x‖² for "key_norm");
number of sequences in the mean; tokens of each after the sinks. With ``per_sequence``, ``sequence`` (from 0) replaces
``sequences``."""

EACH = {"sequence" if name == "sequences" else name: dtype for name, dtype in SENSITIVITIES.items()}
"""The same with ``per_sequence``."""
_Step = Callable[[str], object]
_Found = Iterator[tuple[int, Tensor, NDArray[np.float64]]]  # a layer, its keys or values, and a number for each KV head


@checked(by=choice(*get_args(By)))
def sensitivities(
    model: Module,
    tokenizer: Tokenizer,
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

    The result of each sequence is saved on disk, with a hash of the weights, tokens and settings. A call that was
    stopped continues after the last finished sequence.
    Raises `InputError`: a text that is too short, or does not fit into memory; a model without plain keys and values,
    queries or gradients; numbers that are not finite.

    Parameters
    ----------
    text, sequences, tokens : by default the WikiText-2 validation excerpt; the number of sequences, and their length.
    by : ``"gradient"``, E‖∂L/∂x‖² over the tokens; ``"key_norm"``, E‖x‖², which does not use the loss. Two others
        compress the keys or values of one layer to 3 bits, and divide by their distortion: ``"attention_output"``, the
        relative error of the layer's output; ``"forward_kl"``, the divergence of predictions, which runs the model
        twice for each layer and gives one number for all heads of a layer.
    sinks : first tokens of a sequence that are not counted.
    per_sequence : return a row for each sequence; `settled` takes their means.
    folder : for the results of sequences; the user's cache folder by default.
    """
    if tokens - sinks < LEAST_TOKENS:
        raise InputError(f"tokens={tokens} with sinks={sinks} are too few: give sinks + {LEAST_TOKENS} or more.")
    texts = stretches(tokenizer, excerpt("validation") if text is None else text, tokens, sequences, name="sequences")
    of_all = {"model": fingerprint(model), "sinks": sinks, "by": by}
    frames = []
    for sequence, ids in enumerate(texts):
        facts = of_all | {"text": digest(ids)}
        found = kept(
            kept_in("sensitivities", folder) / f"{by}-{digest([FORMAT, facts])[:16]}.json",
            partial(read, facts),
            partial(_measured, model, ids, by, sinks, _Steps(progress, sequence, sequences)),
            partial(write, facts),
        )
        frames.append(found.with_columns(sequence=pl.lit(sequence, pl.Int32)))
    frame = pl.concat(frames)
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


def frame_of(columns: Mapping[str, Any], types: Mapping[str, Any]) -> pl.DataFrame:
    """The frame of columns in a file; in files of version 0.1 ``tensor`` is called ``side``."""
    return pl.DataFrame({"tensor" if name == "side" else name: own for name, own in columns.items()}, schema=types)


def write(facts: Mapping[str, Any], frame: pl.DataFrame, path: Path) -> Path:
    """Write rows of `EACH` to ``path``, with all that they depend on."""
    return write_json(path, FORMAT, {"facts": facts, "columns": frame.to_dict(as_series=False)})


def read(facts: Mapping[str, Any], path: Path) -> pl.DataFrame:
    """Read a file of `write`; raises `InputError` if it is damaged, or has other ``facts``."""
    with reading("sensitivities", path, "measure them again"):
        content = read_json(path, FORMAT)
        if content["facts"] != facts:
            raise ValueError("they are of another model, text or setting")
        return frame_of(content["columns"], EACH)


@dataclass
class _Steps:
    """Reports the progress of one sequence of several."""

    progress: Progress
    sequence: int
    sequences: int

    def of(self, steps: int) -> _Step:
        """A function that reports the next of this many steps of the sequence."""
        done, total = iter(range(self.sequence * steps, self.sequences * steps)), self.sequences * steps
        said = f"sequence {self.sequence + 1} of {self.sequences}"
        return lambda label: self.progress(next(done), total, f"{said}: {label}")


def _measured(model: Module, ids: Sequence[int], by: By, sinks: int, progress: _Steps) -> pl.DataFrame:
    """Rows of `EACH` of one sequence, with number 0."""
    if by in NATS:
        check_room(model, [len(ids)])
    layers = len(layer_sizes(model))
    step = progress.of({"gradient": 1, "key_norm": 1, "attention_output": layers, "forward_kl": 2 * layers + 1}[by])
    frames = []
    for layer, tensor, found in _MEASURES[by](model, ids, sinks, step):
        if not np.isfinite(found).all():
            wrong = f"The sensitivity of layer {layer}'s {tensor} by {by!r} is NaN or infinite"
            raise InputError(f"{wrong}: {NOT_FINITE}")
        said = {"layer": layer, "tensor": tensor, "sequence": 0, "tokens": len(ids) - sinks, "by": by}
        frames.append(pl.DataFrame({"head": range(len(found)), "sensitivity": found} | said))
    return in_schema(pl.concat(frames), EACH)


def _by_gradient(model: Module, ids: Sequence[int], sinks: int, step: _Step) -> _Found:
    step("gradients")
    try:
        gradients = loss_gradients(model, ids)
    except InputError:
        raise
    except (RuntimeError, ValueError) as error:
        said = f"The loss of this model ({type(model).__module__}) cannot be differentiated ({error})"
        raise InputError(f"{said}: {OTHERS}") from error
    for size, pair in zip(layer_sizes(model), gradients, strict=True):
        squares = [mean_square(gradient[:, :, sinks:]) for gradient in pair]
        if not np.any(squares[0]) and not np.any(squares[1]):
            said = f"No gradient of the loss reaches the keys and values of layer {size.layer}"
            raise InputError(f"{said}: {OTHERS}")
        yield from ((size.layer, tensor, square) for tensor, square in zip(TENSORS, squares, strict=True))


def _by_key_norm(model: Module, ids: Sequence[int], sinks: int, step: _Step) -> _Found:
    step("norms")
    for seen in capture_layers(model, ids):
        yield from ((seen.layer, tensor, mean_square(seen.vectors(tensor)[:, :, sinks:])) for tensor in TENSORS)


def _by_attention_output(model: Module, ids: Sequence[int], sinks: int, step: _Step) -> _Found:
    """The relative error of each KV head's attention output with compressed keys or values, over their distortion."""
    method, bits = TRIAL
    for seen in capture_layers(model, ids):
        step(f"attention of layer {seen.layer}")
        if seen.queries is None:
            wrong = f"Layer {seen.layer} of this model does not show its queries"
            raise InputError(f"{wrong}: choose by='gradient' or by='forward_kl'.")
        errors = layer_errors(Capture((seen,), tuple(ids)), method, bits=bits, sinks=sinks).sort("head")
        for tensor in TENSORS:
            lost = errors.filter(tensor=tensor)["output_error"].to_numpy()
            yield seen.layer, tensor, ratio(lost, _tried(seen.vectors(tensor), tensor, sinks)[1])


def _by_forward_kl(model: Module, ids: Sequence[int], sinks: int, step: _Step) -> _Found:
    """The divergence of predictions with one layer's keys or values compressed, over their distortion."""
    x = mx.array([list(ids[:-1])])
    step("exact")
    exact = log_probabilities(model(x)[0])
    for size, tensor in product(layer_sizes(model), TENSORS):
        step(f"{tensor} of layer {size.layer}")
        caches = probe.with_caches(model, partial(_Trial, size.layer, tensor, sinks))
        lost = divergence(exact, log_probabilities(model(x, cache=caches)[0])).mean().item()
        moved = sum(trial.moved.sum() for trial in probe.slots_of(caches) if isinstance(trial, _Trial))
        yield size.layer, tensor, np.full(size.kv_heads, ratio(lost, moved))


_MEASURES = {
    "gradient": _by_gradient,
    "key_norm": _by_key_norm,
    "attention_output": _by_attention_output,
    "forward_kl": _by_forward_kl,
}


class _Trial(Recorder):
    """Compresses one layer's keys or values after the sinks, and records their distortion."""

    def __init__(self, layer: int, tensor: Tensor, sinks: int, facts: probe.LayerFacts) -> None:
        super().__init__(facts)
        self._layer, self._tensor, self._sinks, self.moved = layer, tensor, sinks, np.zeros(1)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        pair = {"keys": keys, "values": values}
        if self.facts.layer == self._layer:
            pair[self._tensor], self.moved = _tried(pair[self._tensor], self._tensor, self._sinks)
        return super().update_and_fetch(**pair)


def _tried(x: mx.array, tensor: Tensor, sinks: int) -> tuple[mx.array, NDArray[np.float64]]:
    """``x`` decoded from codes after the sinks, and ½·E‖x − x̂‖²/D of each head."""
    method, bits = TRIAL
    codec = find_method(method).codec(x.shape[-1], bits, tensor)
    behind = x[:, :, sinks:].astype(mx.float32)
    coded = codec.decode(codec.encode(behind))
    whole = mx.concatenate([x[:, :, :sinks], coded.astype(x.dtype)], axis=2)
    return whole, mean_square(behind - coded) / (2 * x.shape[-1])


def mean_square(x: mx.array) -> NDArray[np.float64]:
    """E‖x‖² over the tokens, of each head ``[H]`` of ``[1, H, S, D]``."""
    return np.array(mx.square(x[0].astype(mx.float32)).sum(axis=-1).mean(axis=-1), np.float64)
