"""Kernels of vectors ``[B, H, S, ·]``: one launch writes a row of each output for every vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from veloxlab.kernels.text import SIMD, Source

THREADS = 128  # of a threadgroup
IN_LANES = ("simd.h", "lanes.h")  # headers of kernels that keep a vector in the registers of a simdgroup's lanes
_MOST_EACH = 32  # most numbers of a vector in the registers of a lane
_WORD_BITS = 32

Loss = Callable[[Mapping[str, mx.array], mx.array], mx.array]  # of outputs, and of their input


@dataclass(frozen=True, eq=False)
class VectorKernel:
    """One such kernel. A type in ``defines`` becomes the back end's name of the type.

    ``variant`` distinguishes kernels of one name, for back ends that do not read text. ``types`` are definitions by the
    type of a given array: name, and index of the array. With ``whole_numbers`` the trial has whole numbers, because
    results for others depend on rounding. A search can have several results that are equally good. Such a kernel has a
    ``loss``, and is right if it loses no more than its reference.
    """

    name: str  # of the kernel, for people and profilers
    file: str | None  # of ``source/``, with the body; None for a kernel that only CPUs have
    given: tuple[str, ...]  # names of the given arrays in the body, [B, H, S, ·]
    rows: Mapping[str, tuple[int, mx.Dtype]]  # by output: the number of values for a vector, and their type
    at_once: int = 1  # vectors of a threadgroup
    of_head: bool = False  # whether these are tokens of one head of one sequence
    defines: Mapping[str, int | str | mx.Dtype] = field(default_factory=dict)  # constants of the build
    variant: Mapping[str, Any] = field(default_factory=dict)
    types: Mapping[str, int] = field(default_factory=lambda: {"IN_TYPE": 0})
    headers: tuple[str, ...] = IN_LANES  # files of ``source/`` that the body needs
    texts: Mapping[str, str] = field(default_factory=dict)  # replacements of each ``$name`` in the body
    tables: Mapping[str, mx.array] = field(default_factory=dict)  # further inputs, the same for all vectors
    # more of them on a GPU, made for each launch, because for all layers they would take too much memory
    transient: Mapping[str, Callable[[], mx.array]] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()  # names of the outputs in the body, if they differ from those of `rows`
    spans: int = 1  # threadgroups that share a vector
    threads: int = THREADS  # of a threadgroup
    whole_numbers: bool = False
    loss: Loss | None = None
    sources: dict[tuple[object, ...], Source] = field(default_factory=dict, init=False, repr=False)  # what was built

    def types_of(self, given: Sequence[mx.array]) -> tuple[mx.Dtype, ...]:
        """The types of these arrays that `types` names."""
        return tuple(given[i].dtype for i in self.types.values())


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
    """Row 1 of the m-point Hartley matrix times 1/√dim, for dim = m·2^k with m odd; Metal's own cosine is inexact."""
    odd = dim // (dim & -dim)
    angles = [2 * math.pi * i / odd for i in range(odd)]
    return ", ".join(f"{(math.cos(angle) + math.sin(angle)) / math.sqrt(dim)!r}f" for angle in angles)
