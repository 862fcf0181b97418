"""The differences between devices that run kernels, and the launch of kernels."""

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
    """All that differs between devices.

    For attention: ``attention`` returns the kernel of a call or None, as `veloxlab.kernels.attend.attend_kernel`;
    ``together`` runs the prepared calls of all entries of a batch, and ``write`` writes tokens into an evaluated
    buffer, as `veloxlab.kernels.cpu.call.together` and `veloxlab.kernels.cpu.expand.write`. For vectors: ``build``
    makes a function of a `Source`; on a device without text ``run`` runs a kernel eagerly and returns its outputs.
    """

    name: str  # as `veloxlab.runtime.backend` gives it
    attention: Callable[[Queries, Tokens, Any], AttentionKernel | None]
    types: Mapping[mx.Dtype, str]  # names of types in the text of a kernel
    build: Callable[[Source], Built] | None = None
    together: Callable[[Sequence[Any], Queries, Sequence[Any], Sequence[int]], Answer] | None = None
    write: Callable[[Reader | mx.array, mx.array, int, int, bool], None] | None = None
    run: Callable[[VectorKernel, Sequence[mx.array]], list[mx.array]] | None = None
    shared_bytes: int = 0  # memory that the threads of a group share
    groups: int = 0  # threadgroups of attention that fill the device
    table_words: int = 0  # most words of 4 bytes of it for the tables of codes
    large_bytes: Callable[[], int] = lambda: 0  # more of it if a threadgroup has a processor alone,
    large: str = "threadgroup {kind} {name}[{count}];"  # and the declaration of an array there
    pair_words: int = 1  # words that a pair of levels takes there: 1 in half precision, 2 in float32
    shares: tuple[int, int] = (1, 1)  # threads of the matrix unit that share a key, and a value
    product_tokens: int = 0  # whose scores a product of the matrix unit gives
    points_each: int = 1  # points of a codebook search in the registers of a simdgroup
    least_size: int = 0  # least elements of an input: a smaller one is repeated along a last axis of stride 0
    expanded_bytes: int = 16 << 20  # most bytes of decoded keys and values, if KV heads can be read separately
    expanded_tokens: int = 2048  # tokens of a layer that are decoded together
    joins: bool = False  # whether attention writes the newest token into the window
    knows_last: bool = False  # whether a threadgroup can tell that it is the last of several
    tried: bool = True  # whether a kernel is compared with its reference before it is used
    lazy: bool = True  # whether outputs are lazy; otherwise a launch evaluates its inputs


def suited(inputs: list[mx.array], backend: Backend) -> list[mx.array]:
    """Inputs of a kernel in a form that the back end takes."""
    least = backend.least_size
    if not least:
        return inputs
    return [x if x.size >= least else mx.broadcast_to(x[..., None], (*x.shape, least)) for x in inputs]


def few_numbers(numbers: Sequence[int]) -> mx.array:
    """A few whole numbers that change, as the input of a kernel ``[n]`` uint32.

    They are joined from arrays of 8 bytes, which an NVIDIA GPU reads in place. For a larger array from Python the GPU
    moves the memory page, which takes 150 µs.
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
    """The number of different kernels that this process has built."""
    return _built.cache_info().misses


def vectors_source(kernel: VectorKernel, backend: Backend, *given: mx.array) -> Source:
    """The source of a kernel of vectors, for arrays of these types."""
    assert kernel.file is not None
    which = backend, *kernel.types_of(given)
    if which not in kernel.sources:
        defines: dict[str, int | str | mx.Dtype] = {**kernel.defines}
        defines |= {name: given[i].dtype for name, i in kernel.types.items()}
        defines |= {"THREADS": kernel.threads, "VECTORS": kernel.at_once}
        kernel.sources[which] = Source(
            name=kernel.name,
            inputs=(*kernel.given, *kernel.tables, *kernel.transient),
            outputs=kernel.outputs or tuple(kernel.rows),
            defines=tuple((n, backend.types[v] if isinstance(v, mx.Dtype) else v) for n, v in defines.items()),
            headers=kernel.headers,
            body=Template(source_file(kernel.file)).substitute(kernel.texts),
        )
    return kernel.sources[which]


def vectors_key(kernel: VectorKernel, backend: Backend, *given: mx.array) -> Hashable | None:
    """The key of a kernel for arrays of these types; each key is compared with the reference separately.

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
    """Run a kernel: each of its `rows` ``[B, H, S, numbers]``. Given arrays may be views, and are not empty."""
    if backend.run is not None:
        return dict(zip(kernel.rows, backend.run(kernel, given), strict=True))
    lead, rows = given[0].shape[:-1], kernel.rows.values()
    sequences, tokens = (math.prod(lead[:-1]), lead[-1]) if kernel.of_head else (1, math.prod(lead))
    transient = [made() for made in kernel.transient.values()]
    written = launch(
        vectors_source(kernel, backend, *given),
        suited([*given, *kernel.tables.values(), *transient], backend),
        backend=backend,
        groups=(sequences * -(-tokens // kernel.at_once), kernel.spans, 1),
        threads=kernel.threads,
        shapes=[(*lead, count) for count, _ in rows],
        types=[dtype for _, dtype in rows],
    )
    return dict(zip(kernel.rows, written, strict=True))
