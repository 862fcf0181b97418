"""How much a model's loss minds an error in each KV head's keys, and in its values.

Paper: RateQuant (arXiv 2605.06675), which takes the squared gradient of the loss: by the diagonal of the Fisher
information, an error δ of a head's keys costs ½·E‖∂L/∂K‖²·E‖δ‖²/D nats a token if it points in no direction more than
in another, which a random rotation sees to. Here L is the negative log-likelihood of all tokens of a sequence, in nats,
so that the sensitivity does not shrink with the sequence's length.

The other kinds are proxies, there to be compared with it. The first tokens draw most of attention, and the gradients
there are hundreds of times those elsewhere: ``sinks`` of them are left out, as the cache keeps them exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import mlx.core as mx
import numpy as np
import polars as pl
from mlx.nn.layers.base import Module

from veloxlab import probing
from veloxlab.allocate.proxies import SIDES, Sides, Step, by_attention_output, by_forward_kl, by_norm, mean_square
from veloxlab.cache import DEFAULT_SINKS
from veloxlab.checks import checked, choice
from veloxlab.errors import InputError
from veloxlab.identity import fingerprint
from veloxlab.measure.activations import stretches
from veloxlab.measure.gradients import loss_gradients
from veloxlab.measure.progress import Progress, silent
from veloxlab.store import digest, kept, kept_in, read_sealed, write_sealed
from veloxlab.texts import excerpt

By = Literal["gradient", "key_norm", "attention_output", "forward_kl"]
NATS: tuple[By, By] = ("gradient", "forward_kl")  # those whose predicted losses are divergences

FORMAT = "veloxlab sensitivities 1"
LEAST_TOKENS = 16  # of a sequence behind the sinks

SENSITIVITIES = {
    "layer": pl.Int32,
    "head": pl.Int32,  # KV head
    "side": pl.String,  # "keys" or "values"
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
    """Measure the sensitivity of every KV head's keys and values: `SENSITIVITIES`, sorted by layer, side and head.

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
    InputError : ``by`` is unknown; the text is too short; the model has no plain keys and values, shows no queries, or
        its gradient cannot be taken; gradients or activations are not finite.
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
        lambda made, path: write_sealed(
            path, {"format": FORMAT, "facts": facts, "columns": made.to_dict(as_series=False)}
        ),
    )
    return frame if per_sequence else settled(frame, sequences)


def settled(each: pl.DataFrame, sequences: int) -> pl.DataFrame:
    """Means over the first ``sequences`` of a frame that has a row for each: `SENSITIVITIES`."""
    there = each["sequence"].n_unique()
    if not 1 <= sequences <= there:
        raise InputError(f"sequences={sequences} are not in this frame, which has {there}: take from 1 to {there}.")
    return (
        each.filter(pl.col("sequence") < sequences)
        .group_by("layer", "side", "head", "tokens", "by")
        .agg(pl.col("sensitivity").mean(), sequences=pl.len().cast(pl.Int32))
        .sort("layer", "side", "head")
        .select(list(SENSITIVITIES))
    )


def _loaded(path: Path) -> pl.DataFrame:
    """What was kept."""
    try:
        return pl.DataFrame(read_sealed(path, FORMAT)["columns"], schema=_EACH)
    except (OSError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError) as error:
        raise InputError(f"The sensitivities {path} cannot be read ({error}).") from error


def _measured(
    model: Module, read: Sequence[list[int]], by: By, sinks: int, progress: Progress
) -> Iterator[pl.DataFrame]:
    """Rows of each sequence."""
    layers = [f.layer for f in probing.probe(model) if f.compressible]
    if not layers:
        raise InputError("No layer of this model keeps plain keys and values: there is nothing to measure.")
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
        layer = [f.layer for f in probing.probe(model) if f.compressible][reached.index(False)]
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
