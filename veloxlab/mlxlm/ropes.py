"""Which rotary embedding the keys of each cache went through, found out from the keys themselves.

That a layer owns one does not say that it uses it, nor how. So the model runs on single tokens at two positions: they
attend to themselves alone, and their keys differ by the rotation that they went through, if they did.
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

TOKENS = 8  # different ones, each alone: the embedding of one may be zero
POSITION = 100  # of the second run: far enough that most pairs have turned
FREQUENCIES = "_freqs", "_rope_freqs"  # what rotary embeddings, and attention that turns keys by itself, call them
SHARE = 0.05  # of the way that keys move, by which they may miss: bfloat16 rounds to 0.4 %, several times


def ropes_of(model: Module, ids: Sequence[int]) -> list[Rope | None]:
    """The rotary embedding of the keys of each cache that can be compressed, in their order, or None.

    None where keys do not turn, or no rotary embedding of a known kind turns them so: `mlx.nn.RoPE`, or one with fixed
    frequencies, which do not change with the length of the text. ``ids`` are some tokens that the model knows.
    """
    known = _known(model)
    some = mx.array(list(dict.fromkeys(ids))[:TOKENS])[:, None]
    keys = []
    for position in (0, POSITION):
        caches = with_caches(model, partial(Probe, offset=position))
        model(some, cache=caches)
        keys.append([probe.stored_keys for probe in probes_of(caches)])
    return [_between(before, after, known) for before, after in zip(*keys, strict=True)]


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
    """The one that turns keys at position 0 into those at `POSITION`, or None."""

    def miss(x: mx.array) -> float:
        return float(np.asarray(mx.linalg.norm(after.astype(mx.float32) - x.astype(mx.float32))))

    misses = [miss(rope.forward(before, POSITION)) if rope.dims <= before.shape[-1] else math.inf for rope in known]
    return known[int(np.argmin(misses))] if min(misses, default=math.inf) < SHARE * miss(before) else None
