"""Equal steps from the least to the largest number of each group of coordinates, coded and packed in one launch.

The twin is `veloxlab.codecs.parts.groups.GroupQuantizer.encode`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx

from veloxlab.kernels.backend import SIMD, GpuBackend, Source, launch, source_file, type_name
from veloxlab.kernels.lanes import THREADS, check_bits, check_vectors, groups_for, words

_VECTORS = THREADS // SIMD  # of a threadgroup
_LARGEST_DIM = 4096  # of which a threadgroup's codes take half of Metal's threadgroup memory


@dataclass(frozen=True)
class GroupEncoder:
    """Cuts each group of coordinates into equal steps.

    Parameters
    ----------
    bits : of a code, 1 to 8.
    group : coordinates that share a step; the last group may be shorter.
    steps : from the least number of a group to the largest.
    shift : where in a step its level lies, 0 to 1.

    Raises
    ------
    InputError : another width.
    """

    bits: int
    group: int
    steps: int
    shift: float

    def __post_init__(self) -> None:
        check_bits(self.bits)

    @property
    def kernel(self) -> tuple[object, ...]:
        """What tells its kernel from others for vectors of one dimension and type; first a name for people."""
        return "encode groups", self

    def takes(self, x: mx.array) -> bool:
        """Whether the codes of vectors ``[B, H, S, D]`` fit threadgroup memory."""
        return x.shape[-1] <= _LARGEST_DIM

    def __call__(self, backend: GpuBackend, x: mx.array) -> dict[str, mx.array]:
        """Encode ``x`` ``[B, H, S, D]``, float32, float16 or bfloat16, a view with any strides.

        Gives ``codes`` ``[B, H, S, ⌈D·bits / 32⌉]`` uint32, LSB first without gaps, and roots ``half_step``, ``least``
        ``[B, H, S, groups]`` float16, that of a negative number negative. Raises `InputError` for a shape or type that
        the kernel does not take.
        """
        check_vectors(x)
        *lead, dim = x.shape
        groups = -(-dim // self.group)
        shapes = [(*lead, words(dim, self.bits)), (*lead, groups), (*lead, groups)]
        dtypes = [mx.uint32, mx.float16, mx.float16]
        if x.size == 0:
            codes, half_step, least = (mx.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
        else:
            codes, half_step, least = launch(
                _source(self, dim, x.dtype, backend),
                {"x": x},
                backend=backend,
                groups=groups_for(math.prod(lead), _VECTORS),
                threads=THREADS,
                shapes=shapes,
                dtypes=dtypes,
            )
        return {"codes": codes, "half_step": half_step, "least": least}


@lru_cache
def _source(encoder: GroupEncoder, dim: int, dtype: mx.Dtype, backend: GpuBackend) -> Source:
    return Source(
        name="encode_groups",
        inputs=("x",),
        outputs=("codes", "half_step", "least"),
        defines=(
            ("HEAD_DIM", dim),
            ("GROUP", encoder.group),
            ("GROUPS", -(-dim // encoder.group)),
            ("STEPS", encoder.steps),
            ("SHIFT", f"{float(encoder.shift)}f"),
            ("CODE_BITS", encoder.bits),
            ("CODE_WORDS", words(dim, encoder.bits)),
            ("IN_TYPE", type_name(dtype, backend)),
            ("VECTORS", _VECTORS),
        ),
        headers=("simd.h", "packing.h"),
        body=source_file("groups.metal"),
    )
