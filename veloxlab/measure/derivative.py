"""One run of a model and its derivative by keys and values, evaluated in small steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
from mlx.nn.layers.base import Module

from veloxlab import runtime
from veloxlab.cache.arithmetic import attend_exactly
from veloxlab.measure.activations import Recorder
from veloxlab.measure.exponentials import softmax, swiglu
from veloxlab.mlxlm import probe
from veloxlab.mlxlm.hooks import Mask, swiglu_by
from veloxlab.progress import ended_by, is_endable, may_end

_BLOCK = 128  # queries that attend together
_ROWS = 16  # positions whose logits are differentiated together

Pairs = Sequence[tuple[mx.array, ...]]
"""One item for each layer's keys and one for its values."""


class Steps:
    """Arrays of a part of a run, such as a layer, and of its derivative, in the order of their evaluation.

    MLX starts about 100 operations in advance on a CPU, counted over all threads: a thread that evaluates a whole layer
    at once leaves no room to a thread beside it.
    """

    def __init__(self) -> None:
        self.forwards: list[mx.array] = []
        self.backwards: list[mx.array] = []

    def back_through(self, x: mx.array) -> mx.array:
        """Return ``x``, whose gradient is then a step of the derivative."""

        @mx.custom_function
        def same(x: mx.array) -> mx.array:
            return x + 0

        @same.vjp
        def gradient(_: mx.array, cotangent: mx.array, __: mx.array) -> mx.array:
            self.backwards.append(cotangent)
            return cotangent

        return cast("mx.array", same(x))


@dataclass(frozen=True)
class Run:
    """Keys and values of each layer, and gradients by them, which are not evaluated yet.

    ``forwards`` has the steps of each layer and then of the logits, and ``backwards`` those of the logits' gradients,
    and then of each layer from the last to the first.
    """

    seen: Pairs
    gradients: Pairs
    forwards: list[list[mx.array]]
    backwards: list[list[mx.array]]


def evaluate(steps: list[mx.array]) -> None:
    """Evaluate the arrays one after another, and forget each; the work can end between two of them."""
    steps.reverse()
    while steps:
        mx.eval(steps.pop())
        may_end()


class _Perturbed(Recorder):
    """Adds a perturbation to keys and values where they enter the cache; the loss is differentiated by it."""

    def __init__(self, facts: probe.LayerFacts, perturbation: tuple[mx.array, ...]) -> None:
        super().__init__(facts)
        self._perturbation, self.steps = perturbation, Steps()

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        of_keys, of_values = self._perturbation
        perturbed = keys + of_keys.astype(keys.dtype), values + of_values.astype(values.dtype)
        self.steps.forwards += perturbed
        return super().update_and_fetch(*(self.steps.back_through(x) for x in perturbed))

    def attend(
        self, q: mx.array, scale: float, mask: Mask, sinks: mx.array | None = None, cap: float | None = None
    ) -> mx.array:
        """See `Handle.attend`; works in blocks of queries where MLX would compute all logits, also of later keys."""
        if not isinstance(mask, str) or runtime.backend() != "cpu":  # "causal" is the only text
            return super().attend(q, scale, mask, sinks, cap)
        before, total = self.stored_keys.shape[2] - q.shape[2], self.stored_keys.shape[2]
        parts, q = [], self.steps.back_through(q)
        for i in range(0, q.shape[2], _BLOCK):
            seen = min(before + i + _BLOCK, total)
            own = q[:, :, i : i + _BLOCK], self.stored_keys[:, :, :seen], self.mixed[:, :, :seen]
            parts.append(attend_exactly(*own, scale, mask, sinks, cap, softmax))
        self.steps.forwards += parts
        return self.steps.back_through(mx.concatenate(parts, axis=2))


