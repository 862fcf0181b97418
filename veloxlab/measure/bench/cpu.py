"""CPU times: attention, encoding and fitting of every method, for one layer of SmolLM2's shape, in float32.

Times are medians, with the least time too. Compared works are timed in turn, round after round, so that other work on
the machine slows all of them. Compare times as ratios within a run; less than 1 is faster. Tokens are random.
"""

from __future__ import annotations

import os
import time
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache, partial
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np

from veloxlab import runtime
from veloxlab.codecs import METHODS, TENSORS, Codec
from veloxlab.codecs.base import Sample
from veloxlab.codecs.parts.rope import Rope
from veloxlab.kernels.devices import SWITCH
from veloxlab.measure.bench import timing
from veloxlab.measure.bench.shapes import Shape
from veloxlab.measure.bench.timing import Row, Tell
from veloxlab.measure.memory import bytes_of

SHAPE = Shape(9, 3, 64)
TOKENS = (512, 2048, 8192)
EXACT, MLX_LM = "exact 32 bit", "mlx-lm 4 bit"
SAMPLE = 1024  # tokens for the fit of a codec; their codes are repeated
LAYERS = 8  # caches that attention reads in turn, so that their bytes come from memory
ROUNDS = 9
OPS_ROUNDS = 3  # rounds of MLX operations, which can take a hundred times as long
_READ = 1 << 29  # bytes, more than any processor's caches
_BITS = {"vecinfer": 3, "commvq": 2}

Work = Callable[[], object]


def facts() -> Row:
    """Return `timing.facts`, the number of threads, and the speed of the memory."""
    threads = {"cores": runtime.cores(), "threads": runtime.threads(), "blas_threads": runtime.blas_threads()}
    return timing.facts() | threads | {"gigabytes_per_second": bandwidth()}


