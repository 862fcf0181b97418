"""What differs between the machines that run kernels, and how a kernel is built and launched.

A kernel's body is written once, in the subset that Metal and CUDA share, under Metal's names; ``source/cuda.h`` and
``source/metal.h`` supply what differs. What is known when a kernel is built (widths, dimensions) comes as ``#define``,
so that the compiler unrolls by it; a kernel is built once for each set of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import mlx.core as mx

if TYPE_CHECKING:
    from veloxlab.kernels.call import AttentionKernel, Queries, Tokens
    from veloxlab.kernels.readers import Reader
    from veloxlab.kernels.vectors import VectorKernel

SIMD = 32  # threads of a simdgroup (Metal) or warp (CUDA)

Answer = tuple[mx.array, mx.array | None]  # of attention; see `veloxlab.kernels.call.PreparedCall`
Built = Callable[..., list[mx.array]]  # called as the kernels that ``mx.fast.metal_kernel`` makes


@dataclass(frozen=True)
class Source:
    """A kernel in a form that all back ends take, but for the prelude.

    Attributes
    ----------
    name : of the kernel, for people and profilers.
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

    def header(self, prelude: str) -> str:
        """What comes before the body: definitions, the prelude, the functions."""
        defines = "".join(f"#define {name} {value}\n" for name, value in self.defines)
        return "\n".join([defines, source_file(prelude), *map(source_file, self.headers)])


@dataclass(frozen=True, eq=False)
class Backend:
    """All that differs between the machines that run kernels.

    Attributes
    ----------
    name : as `veloxlab.runtime.backend` gives it.
    attention : the kernel of a call of attention, or None; as `veloxlab.kernels.attend.attend_kernel`.
    together : several prepared calls at once, one of each entry of a batch; as `veloxlab.kernels.cpu.call.together`.
    types : what a kernel's text calls each type of number.
    build : makes a `Source` into a function that runs it.
    write : writes tokens into a buffer that is there, where that can be; as `veloxlab.kernels.cpu.expand.write`.
    run : runs a kernel of vectors on evaluated arrays, at once, where nothing is built of text; gives each output.
    shared_bytes : memory that the threads of a group share.
    table_words : words of 4 bytes of it, at most, for the tables of codes.
    pair_words : words that a pair of levels takes there: 1 in half precision, 2 in float32.
    shares : threads of the matrix unit that read a key together, and a value.
    points_each : points of a codebook search that a simdgroup works on at once, by the registers of a thread.
    least_size : elements of an input, at least: a smaller array is repeated along a last axis of stride 0.
    tried : whether a kernel is compared with its reference before it is used.
    lazy : whether outputs are computed when they are asked for. If not, inputs are evaluated before a launch.
    """

    name: str
    attention: Callable[[Queries, Tokens, Any], AttentionKernel | None]
    types: Mapping[mx.Dtype, str]
    build: Callable[[Source], Built] | None = None
    together: Callable[[Sequence[Any], Queries, Sequence[Any], Sequence[int]], Answer] | None = None
    write: Callable[[Reader | mx.array, mx.array, int, int, bool], None] | None = None
    run: Callable[[VectorKernel, Sequence[mx.array]], list[mx.array]] | None = None
    shared_bytes: int = 0
    table_words: int = 0
    pair_words: int = 1
    shares: tuple[int, int] = (1, 1)
    points_each: int = 1
    least_size: int = 0
    tried: bool = True
    lazy: bool = True


@cache
def source_file(name: str) -> str:
    """The text of a file of ``source/``."""
    return (files("veloxlab.kernels") / "source" / name).read_text(encoding="utf-8")


def launch(
    source: Source,
    arrays: Mapping[str, mx.array],
    *,
    backend: Backend,
    groups: tuple[int, int, int],
    threads: int,
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[mx.Dtype],
) -> list[mx.array]:
    """Run a kernel on ``groups`` threadgroups of ``threads`` threads; ``shapes`` and ``dtypes`` are the outputs'."""
    inputs = [arrays[name] for name in source.inputs]
    if backend.least_size:
        inputs = [_at_least(backend.least_size, array) for array in inputs]
    if not backend.lazy:
        mx.eval(inputs)
    return _built(source, backend)(
        inputs=inputs,
        template=[],
        grid=(groups[0] * threads, groups[1], groups[2]),
        threadgroup=(threads, 1, 1),
        output_shapes=list(shapes),
        output_dtypes=list(dtypes),
    )


@lru_cache(maxsize=512)
def _built(source: Source, backend: Backend) -> Built:
    assert backend.build is not None
    return backend.build(source)


def build_with_mlx(language: str, source: Source) -> Built:
    """A kernel of ``mx.fast``, in ``"metal"`` or ``"cuda"``.

    MLX keeps compiled kernels by name, on disk too, so that the name has a checksum of the text.
    """
    body, header = _bare(source.body), _bare(source.header(f"{language}.h"))
    checksum = hashlib.sha256((header + body).encode()).hexdigest()[:16]
    kernel: Built = getattr(mx.fast, f"{language}_kernel")(
        name=f"veloxlab_{source.name}_{checksum}",
        input_names=list(source.inputs),
        output_names=list(source.outputs),
        source=body,
        header=header,
        ensure_row_contiguous=False,  # a cache's arrays are views of growing buffers: bodies go by their strides
    )
    return kernel


def _bare(text: str) -> str:
    """The text without comments and indents: MLX copies all of it at every launch."""
    lines = (line.partition("//")[0].strip() for line in text.splitlines())
    return "\n".join(filter(None, lines)) + "\n"


def _at_least(size: int, array: mx.array) -> mx.array:
    return array if array.size >= size else mx.broadcast_to(array[..., None], (*array.shape, size))
