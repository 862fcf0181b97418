"""Build a kernel's one body for the GPU at hand, and call it.

A body is written in the subset that Metal and CUDA share, under Metal's names; ``source/cuda.h`` and
``source/metal.h`` supply what differs. What is known when a kernel is built (widths, dimensions) comes as ``#define``,
so that the compiler unrolls by it; a kernel is built once for each set of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from typing import Literal, cast

import mlx.core as mx

from veloxlab import runtime

GpuBackend = Literal["metal", "cuda"]
SIMD = 32  # threads of a simdgroup (Metal) or warp (CUDA)
_CONSTANT_BELOW = 8  # elements
SWITCH = "VELOXLAB_KERNELS"  # 0 in the environment: no kernel, the MLX-graph twins do everything

_DTYPES = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat"}


@dataclass(frozen=True)
class Source:
    """A kernel in a form that both GPUs' compilers take, but for the prelude.

    Attributes
    ----------
    name : of the kernel; what it was built for is added to it.
    inputs, outputs : names of the arrays, as the body uses them.
    defines : what is known when it is built.
    headers : files of ``source/`` with the functions that the body calls, in order.
    body : the body's text.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    defines: tuple[tuple[str, int | str], ...]
    headers: tuple[str, ...]
    body: str

    @property
    def built_name(self) -> str:
        """The name with all that tells this build from others: MLX keeps compiled kernels by name."""
        parts = [f"{value}" for _, value in self.defines]
        return "_".join(["veloxlab", self.name, *("".join(c if c.isalnum() else "_" for c in p) for p in parts)])

    def header(self, prelude: str) -> str:
        """What comes before the body: definitions, the prelude, the functions."""
        defines = "".join(f"#define {name} {value}\n" for name, value in self.defines)
        return "\n".join([defines, source_file(prelude), *map(source_file, self.headers)])


@cache
def source_file(name: str) -> str:
    """The text of a file of ``source/``."""
    return (files("veloxlab.kernels") / "source" / name).read_text(encoding="utf-8")


def type_name(dtype: mx.Dtype, backend: GpuBackend) -> str:
    """How a kernel for ``backend`` calls ``dtype``."""
    name = _DTYPES[dtype]
    return "__nv_bfloat16" if name == "bfloat" and backend == "cuda" else name


def gpu() -> GpuBackend | None:
    """The GPU that MLX computes on, or None on a CPU or where ``VELOXLAB_KERNELS=0`` forbids kernels."""
    if os.environ.get(SWITCH) == "0":
        return None
    backend = runtime.backend()
    return backend if backend in ("metal", "cuda") else None  # type: ignore[return-value]


@lru_cache(maxsize=512)
def _built(source: Source, backend: GpuBackend) -> Callable[..., list[mx.array]]:
    make = mx.fast.metal_kernel if backend == "metal" else mx.fast.cuda_kernel
    kernel = make(
        name=source.built_name,
        input_names=list(source.inputs),
        output_names=list(source.outputs),
        source=_bare(source.body),
        header=_bare(source.header(f"{backend}.h")),
        ensure_row_contiguous=False,  # a cache's arrays are views of growing buffers: bodies go by their strides
    )
    return cast(Callable[..., list[mx.array]], kernel)


def _bare(text: str) -> str:
    """The text without comments and indents: MLX copies all of it at every launch."""
    lines = (line.partition("//")[0].strip() for line in text.splitlines())
    return "\n".join(filter(None, lines)) + "\n"


def launch(
    source: Source,
    arrays: Mapping[str, mx.array],
    *,
    backend: GpuBackend,
    groups: tuple[int, int, int],
    threads: int,
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[mx.Dtype],
) -> list[mx.array]:
    """Run a kernel on ``groups`` threadgroups of ``threads`` threads; lazy, as any MLX operation."""
    inputs = [arrays[name] for name in source.inputs]
    outputs: list[mx.array] = _built(source, backend)(
        inputs=[_in_device_memory(array) for array in inputs] if backend == "metal" else inputs,
        template=[],
        grid=(groups[0] * threads, groups[1], groups[2]),
        threadgroup=(threads, 1, 1),
        output_shapes=list(shapes),
        output_dtypes=list(dtypes),
    )
    return outputs


def _in_device_memory(array: mx.array) -> mx.array:
    """The same elements at the same strides, in an array that MLX does not put in Metal's ``constant`` address space.

    It does so with fewer than 8 elements, and a body's pointers are to one space. A last axis of stride 0 adds some.
    """
    return (
        array if array.size >= _CONSTANT_BELOW else mx.broadcast_to(array[..., None], (*array.shape, _CONSTANT_BELOW))
    )
