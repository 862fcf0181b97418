"""Python's share of a decode step on a GPU: the graph of a layer's step is built, and not computed.

It needs no GPU. Kernels are built as for CUDA, except for MLX's launch: their outputs are zeros.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import mean, median
from typing import Any

import mlx.core as mx
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache

from veloxlab import runtime
from veloxlab.cache.counts import BLOCK
from veloxlab.cache.layer import CompressedKVCache
from veloxlab.kernels import devices
from veloxlab.kernels.text import Built, Source
from veloxlab.measure.bench import cpu
from veloxlab.measure.bench.cpu import EXACT, codecs, titled
from veloxlab.measure.bench.timing import Row, Tell, spread
from veloxlab.mlxlm.hooks import attach

PAST = 1024  # tokens before the first timed one, of the longest sequence
SEQUENCES = 1, 8, 32
UNLIKE = 13  # difference of their lengths in tokens, so that their blocks leave the windows at different steps
BLOCKS = 5  # blocks that are encoded while steps are timed
LAYERS = 4  # layers of a step; they share the work that is done once a token


def host(progress: Tell = print) -> list[Row]:
    """Time Python's work for a layer and step, with the exact cache and with every method.

    One sequence is alone. More are a batch, and no two have the same number of tokens.

    Rows: ``cache, sequences, microseconds`` (the median of all steps), ``beyond_exact`` (minus that of the exact
    cache), ``mean_microseconds`` (of all steps: one in `BLOCK` encodes a block), ``most_microseconds, spread, ratio``
    (to the exact cache's).
    """
    made: dict[str, Callable[..., Any]] = {EXACT: lambda **_: KVCache()}
    made |= {titled(name): partial(CompressedKVCache, *two) for name, two in codecs(progress).items()}
    attach()
    rows: list[Row] = []
    with _kernels_without_a_gpu():
        for sequences in SEQUENCES:
            of_exact = 0.0
            for name, cache in made.items():
                spent = _steps(cache, sequences)
                row: Row = {"cache": name, "sequences": sequences, "microseconds": median(spent)}
                row |= {"mean_microseconds": mean(spent), "most_microseconds": max(spent)}
                of_exact = of_exact or row["microseconds"]
                row |= {"spread": spread(spent), "ratio": row["microseconds"] / of_exact}
                rows.append(row | {"beyond_exact": row["microseconds"] - of_exact})
                progress(f"Python of a layer and step: {name}, {sequences} sequences, {row['microseconds']:.3g} µs")
    return rows


def _steps(make: Callable[..., Any], sequences: int) -> list[float]:
    """Return microseconds of each step and layer; arrays that a step leaves are computed before the next step.

    In a batch, each layer requests the places of its tokens, for queries and for keys; the mask is made once.
    """
    shape = cpu.SHAPE
    forms = (1, shape.kv_heads, PAST), (sequences, shape.kv_heads, 1), (sequences, shape.query_heads, 1)
    past, new, q = (mx.random.normal((*form, shape.head_dim)) for form in forms)
    caches = [_filled(make, layer, past, sequences) for layer in range(LAYERS)]
    spent = []
    for _ in range(BLOCKS * BLOCK):
        mx.eval(
            [cache.buffers if hasattr(cache, "buffers") else [cache.keys, cache.values] for cache in caches], new, q
        )
        for cache in caches:
            if hasattr(cache, "settle"):
                cache.settle()  # the check of stored tokens, which nothing else computes here
        mask = caches[0].make_mask(1) if sequences > 1 else None
        start = time.perf_counter()
        for cache in caches:
            _ = cache.offset, cache.offset
            keys, values = cache.update_and_fetch(new, new)
            base.scaled_dot_product_attention(q, keys, values, cache=cache, scale=shape.head_dim**-0.5, mask=mask)
        spent.append(1e6 * (time.perf_counter() - start) / len(caches))
    return spent[BLOCK:]


def _filled(make: Callable[..., Any], layer: int, past: mx.array, sequences: int) -> Any:  # noqa: ANN401
    """Return the cache of a layer after its sequences have come."""
    rows = []
    for i in range(sequences):
        rows.append(make(layer=layer))
        rows[i].update_and_fetch(*[past[:, :, UNLIKE * i :]] * 2)
    return rows[0] if sequences == 1 else rows[0].merge(rows)


def zeros_of(source: Source) -> Built:
    """Return a kernel whose outputs are zeros."""

    def kernel(
        *, output_shapes: Sequence[tuple[int, ...]], output_dtypes: Sequence[mx.Dtype], **_: object
    ) -> list[mx.array]:
        return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]

    return kernel


@contextmanager
def _kernels_without_a_gpu() -> Iterator[None]:
    """Make MLX's device use CUDA's kernels, without computation and without checks."""
    name = runtime.backend()
    before = devices.BACKENDS[name]
    devices.BACKENDS[name] = replace(devices.CUDA, build=zeros_of, tried=False)
    try:
        yield
    finally:
        devices.BACKENDS[name] = before
