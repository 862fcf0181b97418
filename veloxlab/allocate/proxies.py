"""Sensitivities without a backward pass: trials that compress a little, and the length of keys and values.

Each function takes a model, the token ids of one sequence, how many first tokens do not count, and what is told of each
step; it gives for each layer with plain keys and values the sensitivities of its KV heads, of keys and of values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from numpy.typing import NDArray

from veloxlab import probing
from veloxlab.codecs import Codec, Role, find_method
from veloxlab.errors import InputError
from veloxlab.measure.activations import Capture, Recorder, capture_layers
from veloxlab.measure.errors import layer_errors
from veloxlab.measure.quality import divergence, log_probabilities
from veloxlab.measure.ratios import ratio

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

    def __init__(self, facts: probing.LayerFacts, side: Role, sinks: int) -> None:
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
    for facts in probing.probe(model):
        if not facts.compressible:
            continue
        sides = []
        for side in SIDES:
            step(f"{side} of layer {facts.layer}")
            trial = _Trial(facts, side, sinks)
            caches = probing.with_caches(model, _instead_of(facts, trial))
            moved = divergence(exact, log_probabilities(model(x, cache=caches)[0])).mean().item()
            sides.append(np.full(facts.kv_heads, ratio(moved, trial.moved.sum())))
        found.append((sides[0], sides[1]))
    return found


def _instead_of(facts: probing.LayerFacts, trial: Recorder) -> Callable[[probing.LayerFacts], Recorder]:
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
