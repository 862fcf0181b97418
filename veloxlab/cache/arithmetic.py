"""Arithmetic of attention over arrays: masks, caps of logits, and other operations that MLX's kernels lack."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

from veloxlab.kernels.expand import LARGEST_HALF
from veloxlab.mlxlm.hooks import Mask


def attend_exactly(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: Mask,
    sinks: mx.array | None = None,
    cap: float | None = None,
    softmax: Callable[[mx.array], mx.array] | None = None,
) -> mx.array:
    """`Handle.attend` over arrays ``[B, H, S, D]``, by MLX's fused attention without a ``cap`` and another softmax."""
    if cap is None and softmax is None:
        logits = None if sinks is None else sinks.astype(q.dtype)
        attend = mx.fast.scaled_dot_product_attention
        return attend(q, keys, values, scale=scale, mask=mask, sinks=logits)
    heads, shape = keys.shape[1], (*q.shape[:3], keys.shape[2])
    grouped = (q.astype(mx.float32) * scale).reshape(q.shape[0], heads, -1, q.shape[-1])
    scores = capped(grouped @ keys.astype(mx.float32).swapaxes(-1, -2), cap).reshape(shape)
    added = as_added(mask, q, keys.shape[2])
    weights = weights_of(scores, added, sinks, softmax or _precise)[..., : keys.shape[2]]
    mixed = weights.reshape(q.shape[0], heads, -1, keys.shape[2]) @ values.astype(mx.float32)
    return narrowed(mixed.reshape(*q.shape[:3], -1), q.dtype)


def capped(scores: mx.array, cap: float | None) -> mx.array:
    """Scores that a cap bends: see `Handle.attend`."""
    return scores if cap is None else mx.tanh(scores / cap) * cap


def _precise(x: mx.array) -> mx.array:
    return mx.softmax(x, axis=-1, precise=True)


def weights_of(
    scores: mx.array,
    added: mx.array | None,
    sinks: mx.array | None,
    softmax: Callable[[mx.array], mx.array] = _precise,
) -> mx.array:
    """Softmax of scores ``[B, Hq, L, S]`` and of the sinks' logits, which come after the tokens."""
    if added is not None:
        scores = scores + added
    if sinks is not None:
        beside = mx.broadcast_to(sinks.astype(mx.float32)[None, :, None, None], (*scores.shape[:3], 1))
        scores = mx.concatenate([scores, beside], axis=-1)
    return softmax(scores)


def narrowed(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """The result in ``dtype``; finite numbers stay finite."""
    if x.dtype == mx.float32 and dtype == mx.float16:
        x = mx.where(mx.isinf(x), x, mx.clip(x, -LARGEST_HALF, LARGEST_HALF))
    return x.astype(dtype)


def as_added(mask: Mask, q: mx.array, tokens: int) -> mx.array | None:
    """The mask as float32 numbers to add to scores ``[B, Hq, L, S]``, or None."""
    if mask is None or (isinstance(mask, str) and q.shape[2] == 1):
        return None
    some: mx.array = create_causal_mask(q.shape[2], tokens - q.shape[2]) if isinstance(mask, str) else mask
    if some.dtype == mx.bool_:
        some = mx.where(some, 0.0, mx.finfo(mx.float32).min)
    return mx.broadcast_to(some.astype(mx.float32), (*q.shape[:3], tokens))
