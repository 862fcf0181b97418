"""Attention that a family of mlx-lm computes by itself: the same, asked of a `Handle`.

The original runs where keys are no handle, or the cache hands out none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from veloxlab.mlxlm.hooks import Handle, Mask, stands_in_for

Original = Callable[..., mx.array]
Loose = Any  # mlx-lm's layers and caches share no base, and keys are arrays or a handle


def hands_out_handles(cache: object) -> bool:
    """Whether a cache says by ``bits`` of 0, as ours on the codes path do, that attention reads it by a handle."""
    return getattr(cache, "bits", None) == 0


@stands_in_for("gear._softcap_attention")
def _gear(
    original: Original, queries: mx.array, keys: Loose, values: Loose, scale: float, softcap: float, mask: Mask
) -> mx.array:
    if not isinstance(keys, Handle):
        return original(queries, keys, values, scale, softcap, mask)
    return keys.attend(queries, scale, mask, cap=softcap)


@stands_in_for("gemma2.Attention.__call__")
def _gemma2(original: Original, layer: Loose, x: mx.array, mask: Mask = None, cache: Loose = None) -> mx.array:
    if not hands_out_handles(cache):
        return original(layer, x, mask, cache)
    heads = layer.n_heads, layer.n_kv_heads, layer.n_kv_heads
    queries, keys, values = map(_split, (layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)), heads)
    queries, keys = (layer.rope(y, offset=cache.offset) for y in (queries, keys))
    handle, _ = cache.update_and_fetch(keys, values)
    out: mx.array = layer.o_proj(_joined(handle.attend(queries, layer.scale, mask, cap=layer.attn_logit_softcapping)))
    return out


@stands_in_for("plamo.Attention.__call__")
def _plamo(
    original: Original, layer: Loose, hidden_states: mx.array, attention_mask: Mask = None, cache: Loose = None
) -> mx.array:
    """Query head j reads KV head j modulo their number, where others read them in groups."""
    if not hands_out_handles(cache):
        return original(layer, hidden_states, attention_mask, cache)
    heads = layer.q_num_heads, layer.k_num_heads, layer.v_num_heads
    projections = layer.q_proj, layer.k_proj, layer.v_proj
    queries, keys, values = map(_split, (project(hidden_states) for project in projections), heads)
    queries, keys = (layer.rotary_emb(y, offset=cache.offset) for y in (queries, keys))
    handle, _ = cache.update_and_fetch(keys, values)
    found = handle.attend(_turned(queries, heads[0] // heads[1]), layer.scale, attention_mask)
    out: mx.array = layer.o_proj(_joined(_turned(found, heads[1])))
    return out


def _split(x: mx.array, heads: int) -> mx.array:
    """``[B, L, H · D]`` as ``[B, H, L, D]``."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def _joined(x: mx.array) -> mx.array:
    """``[B, H, L, D]`` as ``[B, L, H · D]``."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def _turned(x: mx.array, rows: int) -> mx.array:
    """Heads ``[rows · columns]`` in the order of their columns."""
    batch, heads, *rest = x.shape
    return x.reshape(batch, rows, heads // rows, *rest).swapaxes(1, 2).reshape(batch, heads, *rest)
