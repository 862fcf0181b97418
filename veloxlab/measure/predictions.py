"""What a model predicts: log-probabilities, their divergence, the gradients of their loss, and their memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from veloxlab import runtime
from veloxlab.errors import InputError
from veloxlab.measure.activations import Recorder
from veloxlab.mlxlm import probe


def log_probabilities(logits: mx.array) -> mx.array:
    """Log-probabilities of ``logits`` ``[S, vocabulary]``, float32, in nats."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def of_targets(log_probs: mx.array, targets: mx.array) -> mx.array:
    """−log p ``[S]`` of the tokens ``[S]`` that came next, in nats."""
    return -mx.take_along_axis(log_probs, targets[:, None], axis=-1)[:, 0]


def divergence(exact: mx.array, changed: mx.array) -> mx.array:
    """KL(exact ‖ changed) ``[S]`` of log-probabilities ``[S, vocabulary]``, in nats; NaN where either is."""
    kl = (mx.exp(exact) * (exact - changed)).sum(axis=-1)
    return mx.maximum(kl, 0.0)  # rounding of float32 sums can leave −1e-8; NaN stays


def predicted_bytes(model: Module, lengths: Sequence[int]) -> int:
    """Bytes at least for a model's log-probabilities over stretches of ``lengths``, and another run's of the last."""
    vocabulary: int = model(mx.array([[0]])).shape[-1]  # builds a graph only
    longest = max(lengths)
    # on a CPU MLX makes the scores of a layer's heads, length times length, too
    heads: int = getattr(getattr(model, "args", None), "num_attention_heads", 0) if runtime.backend() == "cpu" else 0
    # at once: logits, as the model gives them and in float32, and the log-probabilities that are compared
    return 4 * (vocabulary * sum(lengths) + max(3 * vocabulary * longest, heads * longest**2))


def check_room(model: Module, lengths: Sequence[int]) -> None:
    """Raise `InputError` if the predictions of stretches of these ``lengths`` do not fit into memory."""
    needed = predicted_bytes(model, lengths)
    free = runtime.device().memory_bytes - mx.get_active_memory()
    if needed > free:
        tokens = f"{len(lengths)} stretch{'es' * (len(lengths) > 1)} of up to {max(lengths):,} tokens"
        said = f"The predictions of {tokens} take {needed:,} bytes at least, and {max(0, free):,} are left here"
        raise InputError(f"{said}: take fewer or shorter ones.")


class _Perturbed(Recorder):
    """Adds to keys and values, where they enter the cache, what the loss is to be differentiated by."""

    def __init__(self, facts: probe.LayerFacts, perturbation: tuple[mx.array, ...]) -> None:
        super().__init__(facts)
        self._perturbation = perturbation

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        of_keys, of_values = self._perturbation
        return super().update_and_fetch(keys + of_keys.astype(keys.dtype), values + of_values.astype(values.dtype))


def loss_gradients(model: Module, ids: Sequence[int]) -> list[tuple[mx.array, ...]]:
    """∂L/∂K ``[1, H, S, Dk]`` and ∂L/∂V ``[1, H, S, Dv]`` of each layer with plain keys and values, lazy, float32.

    L is the negative log-likelihood of ``ids[1:]``, summed, in nats; K is taken after RoPE. Raises MLX's RuntimeError
    or ValueError if a part of the model cannot be differentiated.
    """
    x = mx.array(list(ids))

    def loss(perturbations: list[tuple[mx.array, ...]]) -> mx.array:
        left = iter(perturbations)
        caches = probe.with_caches(model, lambda found: _Perturbed(found, next(left)))
        return of_targets(log_probabilities(model(x[None, :-1], cache=caches)[0]), x[1:]).sum()

    plain = [facts for facts in probe.probe(model) if facts.compressible]
    zeros = [tuple(mx.zeros((1, f.kv_heads, len(ids) - 1, dim)) for dim in f.dims.values()) for f in plain]
    return list(mx.grad(loss)(zeros))
