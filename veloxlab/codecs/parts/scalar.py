"""Levels of scalar codes by arithmetic in the place of a table.

A gather on a CPU takes 5 ns a value. A polynomial, fused into one pass by MLX, takes 0.6 for sixteen levels: through
the levels of a narrow symmetric codebook there is one that is exact to the rounding of float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import groupby
from typing import Literal, NamedTuple

import mlx.core as mx
import numpy as np

from veloxlab.codecs.parts.codebooks import Codebook, gaussian_codebook, sphere_codebook
from veloxlab.codecs.parts.packing import WIDEST, check_word, pack, spread, unpack, words_per_row
from veloxlab.errors import InputError
from veloxlab.kernels.readers import planned

_MOST = 16  # levels: sums of the powers of more are not exact, and cost what the gather does
_ROUNDING = 1e-6  # of a few steps in float32, beside the largest level


def polynomial(levels: np.ndarray) -> Callable[[mx.array], mx.array] | None:
    """A function from codes ``[...]``, of any unsigned type, to ``levels[codes]`` in float32, or None.

    It is None where the ``levels`` ``[2**b]`` are too many, or not opposite to one another, so that no odd polynomial
    of ``2**(b-1)`` terms goes through them.
    """
    count = len(levels)
    place = (2 * np.arange(count) - count + 1) / max(count - 1, 1)  # of each code, from -1 to 1
    if not 2 <= count <= _MOST or np.abs(levels + levels[::-1]).max() > _ROUNDING * np.abs(levels).max():
        return None
    positive = place[count // 2 :]
    terms = np.linalg.solve(np.vander(positive**2), levels[count // 2 :] / positive)
    numbers = mx.array(np.array([2 / (count - 1), *terms], np.float32))
    mx.eval(numbers)
    evaluate, given = _odd_polynomial(len(terms)), list(numbers)

    def valued(codes: mx.array) -> mx.array:
        return evaluate(codes, *given)

    found = np.array(valued(mx.arange(count)))
    return valued if np.abs(found - levels).max() <= _ROUNDING * np.abs(levels).max() else None


@cache
def _odd_polynomial(terms: int) -> Callable[..., mx.array]:
    """Fused arithmetic for any polynomial of so many terms: it is compiled once, and takes its numbers as arrays.

    For shapes that are known: MLX's code for any shape is not vectorised.
    """

    @mx.compile
    def evaluated(codes: mx.array, step: mx.array, first: mx.array, *rest: mx.array) -> mx.array:
        x = codes.astype(mx.float32) * step - 1.0
        square, total = x * x, first
        for term in rest:
            total = total * square + term
        return total * x

    return evaluated


CodebookName = Literal["sphere", "gaussian"]
ScaleName = Literal["norm", "mse", "unbiased"]


def check_scale(scale: str) -> None:
    """Raise `InputError` unless ``scale`` is a `ScaleName`."""
    check_word("scale", scale, "unbiased", "mse", "norm")


def scale_factor(scale: ScaleName, y: mx.array, quantized: mx.array) -> mx.array:
    """What to multiply ``quantized`` with to stand for ``y``, both ``[..., D]`` with ``‖y‖ = √D``: ``[..., 1]``.

    ``"norm"`` is 1, ``"unbiased"`` makes inner products right on average, ``"mse"`` makes the squared error least.
    """
    dim = y.shape[-1]
    if scale == "norm":
        return mx.ones((*y.shape[:-1], 1))
    inner = (y * quantized).sum(axis=-1, keepdims=True)
    # a zero vector's codes say nothing: its root-mean-square of 0 makes the scale 0, if the factor is finite
    inner = mx.where(inner == 0, float(dim), inner)
    if scale == "unbiased":
        return dim / inner
    return inner / mx.square(quantized).sum(axis=-1, keepdims=True)


@dataclass(frozen=True)
class ScalarQuantizer:
    """Each of ``dim`` unit-variance coordinates is replaced by the nearest of ``2**bits`` levels.

    ``codebook`` is ``"sphere"`` (exact for a rotated vector of ``dim`` coordinates) or ``"gaussian"`` (its limit).
    """

    dim: int
    bits: int
    codebook: CodebookName = "sphere"

    def __post_init__(self) -> None:
        _ = self.table  # an impossible width or name is refused here, not at the first token

    @property
    def table(self) -> Codebook:
        """The codebook that is used."""
        check_word("codebook", self.codebook, "sphere", "gaussian")
        return sphere_codebook(self.bits, self.dim) if self.codebook == "sphere" else gaussian_codebook(self.bits)

    @property
    def boundaries(self) -> mx.array:
        """Between neighbouring levels ``[2**bits - 1]``, float32."""
        return _tables(self)[0]

    @property
    def levels(self) -> mx.array:
        """Ascending ``[2**bits]``, float32."""
        return _tables(self)[1]

    @property
    def words(self) -> int:
        """uint32 words that one vector's codes take."""
        return words_per_row(self.dim, self.bits)

    @property
    def nbytes(self) -> int:
        """Bytes of the tables, shared by every layer of a process."""
        return sum(table.nbytes for table in _tables(self))

    def assign(self, y: mx.array) -> mx.array:
        """Index of the nearest level of each coordinate of ``y`` ``[..., dim]``."""
        boundaries, _, _ = _tables(self)
        return mx.searchsorted(boundaries, y)

    def levels_of(self, codes: mx.array) -> mx.array:
        """Level of each code, ``[..., dim]``."""
        return mx.take(_tables(self)[1], codes)

    def pack(self, codes: mx.array) -> mx.array:
        """Codes ``[..., dim]`` to words ``[..., words]``."""
        return pack(codes, self.bits)

    def expand(self, words: mx.array) -> mx.array:
        """Words ``[..., words]`` to levels ``[..., dim]``, float32.

        Where no polynomial goes through them, several are looked up at once: on a CPU a gather costs the same for one
        float as for four.
        """
        valued = _polynomial(self)
        if valued is not None:
            return valued(spread(words, self.bits, self.dim))
        _, _, joint = _tables(self)
        together = joint.shape[-1]
        index = unpack(words, self.bits, self.dim, together)
        levels = mx.take(joint, index, axis=0).reshape(*words.shape[:-1], index.shape[-1] * together)
        return levels[..., : self.dim]


