"""What every benchmark needs: the time of a call, facts of the device, and how fast it moves bytes.

Calls are timed many at once, as the layers of a model are, and alone. A generator makes the graph of a token while the
GPU works on the one before, so the times of evaluating and of making the graph are measured apart.
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
Tell = Callable[[str], None]
REPEATS = 9
FIRST_TRIES = 2
IN_A_ROW = 32  # calls that are evaluated together: as many as a model of 8 billion parameters has layers


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
    times = [_timed(lambda: [call() for call in row]) for _ in range(FIRST_TRIES + REPEATS)][FIRST_TRIES:]
    making, evaluating = (1e6 / IN_A_ROW * statistics.median(part) for part in zip(*times, strict=True))
    return Microseconds(evaluating, making, 1e6 * median_seconds(calls[0], REPEATS))


def median_seconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median time of evaluating what ``work`` gives, on a device that has nothing else to do, after `FIRST_TRIES`."""
    return statistics.median([sum(_timed(work)) for _ in range(FIRST_TRIES + repeats)][FIRST_TRIES:])


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds to make a graph, and to evaluate it."""
    mx.synchronize()
    start = time.perf_counter()
    made = work()
    between = time.perf_counter()
    mx.eval(made)
    mx.synchronize()
    return between - start, time.perf_counter() - between


def vectors(shape: Shape, tokens: int) -> mx.array:
    """Random keys or values."""
    return mx.random.normal((1, shape.kv_heads, tokens, shape.head_dim)).astype(mx.float16)
