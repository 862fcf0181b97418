"""TurboQuant-RVQ: a rotation, then two scalar quantizers, the second of what the first one left.

No paper. Name and method are VeloxQuant-MLX's (``quantizers/turboquant_rvq.py``); the rotation and the first stage are
TurboQuant's (Zandieh et al. 2025, arXiv 2504.19874). For residuals in KV caches see VQLLM, arXiv 2410.15704.

Stored per vector of D coordinates
    Two stages of b/2 bits a coordinate, and one 16-bit scale: b + 16/D bits per value. ``bits`` is b, the total:
    VeloxQuant's "1-bit RVQ" is ``bits=2`` here.

One stage of b bits is better than two of b/2: 0.117 against 0.131 at 2 bits, 0.0095 against 0.0197 at 4 (relative
squared error). Two stages give an embedded code: `Rvq.decode_coarse` reads half of the bits.

Where we differ
    * VeloxQuant's second stage (``residual="laplacian"``) is made for a Laplacian of variance √(3π)/2·4^(−b/2). The
      residual is not Laplacian, and that constant was meant to be √3·π/2. ``"exact"`` computes its density.
    * ``variant="refined"`` has a second codebook for each level of the first, so that both nest in one table of 2^b
      levels. At 2 bits that is the one-stage optimum, above it comes within 5 %.
    * Keys get the unbiased scale and values the MSE scale; VeloxQuant stores the norm, and leaves values in 16 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import mlx.core as mx
import numpy as np

from veloxlab.codecs.base import Code, check_words, unbiased_keys
from veloxlab.codecs.method import Method, Tensor
from veloxlab.codecs.parts import Floats, constant
from veloxlab.codecs.parts.codebooks import (
    Codebook,
    CodebookName,
    coordinate_density,
    gaussian_codebook,
    lloyd_max,
    reach_of,
    sphere_codebook,
)
from veloxlab.codecs.parts.packing import Layout, pack, packed, unpack
from veloxlab.codecs.parts.scalar import codes_at_once
from veloxlab.codecs.parts.scales import SCALE, ScaleName, load_scale, scale_factor
from veloxlab.codecs.parts.transforms import RotationName
from veloxlab.codecs.rotated import RotatedCodec
from veloxlab.kernels.readers import TableReader
from veloxlab.kernels.rotated import encode_kernel, nearest_level
from veloxlab.kernels.vectors import VectorKernel

Variant = Literal["plain", "refined"]
Residual = Literal["exact", "laplacian"]
_PAIRED_BITS = 2  # of a stage, up to which kernels read two coordinates at once, from a table of at most 256 pairs
VELOX_VARIANCE = math.sqrt(3 * math.pi) / 2  # VeloxQuant-MLX's constant for the variance of the residual, times 4^b


@dataclass(frozen=True)
class Rvq(RotatedCodec):
    """Two stages of ``bits / 2`` bits each.

    ``variant`` is ``"plain"`` (one second codebook) or ``"refined"`` (one for each level of the first stage);
    ``residual`` what that of ``"plain"`` is made for, ``"exact"`` or ``"laplacian"``. The rest as for TurboQuant.
    """

    head_dim: int
    bits: int
    variant: Variant = "plain"
    residual: Residual = "exact"
    scale: ScaleName = "unbiased"
    rotation: RotationName = "hadamard"
    codebook: CodebookName = "sphere"
    seed: int = 0

    def __post_init__(self) -> None:
        check_words(self)
        _ = self._rotation, self.stages

    @cached_property
    def stages(self) -> Stages:
        """The codebooks of both stages."""
        dim = self.head_dim if self.codebook == "sphere" else None
        return stages_for(dim, self.bits // 2, self.variant, self.residual if self.variant == "plain" else "exact")

    @property
    def layout(self) -> Layout:
        """Two stages of b/2 bits, and a scale."""
        stage = packed(self.head_dim, self.bits // 2)
        return {"coarse": stage, "fine": stage, "root_scale": SCALE}

    @cached_property
    def _encoder(self) -> VectorKernel | None:
        if self._signs is None:
            return None
        nearest, half = nearest_level(*self.stages.cells, self.bits), self.bits // 2
        return encode_kernel(self._signs, nearest, self.scale, {"coarse": half, "fine": half})

    def quantize(self, y: mx.array) -> tuple[dict[str, mx.array], mx.array]:
        """The cell of both stages, its two halves packed apart, and the chosen scale."""
        boundaries, levels = self.stages.cells
        cell, half = mx.searchsorted(boundaries, y), self.bits // 2
        arrays = {"coarse": pack(cell >> half, half), "fine": pack(cell & ((1 << half) - 1), half)}
        return arrays, scale_factor(self.scale, y, mx.take(levels, cell))

    def levels(self, arrays: dict[str, mx.array]) -> mx.array:
        """Levels of both stages; several neighbours are looked up at once."""
        joint, half = self.stages.joint, self.bits // 2
        together = joint.shape[-1]
        coarse, fine = (unpack(arrays[name], half, self.head_dim, together) for name in ("coarse", "fine"))
        levels = mx.take(joint, (coarse << (half * together)) | fine, axis=0)
        return mx.flatten(levels, -2)[..., : self.head_dim]

    def reader(self, code: Code) -> TableReader:
        """Both stages, and the levels that they stand for together."""
        coarse, fine, root_scale = (code.arrays[name] for name in ("coarse", "fine", "root_scale"))
        return TableReader(self.head_dim, coarse, root_scale, self._signs, *self.stages.paired, fine)

    def decode_coarse(self, code: Code) -> mx.array:
        """Reconstruct ``[B, H, S, D]``, float32, from the first stage and the scale, which are half of the bits."""
        stages, codes = self.stages, unpack(code.arrays["coarse"], self.bits // 2, self.head_dim)
        gain = 1.0  # the stored scale is made for both stages; the first alone would have another, in this proportion
        if self.scale != "norm":
            unbiased = self.scale == "unbiased"
            gain = stages.inner / (1 - stages.first.distortion) if unbiased else stages.energy / stages.inner
        return self.from_codes(mx.take(stages.coarse, codes) * load_scale(code.arrays["root_scale"]) * gain)


class Stages:
    """Codebooks of two stages of h bits each, for coordinates of unit variance, the first in an index's high bits.

    Attributes
    ----------
    levels, coarse : what both stages stand for ``[4**h]``, and the first alone ``[2**h]``.
    inner, energy : E(x·x̂) and E(x̂²).
    cells : boundaries and levels; a cell that no coordinate reaches has no width.
    joint : levels of g neighbours ``[4**(h·g), g]``.
    paired : how kernels read the codes: the width of a stage's index, and the levels that two of them stand for.
    """

    def __init__(self, dim: int | None, half: int, variant: Variant, residual: Residual) -> None:
        self.first = gaussian_codebook(half) if dim is None else sphere_codebook(half, dim)
        reach = reach_of(dim)
        edges = np.concatenate([[-reach], self.first.boundaries, [reach]])
        cells = list(zip(self.first.levels, edges, edges[1:], strict=False))  # level, lower and upper end
        if variant == "refined":
            seconds = [lloyd_max(lambda t: coordinate_density(t, dim), low, high, half) for _, low, high in cells]
            self.levels = np.concatenate([second.levels for second in seconds])
            inner = [second.boundaries for second in seconds]
        else:
            second = _of_residuals(cells, dim, half) if residual == "exact" else _of_laplacian(half)
            self.levels = (self.first.levels[:, None] + second.levels).ravel()
            inner = [np.clip(level + second.boundaries, low, high) for level, low, high in cells]
        parts = [part for i, inside in enumerate(inner) for part in (inside, self.first.boundaries[i : i + 1])]
        boundaries = np.concatenate(parts)
        y = np.linspace(-reach, reach, 2**18 + 1)
        found, mass = self.levels[np.searchsorted(boundaries, y)], coordinate_density(y, dim)
        mass = mass / (mass * y * y).sum()
        self.inner, self.energy = float((mass * y * found).sum()), float((mass * found * found).sum())
        self.cells = constant(boundaries), constant(self.levels)
        self.joint = self._neighbours(half, codes_at_once(2 * half))
        together = 2 if half <= _PAIRED_BITS else 1
        self.paired = half * together, self._neighbours(half, together)
        self.coarse = constant(self.first.levels)

    @property
    def distortion(self) -> float:
        """E(x − x̂)²."""
        return 1 - 2 * self.inner + self.energy

    @property
    def nbytes(self) -> int:
        """Bytes of the tables, shared by every layer of a process."""
        return sum(table.nbytes for table in (*self.cells, self.joint, self.coarse))

    def _neighbours(self, half: int, together: int) -> mx.array:
        """Levels of ``together`` coordinates ``[4**(half·together), together]``."""
        index = np.arange(1 << (2 * half * together))[:, None]
        shifts, mask = half * np.arange(together), (1 << half) - 1
        cells = ((index >> (half * together) >> shifts & mask) << half) | (index >> shifts & mask)
        return constant(self.levels[cells])


stages_for = lru_cache(Stages)


def _of_residuals(cells: list[tuple[float, float, float]], dim: int | None, half: int) -> Codebook:
    """The codebook of what the first stage leaves, whose density is the sum of those of its ``cells``."""

    def in_cell(r: Floats, level: float, low: float, high: float) -> Floats:
        y = level + r
        return np.where((y >= low) & (y < high), coordinate_density(np.clip(y, low, high), dim), 0.0)

    widest = max(max(level - low, high - level) for level, low, high in cells)
    return lloyd_max(lambda r: np.asarray(sum(in_cell(r, *cell) for cell in cells)), -widest, widest, half)


def _of_laplacian(half: int) -> Codebook:
    """The codebook of VeloxQuant's second stage."""
    rate = math.sqrt(2 / (VELOX_VARIANCE * 4.0**-half))
    return lloyd_max(lambda r: np.exp(-rate * np.abs(r)), -30 / rate, 30 / rate, half)


def build(head_dim: int, bits: int, tensor: Tensor, **options: object) -> Rvq:
    """TurboQuant-RVQ for keys (unbiased scale) or for values (MSE scale), unless ``scale`` says otherwise."""
    return Rvq(head_dim, bits, **unbiased_keys(tensor, options))


METHOD = Method(
    id="rvq",
    name="TurboQuant-RVQ",
    paper="VeloxQuant-MLX, after Zandieh et al. 2025, arXiv 2504.19874",
    bits=range(2, 9, 2),
    stored="two stages of b/2 bits a coordinate, one 16-bit scale a vector",
    options=("variant", "residual", "scale", "rotation", "codebook", "seed"),
    build=build,
    colour="#3f9142",
    mark="diamond",
    space="smoothed_rotated",
    timed=True,
)