@lru_cache
def _polynomial(quantizer: ScalarQuantizer) -> Callable[[mx.array], mx.array] | None:
    return polynomial(quantizer.table.levels)


_PAIRED_BITS = 4  # up to which kernels read two codes at once, from a table of at most 256 pairs


@lru_cache
def paired_levels(quantizer: ScalarQuantizer) -> tuple[int, mx.array]:
    """How kernels read the codes: the width of an index, and the levels ``[2**width, 2 or 1]`` that it stands for."""
    together = 2 if quantizer.bits <= _PAIRED_BITS else 1
    return quantizer.bits * together, paired(quantizer.table.levels, quantizer.bits)


def paired(levels: np.ndarray, bits: int) -> mx.array:
    """Levels ``[2**bits]``, of two neighbouring codes at once ``[4**bits, 2]`` where the codes are narrow, float32."""
    table = mx.array(_joint(levels, bits, 2 if bits <= _PAIRED_BITS else 1).astype(np.float32))
    mx.eval(table)
    return table


def _joint(levels: np.ndarray, bits: int, together: int) -> np.ndarray:
    """Levels of every combination of ``together`` neighbouring codes ``[2**(bits·together), together]``."""
    index = np.arange(1 << (bits * together))[:, None] >> (bits * np.arange(together)) & ((1 << bits) - 1)
    return np.asarray(levels[index])


JOINT_INDEX_BITS = 12  # a joint table stays under 64 KB; at 16 bits it would be 1.4 times faster, and 2 MB


@lru_cache
def _tables(quantizer: ScalarQuantizer) -> tuple[mx.array, mx.array, mx.array]:
    """Boundaries, levels, and the levels of every combination of neighbouring codes ``[2**(bits·g), g]``."""
    table, bits = quantizer.table, quantizer.bits
    together = 1
    while 2 * together * bits <= JOINT_INDEX_BITS and together < 8:
        together *= 2
    joint_levels = _joint(table.levels, bits, together)
    arrays = tuple(mx.array(a.astype(np.float32)) for a in (table.boundaries, table.levels, joint_levels))
    mx.eval(*arrays)
    boundaries, levels, joint = arrays
    return boundaries, levels, joint


class PlanTables(NamedTuple):
    """A bit plan as `veloxlab.kernels.encode.plan_kernel` takes it; see there."""

    first_bits: mx.array
    first_codes: mx.array
    boundaries: mx.array
    levels: mx.array


