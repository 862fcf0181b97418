"""Replacements for families of mlx-lm that compute attention by themselves; they ask a `Handle` to attend.

The original runs if keys are no handle, or if the cache gives none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.models import base

from veloxlab.mlxlm.hooks import Handle, InPlace, Mask, stands_in_for

Original = Callable[..., mx.array]
Loose = Any  # mlx-lm's layers and caches have no common base; keys are arrays or a handle


def hands_out_handles(cache: object) -> bool:
    """Whether attention reads a cache by a handle: caches on the codes path state this with ``bits`` of 0."""
    return getattr(cache, "bits", None) == 0


def stands_in(cache: object) -> bool:
    """Whether a cache replaces a model's own, on any path."""
    return isinstance(cache, InPlace)


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
    """Query head j reads KV head j modulo their number; other families read them in groups."""
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


@stands_in_for("plamo2.Attention.__call__")
def _plamo2(
    original: Original, layer: Loose, hidden_states: mx.array, mask: Mask = None, cache: Loose = None
) -> mx.array:
    """The original calls MLX's attention directly, not mlx-lm's."""
    if not hands_out_handles(cache):
        return original(layer, hidden_states, mask, cache)
    ends = [layer.q_proj_dim, layer.q_proj_dim + layer.k_proj_dim]
    heads = layer.q_num_heads, layer.k_num_heads, layer.v_num_heads
    queries, keys, values = map(_split, mx.split(layer.qkv_proj(hidden_states), ends, axis=-1), heads)
    both = (queries, layer.q_weight), (keys, layer.k_weight)
    queries, keys = (mx.fast.rms_norm(y, weight=None, eps=1e-6) * weight[:, None] for y, weight in both)
    queries, keys = (layer.rope(y, offset=cache.offset) for y in (queries, keys))
    handle, _ = cache.update_and_fetch(keys, values)
    out: mx.array = layer.o_proj(_joined(handle.attend(queries, layer.scale, mask)))
    return out


@stands_in_for("phi3small.Attention._block_sparse_attention")
def _phi3small(
    original: Original, layer: Loose, queries: mx.array, keys: Loose, values: Loose, scale: float, mask: Loose
) -> mx.array:
    """The original adds its own mask to the logits unchanged: ones and zeros if it is boolean."""
    if not isinstance(keys, Handle):
        return original(layer, queries, keys, values, scale, mask)
    count, tokens = queries.shape[2], keys.shape[2]
    seen = layer._block_sparse_mask(count, tokens)[1].reshape(1, layer.n_heads, count, tokens)
    added = mx.where(seen, 0.0, mx.finfo(mx.float32).min)
    return keys.attend(queries, scale, added if mask is None else added + mask)


@stands_in_for("deepseek_v32.DeepseekV32Attention.__call__")
def _deepseek_v32(
    original: Original, layer: Loose, x: mx.array, mask: mx.array | None = None, cache: Loose = None
) -> mx.array:
    """The indexer's choice of tokens becomes a mask, also for one token, where the original picks latents."""
    if cache is None or not stands_in(cache[0]):
        return original(layer, x, mask, cache)
    own, indexed = cache[0], cache[1]
    residual = layer.q_a_layernorm(layer.q_a_proj(x))
    queries, turned = mx.split(_split(layer.q_b_proj(residual), layer.num_heads), [layer.qk_nope_head_dim], axis=-1)
    latents, rotary = mx.split(layer.kv_a_proj_with_mqa(x), [layer.kv_lora_rank], axis=-1)
    turned, rotary = (layer.rope(y, own.offset) for y in (turned, _split(rotary, 1)))
    latents, rotary = own.update_and_fetch(layer.kv_a_layernorm(latents)[:, None], rotary)
    chosen = layer.indexer(x, residual, mask, cache=indexed)
    scores = (turned * layer.scale) @ rotary.swapaxes(-1, -2)
    if chosen is not None:
        none = mx.zeros((*chosen.shape[:-1], scores.shape[-1]), mx.bool_)
        seen = mx.put_along_axis(none, mx.stop_gradient(chosen), mx.array(True), axis=-1)
        mask = seen if mask is None else seen & mask
    if mask is not None:
        scores = mx.where(mask, scores, mx.array(mx.finfo(scores.dtype).min, scores.dtype))
    if one := x.shape[1] == 1:
        queries, keys, values = layer.embed_q(queries), latents, latents
    else:
        keys, values = layer.embed_q(latents, transpose=False), layer.unembed_out(latents)
    found = base.scaled_dot_product_attention(queries, keys, values, cache=None, scale=layer.scale, mask=scores)
    out: mx.array = layer.o_proj(_joined(layer.unembed_out(found) if one else found))
    return _computed_with(out, indexed)


@stands_in_for("minimax_m3_vl.Attention.__call__")
def _minimax_m3(original: Original, layer: Loose, x: mx.array, mask: Loose = None, cache: Loose = None) -> mx.array:
    """The original makes the stored keys depend on its indexer's; here the output depends on them."""
    if cache is None or not stands_in(cache[0]):
        return original(layer, x, mask, cache)
    own, offset = cache[0], cache[0].offset
    heads = layer.num_attention_heads, layer.num_key_value_heads, layer.num_key_value_heads
    queries, keys, values = map(_split, (layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)), heads)
    if layer.use_qk_norm:
        queries, keys = layer.q_norm(queries), layer.k_norm(keys)
    queries, keys = (layer.rope(y, offset=offset) for y in (queries, keys))
    if layer.is_sparse_attn:
        mask = layer._block_mask(x, mask, offset, cache[1])
    keys, values = own.update_and_fetch(keys, values)
    found = base.scaled_dot_product_attention(queries, keys, values, cache=None, scale=layer.scale, mask=mask)
    out: mx.array = layer.o_proj(_joined(found))
    return _computed_with(out, cache[1]) if layer.is_sparse_attn else out


def _computed_with(out: mx.array, indexed: Loose) -> mx.array:
    """Compute the indexer's stored arrays together with ``out``; if unused, their graph would grow with each token."""
    computed: mx.array = mx.depends([out], [indexed.keys, indexed.values])[0]
    return computed


def _split(x: mx.array, heads: int) -> mx.array:
    """Reshape ``[B, L, H · D]`` to ``[B, H, L, D]``."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def _joined(x: mx.array) -> mx.array:
    """Reshape ``[B, H, L, D]`` to ``[B, L, H · D]``."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def _turned(x: mx.array, rows: int) -> mx.array:
    """Reorder heads ``[rows · columns]`` by columns."""
    batch, heads, *rest = x.shape
    return x.reshape(batch, rows, heads // rows, *rest).swapaxes(1, 2).reshape(batch, heads, *rest)
