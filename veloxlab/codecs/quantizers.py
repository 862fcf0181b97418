"""Quantizers of rotated coordinates: the scalar table, the same with bits planned for each coordinate, and the sign
sketch that TurboQuant's `prod` and QJL share.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Literal

import mlx.core as mx
import numpy as np

from veloxlab.codecs.codebooks import Codebook, check_bits, gaussian_codebook, sphere_codebook
from veloxlab.codecs.packing import WIDEST, pack, unpack, words_per_row
from veloxlab.codecs.transforms import haar_matrix
from veloxlab.errors import InputError

CodebookName = Literal["sphere", "gaussian"]
SketchName = Literal["orthogonal", "gaussian"]
GroupLevels = Literal["centres", "ends"]
ScaleName = Literal["norm", "mse", "unbiased"]


def check_scale(scale: str) -> None:
    """Raise `InputError` unless ``scale`` is a `ScaleName`."""
    if scale not in ("norm", "mse", "unbiased"):
        raise InputError(f"Unknown scale {scale!r}: choose 'unbiased', 'mse' or 'norm'.")


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
        if self.codebook == "sphere":
            return sphere_codebook(self.bits, self.dim)
        if self.codebook == "gaussian":
            return gaussian_codebook(self.bits)
        raise InputError(f"Unknown codebook {self.codebook!r}: choose 'sphere' or 'gaussian'.")

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

        Several codes are looked up at once: on a CPU a gather costs the same for one float as for four.
        """
        _, _, joint = _tables(self)
        together = joint.shape[-1]
        index = unpack(words, self.bits, self.dim, together)
        levels = mx.take(joint, index, axis=0).reshape(*words.shape[:-1], index.shape[-1] * together)
        return levels[..., : self.dim]


_PAIRED_BITS = 4  # up to which kernels read two codes at once, from a table of at most 256 pairs


@lru_cache
def paired_levels(quantizer: ScalarQuantizer) -> tuple[int, mx.array]:
    """How kernels read the codes: the width of an index, and the levels ``[2**width, 2 or 1]`` that it stands for."""
    together = 2 if quantizer.bits <= _PAIRED_BITS else 1
    return quantizer.bits * together, paired(quantizer.table.levels, quantizer.bits)


def paired(levels: np.ndarray, bits: int) -> mx.array:
    """Levels ``[2**bits]``, of two neighbouring codes at once ``[4**bits, 2]`` where the codes are narrow, float32."""
    together = 2 if bits <= _PAIRED_BITS else 1
    index = np.arange(1 << (bits * together))[:, None] >> (bits * np.arange(together)) & ((1 << bits) - 1)
    table = mx.array(levels[index].astype(np.float32))
    mx.eval(table)
    return table


JOINT_INDEX_BITS = 12  # a joint table stays under 64 KB; at 16 bits it would be 1.4 times faster, and 2 MB


@lru_cache
def _tables(quantizer: ScalarQuantizer) -> tuple[mx.array, mx.array, mx.array]:
    """Boundaries, levels, and the levels of every combination of neighbouring codes ``[2**(bits·g), g]``."""
    table, bits = quantizer.table, quantizer.bits
    together = 1
    while 2 * together * bits <= JOINT_INDEX_BITS and together < 8:
        together *= 2
    index = np.arange(1 << (bits * together))[:, None] >> (bits * np.arange(together)) & ((1 << bits) - 1)
    arrays = tuple(mx.array(a.astype(np.float32)) for a in (table.boundaries, table.levels, table.levels[index]))
    mx.eval(*arrays)
    boundaries, levels, joint = arrays
    return boundaries, levels, joint


def greedy_bits(
    weights: Sequence[float],
    budget: int,
    *,
    rates: float | Sequence[float] = 4.0,
    least: int = 0,
    most: int = WIDEST,
) -> tuple[int, ...]:
    """Integer water-filling: the widths of total ``budget`` with the least Σ wᵢ·rᵢ^−bᵢ, one bit at a time.

    Each bit goes where it saves most, wᵢ·rᵢ^−bᵢ·(1 − 1/rᵢ); ties to the lowest index. Optimal, since every term is
    convex in its width. With r = 4 and variances as weights it is the rule argmax λᵢ / 4^bᵢ of SpectralQuant; with
    fitted rates it is RateQuant's.

    Parameters
    ----------
    weights : w ≥ 0 of each component.
    budget : bits to give in all.
    rates : r > 1, by which one more bit divides a component's term; one for all, or one each.
    least, most : bounds of each width.

    Raises
    ------
    InputError : the budget does not fit between the bounds.
    """
    count = len(weights)
    each = [float(rates)] * count if isinstance(rates, int | float) else [float(r) for r in rates]
    if not count * least <= budget <= count * most:
        raise InputError(
            f"A budget of {budget} bits does not fit {count} components of {least} to {most} bits each: "
            f"give from {count * least} to {count * most}."
        )
    widths = [least] * count
    saving = [w * r**-least * (1 - 1 / r) for w, r in zip(weights, each, strict=True)]
    heap = [(-s, i) for i, s in enumerate(saving)] if most > least else []
    heapq.heapify(heap)
    for _ in range(budget - count * least):
        saved, i = heapq.heappop(heap)
        widths[i] += 1
        if widths[i] < most:
            heapq.heappush(heap, (saved / each[i], i))
    return tuple(widths)