@dataclass(frozen=True)
class PlannedQuantizer:
    """Coordinate ``i``, of unit variance, is replaced by the nearest of the ``2**widths[i]`` Gaussian levels.

    A width of 0 keeps nothing: the level is 0. All codes of a vector lie in one bit string, in order and without a gap,
    LSB first, padded at its end only. Every layer has a plan of its own: its tables are kept here.
    """

    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        wrong = [w for w in self.widths if not 0 <= w <= WIDEST]
        if wrong:
            raise InputError(f"A coordinate of {wrong[0]} bits cannot be packed: give every one 0 to {WIDEST}.")

    @property
    def words(self) -> int:
        """uint32 words that one vector's codes take."""
        return words_per_row(sum(self.widths), 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the tables; of those that kernels take, where one has run."""
        kernels: list[mx.array] = [self.kernel_plan] if "kernel_plan" in vars(self) else []
        kernels += self.encoder_tables if "encoder_tables" in vars(self) else ()
        return sum(table.nbytes for table in (*self._tables, *kernels))

    def assign(self, y: mx.array) -> mx.array:
        """Index of the nearest level of each coordinate of ``y`` ``[..., dim]``."""
        parts, start = [], 0
        for width, run in groupby(self.widths):
            part = y[..., start : (start := start + len(list(run)))]
            unit = _tables(ScalarQuantizer(0, width, "gaussian"))[0] if width else mx.array([], mx.float32)
            parts.append(mx.searchsorted(unit, part) if width else mx.zeros(part.shape, mx.uint32))
        return mx.concatenate(parts, axis=-1).astype(mx.uint32)

    def levels_of(self, codes: mx.array) -> mx.array:
        """Level of each code, ``[..., dim]``."""
        levels, first, _, _, _ = self._tables
        return mx.take(levels, codes + first)

    def pack(self, codes: mx.array) -> mx.array:
        """Codes ``[..., dim]`` to words ``[..., words]``."""
        _, _, word, shift, _ = self._tables
        empty = mx.zeros((*codes.shape[:-1], self.words + 1), mx.uint32)
        if codes.size == 0:
            return empty[..., :-1]
        placed = codes.astype(mx.uint64) << shift  # in its word and, where it straddles, the next
        low, high = placed.astype(mx.uint32), (placed >> 32).astype(mx.uint32)
        return empty.at[..., word].add(low).at[..., word + 1].add(high)[..., :-1]  # disjoint bits: a sum is their union

    def expand(self, words: mx.array) -> mx.array:
        """Words ``[..., words]`` to levels ``[..., dim]``, float32."""
        _, _, word, shift, mask = self._tables
        if words.size == 0:
            return mx.zeros((*words.shape[:-1], len(self.widths)))
        following = mx.take(words, mx.minimum(word + 1, self.words - 1), axis=-1).astype(mx.uint64) << 32
        both = mx.take(words, word, axis=-1).astype(mx.uint64) | following
        return self.levels_of(((both >> shift) & mask).astype(mx.uint32))

    @cached_property
    def _tables(self) -> tuple[mx.array, mx.array, mx.array, mx.array, mx.array]:
        """All levels of the widths in use, and for each coordinate: its first level, its word, its shift, its mask."""
        widths = np.array(self.widths)
        first: dict[int, int] = {}
        levels: list[float] = []
        for width in sorted(set(self.widths)):
            first[width] = len(levels)
            levels += list(gaussian_codebook(width).levels) if width else [0.0]
        offset = np.cumsum(widths) - widths
        word = np.minimum(offset // 32, max(self.words - 1, 0))  # a tail of no bits begins past the last word
        arrays = (
            mx.array(np.array(levels, np.float32)),
            mx.array(np.array([first[w] for w in self.widths], np.uint32)),
            mx.array(word.astype(np.uint32)),
            mx.array((offset % 32).astype(np.uint64)),
            mx.array((1 << widths) - 1).astype(mx.uint64),
        )
        mx.eval(*arrays)
        return arrays

    @cached_property
    def kernel_plan(self) -> mx.array:
        """Widths and levels for `veloxlab.kernels.readers.PlanReader`."""
        levels, first, _, _, _ = self._tables
        return planned(self.widths, np.array(first), np.array(levels))

    @cached_property
    def encoder_tables(self) -> PlanTables:
        """Tables of the widths in use at their places among those of all, and where codes lie in a row of bits."""
        boundaries, levels = (np.zeros((2 << WIDEST) - 1, np.float32) for _ in range(2))
        for width in set(self.widths) - {0}:
            table, first = gaussian_codebook(width), (1 << width) - 1
            boundaries[first : first + len(table.boundaries)] = table.boundaries
            levels[first : first + len(table.levels)] = table.levels
        ends = np.cumsum(self.widths)
        first_codes = np.searchsorted(ends, 32 * np.arange(self.words), side="right")
        first_bits = np.concatenate([[0], ends])
        positions = mx.array(first_bits.astype(np.uint32)), mx.array(first_codes.astype(np.uint32))
        tables = PlanTables(*positions, mx.array(boundaries), mx.array(levels))
        mx.eval(*tables)
        return tables
