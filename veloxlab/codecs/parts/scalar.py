"""Scalar quantizers: one width for all coordinates, or one for each.

MLX's gather takes 5 ns a value on a CPU. So the levels of a narrow symmetric codebook are computed by a polynomial,
which is exact to the rounding of float32 and takes 0.6 ns for 16 levels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property, lru_cache, partial
from itertools import groupby

import mlx.core as mx
import numpy as np

from veloxlab.codecs.parts import constant
from veloxlab.codecs.parts.codebooks import Codebook, CodebookName, gaussian_codebook, sphere_codebook
from veloxlab.codecs.parts.packing import WIDEST, Layout, Places, pack, packed, unpack, unpack_to_bytes
from veloxlab.kernels.readers import planned
from veloxlab.kernels.vectors import words_per_row

_JOINT_INDEX_BITS = 12  # a joint table stays under 64 KB; at 16 bits it would be 1.4 times faster, and 2 MB
_PAIRED_BITS = 4  # up to which kernels read two codes at once, from a table of at most 256 pairs
_MOST = 16  # levels: polynomials of more are not exact, and as slow as the gather
_ROUNDING = 1e-6  # of a few float32 operations, relative to the largest level


def _polynomial(levels: np.ndarray) -> Callable[[mx.array], mx.array] | None:
    """A function from codes ``[...]``, of any unsigned type, to ``levels[codes]`` in float32.

    None for too many ``levels`` ``[2**b]``, or if no odd polynomial of ``2**(b-1)`` terms goes through them.
    """
    count = len(levels)
    allowed = _ROUNDING * np.abs(levels).max()
    if not 2 <= count <= _MOST or np.abs(levels + levels[::-1]).max() > allowed:
        return None
    positive = ((2 * np.arange(count) - count + 1) / (count - 1))[count // 2 :]  # places of codes are from -1 to 1
    terms = np.linalg.solve(np.vander(positive**2), levels[count // 2 :] / positive)
    valued = partial(_odd_polynomial(len(terms)), given=list(constant(np.array([2 / (count - 1), *terms]))))
    return valued if np.abs(np.array(valued(mx.arange(count))) - levels).max() <= allowed else None


@cache
def _odd_polynomial(terms: int) -> Callable[..., mx.array]:
    """Fused arithmetic for polynomials of this many terms, compiled by shape: MLX vectorises only known shapes."""

    @mx.compile
    def evaluated(codes: mx.array, given: list[mx.array]) -> mx.array:
        step, total, *rest = given
        x = codes.astype(mx.float32) * step - 1.0
        square = x * x
        for term in rest:
            total = total * square + term
        return total * x

    return evaluated


def joint_levels(levels: np.ndarray, bits: int, together: int, parts: int = 1) -> mx.array:
    """Levels of every combination of ``together`` neighbouring codes ``[2**(bits·together), together]``, float32.

    An index has the codes' high parts first, side by side, where each is cut in two ``parts`` that are packed apart.
    """
    index, width = np.arange(1 << (bits * together))[:, None], bits // parts
    codes = np.zeros_like(index)
    for part in reversed(range(parts)):
        own = index >> (width * together * part) >> (width * np.arange(together)) & ((1 << width) - 1)
        codes = codes << width | own
    return constant(levels[codes])


def paired_levels(levels: np.ndarray, bits: int, parts: int = 1) -> tuple[int, mx.array]:
    """The table of a kernel: the width of an index, and the ``levels`` of one code or two ``[2**width, 1 or 2]``."""
    together = 2 if bits <= _PAIRED_BITS else 1
    return bits // parts * together, joint_levels(levels, bits, together, parts)


class ScalarQuantizer:
    """Replaces each of ``dim`` unit-variance coordinates by the nearest of ``2**bits`` levels; see `quantizer_for`.

    Codes are packed whole, or in two halves apart, the high one first: ``fields`` are the arrays' names and widths.
    ``table`` is the codebook, ``boundaries`` and ``levels`` are its own in float32, ``paired`` is of `paired_levels`,
    and ``nbytes`` are those of the tables, shared by every layer of a process.
    """

    def __init__(self, dim: int, table: Codebook, *fields: str) -> None:
        parts, self.bits = len(fields), len(table.levels).bit_length() - 1
        self.dim, self.table, self.fields = dim, table, dict.fromkeys(fields, self.bits // parts)
        self.boundaries, self.levels = constant(table.boundaries), constant(table.levels)
        self.paired = paired_levels(table.levels, self.bits, parts)
        self._polynomial = _polynomial(table.levels) if parts == 1 else None
        together = max(n for n in (1, 2, 4, 8) if n == 1 or n * self.bits <= _JOINT_INDEX_BITS)
        self._joint = joint_levels(table.levels, self.bits, together, parts)
        self.nbytes = sum(array.nbytes for array in (self.boundaries, self.levels, self._joint))
        self.layout: Layout = {name: packed(dim, width) for name, width in self.fields.items()}

    def assign(self, y: mx.array) -> mx.array:
        """Index of the nearest level of each coordinate of ``y`` ``[..., dim]``."""
        return mx.searchsorted(self.boundaries, y)

    def levels_of(self, codes: mx.array) -> mx.array:
        """Level of each code, ``[..., dim]``."""
        return mx.take(self.levels, codes)

    def pack(self, codes: mx.array) -> dict[str, mx.array]:
        """Codes ``[..., dim]`` to words ``[..., words]``."""
        if len(self.fields) == 1:
            return {name: pack(codes, self.bits) for name in self.fields}
        half = self.bits // 2
        parts = codes >> half, codes & ((1 << half) - 1)
        return {name: pack(part, half) for name, part in zip(self.fields, parts, strict=True)}

    def expand(self, arrays: dict[str, mx.array]) -> mx.array:
        """Packed codes to levels ``[..., dim]``, float32: by the polynomial, or several at a time from a table."""
        if self._polynomial is not None:
            return self._polynomial(unpack_to_bytes(arrays[next(iter(self.fields))], self.bits, self.dim))
        together = self._joint.shape[-1]
        high, *low = (unpack(arrays[name], width, self.dim, together) for name, width in self.fields.items())
        index = high << (self.bits // 2 * together) | low[0] if low else high
        return mx.flatten(mx.take(self._joint, index, axis=0), -2)[..., : self.dim]


@lru_cache
def quantizer_for(dim: int, bits: int, codebook: CodebookName = "sphere") -> ScalarQuantizer:
    """The quantizer of a rotated vector of ``dim`` coordinates, exact or for the limit, ``"gaussian"``."""
    table = sphere_codebook(bits, dim) if codebook == "sphere" else gaussian_codebook(bits)
    return ScalarQuantizer(dim, table, "codes")


class PlannedQuantizer:
    """Coordinate ``i``, of unit variance, is replaced by the nearest of the ``2**widths[i]`` Gaussian levels.

    Widths are 0 to 8; with width 0 the level is 0. All codes of a vector are in one bit string of ``words`` uint32, in
    order and without gaps, LSB first. Every layer has its own plan, so the tables are kept here.
    """

    def __init__(self, widths: tuple[int, ...]) -> None:
        self.widths, self.words = widths, words_per_row(sum(widths), 1)
        tables = {w: gaussian_codebook(w).levels if w else np.zeros(1) for w in sorted(set(widths))}
        first = dict(zip(tables, np.cumsum([0, *map(len, tables.values())]), strict=False))
        self._levels = constant(np.concatenate(list(tables.values())))
        self._first = constant(np.array([first[w] for w in widths]), mx.uint32)
        bits = np.array(widths, np.int64)
        self._places = Places(np.cumsum(bits) - bits, bits, self.words)

    @property
    def nbytes(self) -> int:
        """Bytes of the tables, including those of kernels that have run."""
        own = [table for table in vars(self).values() if isinstance(table, mx.array)]
        return sum(t.nbytes for t in (*own, *self._places.arrays, *vars(self).get("encoder_tables", {}).values()))

    def assign(self, y: mx.array) -> mx.array:
        """Index of the nearest level of each coordinate of ``y`` ``[..., dim]``."""
        parts, start = [], 0
        for width, run in groupby(self.widths):
            part = y[..., start : (start := start + len(list(run)))]
            parts.append(quantizer_for(0, width, "gaussian").assign(part) if width else mx.zeros(part.shape, mx.uint32))
        return mx.concatenate(parts, axis=-1).astype(mx.uint32)

    def levels_of(self, codes: mx.array) -> mx.array:
        """Level of each code, ``[..., dim]``."""
        return mx.take(self._levels, codes + self._first)

    def pack(self, codes: mx.array) -> mx.array:
        """Codes ``[..., dim]`` to words ``[..., words]``."""
        return self._places.write(codes)

    def expand(self, words: mx.array) -> mx.array:
        """Words ``[..., words]`` to levels ``[..., dim]``, float32."""
        if words.size == 0:
            return mx.zeros((*words.shape[:-1], len(self.widths)))
        return self.levels_of(self._places.read(words))

    @cached_property
    def kernel_plan(self) -> mx.array:
        """Widths and levels for `veloxlab.kernels.readers.PlanReader`."""
        return planned(self.widths, np.array(self._first), np.array(self._levels))

    @cached_property
    def encoder_tables(self) -> dict[str, mx.array]:
        """Tables for `veloxlab.kernels.encode.plan_kernel`: first bits of codes, boundaries and levels by width."""
        boundaries, levels = (np.zeros((2 << WIDEST) - 1) for _ in range(2))
        for width in set(self.widths) - {0}:
            table, first = gaussian_codebook(width), (1 << width) - 1
            boundaries[first : first + len(table.boundaries)] = table.boundaries
            levels[first : first + len(table.levels)] = table.levels
        ends = np.cumsum(self.widths)
        first_codes = np.searchsorted(ends, 32 * np.arange(self.words), side="right")
        places = {"first_bits": np.array([0, *ends]), "first_codes": first_codes}
        tables = {"boundaries": constant(boundaries), "levels": constant(levels)}
        return tables | {name: constant(array, mx.uint32) for name, array in places.items()}
