"""RaBitQ: a random rotation, then the grid point whose direction is nearest.

Papers: *RaBitQ: Quantizing High-Dimensional Vectors with a Theoretical Error Bound for Approximate Nearest Neighbor
Search*, J. Gao, C. Long, SIGMOD 2024, arXiv 2405.12497 (1 bit); *Practical and Asymptotically Optimal Quantization of
High-Dimensional Vectors in Euclidean Space for Approximate Nearest Neighbor Search*, J. Gao, Y. Gou, Y. Xu, Y. Yang,
C. Long, R. C.-W. Wong, SIGMOD 2025, arXiv 2409.09913 (B bits).

Every coordinate of the rotated vector y becomes a step of a uniform grid, u ∈ {±½, ±1½, … ±(2^(B−1) − ½)}. Only the
direction of u counts, so the grid may be stretched for each vector: u(t) = sign(y)·(min(⌊t|y|⌋, 2^(B−1) − 1) + ½), with
the t at which cos(y, u) is largest.

Stored per vector of D coordinates
    B·D bits, u + (2^B − 1)/2 as a whole number, and one 16-bit scale: B + 16/D bits per value. With ``bounds`` 16 bits
    more. With a ``centroid`` nothing more per vector; the mean of each KV head is held once. That of keys, after RoPE,
    fits the positions of the calibration text, and helps less and less at later ones.

Keys store the scale ‖x‖²/⟨x, u⟩, for unbiased inner products (the papers' estimator). Values store ⟨x, u⟩/‖u‖², for the
least squared error.

Where we differ
    * The search for t. ``exact`` tries every t at which a coordinate steps, as the paper; each bit doubles its work.
      ``fast`` is the authors' constant t for (D, B). ``grid``, the default, tries 24 values of t for each vector: at
      D = 128 its squared error is within 0.1 % of the exact one up to 5 bits and 2 % at 8.
    * The rotation is signs and Hadamard instead of four rounds of those with Kac's walk: the same errors, measured.
    * The query stays in floating point. The authors round it to 4 bits, which adds an error.
    * No inverted file of centroids: at most one centroid, the mean of a KV head, and none by default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import ClassVar, Literal, Self

import mlx.core as mx
import numpy as np

from veloxlab.codecs.base import Code, Sample, check_heads, check_vectors
from veloxlab.codecs.method import Method, Tensor
from veloxlab.codecs.parts import constant, in_turn, packing, scales
from veloxlab.codecs.parts.learning import learnable
from veloxlab.codecs.parts.rope import Start
from veloxlab.codecs.parts.scalar import paired_levels
from veloxlab.codecs.parts.transforms import RotationName
from veloxlab.codecs.rotated import RotatedCodec
from veloxlab.errors import InputError
from veloxlab.kernels.readers import TableReader
from veloxlab.kernels.rotated import best_grid, encode_kernel, stretched_grid
from veloxlab.kernels.vectors import VectorKernel

ScaleName = Literal["unbiased", "mse"]
EncoderName = Literal["grid", "exact", "fast"]
EPSILON = 1.9  # the papers' ε₀: a single inner product is within the bound 94 times in 100, as a Gaussian within 1.9 σ
_TRIES = 24  # values of t that `grid` tries
_AT_ONCE = 1 << 21  # numbers of one temporary array: vectors are encoded in chunks of that size
_TINY = 1e-30


@dataclass(frozen=True)
class RaBitQ(RotatedCodec):
    """RaBitQ: ``encoder`` finds t, ``bounds`` stores what `half_widths` needs; see `ScaleName`, `RotatedSpace`."""

    head_dim: int
    bits: int
    scale: ScaleName = "unbiased"
    encoder: EncoderName = "grid"
    bounds: bool = False
    rotation: RotationName = "hadamard"
    seed: int = 0

    def __post_init__(self) -> None:
        self._check(bits=packing.BITS)
        if self.bounds and self.scale != "unbiased":
            raise InputError(f"bounds=True bounds an unbiased estimate, and scale={self.scale!r} is not: choose one.")
        _ = self._rotation

    @property
    def layout(self) -> packing.Layout:
        sine = {"sine": scales.SCALE} if self.bounds else {}
        return {"codes": packing.packed(self.head_dim, self.bits), "root_scale": scales.SCALE} | sine

    @cached_property
    def _encoder(self) -> VectorKernel | None:
        tried, loss = self.encoder == "grid" and self.bits > 1, None
        if self.encoder == "exact":
            grid, loss = best_grid(self.bits), self._lost
        else:
            usual = constant(np.array([usual_stretch(self.head_dim, self.bits)]))
            grid = stretched_grid(_tries(self.bits) if tried else usual, self.bits, tried=tried)
        fields = {"codes": self.bits}
        return encode_kernel(self.head_dim, self._signs, grid, self.scale, fields, sine=self.bounds, loss=loss)

    def _lost(self, arrays: Mapping[str, mx.array], x: mx.array) -> mx.array:
        """Relative squared errors of encoded vectors, plus the error of their stored sines."""
        y, u = x if self._signs is None else self._rotation.forward(x), RaBitQ.expand(self, Code(dict(arrays)))
        off, rest = (
            mx.square(y - factor * u).sum(axis=-1, keepdims=True) / mx.square(y).sum(axis=-1, keepdims=True)
            for factor in (scales.load_scale(arrays["root_scale"]), scales.scale_factor("mse", y, u))
        )
        return off + mx.abs(mx.square(arrays["sine"].astype(mx.float32)) - rest) if self.bounds else off

    @property
    def _table(self) -> mx.array | None:
        return _steps(self.bits)

    def quantize(self, y: mx.array) -> tuple[dict[str, mx.array], mx.array]:
        magnitude, top = mx.abs(y), 2 ** (self.bits - 1)
        steps = mx.minimum(mx.floor(self._stretch(magnitude) * magnitude), top - 1)
        codes = mx.where(y >= 0, top + steps, top - 1 - steps)  # the sign of 0 is +1
        u = codes - float(2**self.bits - 1) / 2
        arrays = {"codes": packing.pack(codes, self.bits)}
        if self.bounds:
            rest = mx.linalg.norm(y - scales.scale_factor("mse", y, u) * u, axis=-1, keepdims=True)
            arrays["sine"] = (rest / math.sqrt(self.head_dim)).astype(mx.float16)
        return arrays, scales.scale_factor(self.scale, y, u)

    def expand(self, code: Code) -> mx.array:
        codes = packing.unpack_to_bytes(code.arrays["codes"], self.bits, self.head_dim).astype(mx.float32)
        return codes - float(2**self.bits - 1) / 2

    def reader(self, code: Code) -> TableReader:
        codes, root_scale = code.arrays["codes"], code.arrays["root_scale"]
        return TableReader(self.head_dim, codes, root_scale, self._signs, *_paired_steps(self.bits))

    def half_widths(self, code: Code, epsilon: float = EPSILON) -> mx.array:
        """The error bound of ⟨q, x̂⟩ for a query of length 1 ``[B, H, S, 1]``: ε₀·‖x̂ − x‖/√(D − 1).

        The error is that of a random direction: within the bound with the probability of a Gaussian within ``epsilon``
        standard deviations. Raises `InputError` without ``bounds``.
        """
        if "sine" not in code.arrays:
            raise InputError("This code holds no error bounds: make the codec with bounds=True.")
        u = RaBitQ.expand(self, code)  # without scale and mean
        length = scales.load_scale(code.arrays["root_scale"]) * mx.linalg.norm(u, axis=-1, keepdims=True)
        return length * code.arrays["sine"].astype(mx.float32) * (epsilon / math.sqrt(self.head_dim - 1))

    def _stretch(self, magnitude: mx.array) -> mx.array:
        """The t of each vector ``[..., D]`` of length √D and no negative coordinate: ``[..., 1]``."""
        shape = (*magnitude.shape[:-1], 1)
        if self.bits == 1 or self.encoder == "fast" or not magnitude.size:
            return mx.full(shape, usual_stretch(self.head_dim, self.bits))
        exact = self.encoder == "exact"
        search, width = (_best_stretch, 2 ** (self.bits - 1) - 1) if exact else (_tried_stretch, _TRIES)
        rows = magnitude.reshape(-1, self.head_dim)
        size = max(1, _AT_ONCE // (self.head_dim * width))
        return in_turn(lambda some: search(some, self.bits), rows, size).reshape(shape)


@dataclass(frozen=True, eq=False)
class CentredRaBitQ(RaBitQ):
    """RaBitQ of a vector minus its KV head's mean: ``centroid`` ``[H, D]`` float32, 0 before `fit`.

    ⟨q, mean⟩ is the same for all tokens, so attention over keys does not see it.
    """

    reaches_by: ClassVar[str] = "tokens={N}"
    centroid: mx.array | None = None
    heads_alike: ClassVar[bool] = False
    expand_scales: ClassVar[bool] = True

    __eq__, __hash__ = object.__eq__, object.__hash__  # fitted codecs are compared by identity

    def blank(self, kv_heads: int) -> Self:
        return replace(self, centroid=mx.zeros((kv_heads, self.head_dim)))

    def fit(self, sample: Sample) -> Self:
        """Learn the mean of each KV head; raises `InputError` below 16 tokens, or if they are all the same."""
        check_vectors(sample.x, self.head_dim)
        learnable(mx.flatten(sample.x.swapaxes(1, 2), 2)[:, None], "A centroid")  # one head may be of zeros
        return replace(self, centroid=constant(sample.x.astype(mx.float32).mean(axis=(0, 2))))

    def encode(self, x: mx.array, start: Start = 0) -> Code:
        check_vectors(x, self.head_dim)
        return super().encode(x if self.centroid is None else x.astype(mx.float32) - self._mean(x.shape[1]), start)

    def expand(self, code: Code) -> mx.array:
        """Rotated vectors with their scale, because the mean must not be scaled."""
        y = super().expand(code) * scales.load_scale(code.arrays["root_scale"])
        return y if self.centroid is None else y + self._rotation.forward(self._mean(y.shape[1]))

    @property
    def _table(self) -> mx.array | None:
        return super()._table if self.centroid is None else None

    def reader(self, code: Code) -> TableReader:
        plain = super().reader(code)
        if self.centroid is None:
            return plain
        self._mean(plain.kv_heads)  # refuses other heads
        return replace(plain, shifts=self._rotated_mean)

    @cached_property
    def _rotated_mean(self) -> mx.array:
        assert self.centroid is not None
        return constant(self._rotation.forward(self.centroid))

    def _mean(self, heads: int) -> mx.array:
        assert self.centroid is not None
        check_heads(self.centroid.shape[0], heads)
        return self.centroid[None, :, None]


@lru_cache
def _steps(bits: int) -> mx.array:
    return constant(np.arange(1 << bits) - (2**bits - 1) / 2)


_paired_steps = lru_cache(lambda bits: paired_levels(np.array(_steps(bits)), bits))


@lru_cache
def _tries(bits: int) -> mx.array:
    """Values of t that `grid` tries, relative to the one at which the largest coordinate is about to be clipped."""
    return constant(mx.linspace(0.9, 1 + 2.5 / 2 ** (bits - 1), _TRIES))


@lru_cache
def usual_stretch(dim: int, bits: int) -> float:
    """The constant t of ``fast``: the mean of the best t of 100 random vectors of length √dim; 0 for one bit."""
    if bits == 1:  # one bit has no steps
        return 0.0
    y = np.abs(np.random.default_rng(0).standard_normal((100, dim)))
    y *= math.sqrt(dim) / np.linalg.norm(y, axis=1, keepdims=True)
    return float(np.array(_best_stretch(mx.array(y.astype(np.float32)), bits)).mean())


def _best_stretch(a: mx.array, bits: int) -> mx.array:
    """The t at which cos(a, u(t)) is largest, for ``a`` ``[N, D]`` without negative coordinates: ``[N, 1]``.

    u changes only where t·a_i passes a whole number j. Sorted by t, each such step adds a_i to ⟨a, u⟩ and
    (j + ½)² − (j − ½)² = 2j to ‖u‖², so cumulative sums give the cosine after every step.
    """
    count = 2 ** (bits - 1) - 1  # steps of one coordinate
    steps = mx.arange(1, count + 1).astype(mx.float32) / mx.maximum(a, _TINY)[..., None]
    steps = steps.reshape(a.shape[0], -1)
    order = mx.argsort(steps, axis=-1)
    start, square = a.sum(axis=-1, keepdims=True) / 2, a.shape[-1] / 4
    inner = start + mx.cumsum(mx.take_along_axis(a, order // count, axis=-1), axis=-1)
    norm = square + mx.cumsum((2 * (order % count) + 2).astype(mx.float32), axis=-1)
    quality = mx.square(inner) / norm
    best = mx.argmax(quality, axis=-1, keepdims=True)
    t = mx.take_along_axis(steps, mx.take_along_axis(order, best, axis=-1), axis=-1)
    better = mx.take_along_axis(quality, best, axis=-1) > mx.square(start) / square
    return mx.where(better, t * (1 + 1e-6), 0.0)  # so that t·a_i does not round to just below j


def _tried_stretch(a: mx.array, bits: int) -> mx.array:
    """The best of `_TRIES` values of t around the one at which the largest coordinate is about to be clipped.

    The sine of the angle is compared, because at 8 bits the cosine rounds to 1 in float32. With e = u − t·a it is
    √((‖e‖² − ⟨e, a⟩² / ‖a‖²) / ‖u‖²), without cancellation.
    """
    top = 2 ** (bits - 1)
    t = top / mx.maximum(a.max(axis=-1, keepdims=True), _TINY) * _tries(bits)
    reach = t[..., None] * a[:, None]
    u = mx.minimum(mx.floor(reach), top - 1) + 0.5
    error = u - reach
    along = mx.square((error * a[:, None]).sum(axis=-1))
    along = along / mx.maximum(mx.square(a).sum(axis=-1, keepdims=True), _TINY)
    sine = (mx.square(error).sum(axis=-1) - along) / mx.square(u).sum(axis=-1)  # squared
    return mx.take_along_axis(t, mx.argmin(sine, axis=-1, keepdims=True), axis=-1)


def build(head_dim: int, bits: int, tensor: Tensor, *, centroid: bool = False, **options: object) -> RaBitQ:
    """For keys (unbiased scale) or values (MSE scale, no ``bounds``), unless ``scale`` says otherwise."""
    if tensor == "values":
        options.pop("bounds", None)
    return (CentredRaBitQ if centroid else RaBitQ)(head_dim, bits, **scales.unbiased_keys(tensor, options))


METHOD = Method(
    id="rabitq",
    name="RaBitQ",
    paper="Gao, Long 2024, arXiv 2405.12497; Gao et al. 2024, arXiv 2409.09913",
    bits=range(1, 9),
    stored="b bits a coordinate, one 16-bit scale a vector; key_bits=1, value_bits=4 hold a sixth of a 16-bit cache",
    options=("scale", "encoder", "bounds", "centroid", "rotation", "seed"),
    build=build,
    colour="#1b9e8a",
    mark="triangle-up",
    timed=True,
)