@dataclass(frozen=True)
class PlannedQuantizer:
    """Coordinate ``i``, of unit variance, is replaced by the nearest of the ``2**widths[i]`` Gaussian levels.

    A width of 0 keeps nothing: the level is 0. All codes of a vector lie in one bit string, in order and without a gap,
    LSB first, padded at its end only.
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
        """Bytes of the tables, shared by every layer of a process."""
        return sum(table.nbytes for table in _planned_tables(self))

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
        levels, first, _, _, _ = _planned_tables(self)
        return mx.take(levels, codes + first)

    def pack(self, codes: mx.array) -> mx.array:
        """Codes ``[..., dim]`` to words ``[..., words]``."""
        _, _, word, shift, _ = _planned_tables(self)
        empty = mx.zeros((*codes.shape[:-1], self.words + 1), mx.uint32)
        if codes.size == 0:
            return empty[..., :-1]
        placed = codes.astype(mx.uint64) << shift  # in its word and, where it straddles, the next
        low, high = placed.astype(mx.uint32), (placed >> 32).astype(mx.uint32)
        return empty.at[..., word].add(low).at[..., word + 1].add(high)[..., :-1]  # disjoint bits: a sum is their union

    def expand(self, words: mx.array) -> mx.array:
        """Words ``[..., words]`` to levels ``[..., dim]``, float32."""
        _, _, word, shift, mask = _planned_tables(self)
        if words.size == 0:
            return mx.zeros((*words.shape[:-1], len(self.widths)))
        following = mx.take(words, mx.minimum(word + 1, self.words - 1), axis=-1).astype(mx.uint64) << 32
        both = mx.take(words, word, axis=-1).astype(mx.uint64) | following
        return self.levels_of(((both >> shift) & mask).astype(mx.uint32))


@lru_cache
def _planned_tables(quantizer: PlannedQuantizer) -> tuple[mx.array, mx.array, mx.array, mx.array, mx.array]:
    """All levels of the widths in use, and for each coordinate: its first level, its word, its shift, its mask."""
    widths = np.array(quantizer.widths)
    first: dict[int, int] = {}
    levels: list[float] = []
    for width in sorted(set(quantizer.widths)):
        first[width] = len(levels)
        levels += list(gaussian_codebook(width).levels) if width else [0.0]
    offset = np.cumsum(widths) - widths
    word = np.minimum(offset // 32, max(quantizer.words - 1, 0))  # a tail of no bits begins past the last word
    arrays = (
        mx.array(np.array(levels, np.float32)),
        mx.array(np.array([first[w] for w in quantizer.widths], np.uint32)),
        mx.array(word.astype(np.uint32)),
        mx.array((offset % 32).astype(np.uint64)),
        mx.array((1 << widths) - 1).astype(mx.uint64),
    )
    mx.eval(*arrays)
    return arrays


@dataclass(frozen=True)
class SignSketch:
    """The signs of a random projection, from which inner products are estimated without bias (QJL, arXiv 2406.03482).

    ``rows`` projections of ``dim`` coordinates. ``"gaussian"`` draws them independently, as the papers do;
    ``"orthogonal"`` draws blocks of ``dim`` orthogonal rows of length √dim, with about 2.75 times less variance
    for the same bits. ``rows`` is a multiple of ``dim`` for the latter.
    """

    dim: int
    rows: int
    kind: SketchName = "orthogonal"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("orthogonal", "gaussian"):
            raise InputError(f"Unknown sketch {self.kind!r}: choose 'orthogonal' or 'gaussian'.")
        if self.kind == "orthogonal" and self.rows % self.dim:
            raise InputError(
                f"An orthogonal sketch of {self.rows} rows does not fit a head dimension of {self.dim}: "
                f"take a multiple of {self.dim} rows, or a gaussian sketch."
            )

    @property
    def words(self) -> int:
        """uint32 words that one vector's signs take."""
        return words_per_row(self.rows, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the projection, shared by every layer of a process."""
        return self.matrix.nbytes

    @property
    def matrix(self) -> mx.array:
        """The projection ``[rows, dim]``, float32."""
        return _sketch_matrix(self)

    @property
    def unbiased_scale(self) -> float:
        """``c`` such that ``c·‖x‖·⟨Sq, sign(Sx)⟩`` has mean ``⟨q, x⟩``: 1 / (rows · E|⟨row, u⟩|) for a unit ``u``."""
        mean_abs = math.sqrt(2 / math.pi)
        if self.kind == "orthogonal":  # a row is uniform on the sphere of radius √dim, not Gaussian
            log_ratio = math.lgamma(self.dim / 2) - math.lgamma((self.dim + 1) / 2)
            mean_abs = math.sqrt(self.dim / math.pi) * math.exp(log_ratio)
        return 1 / (self.rows * mean_abs)

    def signs(self, x: mx.array) -> mx.array:
        """Signs of the projections of ``x`` ``[..., dim]`` as packed bits ``[..., words]``; the sign of 0 is +1."""
        return pack((x @ self.matrix.T >= 0).astype(mx.uint32), 1)

    def expand(self, words: mx.array) -> mx.array:
        """Packed bits to ±1 ``[..., rows]``, float32."""
        return unpack(words, 1, self.rows).astype(mx.float32) * 2 - 1


@lru_cache
def _sketch_matrix(sketch: SignSketch) -> mx.array:
    if sketch.kind == "orthogonal":
        blocks = [haar_matrix(sketch.dim, sketch.seed + i) for i in range(sketch.rows // sketch.dim)]
        matrix = mx.concatenate(blocks) * math.sqrt(sketch.dim)
    else:
        rng = np.random.default_rng(sketch.seed)
        matrix = mx.array(rng.standard_normal((sketch.rows, sketch.dim)).astype(np.float32))
    mx.eval(matrix)
    return matrix


@dataclass(frozen=True)
class GroupQuantizer:
    """Groups of neighbouring coordinates, each cut into ``2**bits`` equal steps from its least to its largest number.

    ``"centres"`` decodes a step to its middle; ``"ends"`` puts the outer levels on the least and the largest number, as
    KIVI and QJL do. A group keeps two 16-bit numbers. The last one is shorter where ``group`` does not divide ``dim``.
    """

    dim: int
    bits: int
    group: int = 32
    levels: GroupLevels = "centres"

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.levels not in ("centres", "ends"):
            raise InputError(f"Unknown levels {self.levels!r}: choose 'centres' or 'ends'.")
        if isinstance(self.group, bool) or not isinstance(self.group, int) or self.group < 1:
            raise InputError(f"group={self.group!r} is no number of coordinates: give a whole number, 1 or more.")

    @property
    def groups(self) -> int:
        """Groups of one vector."""
        return -(-self.dim // self.group)

    @property
    def nbits(self) -> int:
        """Bits that one vector takes: whole words of codes, and 32 bits a group."""
        return 32 * (words_per_row(self.dim, self.bits) + self.groups)

    def encode(self, x: mx.array) -> dict[str, mx.array]:
        """Give ``codes`` ``[..., words]`` and roots ``half_step``, ``least`` ``[..., groups]`` of ``[..., dim]``."""
        x = self._grouped(x.astype(mx.float32))
        least, largest = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
        # roots, as for scales: float16 holds them for any |x| up to 4e9. The codes are of what is kept of them
        root_least = (mx.sign(least) * mx.sqrt(mx.abs(least))).astype(mx.float16)
        least = _signed_square(root_least)
        root_half = mx.sqrt(mx.maximum(largest - least, 0.0) / (2 * self._steps)).astype(mx.float16)
        step = 2 * _signed_square(root_half)
        codes = (x - least) / mx.where(step == 0, 1.0, step) - self._shift
        codes = self._flat(mx.clip(mx.round(codes), 0, 2**self.bits - 1))
        return {"codes": pack(codes, self.bits), "half_step": root_half[..., 0], "least": root_least[..., 0]}

    def expand(self, arrays: dict[str, mx.array]) -> mx.array:
        """Decode to ``[..., dim]``, float32."""
        codes = self._grouped(unpack(arrays["codes"], self.bits, self.dim).astype(mx.float32))
        half_step, least = (_signed_square(arrays[name])[..., None] for name in ("half_step", "least"))
        return self._flat(least + (codes + self._shift) * (2 * half_step))

    @property
    def _steps(self) -> int:
        return (1 << self.bits) - int(self.levels == "ends")

    @property
    def _shift(self) -> float:
        return 0.5 if self.levels == "centres" else 0.0

    def _flat(self, x: mx.array) -> mx.array:
        """``[..., groups, group]`` to ``[..., dim]``."""
        return x.reshape(*x.shape[:-2], self.groups * self.group)[..., : self.dim]

    def _grouped(self, x: mx.array) -> mx.array:
        """``[..., dim]`` to ``[..., groups, group]``; the last group is filled up with its last coordinate."""
        missing = self.groups * self.group - self.dim
        if missing:
            x = mx.concatenate([x, mx.repeat(x[..., -1:], missing, axis=-1)], axis=-1)
        return x.reshape(*x.shape[:-1], self.groups, self.group)


def _signed_square(root: mx.array) -> mx.array:
    root = root.astype(mx.float32)
    return root * mx.abs(root)
