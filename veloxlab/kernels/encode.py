"""Encoding of vectors in one launch: root-mean-square 1, a signed Hadamard transform, a quantizer, scale and packing.

A vector lies in the registers of a simdgroup's lanes (``source/lanes.h``): it is read once, and only its codes and its
scale are written. The twin is ``RotatedCodec.encode``, with the quantizer that a codec has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from string import Template
from typing import Final

import mlx.core as mx

from veloxlab.errors import InputError
from veloxlab.kernels.backend import GpuBackend, Source, launch, source_file
from veloxlab.kernels.lanes import (
    THREADS,
    can_spread,
    check_bits,
    check_fits,
    check_table,
    groups_for,
    hartley_row,
    layout,
    vectors_at_once,
    words,
)

# what a vector's root-mean-square is to be multiplied with, from the sums that ``encode.metal`` makes
_FACTORS: Final = {"norm": "1.0f", "mse": "inner / squares", "unbiased": "HEAD_DIM / inner"}

# what is left of a vector of length √D when the nearest multiple of its grid point is taken away
_REST: Final = (
    "float rest = 0.0f;\n"
    "UNROLL for (uint i = 0; i < each; i++) {\n"
    "  const float off = y[i] - inner / squares * quantizer.level(own[i * lanes + lane]);\n"
    "  rest += off * off;\n"
    "}\n"
    "rest = total_of<int(lanes)>(rest);"
)
_KEEP_REST: Final = "if (lane == 0) sines[vector] = half(square_root(rest / float(HEAD_DIM)));"


@dataclass(frozen=True)
class Fragment:
    """Text of a quantizer in a kernel.

    Attributes
    ----------
    name : what tells it from others.
    tables : threadgroup variables, and what fills them.
    setup : the statement that makes it, once a vector lies spread in ``y``.
    """

    name: str
    tables: str
    setup: str


@dataclass(frozen=True, eq=False)
class NearestLevel:
    """The nearest of ascending levels, as `veloxlab.codecs.parts.scalar.ScalarQuantizer` finds it.

    Parameters
    ----------
    boundaries, levels : ``[2**bits - 1]``, of which some may be equal, and ``[2**bits]``; float32, for coordinates of
        variance 1.
    bits : of a code, 1 to 8.
    """

    boundaries: mx.array
    levels: mx.array
    bits: int

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_table("boundaries", self.boundaries, 2**self.bits - 1)
        check_table("levels", self.levels, 2**self.bits)

    @property
    def arrays(self) -> dict[str, mx.array]:
        """Inputs of the kernel."""
        return {"boundaries": self.boundaries, "levels": self.levels}

    @property
    def fragment(self) -> Fragment:
        """Its text, the same for all tables of a size."""
        return _NEAREST_LEVEL


@dataclass(frozen=True, eq=False)
class StretchedGrid:
    """The steps ±½, ±1½ … ±(2^(bits − 1) − ½), which stretched coordinates find downwards in size.

    Parameters
    ----------
    stretches : ``[n]`` float32. The first one serves all vectors; but where they are to be tried, they are in units of
        the stretch at which a vector's largest coordinate leaves the grid, and the one is taken with which vector and
        grid point have the largest cosine.
    bits : of a code, 1 to 8.
    tried : see there.
    """

    stretches: mx.array
    bits: int
    tried: bool

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_table("stretches", self.stretches, max(1, self.stretches.size))

    @property
    def arrays(self) -> dict[str, mx.array]:
        """Inputs of the kernel."""
        return {"stretches": self.stretches}

    @property
    def fragment(self) -> Fragment:
        """Its text, the same for all stretches of a number."""
        count = self.stretches.size
        if not self.tried:
            return Fragment("stretched_grid", "", "const StretchedGrid<CODE_BITS> quantizer = {stretches[0]};")
        best = f"best_stretch<HEAD_DIM, CODE_BITS>(y, stretches, stretches_strides[0], {count})"
        return Fragment(f"stretched_grid_of_{count}", "", f"const StretchedGrid<CODE_BITS> quantizer = {{{best}}};")


Quantizer = NearestLevel | StretchedGrid

_NEAREST_LEVEL = Fragment(
    "nearest_level",
    tables=(
        "threadgroup float table[1 << CODE_BITS], bounds[1 << CODE_BITS];\n"
        "for (uint i = thread_id; i < 1 << CODE_BITS; i += THREADS) {\n"
        "  table[i] = levels[i * levels_strides[0]];\n"
        "  if (i < (1 << CODE_BITS) - 1) bounds[i] = boundaries[i * boundaries_strides[0]];\n"
        "}\n"
        "group_barrier();"
    ),
    setup="const NearestLevel<CODE_BITS> quantizer = {bounds, table};",
)


@dataclass(frozen=True, eq=False)
class SpreadEncoder:
    """Spreads vectors, quantizes each coordinate, and packs.

    Parameters
    ----------
    signs : ±1 of each coordinate ``[D]``, float32; see `veloxlab.codecs.parts.transforms.SignedHadamard`.
    quantizer : of coordinates.
    scale : ``"norm"``, ``"mse"`` or ``"unbiased"``; see `veloxlab.codecs.parts.scalar.scale_factor`.
    fields : name and width of each part that a code is cut into, from its high bits down; they are packed apart.
    sine : whether that of the angle between a vector and what its codes stand for is kept too, as ``sine``.

    Raises
    ------
    InputError : another scale, or widths that do not add up to the code's.
    """

    signs: mx.array
    quantizer: Quantizer
    scale: str
    fields: tuple[tuple[str, int], ...]
    sine: bool = False

    def __post_init__(self) -> None:
        if self.scale not in _FACTORS:
            raise InputError(f"Unknown scale {self.scale!r}: choose 'unbiased', 'mse' or 'norm'.")
        widths = [width for _, width in self.fields]
        if sum(widths) != self.quantizer.bits or min(widths) < 1:
            raise InputError(
                f"Fields of {widths} bits make no code of {self.quantizer.bits}: give widths that add up to it."
            )

    @property
    def kernel(self) -> tuple[object, ...]:
        """What tells its kernel from others for vectors of one dimension and type; first a name for people."""
        return "encode", self.quantizer.fragment, self.scale, self.fields, self.sine

    def takes(self, x: mx.array) -> bool:
        """Whether vectors ``[B, H, S, D]`` fit the kernel's registers."""
        return can_spread(x.shape[-1])

    def __call__(self, backend: GpuBackend, x: mx.array) -> dict[str, mx.array]:
        """Encode ``x`` ``[B, H, S, D]``, float32, float16 or bfloat16, a view with any strides.

        Gives each field's codes ``[B, H, S, ⌈D·width / 32⌉]`` uint32, LSB first without gaps, and ``root_scale``, the
        square root of each vector's scale, and perhaps ``sine``, both ``[B, H, S, 1]`` float16. Raises `InputError` for
        a shape or dtype that the kernel does not take.
        """
        check_fits(x)
        *lead, dim = x.shape
        check_table("signs", self.signs, dim)
        numbers = ("root_scale", "sine") if self.sine else ("root_scale",)
        names = (*(name for name, _ in self.fields), *numbers)
        widths = tuple(width for _, width in self.fields)
        shapes = [(*lead, words(dim, width)) for width in widths] + [(*lead, 1)] * len(numbers)
        dtypes = [mx.uint32] * len(widths) + [mx.float16] * len(numbers)
        if x.size == 0:
            return {name: mx.zeros(shape, dtype) for name, shape, dtype in zip(names, shapes, dtypes, strict=True)}
        arrays = {"x": x, "signs": self.signs, **self.quantizer.arrays}
        written = launch(
            _source(dim, x.dtype, tuple(arrays), self.quantizer.fragment, widths, self.scale, self.sine, backend),
            arrays,
            backend=backend,
            groups=groups_for(math.prod(lead), vectors_at_once(dim)),
            threads=THREADS,
            shapes=shapes,
            dtypes=dtypes,
        )
        return dict(zip(names, written, strict=True))


