"""MLX operations in place of Metal kernels for two families of mlx-lm, so that their caches are checked anywhere.

Attention and caches are mlx-lm's own. All numbers are in float32, where muse_spark rounds to bfloat16, so that rounding
hides no error. For a third family, an empty package replaces one that it does not use.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx

FAMILIES = "bitnet", "muse_spark"


def needed(family: str) -> bool:
    """Return whether a family needs these replacements to run on this machine."""
    return family in FAMILIES and not mx.metal.is_available()


def put_in(family: str) -> None:
    """Replace the parts of the family's module that do not run on this machine."""
    if family == "olmo":  # it only checks that this package exists
        sys.modules.setdefault("hf_olmo", ModuleType("hf_olmo"))
    if not needed(family):
        return
    module: Any = import_module(f"mlx_lm.models.{family}")
    if family == "bitnet":
        layers: Any = import_module("mlx_lm.models.bitlinear_layers")
        layers._bitlinear_kernel = _ternary_product
    else:
        module.mx = SimpleNamespace(**vars(mx) | {"bfloat16": mx.float32})
        for function in MUSE_SPARK:
            setattr(module, function.__name__, function)


def _ternary_product(
    inputs: list[mx.array], template: list[tuple[str, Any]], output_dtypes: list[mx.Dtype], **_: object
) -> list[mx.array]:
    """Return ``x`` times weights of which a byte holds four, one from each quarter of the rows."""
    x, packed, scale = inputs
    weights = mx.concatenate([((packed >> shift) & 3).astype(mx.float32) - 1 for shift in (0, 2, 4, 6)])
    product = x @ weights.T
    scaled = product / scale if dict(template)["invert_weight_scales"] else product * scale
    return [scaled.astype(output_dtypes[0])]


# for muse_spark, by its own names -------------------------------------------------------------------


def pre_norm(stream: mx.array, norm: Any, *, dtype: mx.Dtype) -> mx.array:
    return mx.fast.rms_norm(stream, norm.weight, norm.eps)


def norm_add_norm(
    branch: mx.array,
    stream: mx.array,
    *,
    alpha: mx.array,
    beta: mx.array,
    post_weight: mx.array | None,
    post_eps: float,
    next_norm: Any,
) -> tuple[mx.array, mx.array | None]:
    normed = mx.fast.rms_norm(branch if post_weight is None else branch * post_weight, None, post_eps)
    added = alpha * stream + beta * normed
    return added, None if next_norm is None else mx.fast.rms_norm(added, next_norm.weight, next_norm.eps)


def qk_norm(
    qkvg: mx.array, *, n_heads: int, n_kv_heads: int, head_dim: int, eps: float, query_scale: float
) -> tuple[mx.array, mx.array]:
    heads = mx.unflatten(qkvg, -1, (-1, head_dim))[..., : n_heads + n_kv_heads, :]
    normed = mx.fast.rms_norm(heads, None, eps)
    return normed[..., :n_heads, :] * query_scale, normed[..., n_heads:, :]


def qk_norm_rope(qkvg: mx.array, *, rope_base: float, offset: int | mx.array, **sizes: Any) -> tuple[mx.array, ...]:
    def turned(x: mx.array) -> mx.array:
        heads = x.swapaxes(1, 2)
        found = mx.fast.rope(heads, x.shape[-1], traditional=True, base=rope_base, scale=1.0, offset=offset)
        return found.swapaxes(1, 2)

    return tuple(map(turned, qk_norm(qkvg, **sizes)))


def rms_norm_sigmoid_gate(x: mx.array, gate: mx.array, *, eps: float) -> mx.array:
    return mx.flatten(mx.fast.rms_norm(x, None, eps).swapaxes(1, 2), -2) * mx.sigmoid(gate)


def expert_routing(
    logits: mx.array, expert_bias: mx.array, *, top_k: int, multiplier: float, score_eps: float, route_scale: float
) -> tuple[mx.array, mx.array]:
    scores = mx.sigmoid(logits * multiplier)
    chosen = mx.argsort(-(scores + expert_bias), axis=-1)[..., :top_k]
    weights = mx.take_along_axis(scores, chosen, axis=-1)
    return chosen, weights / (weights.sum(axis=-1, keepdims=True) + score_eps) * route_scale


def post_expert_norm_combine(experts: mx.array, weights: mx.array, *, norm_weight: mx.array, eps: float) -> mx.array:
    return (mx.fast.rms_norm(experts * norm_weight, None, eps) * weights[..., None]).sum(axis=-2)


MUSE_SPARK = (
    *(pre_norm, norm_add_norm, qk_norm, qk_norm_rope),
    *(rms_norm_sigmoid_gate, expert_routing, post_expert_norm_combine),
)
