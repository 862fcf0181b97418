"""Keys and values of a model with the gradients of its loss, window by window, for codes in the loss's own metric."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import mlx.core as mx
from mlx.nn.layers.base import Module

from veloxlab.codecs import TENSORS, Tensor
from veloxlab.codecs.base import Sample
from veloxlab.measure.activations import LayerCapture, Recorder
from veloxlab.measure.quality import loss_gradients
from veloxlab.mlxlm import probe
from veloxlab.mlxlm.ropes import ropes_of
from veloxlab.progress import Progress

WINDOW = 512  # tokens of a stretch of text
_HELD = mx.bfloat16  # what all windows are held in: sizes vary much, and eight bits say enough of a mean


def with_gradients(
    model: Module, windows: Sequence[Sequence[int]], sinks: int, seed: int, progress: Progress
) -> Iterator[tuple[int, Tensor, Sample]]:
    """Give each layer's keys, then its values, behind the sinks, with gradients of the loss of labels that it draws.

    The Fisher matrix is of what the model says, not of the text: after every token a label is drawn from its own
    predictions. Of all windows keys, values and gradients are held, as much as the model's own cache of two texts of
    that length. A model that cannot be differentiated gives queries in their place, with a warning.
    """
    facts = [found for found in probe.probe(model) if found.compressible]
    ropes, steps = ropes_of(model, windows[0]), len(windows) + len(facts)
    held: list[list[list[mx.array | None]]] = [[] for _ in facts]  # by layer and window: keys, values, gradients
    differentiable = True
    for w, ids in enumerate(windows):
        progress(w, steps, f"gradients of window {w + 1} of {len(windows)}")
        caches = probe.with_caches(model, Recorder)
        logits = model(mx.array([list(ids)]), cache=caches)[0].astype(mx.float32)
        labels = mx.random.categorical(logits, key=mx.random.key(seed + w))
        recorders = probe.probes_of(caches)
        mx.eval(labels, [[r.keys, r.values, r.queries] for r in recorders if isinstance(r, Recorder)])
        del logits, caches
        gradients = _gradients(model, ids, labels) if differentiable else None
        differentiable = gradients is not None
        for i, recorder in enumerate(recorders):
            assert isinstance(recorder, Recorder)
            seen = LayerCapture(recorder.facts.layer, recorder.queries, recorder.keys, recorder.values, None)
            seen.check_finite("to which nothing can be fitted", "queries", *TENSORS)
            own = gradients[i] if gradients else (None, None)
            kept = recorder.keys, recorder.values, *own, None if gradients else recorder.queries
            held[i].append([None if x is None else x.astype(_HELD) for x in kept])
            mx.eval([x for x in held[i][-1] if x is not None])
    for i, (found, rope) in enumerate(zip(facts, ropes, strict=True)):
        progress(len(windows) + i, steps, f"fitting layer {found.layer}")
        *both, of_keys, of_values, queries = (_joined(part, sinks) for part in zip(*held[i], strict=True))
        held[i] = []
        for tensor, x, gradient in zip(TENSORS, both, (of_keys, of_values), strict=True):
            assert x is not None
            yield found.layer, tensor, Sample(x, queries, rope, seed, sinks, gradient if differentiable else None)
    progress(steps, steps, "done")


def _gradients(model: Module, ids: Sequence[int], labels: mx.array) -> list[tuple[mx.array, ...]] | None:
    try:
        found = [tuple(g.astype(_HELD) for g in pair) for pair in loss_gradients(model, ids, labels)]
        mx.eval(found)
        if all(mx.isfinite(g).all().item() and g.any().item() for pair in found for g in pair):
            return found
        why = "some gradients are zero or not finite"
    except (RuntimeError, ValueError) as error:
        why = str(error)
    warnings.warn(
        f"The loss of this model ({type(model).__module__}) gives no gradients of all keys and values ({why}). Its "
        "queries stand in for them: which layers and heads matter more is not known, and all count the same.",
        stacklevel=4,
    )
    return None


def _joined(parts: Sequence[mx.array | None], sinks: int) -> mx.array | None:
    """Windows as a batch ``[W, H, S, D]`` of float32, evaluated."""
    given = [part[:, :, sinks:] for part in parts if part is not None]
    if len(given) < len(parts):
        return None
    joined = mx.concatenate(given).astype(mx.float32)
    mx.eval(joined)
    return joined
