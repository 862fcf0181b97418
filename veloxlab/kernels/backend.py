"""What differs between the machines that run kernels, and how a kernel is built and launched.

A kernel's body is written once, in the subset that Metal and CUDA share, under Metal's names; ``source/cuda.h`` and
``source/metal.h`` supply what differs. What is known when a kernel is built (widths, dimensions) comes as ``#define``,
so that the compiler unrolls by it; a kernel is built once for each set of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from veloxlab.errors import InputError
from veloxlab.store import kept_in, make_folder, write_together

if TYPE_CHECKING:
    from veloxlab.kernels.call import AttentionKernel, Queries, Tokens
    from veloxlab.kernels.readers import Reader
    from veloxlab.kernels.vectors import VectorKernel

SIMD = 32  # threads of a simdgroup (Metal) or warp (CUDA)

Answer = tuple[mx.array, mx.array | None]  # of attention; see `veloxlab.kernels.call.PreparedCall`
Built = Callable[..., list[mx.array]]  # called as the kernels that ``mx.fast.metal_kernel`` makes


@dataclass(frozen=True)
class Source:
    """A kernel in a form that all back ends take, but for the prelude."""

    name: str  # of the kernel, for people and profilers
    inputs: tuple[str, ...]  # names of the arrays, as the body uses them
    outputs: tuple[str, ...]
    defines: tuple[tuple[str, int | str], ...]  # what is known when it is built
    headers: tuple[str, ...]  # files of ``source/`` with the functions that the body calls, in order
    body: str
    large_bytes: int = 0  # of threadgroup memory that is given at the launch

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.name, self.defines, self.body))

    @cached_property
    def built(self) -> dict[Backend, Built]:
        """What has been made of it, by back end: a launch looks here first."""
        return {}

    def header(self, prelude: str) -> str:
        """What comes before the body: definitions, the prelude, the functions."""
        defines = "".join(f"#define {name} {value}\n" for name, value in self.defines)
        return "\n".join([defines, source_file(prelude), *map(source_file, self.headers)])


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


@cache
def source_file(name: str) -> str:
    """The text of a file of ``source/``."""
    return (files("veloxlab.kernels") / "source" / name).read_text(encoding="utf-8")


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


def build_with_mlx(language: str, source: Source) -> Built:
    """A kernel of ``mx.fast``, in ``"metal"`` or ``"cuda"``.

    MLX keeps compiled kernels by name, on disk too, so that the name has a checksum of the text.
    """
    body, header = _bare(source.body), _bare(source.header(f"{language}.h"))
    checksum = hashlib.sha256((header + body).encode()).hexdigest()[:16]
    if language == "cuda":
        body, header = _included(source, body, header, checksum)
    large = {"shared_memory": source.large_bytes} if source.large_bytes else {}
    kernel: Built = getattr(mx.fast, f"{language}_kernel")(
        name=f"veloxlab_{source.name}_{checksum}",
        input_names=list(source.inputs),
        output_names=list(source.outputs),
        source=body,
        header=header,
        **large,
        ensure_row_contiguous=False,  # a cache's arrays are views of growing buffers: bodies go by their strides
    )
    return kernel


def _included(source: Source, body: str, header: str, checksum: str) -> tuple[str, str]:
    """Body and header that include the text from files of the user's cache, where these can be written.

    At every launch MLX copies a kernel's text and makes a checksum of it: of 30 KB that takes longer than the rest. It
    looks in the body for the names of shapes and strides.
    """
    facts = (f"{name}_{fact}" for name in source.inputs for fact in ("shape", "strides", "ndim"))
    files = {kept_in("kernels") / f"{checksum}_{part}.h": text for part, text in (("body", body), ("header", header))}
    try:
        missing = {path: text.encode() for path, text in files.items() if not path.exists() or path.read_text() != text}
        if missing:
            make_folder(kept_in("kernels"))
            write_together(missing)
    except (InputError, OSError, ValueError):
        return body, header
    body_file, header_file = map(str, files)
    if not header_file.isascii() or any(mark in header_file for mark in '"\\\n'):
        return body, header
    named = " ".join(fact for fact in facts if fact in body)
    return f'// {named}\n#include "{body_file}"\n', f'#include "{header_file}"\n'


def _bare(text: str) -> str:
    """The text without comments and indents."""
    lines = (line.partition("//")[0].strip() for line in text.splitlines())
    return "\n".join(filter(None, lines)) + "\n"
