"""Find the rotary embedding of each cache's keys, from the keys themselves.

A layer may own a rotary embedding without use of it. So the model runs on single tokens at two positions. Each token
attends only to itself, so its keys differ only by the rotation between the positions, if there is one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.nn.layers.base import Module

from veloxlab.codecs.parts.rope import Rope
from veloxlab.mlxlm.probe import Probe, probes_of, with_caches

TOKENS = 8  # different tokens, one at a time: the embedding of one may be zero
POSITION = 100  # of the second run: there, most pairs have rotated
FREQUENCIES = "_freqs", "_rope_freqs"  # attributes of rotary embeddings, and of attention that rotates keys itself
SHARE = 0.05  # greatest error as a share of the keys' movement: bfloat16 rounds to 0.4 %, several times


def ropes_of(model: Module, ids: Sequence[int]) -> list[Rope | None]:
    """Return the rotary embedding of each compressible cache's keys, or None, in the order of the caches.

    None if keys do not rotate, or not by an embedding of a known kind: `mlx.nn.RoPE`, or one with fixed frequencies,
    which do not change with the length of the text. ``ids``: some valid token ids.
    """
    known = _known(model)
    some = mx.array(list(dict.fromkeys(ids))[:TOKENS])[:, None]
    keys = []
    for position in (0, POSITION):
        caches = with_caches(model, partial(Probe, offset=position))
        model(some, cache=caches)
        keys.append([probe.stored_keys for probe in probes_of(caches)])
    return [_between(before, after, known) for before, after in zip(*keys, strict=True)]


def has_rope(model: Module) -> bool:
    """Return whether a part of the model is a rotary embedding, of any kind; reads no weights."""
    named = any("rope" in name.lower() or "rotary" in name.lower() for name, _ in model.named_modules())
    return named or bool(_known(model))


def _known(model: Module) -> list[Rope]:
    found: dict[tuple[object, ...], Rope] = {}
    for _, module in model.named_modules():
        freqs = next((held for name in FREQUENCIES if (held := getattr(module, name, None)) is not None), None)
        if type(module) is nn.RoPE:
            rope = Rope(module.dims, module.traditional, module.base, scale=module.scale)
        elif isinstance(freqs, mx.array) and freqs.ndim == 1:
            rope = Rope(2 * freqs.size, getattr(module, "traditional", False), None, freqs)
        else:
            continue
        found.setdefault((rope.dims, rope.traditional, rope.base, rope.scale, tuple(rope.angles)), rope)
    return list(found.values())


def _between(before: mx.array, after: mx.array, known: Sequence[Rope]) -> Rope | None:
    """Return the embedding that rotates keys at position 0 to those at `POSITION`, or None."""

    def miss(x: mx.array) -> float:
        return float(np.asarray(mx.linalg.norm(after.astype(mx.float32) - x.astype(mx.float32))))

    misses = [miss(rope.forward(before, POSITION)) if rope.dims <= before.shape[-1] else math.inf for rope in known]
    return known[int(np.argmin(misses))] if min(misses, default=math.inf) < SHARE * miss(before) else None
