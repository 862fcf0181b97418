"""TurboQuant-RVQ: a rotation, then two scalar quantizers, the second for the residual of the first.

No paper. Name and method are VeloxQuant-MLX's (``quantizers/turboquant_rvq.py``); the rotation and the first stage are
TurboQuant's (Zandieh et al. 2025, arXiv 2504.19874). For residuals in KV caches see VQLLM, arXiv 2410.15704.

Stored per vector of D coordinates
    Two stages of b/2 bits a coordinate, and one 16-bit scale: b + 16/D bits per value. ``bits`` is b, the total:
    VeloxQuant's "1-bit RVQ" is ``bits=2`` here. One stage of b bits loses less, but two stages give an embedded code:
    `Rvq.decode_coarse` reads half of its bits.

Where we differ
    * VeloxQuant's second stage (``residual="laplacian"``) is made for a Laplacian of variance √(3π)/2·4^(−b/2). The
      residual is not Laplacian, and the constant was meant to be √3·π/2. ``"exact"`` computes the true density.
    * ``variant="refined"`` has a second codebook for each level of the first, so that both nest in one table of 2^b
      levels. At 2 bits that is the one-stage optimum; with more bits it is within 5 % of it.
    * Keys get the unbiased scale and values the MSE scale. VeloxQuant stores the norm, and keeps values in 16 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Literal

import mlx.core as mx
import numpy as np

from veloxlab.codecs.base import Code
from veloxlab.codecs.method import Method
from veloxlab.codecs.parts import Floats, scalar
from veloxlab.codecs.parts.codebooks import STARTS, Codebook, CodebookName, coordinate_density, lloyd_max, reach_of
from veloxlab.codecs.parts.packing import unpack
from veloxlab.codecs.parts.scales import ScaleName, load_scale, unbiased_keys
from veloxlab.codecs.parts.transforms import RotationName
from veloxlab.codecs.rotated import TableCodec

Variant = Literal["plain", "refined"]
Residual = Literal["exact", "laplacian"]
VELOX_VARIANCE = math.sqrt(3 * math.pi) / 2  # VeloxQuant-MLX's constant for the variance of the residual, times 4^b


@dataclass(frozen=True)
class Rvq(TableCodec):
    """Two stages of ``bits / 2`` bits each.

    ``variant`` is ``"plain"`` (one second codebook) or ``"refined"`` (one for each level of the first stage);
    ``residual`` is the density for ``"plain"``, ``"exact"`` or ``"laplacian"``. Other fields are TurboQuant's.
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
        self._check()
        _ = self._rotation, self.stages

    @cached_property
    def stages(self) -> Stages:
        """The codebooks of both stages."""
        kind = self.residual if self.variant == "plain" else "refined"
        return _stages_for(self.head_dim, self.bits // 2, self.codebook, kind)

    @property
    def _quantizer(self) -> Stages:
        return self.stages

    def decode_coarse(self, code: Code) -> mx.array:
        """Reconstruct ``[B, H, S, D]``, float32, from the first stage and the scale, which are half of the bits."""
        stages, codes = self.stages, unpack(code.arrays["coarse"], self.bits // 2, self.head_dim)
        gain = 1.0  # the stored scale is for both stages; this is its ratio to the scale of the first alone
        if self.scale != "norm":
            unbiased = self.scale == "unbiased"
            gain = stages.inner / (1 - stages.first.table.distortion) if unbiased else stages.energy / stages.inner
        return self.from_codes(stages.first.levels_of(codes) * load_scale(code.arrays["root_scale"]) * gain)


class Stages(scalar.ScalarQuantizer):
    """Codebooks of two stages of ``half`` bits each, joined as one table of sums.

    ``first`` is the first stage's quantizer; ``inner`` and ``energy`` are E(x·x̂) and E(x̂²) of both stages, and
    ``distortion`` is E(x − x̂)². A cell that no coordinate reaches has no width.
    """

    def __init__(self, head_dim: int, half: int, codebook: CodebookName, kind: str) -> None:
        self.first = scalar.quantizer_for(head_dim, half, codebook)
        dim = head_dim if codebook == "sphere" else None
        reach, first = reach_of(dim), self.first.table
        edges = np.concatenate([[-reach], first.boundaries, [reach]])
        cells = list(zip(first.levels, edges, edges[1:], strict=False))  # level, lower and upper end
        if kind == "refined":
            # below 0, mirrored above; inside a cell the density is log-concave, so there is one optimum
            lower = [(low, high) for _, low, high in cells[: len(cells) // 2]]
            density = partial(coordinate_density, dim=dim)
            seconds = [lloyd_max(density, *ends, half, starts=STARTS[:1]) for ends in lower]
            levels = np.concatenate([second.levels for second in seconds])
            levels = np.concatenate([levels, -levels[::-1]])
            inner = [second.boundaries for second in seconds]
            inner += [-boundaries[::-1] for boundaries in reversed(inner)]
        else:
            second = _of_residuals(cells, dim, half) if kind == "exact" else _of_laplacian(half)
            levels = (first.levels[:, None] + second.levels).ravel()
            inner = [np.clip(level + second.boundaries, low, high) for level, low, high in cells]
        parts = [part for i, inside in enumerate(inner) for part in (inside, first.boundaries[i : i + 1])]
        boundaries = np.concatenate(parts)
        y = np.linspace(-reach, reach, 2**18 + 1)
        found, mass = levels[np.searchsorted(boundaries, y)], coordinate_density(y, dim)
        mass = mass / (mass * y * y).sum()
        self.inner, self.energy = float((mass * y * found).sum()), float((mass * found * found).sum())
        self.distortion = 1 - 2 * self.inner + self.energy
        super().__init__(head_dim, Codebook(levels, boundaries, self.distortion), "coarse", "fine")
        self.nbytes += self.first.levels.nbytes


_stages_for = lru_cache(Stages)


def _of_residuals(cells: list[tuple[float, float, float]], dim: int | None, half: int) -> Codebook:
    """The codebook of the first stage's residual, whose density is the sum over its ``cells``."""

    def in_cell(r: Floats, level: float, low: float, high: float) -> Floats:
        y = level + r
        return np.where((y >= low) & (y < high), coordinate_density(np.clip(y, low, high), dim), 0.0)

    widest = max(max(level - low, high - level) for level, low, high in cells)
    return lloyd_max(lambda r: np.asarray(sum(in_cell(r, *cell) for cell in cells)), -widest, widest, half)


def _of_laplacian(half: int) -> Codebook:
    rate = math.sqrt(2 / (VELOX_VARIANCE * 4.0**-half))
    return lloyd_max(lambda r: np.exp(-rate * np.abs(r)), -30 / rate, 30 / rate, half)


METHOD = Method(
    id="rvq",
    name="TurboQuant-RVQ",
    paper="VeloxQuant-MLX, after Zandieh et al. 2025, arXiv 2504.19874",
    bits=range(2, 9, 2),
    stored="two stages of b/2 bits a coordinate, one 16-bit scale a vector",
    options=("variant", "residual", "scale", "rotation", "codebook", "seed"),
    build=lambda head_dim, bits, tensor, **options: Rvq(head_dim, bits, **unbiased_keys(tensor, options)),
    colour="#3f9142",
    mark="diamond",
    space="smoothed_rotated",
    timed=True,
)
