"""How long a cache takes to store tokens and to attend to them: to be read as ratios of one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import scaled_dot_product_attention

from veloxlab.measure.activations import LayerCapture

REPEATS = 5


def cache_speed(layer: LayerCapture, make: Callable[[], Any]) -> tuple[float, float]:
    """Seconds to store a layer's captured keys and values, and seconds for one query to attend to them all.

    ``make`` gives an empty cache for the layer, ours or any of mlx-lm's. Medians of `REPEATS`, after two first tries.
    """
    keys, values = layer.keys, layer.values
    heads = keys.shape[1] if layer.queries is None else layer.queries.shape[1]
    query = mx.random.normal((1, heads, 1, keys.shape[-1]), dtype=keys.dtype, key=mx.random.key(0))
    cache = make()
    read_keys, read_values = cache.update_and_fetch(keys, values)
    mx.eval(cache.state, query)

    def store() -> object:
        fresh = make()
        fresh.update_and_fetch(keys, values)
        return fresh.state

    def attend() -> object:
        own = mx.array(query)  # mlx-lm's quantized attention scales the one that it is given in its place
        return scaled_dot_product_attention(
            own, read_keys, read_values, cache=cache, scale=keys.shape[-1] ** -0.5, mask=None
        )

    return median_seconds(store), median_seconds(attend)


def median_seconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median time of evaluating what ``work`` gives, on a device that has nothing else to do, after two first tries."""
    for _ in range(2):
        mx.eval(work())
    seconds = []
    for _ in range(repeats):
        mx.synchronize()
        start = time.perf_counter()
        mx.eval(work())
        mx.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