def loss_gradients(model: Module, ids: Sequence[int]) -> Pairs:
    """Return ∂L/∂K ``[1, H, S, Dk]`` and ∂L/∂V ``[1, H, S, Dv]`` of layers with plain keys and values, lazy, float32.

    L is the negative log-likelihood of the next tokens, summed, in nats. K is taken after RoPE. Raises MLX's
    RuntimeError or ValueError if a part of the model cannot be differentiated.
    """
    wanted = mx.array(list(ids[1:]))[:, None]

    def total(logits: mx.array, _: Steps) -> mx.array:
        return (mx.logsumexp(logits, axis=-1, keepdims=True) - mx.take_along_axis(logits, wanted, axis=-1)).sum()

    run = _differentiated(model, ids[:-1], total)
    if is_endable():
        for steps in run.forwards + run.backwards:
            evaluate(steps)
    return run.gradients


def drawn_gradients(model: Module, ids: Sequence[int], key: mx.array) -> Run:
    """Return a run with the gradients of `signed_sum`, which have the form of `loss_gradients`."""
    return _differentiated(model, ids, lambda logits, steps: signed_sum(logits, key, steps))


def signed_sum(logits: mx.array, key: mx.array, steps: Steps) -> mx.array:
    """Return 0 as a function of ``logits`` ``[S, vocabulary]``; its gradients estimate the Fisher matrix.

    The gradient of a position is g = ±√p − p Σ ±√p, with random signs. So E[ggᵀ] = diag(p) − ppᵀ, the Fisher matrix of
    the next token's distribution, and different positions are uncorrelated. A label drawn from p has the same E[ggᵀ].
    But if the model is nearly sure of a token, the label is almost always that token, with a gradient near zero, and
    another one only once in 1 / (1 − p) draws: the mean of few draws has a large error.

    Few arrays of the logits' size are held: the signs are a step before the logits, and the gradients of a few
    positions are a step of the derivative.
    """
    signs = mx.random.bernoulli(0.5, logits.shape, key)
    steps.forwards.append(signs)

    @mx.custom_function
    def zero(_: mx.array) -> mx.array:
        return mx.zeros(())

    @zero.vjp
    def gradients(logits: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        parts = []
        for i in range(0, len(logits), _ROWS):
            p = softmax(logits[i : i + _ROWS])
            signed = (2.0 * signs[i : i + _ROWS] - 1) * mx.sqrt(p)
            parts.append(cotangent * (signed - p * signed.sum(axis=-1, keepdims=True)))
        steps.backwards += parts
        return mx.concatenate(parts)

    return cast("mx.array", zero(logits))


def _differentiated(model: Module, ids: Sequence[int], total: Callable[[mx.array, Steps], mx.array]) -> Run:
    """Return a run with the gradients of ``total``, which is a function of logits ``[S, vocabulary]``."""
    x, parts = mx.array([list(ids)]), [Steps()]  # of the logits, and of each layer from the last to the first

    def loss(perturbations: Pairs) -> tuple[mx.array, Pairs]:
        left = iter(perturbations)
        caches = probe.with_caches(model, lambda found: _Perturbed(found, next(left)))
        logits = model(x, cache=caches).squeeze(0).astype(mx.float32)  # an index would make its gradient a scatter
        value = total(logits, parts[0])
        parts[0].forwards.append(logits)
        layers = [own for own in probe.probes_of(caches) if isinstance(own, _Perturbed)]
        parts.extend(own.steps for own in layers[::-1])
        return value, [(own.stored_keys, own.stored_values) for own in layers]

    plain = [facts for facts in probe.probe(model) if facts.compressible]
    zeros = [tuple(mx.zeros((1, f.kv_heads, len(ids), dim)) for dim in f.dims.values()) for f in plain]
    try:
        with ended_by(None), swiglu_by(swiglu):  # MLX evaluates nothing within a transformation
            (_, seen), gradients = mx.value_and_grad(loss)(zeros)
        last = [(), *gradients[::-1]]
        backwards = [[*own.backwards, *pair] for own, pair in zip(parts, last, strict=True)]
        return Run(seen, gradients, [own.forwards[:] for own in parts[::-1]], backwards)
    finally:  # the arrays keep the functions of `back_through`, and these the lists: a cycle that Python cannot see
        for own in parts:
            own.forwards.clear()
            own.backwards.clear()
