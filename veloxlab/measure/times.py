"""Times of each layer of a cache and of the exact one: to store tokens, to decode them, and to attend to them."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import polars as pl
from mlx.nn.layers.base import Module

from veloxlab.cache.layer import CompressedKVCache
from veloxlab.cache.plan import Plan
from veloxlab.checks import CACHE_MAKER, CALIBRATIONS, checked
from veloxlab.errors import InputError
from veloxlab.measure.activations import Capture, LayerCapture
from veloxlab.measure.bench.timing import median_seconds
from veloxlab.measure.compare import REPEATS, CacheSeconds, cache_seconds
from veloxlab.measure.frames import schema
from veloxlab.measure.generation import SIDES
from veloxlab.measure.memory import report
from veloxlab.measure.quality import CacheMaker, maker
from veloxlab.mlxlm.probe import own_cache, probe, slot_of
from veloxlab.progress import Progress, silent

LAYER_TIMES = schema("layer part side microseconds tokens held_bytes fp16_bytes")
"""Columns of `layer_times`: "store", "decode" or "attend"; "exact" or "compressed"; the median in µs, for each token of
the first two, and for one query over all tokens of the last; tokens in the layer; its bytes, and
those of exact keys and values in 16 bits."""


@checked(method_or_plan=CACHE_MAKER, calibration=CALIBRATIONS)
def layer_times(
    model: Module,
    capture: Capture,
    method_or_plan: str | Plan | CacheMaker = "turboquant",
    *,
    progress: Progress = silent,
    **settings: Any,
) -> pl.DataFrame:
    """Time every layer of a compressed cache, and of the exact one, on captured keys and values: `LAYER_TIMES`.

    All tokens come in one call. An exact cache does not decode. Other work on this device makes times longer: compare
    only rows of one frame. Raises `InputError`: as `veloxlab.make_cache`; for a capture of another model.

    Parameters
    ----------
    method_or_plan : a method's id or a `veloxlab.Plan`, or any function from the model to a prompt cache; ``settings``
        are further arguments of `veloxlab.make_cache`.
    """
    facts = {found.layer: found for found in probe(model) if found.compressible}
    if not {layer.layer for layer in capture.layers} <= {*facts}:
        raise InputError("The capture is of another model: capture this one with vl.capture.")
    caches = {"exact": own_cache(model), "compressed": maker(method_or_plan, settings)(model)}
    rows: list[tuple[object, ...]] = []
    for done, layer in enumerate(capture.layers):
        progress(done, len(capture.layers), f"timing layer {layer.layer}")
        empty = [slot_of(caches[side], facts[layer.layer]) for side in SIDES]
        found = cache_seconds(layer, *(partial(copy.deepcopy, each) for each in empty))
        for side, seconds, each in zip(SIDES, found, empty, strict=True):
            rows += _rows(layer, side, seconds, each)
    progress(len(capture.layers), len(capture.layers), "done")
    return pl.DataFrame(rows, schema=LAYER_TIMES, orient="row")


def _rows(layer: LayerCapture, side: str, seconds: CacheSeconds, empty: Any) -> list[tuple[object, ...]]:  # noqa: ANN401
    filled, tokens = copy.deepcopy(empty), layer.keys.shape[2]
    filled.update_and_fetch(layer.keys, layer.values)
    found = {"store": seconds.store / tokens, "attend": seconds.attend}
    if isinstance(filled, CompressedKVCache):
        found["decode"] = median_seconds(filled.decoded, REPEATS) / tokens
    held = report([filled]).row(0, named=True)
    sizes = held["tokens"], held["held_bytes"], held["fp16_bytes"]
    return [(layer.layer, part, side, 1e6 * each, *sizes) for part, each in found.items()]
