"""What every benchmark needs: how long a call takes, what device it was on, and how fast that moves bytes.

Calls are timed many at once, as the layers of a model are, and alone. A generator makes the graph of a token while the
GPU works on the one before, so the time of evaluating is told apart from that of making the graph.
"""

from __future__ import annotations

import datetime
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from veloxlab import runtime
from veloxlab.kernels.checked import states
from veloxlab.kernels.devices import current_backend

Row = dict[str, Any]
Progress = Callable[[str], None]
REPEATS = 9
FIRST_TRIES = 2
IN_A_ROW = 32  # calls that are evaluated together: as many as a model of 8 billion parameters has layers
_CACHE_BYTES = 2 << 30  # of the caches that the calls of a row take in turn


@dataclass(frozen=True)
class Shape:
    """Query heads, KV heads and head dimension of a layer."""

    query_heads: int
    kv_heads: int
    head_dim: int

    @property
    def scale(self) -> float:
        """What attention multiplies q·k with."""
        return float(self.head_dim**-0.5)


class Microseconds(NamedTuple):
    """Median times of one call: of many evaluated together, of making its graph, and of both for one call alone."""

    evaluating: float
    making: float
    alone: float


def facts() -> Row:
    """Device, driver, versions, date, and what was found of the kernels."""
    device, backend = runtime.device(), current_backend()
    versions = runtime.installed_versions(("veloxlab", "mlx", "mlx-lm"))
    return {
        "device": device.name,
        "driver": runtime.driver(),
        "backend": device.backend,
        "memory_gib": round(device.memory_bytes / 2**30, 1),
        "kernels": "none" if backend is None else backend.name,
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "kernel_states": states(),
    }


def microseconds(calls: Sequence[Callable[[], object]]) -> Microseconds:
    """Time ``calls``, each of which makes a lazy result, taken in turn, `IN_A_ROW` of them."""
    row = [calls[i % len(calls)] for i in range(IN_A_ROW)]
    making, evaluating = [], []
    for repeat in range(FIRST_TRIES + REPEATS):
        mx.synchronize()
        start = time.perf_counter()
        made = [call() for call in row]
        between = time.perf_counter()
        mx.eval(made)
        mx.synchronize()
        if repeat >= FIRST_TRIES:
            making.append(between - start)
            evaluating.append(time.perf_counter() - between)
    one = 1e6 / IN_A_ROW
    return Microseconds(
        statistics.median(evaluating) * one, statistics.median(making) * one, median_seconds(calls[0], REPEATS) * 1e6
    )


def median_seconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median time of evaluating what ``work`` gives, on a device that has nothing else to do, after `FIRST_TRIES`."""
    seconds = []
    for repeat in range(FIRST_TRIES + repeats):
        mx.synchronize()
        start = time.perf_counter()
        mx.eval(work())
        mx.synchronize()
        if repeat >= FIRST_TRIES:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def copies(bytes_each: int) -> int:
    """How many caches the calls of a row take in turn, so that none is left in the GPU's second-level cache."""
    return max(1, min(IN_A_ROW, _CACHE_BYTES // bytes_each))


def bandwidth() -> float:
    """Gigabytes a second at which MLX copies a large array or reads it to a sum, whichever is more: for a roofline."""
    source = mx.zeros((1 << 28,), mx.float32)
    mx.eval(source)
    copied = 2 * source.nbytes / median_seconds(lambda: source + 1, REPEATS)
    read = source.nbytes / median_seconds(source.sum, REPEATS)
    return max(copied, read) / 1e9


def query(shape: Shape) -> mx.array:
    """A random query of one token."""
    return mx.random.normal((1, shape.query_heads, 1, shape.head_dim)).astype(mx.float16)


def vectors(shape: Shape, tokens: int) -> mx.array:
    """Random keys or values."""
    return mx.random.normal((1, shape.kv_heads, tokens, shape.head_dim)).astype(mx.float16)