@cache
def bandwidth() -> float:
    """Return the gigabytes a second that the threads of this process read together, the most of `ROUNDS` times."""
    parts = np.array_split(np.ones(_READ // 4, np.float32), runtime.threads())
    with ThreadPoolExecutor(len(parts)) as pool:
        return _READ / min(timeit.repeat(lambda: list(pool.map(np.max, parts)), number=1, repeat=ROUNDS)) / 1e9


def attention_of_methods(tokens: Sequence[int] = TOKENS, progress: Tell = print) -> list[Row]:
    """Time attention of one token to the fewest and the most of ``tokens``, in a layer: exact, mlx-lm's, every method.

    Rows: ``cache, query_heads, kv_heads, head_dim, tokens, microseconds, least_microseconds, ratio`` (of exact
    attention's time), ``slope_ratio`` (the same for the time of each further token; in rows of the most tokens),
    ``ops_microseconds, of_ops`` (ratio to the time of MLX operations), ``bytes, gigabytes_per_second,
    roofline_microseconds, spread`` (`timing.spread`).
    """
    tiles = {name: [codec.encode(vectors(SAMPLE)) for codec in own] for name, own in codecs(progress).items()}
    rows: list[Row] = []
    for count in sorted({min(tokens), max(tokens)}):
        of_float: dict[str, Any] = {"shape": SHAPE, "tokens": count, "dtype": mx.float32}
        ways: dict[str, Callable[[], timing.Cache]] = {EXACT: partial(timing.exact, **of_float)}
        ways[MLX_LM] = partial(timing.mlx_lm, bits=4, **of_float)
        for name, own in codecs().items():
            ways[titled(name)] = partial(timing.repeated, SHAPE, count, own, tiles[name])
        query = mx.random.normal((1, SHAPE.query_heads, 1, SHAPE.head_dim))
        made = {name: [way() for _ in range(LAYERS)] for name, way in ways.items()}
        mx.eval(query, [arrays for own in made.values() for _, arrays in own])
        works: dict[str, list[Work]] = {
            name: [partial(_attended, attend, query) for attend, _ in own] for name, own in made.items()
        }
        # new caches: a kernel that has read a cache reads it again, even if kernels are switched off
        by_ops = {name: partial(_attended, ways[name]()[0], query) for name in ways if name not in (EXACT, MLX_LM)}
        size = {name: bytes_of(own[0][1]) for name, own in made.items()}
        for row in _in_turn(works, by_ops):
            moved = size[row["cache"]]
            row |= {"tokens": count, **asdict(SHAPE), "bytes": moved}
            row |= {"gigabytes_per_second": moved / row["microseconds"] / 1e3}
            row |= {"roofline_microseconds": moved / bandwidth() / 1e3}
            rows.append(row)
            progress(f"attention to {count} tokens: {said(row, 'microseconds', 'µs')}")
    return _with_ratios(rows)


def _with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the fewest and of the most tokens, with ratios to exact attention, the first row of each."""
    few, most = ([row for row in rows if row["tokens"] == at] for at in (rows[0]["tokens"], rows[-1]["tokens"]))
    for one in (few, most):
        for row in one:
            row["ratio"] = row["microseconds"] / one[0]["microseconds"]
    if few != most:
        slopes = [late["microseconds"] - early["microseconds"] for early, late in zip(few, most, strict=True)]
        for row, slope in zip(most, slopes, strict=True):
            row["slope_ratio"] = slope / slopes[0]
    return list(rows)


def encode(progress: Tell = print) -> list[Row]:
    """Time encoding `SAMPLE` tokens of a layer: ``cache, tokens, microseconds, least_microseconds, of_ops``, …"""
    x = [vectors(SAMPLE) for _ in TENSORS]
    works: dict[str, list[Work]] = {
        titled(name): [partial(timing.encoded, own, x)] for name, own in codecs(progress).items()
    }
    return [_told(row, "encoding", progress) for row in _in_turn(works, _first(works))]


def fit(progress: Tell = print) -> list[Row]:
    """Time the fit to `SAMPLE` tokens of one layer, for methods that are calibrated: rows as those of `encode`."""
    sample = Sample(vectors(SAMPLE), rope=Rope(SHAPE.head_dim))
    works: dict[str, list[Work]] = {}
    for name, own in codecs(progress).items():
        if METHODS[name].calibrated:
            works[titled(name)] = [lambda own=own: [tuple(vars(codec.fit(sample)).values()) for codec in own]]  # type: ignore[misc]
    return [_told(row, "fitting", progress) for row in _in_turn(works, _first(works), OPS_ROUNDS, 1)]


def _first(works: Mapping[str, Sequence[Work]]) -> dict[str, Work]:
    return {name: own[0] for name, own in works.items()}


def _attended(attend: Callable[[mx.array], mx.array], query: mx.array) -> mx.array:
    return attend(mx.array(query))  # mlx-lm's quantized attention scales its query in place


def _told(row: Row, what: str, progress: Tell) -> Row:
    progress(f"{what} {SAMPLE} tokens: {said(row, 'microseconds', 'µs')}")
    return row | {"tokens": SAMPLE}


def said(row: Row, time: str, unit: str) -> str:
    """Return a row in words, for progress: ``time`` is the column of the time, in ``unit``."""
    beside = {"ratio": "of exact", "of_mlx_lm": "of mlx-lm's", "of_ops": "of MLX operations", "busy_ratio": "when busy"}
    ratios = [f", {row[name]:.3g} {words}" for name, words in beside.items() if row.get(name)]
    return f"{row['cache']}, {row[time]:.4g} {unit}{''.join(ratios)}"


def _in_turn(
    works: Mapping[str, Sequence[Work]],
    by_ops: Mapping[str, Work],
    rounds: int | None = None,
    ops_rounds: int | None = None,
) -> Iterator[Row]:
    """Time all ``works`` in rounds, and those of ``by_ops`` with MLX operations only: a row for each name."""
    for own in works.values():
        for work in own:
            seconds(work)
    spent, slow = ({name: list[float]() for name in works} for _ in range(2))
    rounds, ops_rounds = rounds or ROUNDS, ops_rounds or OPS_ROUNDS
    for i in range(max(rounds, ops_rounds)):
        for name, own in works.items():
            if i < rounds:
                spent[name] += [1e6 * seconds(work) for work in own]
            if i < ops_rounds and name in by_ops:
                with _operations():
                    slow[name].append(1e6 * seconds(by_ops[name]))
    for name, times in spent.items():
        row: Row = {"cache": name, "microseconds": median(times), "least_microseconds": min(times)}
        row["spread"] = timing.spread(times)
        if slow[name]:
            of_ops = median(slow[name])
            row |= {"ops_microseconds": of_ops, "of_ops": row["microseconds"] / of_ops}
        yield row


def seconds(work: Work) -> float:
    """Return the time of ``work`` and of the evaluation of its result."""
    start = time.perf_counter()
    mx.eval(work())
    return time.perf_counter() - start


@contextmanager
def _operations() -> Iterator[None]:
    """Switch kernels off."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "0"
    try:
        yield
    finally:
        os.environ.pop(SWITCH)
        os.environ.update({SWITCH: before} if before is not None else {})


def vectors(tokens: int) -> mx.array:
    """Return random keys or values of one layer."""
    x = timing.vectors(SHAPE, tokens, mx.float32)
    mx.eval(x)
    return x


def _bits(method: str) -> int:
    return _BITS.get(method, timing.METHOD_BITS)


def titled(method: str) -> str:
    """Return a method with its bits, as in rows."""
    return f"{method} {_bits(method)} bit"


def fitted(method: str, bits: int) -> list[Codec]:
    """Return codecs of keys and of values, fitted to random vectors."""
    return [timing.fitted(method, SHAPE, tensor, bits, SAMPLE) for tensor in TENSORS]


_codecs: dict[str, list[Codec]] = {}


def codecs(progress: Tell = print) -> dict[str, list[Codec]]:
    """Return codecs of keys and of values of every method, fitted once."""
    for name in METHODS:
        if name not in _codecs and name != "none":
            progress(f"fitting {titled(name)}")
            _codecs[name] = fitted(name, _bits(name))
    return _codecs
