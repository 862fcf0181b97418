"""Kernels that take vectors ``[B, H, S, ·]`` and write, in one launch, a row of each output for every vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from string import Template
from typing import Any

import mlx.core as mx

from veloxlab.kernels.backend import SIMD, Backend, Source, launch, source_file, suited

THREADS = 128  # of a threadgroup
IN_LANES = ("simd.h", "lanes.h")  # headers of kernels that keep a vector in the registers of a simdgroup's lanes
_MOST_EACH = 32  # numbers of a vector that a lane keeps there
_WORD_BITS = 32

Loss = Callable[[Mapping[str, mx.array], mx.array], mx.array]  # of outputs, and of the array that they are made of


@dataclass(frozen=True, eq=False)
class VectorKernel:
    """One such kernel. Of its ``defines`` a type stands for the back end's name of it.

    ``variant`` is what else tells it from others of its name, for back ends that do not read text. ``types`` are
    definitions that are the type of a given array: the name of each, and which array. If it is to be tried on
    ``whole_numbers``, its answer to others would depend on rounding. Of answers that are as good, to rounding, any may
    be found by a search that says what is lost by one, its ``loss``: no more may be lost than by the reference's.
    """

    name: str  # of the kernel, for people and profilers
    file: str | None  # of ``source/``, with the body; None for a kernel that only CPUs have
    given: tuple[str, ...]  # names that the body has for the arrays that the kernel is called with, [B, H, S, ·]
    rows: Mapping[str, tuple[int, mx.Dtype]]  # by output: the numbers that it has for a vector, and their type
    at_once: int = 1  # vectors of a threadgroup
    defines: Mapping[str, int | str | mx.Dtype] = field(default_factory=dict)  # what is known when it is built
    variant: Mapping[str, Any] = field(default_factory=dict)
    types: Mapping[str, int] = field(default_factory=lambda: {"IN_TYPE": 0})
    headers: tuple[str, ...] = IN_LANES  # files of ``source/`` that the body needs
    texts: Mapping[str, str] = field(default_factory=dict)  # what is put in the place of each ``$name`` of the body
    tables: Mapping[str, mx.array] = field(default_factory=dict)  # further inputs, the same for all vectors
    outputs: tuple[str, ...] = ()  # names that the body has for the outputs, where they are not those of `rows`
    spans: int = 1  # threadgroups that share a vector
    threads: int = THREADS  # of a threadgroup
    whole_numbers: bool = False
    loss: Loss | None = None
    _sources: dict[tuple[object, ...], Source] = field(default_factory=dict, init=False, repr=False)

    def source(self, backend: Backend, *given: mx.array) -> Source:
        """What is built for arrays of these types."""
        assert self.file is not None
        which = backend, *[given[i].dtype for i in self.types.values()]
        if which not in self._sources:
            types = {name: given[i].dtype for name, i in self.types.items()}
            defines = {**self.defines, **types, "THREADS": self.threads, "VECTORS": self.at_once}
            self._sources[which] = Source(
                name=self.name,
                inputs=(*self.given, *self.tables),
                outputs=self.outputs or tuple(self.rows),
                defines=tuple((n, backend.types[v] if isinstance(v, mx.Dtype) else v) for n, v in defines.items()),
                headers=self.headers,
                body=Template(source_file(self.file)).substitute(self.texts),
            )
        return self._sources[which]

    def key(self, backend: Backend, *given: mx.array) -> Hashable | None:
        """What tells kernels apart that have to show, each for itself, that they are right.

        None where the back end does not have the kernel, for arrays of these types.
        """
        which = backend, *[given[i].dtype for i in self.types.values()]
        if which in self._sources:
            return self._sources[which], backend
        if (self.file is None and backend.run is None) or not all(dtype in backend.types for dtype in which[1:]):
            return None
        if backend.run is None:
            return self.source(backend, *given), backend
        shapes = tuple((array.dtype, array.shape[-1]) for array in given)
        return self.name, tuple(self.variant.items()), tuple(self.rows.items()), shapes, backend

    def __call__(self, backend: Backend, *given: mx.array) -> dict[str, mx.array]:
        """Each of `rows`, ``[B, H, S, numbers]``. Given arrays are views with any strides, and not empty."""
        if backend.run is not None:
            return dict(zip(self.rows, backend.run(self, given), strict=True))
        lead, rows = given[0].shape[:-1], self.rows.values()
        written = launch(
            self.source(backend, *given),
            suited([*given, *self.tables.values()], backend),
            backend=backend,
            groups=(-(-math.prod(lead) // self.at_once), self.spans, 1),
            threads=self.threads,
            shapes=[(*lead, count) for count, _ in rows],
            types=[dtype for _, dtype in rows],
        )
        return dict(zip(self.rows, written, strict=True))


def words_per_row(count: int, bits: int) -> int:
    """uint32 words that hold ``count`` codes of ``bits`` bits each."""
    return -(-count * bits // _WORD_BITS)


def lanes(dim: int) -> int:
    """Lanes that share a vector; as in ``lanes.h``."""
    return min(dim & -dim, SIMD)


def fits_lanes(dim: int) -> bool:
    """Whether vectors of ``dim`` = m·2^k numbers, m odd, fit the registers of their lanes: 2^k of them, 32 at most."""
    return 0 < dim <= _MOST_EACH * lanes(dim)


def hartley_row(dim: int) -> str:
    """Row 1 of the m-point Hartley matrix by 1/√dim, for dim = m·2^k with m odd; Metal's own cosine is a coarse one."""
    odd = dim // (dim & -dim)
    angles = [2 * math.pi * i / odd for i in range(odd)]
    return ", ".join(f"{(math.cos(angle) + math.sin(angle)) / math.sqrt(dim)!r}f" for angle in angles)
