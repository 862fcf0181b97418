"""mlx-lm's quantized cache, for comparison with compressed caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx.nn.layers.base import Module
from mlx_lm.models.cache import QuantizedKVCache

from veloxlab.errors import InputError
from veloxlab.mlxlm.probe import LayerFacts, probe, with_caches

GROUP = 64  # values that share a scale, by default


def why_not_quantized(layers: Sequence[LayerFacts], bits: int) -> str | None:
    """Return why mlx-lm's quantized cache cannot hold the keys and values of these layers; None if it can."""
    for found in layers:
        if found.kv_heads and (not found.compressible or found.path == "latents"):
            return f"in layer {found.layer} {found.reason}"
        if found.max_size is not None:
            return f"layer {found.layer} slides"
        for tensor, dim in found.dims.items():
            if dim % GROUP:
                why = f"no multiple of its groups of {GROUP}"
                return f"{tensor} of layer {found.layer} have head dimension {dim}, {why}"
            if dim * bits // 32 != dim // (32 // bits):
                return f"its buffers have no room for {tensor} of head dimension {dim}"
    return None


def quantized_cache(model: Module, bits: int) -> list[Any]:
    """Return mlx-lm's quantized caches for a model's layers with keys and values; `InputError` if they do not fit."""
    if reason := why_not_quantized(probe(model), bits):
        raise InputError(f"mlx-lm has no {bits}-bit cache for this model: {reason}.")
    return with_caches(model, lambda _: QuantizedKVCache(group_size=GROUP, bits=bits))
