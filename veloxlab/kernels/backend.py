"""What differs between the machines that run kernels, and how a kernel is launched."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from string import Template
from typing import Any

import mlx.core as mx

from veloxlab.kernels.call import Answer, AttentionKernel, Queries, Tokens
from veloxlab.kernels.readers import Reader
from veloxlab.kernels.text import Built, Source, source_file
from veloxlab.kernels.vectors import VectorKernel


@dataclass(frozen=True, eq=False)
class Backend:
    """All that differs between the machines that run kernels.

    Of attention: ``attention`` gives the kernel of a call, or None, as `veloxlab.kernels.attend.attend_kernel`;
    ``together`` makes several prepared calls at once, one of each entry of a batch, and ``write`` writes tokens into a
    buffer that is there, as `veloxlab.kernels.cpu.call.together` and `veloxlab.kernels.cpu.expand.write`.
    Of vectors: ``build`` makes a `Source` into a function that runs it; where nothing is built of text, ``run`` runs a
    kernel on evaluated arrays, at once, and gives each output.
    """

    name: str  # as `veloxlab.runtime.backend` gives it
    attention: Callable[[Queries, Tokens, Any], AttentionKernel | None]
    types: Mapping[mx.Dtype, str]  # what a kernel's text calls each type of number
    build: Callable[[Source], Built] | None = None
    together: Callable[[Sequence[Any], Queries, Sequence[Any], Sequence[int]], Answer] | None = None
    write: Callable[[Reader | mx.array, mx.array, int, int, bool], None] | None = None
    run: Callable[[VectorKernel, Sequence[mx.array]], list[mx.array]] | None = None
    shared_bytes: int = 0  # memory that the threads of a group share
    groups: int = 0  # threadgroups of attention that keep the device busy: of more than that, the last wait for others
    table_words: int = 0  # words of 4 bytes of it, at most, for the tables of codes
    large_bytes: Callable[[], int] = lambda: 0  # that a threadgroup gets beside it, where it has a processor alone,
    large: str = "threadgroup {kind} {name}[{count}];"  # and how an array in them is declared
    pair_words: int = 1  # words that a pair of levels takes there: 1 in half precision, 2 in float32
    shares: tuple[int, int] = (1, 1)  # threads of the matrix unit that read a key together, and a value
    points_each: int = 1  # points of a codebook search that a simdgroup has in hand, by the registers of a thread
    least_size: int = 0  # elements of an input, at least: a smaller one is repeated along a last axis of stride 0
    expanded_bytes: int = 16 << 20  # of decoded keys and values that are held at once, if KV heads can be taken apart
    expanded_tokens: int = 2048  # of a layer that are decoded together, where all are
    tried: bool = True  # whether a kernel is compared with its reference before it is used
    lazy: bool = True  # whether outputs are computed when they are asked for; else inputs are evaluated at a launch


def suited(inputs: list[mx.array], backend: Backend) -> list[mx.array]:
    """Inputs of a kernel in a form that the back end takes."""
    least = backend.least_size
    if not least:
        return inputs
    return [x if x.size >= least else mx.broadcast_to(x[..., None], (*x.shape, least)) for x in inputs]


def few_numbers(numbers: Sequence[int]) -> mx.array:
    """Whole numbers as a kernel gets them ``[n]`` uint32, for a few that change.

    They come in pairs, each an array of 8 bytes: a GPU of NVIDIA reads these where they are. The page of a larger array
    that Python has made moves to it when it is read, which takes 150 µs.
    """
    return mx.concatenate([mx.array([*numbers[i : i + 2]], mx.uint32) for i in range(0, len(numbers), 2)])


def launch(
    source: Source,
    inputs: list[mx.array],
    *,
    backend: Backend,
    groups: tuple[int, int, int],
    threads: int,
    shapes: Sequence[tuple[int, ...]],
    types: Sequence[mx.Dtype],
) -> list[mx.array]:
    """Run a kernel on ``groups`` threadgroups of ``threads`` threads; its outputs are of these shapes and types."""
    if not backend.lazy:
        mx.eval(inputs)
    return built(source, backend)(
        inputs=inputs,
        grid=(groups[0] * threads, groups[1], groups[2]),
        threadgroup=(threads, 1, 1),
        output_shapes=shapes,
        output_dtypes=types,
    )


def built(source: Source, backend: Backend) -> Built:
    """The function that runs a kernel, which is built once."""
    made = source.built.get(backend)
    if made is None:
        made = source.built[backend] = _built(source, backend)
    return made


@lru_cache(maxsize=512)
def _built(source: Source, backend: Backend) -> Built:
    assert backend.build is not None
    return backend.build(source)


def built_kernels() -> int:
    """How many kernels this process has built, none twice."""
    return _built.cache_info().misses


def vectors_source(kernel: VectorKernel, backend: Backend, *given: mx.array) -> Source:
    """What is built of a kernel of vectors, for arrays of these types."""
    assert kernel.file is not None
    which = backend, *kernel.types_of(given)
    if which not in kernel.sources:
        defines: dict[str, int | str | mx.Dtype] = {**kernel.defines}
        defines |= {name: given[i].dtype for name, i in kernel.types.items()}
        defines |= {"THREADS": kernel.threads, "VECTORS": kernel.at_once}
        kernel.sources[which] = Source(
            name=kernel.name,
            inputs=(*kernel.given, *kernel.tables),
            outputs=kernel.outputs or tuple(kernel.rows),
            defines=tuple((n, backend.types[v] if isinstance(v, mx.Dtype) else v) for n, v in defines.items()),
            headers=kernel.headers,
            body=Template(source_file(kernel.file)).substitute(kernel.texts),
        )
    return kernel.sources[which]


def vectors_key(kernel: VectorKernel, backend: Backend, *given: mx.array) -> Hashable | None:
    """Identify the kernel that such arrays run: each of these is compared with its reference on its own.

    None if the back end does not have the kernel for arrays of these types.
    """
    types = kernel.types_of(given)
    which = backend, *types
    if which in kernel.sources:
        return kernel.sources[which], backend
    if (kernel.file is None and backend.run is None) or not all(dtype in backend.types for dtype in types):
        return None
    if backend.run is None:
        return vectors_source(kernel, backend, *given), backend
    shapes = tuple((array.dtype, array.shape[-1]) for array in given)
    return kernel.name, tuple(kernel.variant.items()), tuple(kernel.rows.items()), shapes, backend


def run_vectors(kernel: VectorKernel, backend: Backend, *given: mx.array) -> dict[str, mx.array]:
    """Each of the kernel's `rows`, ``[B, H, S, numbers]``. Given arrays are views with any strides, and not empty."""
    if backend.run is not None:
        return dict(zip(kernel.rows, backend.run(kernel, given), strict=True))
    lead, rows = given[0].shape[:-1], kernel.rows.values()
    written = launch(
        vectors_source(kernel, backend, *given),
        suited([*given, *kernel.tables.values()], backend),
        backend=backend,
        groups=(-(-math.prod(lead) // kernel.at_once), kernel.spans, 1),
        threads=kernel.threads,
        shapes=[(*lead, count) for count, _ in rows],
        types=[dtype for _, dtype in rows],
    )
    return dict(zip(kernel.rows, written, strict=True))
