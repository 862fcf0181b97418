"""How a model's loss changes with the keys and values that its layers hand to their caches, by backward passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from veloxlab.measure.activations import Recorder
from veloxlab.measure.quality import log_probabilities
from veloxlab.mlxlm import probe


class _Perturbed(Recorder):
    """Adds to keys and values, where they enter the cache, what the loss is to be differentiated by."""

    def __init__(self, facts: probe.LayerFacts, perturbation: tuple[mx.array, mx.array]) -> None:
        super().__init__(facts)
        self._perturbation = perturbation

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        of_keys, of_values = self._perturbation
        return super().update_and_fetch(keys + of_keys.astype(keys.dtype), values + of_values.astype(values.dtype))


def loss_gradients(model: Module, ids: Sequence[int]) -> list[tuple[mx.array, mx.array]]:
    """∂L/∂K ``[1, H, S, Dk]`` and ∂L/∂V ``[1, H, S, Dv]`` of each layer with plain keys and values, lazy, float32.

    L is the negative log-likelihood of ``ids[1:]``, summed, in nats; K is taken after RoPE, where a cache gets it. A
    layer that lends its keys and values has the gradient by way of all that read them. Weights may be quantized.

    Raises
    ------
    RuntimeError, ValueError : a part of the model cannot be differentiated, in MLX's words.
    """
    facts = [f for f in probe.probe(model) if f.compressible]
    x = mx.array([list(ids)])
    tokens = len(ids) - 1

    def loss(perturbations: list[tuple[mx.array, mx.array]]) -> mx.array:
        left = iter(perturbations)
        caches = probe.with_caches(model, lambda found: _Perturbed(found, next(left)))
        log_probs = log_probabilities(model(x[:, :-1], cache=caches)[0])
        return -mx.take_along_axis(log_probs, x[0, 1:, None], axis=-1).sum()

    zeros = [
        (mx.zeros((1, f.kv_heads, tokens, f.key_dim)), mx.zeros((1, f.kv_heads, tokens, f.value_dim))) for f in facts
    ]
    return list(mx.grad(loss)(zeros))
