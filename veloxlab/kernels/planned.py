"""Encoding of vectors whose coordinates have widths, means and deviations of their own, in one launch.

The plan is data: all layers share one kernel. Its twin is ``SpectralQuant``'s, with a `PlannedQuantizer`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import mlx.core as mx

from veloxlab.errors import InputError
from veloxlab.kernels.backend import GpuBackend, Source, launch, source_file
from veloxlab.kernels.lanes import (
    THREADS,
    WIDEST,
    can_spread,
    check_fits,
    check_table,
    groups_for,
    layout,
    vectors_at_once,
)

_ENTRIES: Final = (2 << WIDEST) - 1  # of the tables of all widths from 0 bits on
# what a vector's root-mean-square is to be multiplied with, from the sums that ``planned.metal`` makes
_FACTORS: Final = {
    "norm": "1.0f",
    "mse": "(inner > 0.0f ? inner : 0.0f) / squares",
    "unbiased": "energy / (inner > energy / {largest}f ? inner : energy / {largest}f)",
}


@dataclass(frozen=True, eq=False)
class PlannedEncoder:
    """Quantizes vectors of a layer, which were brought to a basis, by a bit plan, and packs.

    Parameters
    ----------
    first_bits : where each coordinate's code begins in a row of bits, and where the last one ends ``[D + 1]`` uint32;
        a code takes 0 to 8 bits.
    first_codes : the first coordinate that has bits in each word ``[words]`` uint32.
    boundaries, levels : for coordinates of mean 0 and variance 1 ``[511]`` float32. Those of n bits begin at 2^n − 1;
        of widths that no coordinate has anything may stand there.
    mean, deviation : of each KV head's coordinates ``[H, 1, D]`` float32, for vectors of root-mean-square 1.
    scale : ``"norm"``, ``"mse"`` or ``"unbiased"``, as `veloxlab.codecs.spectralquant` has them.
    largest : factor of an unbiased scale.

    Raises
    ------
    InputError : another scale, or tables of other sizes.
    """

    first_bits: mx.array
    first_codes: mx.array
    boundaries: mx.array
    levels: mx.array
    mean: mx.array
    deviation: mx.array
    scale: str
    largest: float

    def __post_init__(self) -> None:
        if self.scale not in _FACTORS:
            raise InputError(f"Unknown scale {self.scale!r}: choose 'unbiased', 'mse' or 'norm'.")
        for name in ("boundaries", "levels"):
            check_table(name, getattr(self, name), _ENTRIES)
        for name in ("mean", "deviation"):
            check_table(f"{name} of a KV head", getattr(self, name)[0, 0], self.first_bits.size - 1)

    @property
    def kernel(self) -> tuple[object, ...]:
        """What tells its kernel from others for vectors of one dimension and type; first a name for people."""
        return "encode by plan", self.first_codes.size, self.scale, self.largest

    def takes(self, x: mx.array) -> bool:
        """Whether vectors ``[B, H, S, D]`` fit the kernel's registers."""
        return can_spread(x.shape[-1])

    def __call__(self, backend: GpuBackend, x: mx.array, y: mx.array) -> dict[str, mx.array]:
        """Encode ``x`` ``[B, H, S, D]`` in any float type, given as well in the basis: ``y`` ``[B, H, S, D]``, float32.

        Both may be views with any strides. Gives ``codes`` ``[B, H, S, words]`` uint32, one string of bits without
        gaps, and ``root_scale``, the square root of each vector's scale ``[B, H, S, 1]``, float16. Raises `InputError`
        for shapes or types that the kernel does not take.
        """
        check_fits(x)
        *lead, dim = x.shape
        if y.shape != x.shape or y.dtype != mx.float32 or self.mean.shape != (x.shape[1], 1, dim):
            raise InputError(
                f"The basis has {list(y.shape)} of {y.dtype} and its means {list(self.mean.shape)}, of vectors "
                f"{list(x.shape)}: give the same shape in float32, and means of {x.shape[1]} KV heads."
            )
        count = self.first_codes.size
        shapes, dtypes = [(*lead, count), (*lead, 1)], [mx.uint32, mx.float16]
        if x.size == 0:
            codes, root_scale = (mx.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
        else:
            codes, root_scale = launch(
                _source(dim, x.dtype, count, self.scale, self.largest, backend),
                {
                    "x": x,
                    "y": y,
                    "mean": self.mean,
                    "deviation": self.deviation,
                    "boundaries": self.boundaries,
                    "levels": self.levels,
                    "first_bits": self.first_bits,
                    "first_codes": self.first_codes,
                },
                backend=backend,
                groups=groups_for(math.prod(lead), vectors_at_once(dim)),
                threads=THREADS,
                shapes=shapes,
                dtypes=dtypes,
            )
        return {"codes": codes, "root_scale": root_scale}


@lru_cache
def _source(dim: int, dtype: mx.Dtype, words: int, scale: str, largest: float, backend: GpuBackend) -> Source:
    return Source(
        name="encode_by_plan",
        inputs=("x", "y", "mean", "deviation", "boundaries", "levels", "first_bits", "first_codes"),
        outputs=("codes", "root_scale"),
        defines=(
            *layout(dim, dtype, backend),
            ("CODE_WORDS", words),
            ("WIDEST", WIDEST),
            ("FACTOR", _FACTORS[scale].format(largest=float(largest))),
        ),
        headers=("simd.h", "lanes.h", "quantizers.h", "packing.h"),
        body=source_file("planned.metal"),
    )