@lru_cache
def _source(
    dim: int,
    dtype: mx.Dtype,
    inputs: tuple[str, ...],
    quantizer: Fragment,
    widths: tuple[int, ...],
    scale: str,
    sine: bool,
    backend: GpuBackend,
) -> Source:
    rows = [f"row_{width}_{i}" for i, width in enumerate(widths)]
    below = [sum(widths[i + 1 :]) for i in range(len(widths))]  # bits of a code under the field
    pack = [
        f"pack_row<HEAD_DIM, {width}, {low}>(own, {row} + vector * {words(dim, width)}u, lane, lanes);"
        for row, width, low in zip(rows, widths, below, strict=True)
    ]
    return Source(
        name="_".join(["encode", quantizer.name, *map(str, widths), *(["sine"] if sine else [])]),
        inputs=inputs,
        outputs=(*rows, "root_scale", *(["sines"] if sine else [])),
        defines=(*layout(dim, dtype, backend), ("CODE_BITS", sum(widths)), ("FACTOR", _FACTORS[scale])),
        headers=("simd.h", "lanes.h", "quantizers.h", "packing.h"),
        body=Template(source_file("encode.metal")).substitute(
            hartley=hartley_row(dim),
            tables=quantizer.tables,
            quantizer=quantizer.setup,
            rest=_REST if sine else "",
            keep_rest=_KEEP_REST if sine else "",
            pack="\n  ".join(pack),
        ),
    )
