"""Signs of projections, packed, and the size of what was projected, in one launch.

The projections are a matrix product, which MLX makes. The twin is that of `veloxlab.codecs.qjl`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx

from veloxlab.errors import InputError
from veloxlab.kernels.backend import SIMD, GpuBackend, Source, launch, source_file, type_name
from veloxlab.kernels.lanes import THREADS, check_vectors, groups_for, words

_VECTORS = THREADS // SIMD  # of a threadgroup


@dataclass(frozen=True)
class SignEncoder:
    """Keeps the signs of a vector's projections, and its root-mean-square."""

    @property
    def kernel(self) -> tuple[object, ...]:
        """What tells its kernel from others for vectors and projections of one dimension; first a name for people."""
        return ("encode signs",)

    def takes(self, x: mx.array) -> bool:
        """Whether there is a kernel for vectors ``[B, H, S, D]``: for all."""
        return True

    def __call__(self, backend: GpuBackend, x: mx.array, y: mx.array) -> dict[str, mx.array]:
        """Encode ``x`` ``[B, H, S, D]`` in any float type, whose projections ``y`` ``[B, H, S, m]`` are float32.

        Both may be views with any strides. Gives ``signs`` ``[B, H, S, ⌈m / 32⌉]`` uint32, LSB first, 1 for 0 and
        above, and ``root_rms``, the square root of the root-mean-square of ``x``, ``[B, H, S, 1]`` float16. Raises
        `InputError` for shapes or types that the kernel does not take.
        """
        check_vectors(x)
        *lead, dim = x.shape
        if y.shape[:-1] != x.shape[:-1] or y.dtype != mx.float32:
            raise InputError(
                f"The projections have {list(y.shape)} of {y.dtype}, of vectors {list(x.shape)}: "
                f"give {[*lead, 'rows']} of float32."
            )
        rows = y.shape[-1]
        shapes, dtypes = [(*lead, words(rows, 1)), (*lead, 1)], [mx.uint32, mx.float16]
        if y.size == 0:
            signs, root_rms = (mx.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
        else:
            signs, root_rms = launch(
                _source(dim, rows, x.dtype, backend),
                {"x": x, "y": y},
                backend=backend,
                groups=groups_for(math.prod(lead), _VECTORS),
                threads=THREADS,
                shapes=shapes,
                dtypes=dtypes,
            )
        return {"signs": signs, "root_rms": root_rms}


@lru_cache
def _source(dim: int, rows: int, dtype: mx.Dtype, backend: GpuBackend) -> Source:
    return Source(
        name="encode_signs",
        inputs=("x", "y"),
        outputs=("signs", "root_rms"),
        defines=(
            ("HEAD_DIM", dim),
            ("ROWS", rows),
            ("CODE_WORDS", words(rows, 1)),
            ("IN_TYPE", type_name(dtype, backend)),
            ("VECTORS", _VECTORS),
        ),
        headers=("simd.h",),
        body=source_file("signs.metal"),
    )
