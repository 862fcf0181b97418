"""A back end that checks kernels as Metal, and runs them on the CPU immediately."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import mlx.core as mx
import numpy as np

from tests.metal_on_host.check import check_syntax
from tests.metal_on_host.run import BFLOAT, TYPES, run
from veloxlab.kernels.devices import METAL
from veloxlab.kernels.text import Built, Source

DTYPES: dict[mx.Dtype, np.dtype] = {
    mx.float32: np.dtype(np.float32),
    mx.float16: np.dtype(np.float16),
    mx.bfloat16: BFLOAT,
    mx.uint32: np.dtype(np.uint32),
    mx.int32: np.dtype(np.int32),
    mx.uint8: np.dtype(np.uint8),
}
_LEAST_IN_DEVICE = 8  # elements; MLX puts smaller arrays in Metal's `constant` address space


def built(source: Source) -> Built:
    """Return a function with the interface of ``mx.fast.metal_kernel`` for ``source``."""

    def kernel(
        *,
        inputs: Sequence[mx.array],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        threads = threadgroup[0]
        assert threadgroup[1:] == (1, 1), f"threadgroups are rows of threads, not {threadgroup}"
        assert grid[0] % threads == 0, f"{grid[0]} threads are no whole threadgroups of {threads}"
        arrays = dict(zip(source.inputs, map(to_numpy, inputs), strict=True))
        dtypes = [DTYPES[dtype] for dtype in output_dtypes]
        small = frozenset(name for name, array in arrays.items() if array.size < _LEAST_IN_DEVICE)
        _check(source, tuple(TYPES[dtype] for dtype in [*(a.dtype for a in arrays.values()), *dtypes]), small)
        groups = (grid[0] // threads, grid[1], grid[2])
        return [to_mlx(output) for output in run(source, arrays, groups, threads, output_shapes, dtypes)]

    return kernel


@lru_cache
def _check(source: Source, types: tuple[str, ...], constant: frozenset[str]) -> None:
    check_syntax(source, dict(zip([*source.inputs, *source.outputs], types, strict=True)), constant)


def to_numpy(array: mx.array) -> np.ndarray:
    """Return the same numbers with the same strides."""
    mx.eval(array)
    return np.asarray(array.view(mx.uint16)).view(BFLOAT) if array.dtype == mx.bfloat16 else np.asarray(array)


def to_mlx(array: np.ndarray) -> mx.array:
    """Undo `to_numpy`."""
    return mx.array(array.view(np.uint16)).view(mx.bfloat16) if array.dtype == BFLOAT else mx.array(array)


HOST = replace(METAL, build=built, lazy=False)
