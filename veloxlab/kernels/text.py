"""The text of a kernel, and its build by MLX.

A kernel's body is written once, in the common subset of Metal and CUDA with Metal's names; ``source/cuda.h`` and
``source/metal.h`` define what differs. Constants of the build (widths, dimensions) are ``#define``s, so that the
compiler unrolls loops. A kernel is built once for each set of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from importlib.resources import files
from typing import Any

import mlx.core as mx

from veloxlab.errors import InputError
from veloxlab.kernels.compiled import Kernel, beside_text, keep
from veloxlab.store import kept_in, make_folder, write_together

SIMD = 32  # threads of a simdgroup (Metal) or warp (CUDA)

Built = Callable[..., list[mx.array]]  # called as the kernels that ``mx.fast.metal_kernel`` makes


@dataclass(frozen=True)
class Source:
    """The text of a kernel for all back ends, without the prelude."""

    name: str  # of the kernel, for people and profilers
    inputs: tuple[str, ...]  # names of the arrays, as the body uses them
    outputs: tuple[str, ...]
    defines: tuple[tuple[str, int | str], ...]  # constants of the build
    headers: tuple[str, ...]  # files of ``source/`` with the functions that the body calls, in order
    body: str
    large_bytes: int = 0  # of threadgroup memory that the launch allocates

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.name, self.defines, self.body))

    @cached_property
    def built(self) -> dict[Hashable, Built]:
        """The functions that run it and all equal ones, by back end: a launch looks here first."""
        return _functions_of(self)

    def header(self, prelude: str) -> str:
        """The text before the body: definitions, the prelude, the functions."""
        defines = "".join(f"#define {name} {value}\n" for name, value in self.defines)
        return "\n".join([defines, source_file(prelude), *map(source_file, self.headers)])


@lru_cache(maxsize=512)
def _functions_of(_: Source) -> dict[Hashable, Built]:
    return {}


@cache
def source_file(name: str) -> str:
    """The text of a file of ``source/``."""
    return (files("veloxlab.kernels") / "source" / name).read_text(encoding="utf-8")


def build_with_mlx(language: str, source: Source) -> Built:
    """A kernel of ``mx.fast``, in ``"metal"`` or ``"cuda"``.

    MLX caches compiled kernels by name, so the name has a checksum of the text.
    """
    body, header = _bare(source.body), _bare(source.header(f"{language}.h"))
    beside = beside_text() if language == "cuda" else ""
    checksum = hashlib.sha256((header + body + beside).encode()).hexdigest()[:16]
    if language == "cuda":
        body, header = _included(source, body, header, checksum)
    name = f"veloxlab_{source.name}_{checksum}"
    large = {"shared_memory": source.large_bytes} if source.large_bytes else {}
    kernel: Built = getattr(mx.fast, f"{language}_kernel")(
        name=name,
        input_names=list(source.inputs),
        output_names=list(source.outputs),
        source=body,
        header=header,
        **large,
        ensure_row_contiguous=False,  # a cache's arrays are views of growing buffers: bodies use their strides
    )
    if language != "cuda":
        return kernel

    def first(*, inputs: list[mx.array], output_dtypes: Sequence[mx.Dtype], **given: Any) -> list[mx.array]:
        keep(Kernel(name, source.inputs, source.outputs, header, body), inputs, output_dtypes)
        source.built.update(dict.fromkeys(source.built, kernel))  # later launches need not come here
        return kernel(inputs=inputs, output_dtypes=output_dtypes, **given)

    return first


def _included(source: Source, body: str, header: str, checksum: str) -> tuple[str, str]:
    """Body and header that include the text from files in the user's cache folder, if these can be written.

    At every launch MLX copies a kernel's text and hashes it, which for 30 KB takes longer than the rest. MLX searches
    the body for the names of shapes and strides.
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
