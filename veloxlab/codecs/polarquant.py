"""PolarQuant: a random rotation, then the angles of a recursive polar transform.

Paper: *PolarQuant: Quantizing KV Caches with Polar Transformation*, I. Han, P. Kacham, A. Karbasi, V. Mirrokni,
A. Zandieh, 2025 (AISTATS 2026), arXiv 2502.02617. Not the other PolarQuant (S. Wu et al., arXiv 2502.00527).
The transform is in `veloxlab.codecs.parts.polar`.

Stored per vector of D coordinates
    ``block``  Angles of blocks of 16 (L = 4), and each block's radius in 16 bits. b bits at level 1 and b − 2 above, so
               b − 1/8 bits per value: 3.875 for the paper's 4/2/2/2, which is ``bits=4``.
    ``full``   The recursion continues while D can be halved: one radius for 2^k coordinates (one in all for D = 64,
               128, 256; 5 for 80; 3 for 96 and 192; 7 for 112). b + 1 bits at level 1 and b − 1 above: about b + 16/D.
    The codes of levels of equal width are packed together, in whole bytes.

Where we differ
    * ``block`` is the paper's and the default. ``full`` is better at equal bits: 0.0351 at 3.125, against 0.0699 at
      3.375.
    * The paper stores the norm (``scale="norm"``); ``mse``, for values, stores r·⟨u, û⟩, where u is the block's
      direction; ``unbiased``, for keys, multiplies a vector's radii with ‖x‖²/⟨x, x̂⟩. All take the same bits.
    * The paper makes its offline codebooks from samples by k-means++; ours (``"offline"``) are computed from the
      densities. ``"online"`` is the paper's other kind, k-means of the angles of the prompt: a cache fits them to the
      first tokens that it packs, for keys and values of each layer. ``"fitted"`` is the same from calibration. Both
      start at the offline ones; on SmolLM2 the squared error of keys falls by 2 % (``block``) to 7 % (``full``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal, Self, get_args

import mlx.core as mx
import numpy as np

from veloxlab.checks import choice, many, whole
from veloxlab.codecs.base import Code, Sample, check_vectors, not_fitted
from veloxlab.codecs.method import Method, Tensor
from veloxlab.codecs.parts import packing, polar, scales
from veloxlab.codecs.parts.rope import Start
from veloxlab.codecs.parts.transforms import RotationName
from veloxlab.codecs.rotated import RotatedSpace
from veloxlab.errors import InputError
from veloxlab.kernels.checked import computed
from veloxlab.kernels.readers.blocks import MOST_LEVELS, MOST_ROWS, PolarReader
from veloxlab.kernels.vectors import VectorKernel

Recursion = Literal["block", "full"]
CodebookName = Literal["offline", "online", "fitted"]
BLOCK_LEVELS = 4  # blocks of 16 coordinates
_LEAST_ANGLES = 8  # for each centroid to be fitted
_MOST_VECTORS = 1 << 13  # in a fit of codebooks: if there are more, every nth token is read


@dataclass(frozen=True)
class PolarQuant(RotatedSpace):
    """PolarQuant (arXiv 2502.02617, Algorithm 1); for ``codebook`` see the module.

    ``levels`` are the bits of the angles of each level, the first level's first; D is a multiple of ``2**len(levels)``.
    ``centroids`` are learned by `fit`, level after level from the second on.
    """

    head_dim: int
    levels: tuple[int, ...] = (4, 2, 2, 2)
    scale: scales.ScaleName = "unbiased"
    codebook: CodebookName = "offline"
    rotation: RotationName = "hadamard"
    seed: int = 0
    centroids: tuple[float, ...] = ()
    expand_scales: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._check()
        _ = self._rotation, self.tree

    @cached_property
    def tree(self) -> polar.PolarTree:
        """The quantizer of the angles."""
        make = polar.PolarTree if self.centroids else polar.tree_for  # learned tables are released with the codec
        return make(self.head_dim, self.levels, self.centroids)

    @property
    def layout(self) -> packing.Layout:
        return self.tree.layout | {"root_rms": packing.Row(mx.float16, self.head_dim // self.tree.block)}

    @property
    def online(self) -> bool:
        return self.codebook == "online" and not self._is_fitted

    @property
    def _is_fitted(self) -> bool:
        return len(self.centroids) == sum(1 << bits for bits in self.levels[1:])  # level 1 has nothing to learn

    def fit(self, sample: Sample) -> Self:
        """Learn the angles above level 1 from ``sample.x``, unless they are ``"offline"``; all heads share them.

        For a level with too few angles an online codec keeps the offline ones; ``"fitted"`` raises `InputError`.
        """
        check_vectors(sample.x, self.head_dim)
        if self.codebook == "offline":
            return self
        batch, heads, tokens, _ = sample.x.shape
        x = sample.x[:, :, :: max(1, batch * heads * tokens // _MOST_VECTORS)].astype(mx.float32)
        angles, _ = self.tree.angles(self._rotation.forward(x))
        learned: list[float] = []
        for level, bits in enumerate(self.levels[1:], 2):
            seen, least = np.sort(np.array(angles[level - 1]).ravel().astype(np.float64)), _LEAST_ANGLES << bits
            usual, _ = polar.angle_codebook(level, bits)
            different = len(np.unique(seen))
            if different < least and self.codebook == "fitted":
                needed = -(-least // (heads * (self.head_dim >> level)))
                raise InputError(
                    f"The sample shows {different} different angles of level {level}, too few to fit {1 << bits} to "
                    f"them: calibrate with at least {needed} tokens that differ."
                )
            learned += (polar.fitted_angles(seen, level, bits) if different >= least else usual).tolist()
        return replace(self, centroids=tuple(learned))

    def encode(self, x: mx.array, start: Start = 0) -> Code:
        check_vectors(x, self.head_dim)
        if self.codebook == "fitted" and not self._is_fitted:
            raise not_fitted("PolarQuant", ", codebook='fitted'")
        return Code(computed(lambda _: self._encoder, self._encode_by_graph, self._for_encoder(x)), start)

    @cached_property
    def _encoder(self) -> VectorKernel:
        rows = {name: (row.count, row.dtype or mx.float32) for name, row in self.layout.items()}
        signs = {} if self._signs is None else {"signs": self._signs}
        tables = {"edges": self.tree.edges, "circles": self.tree.circles} | signs
        variant = {"levels": self.levels, "scale": self.scale, "rotates": bool(signs)}
        return VectorKernel("encode_angles", None, ("x",), rows, variant=variant, tables=tables)  # no GPU has it

    def _encode_by_graph(self, x: mx.array) -> dict[str, mx.array]:
        y = x if self._signs is None else self._rotation.forward(x.astype(mx.float32))
        angles, radius = self.tree.angles(y)
        codes = self.tree.assign(angles)
        if self.scale != "norm":
            inner = (mx.unflatten(y, -1, (-1, self.tree.block)) * self.tree.directions(codes)).sum(axis=-1)
            if self.scale == "mse":
                radius = inner
            else:  # one factor for the whole vector: with one for each block errors would vary more
                total, kept = (a.sum(axis=-1, keepdims=True) for a in (mx.square(radius), radius * inner))
                radius = radius * (total / mx.where(kept == 0, 1.0, kept))
        rms = radius / math.sqrt(self.tree.block)  # as other codecs' scales, so that the same range is safe
        return self.tree.pack(codes) | {"root_rms": scales.store_scale(rms)}

    def expand(self, code: Code) -> mx.array:
        radius = scales.load_scale(code.arrays["root_rms"]) * math.sqrt(self.tree.block)
        return mx.flatten(self.tree.directions(self.tree.unpack(code.arrays)) * radius[..., None], -2)

    def reader(self, code: Code) -> PolarReader | None:
        first, *others = (code.arrays[name] for name in self.tree.layout)
        if len(self.levels) > MOST_LEVELS or 1 + len(others) > MOST_ROWS:
            return None
        other, layout = others[0] if others else None, (self.levels, self.tree.circles)
        return PolarReader(self.head_dim, first, None, self._signs, other, code.arrays["root_rms"], *layout)


def preset(head_dim: int, bits: int, recursion: Recursion) -> tuple[int, ...]:
    """Widths of the levels for ``bits`` from 2 to 8, as the module says."""
    if choice(*get_args(Recursion))("recursion", recursion) == "block":
        first, rest, count = (bits, bits - 2, BLOCK_LEVELS) if bits > 2 else (1, 1, BLOCK_LEVELS)
    else:
        first, rest, count = min(bits + 1, 8), bits - 1, polar.halvings(head_dim)
    return (first,) + (rest,) * (count - 1)


def build(
    head_dim: int,
    bits: int,
    tensor: Tensor,
    *,
    recursion: Recursion = "block",
    levels: object = None,
    **options: object,
) -> PolarQuant:
    """PolarQuant for keys (unbiased scale) or values (MSE scale), with the preset's ``levels`` or the given ones."""
    widths = preset(head_dim, bits, recursion) if levels is None else many(whole(1))("levels", levels)
    return PolarQuant(head_dim, widths, **scales.unbiased_keys(tensor, options))


METHOD = Method(
    id="polarquant",
    name="PolarQuant",
    paper="Han et al. 2025, arXiv 2502.02617",
    bits=range(2, 9),
    stored="angles of a recursive polar transform, a 16-bit radius for every 16 coordinates; once, learned codebooks",
    options=("recursion", "levels", "scale", "codebook", "rotation", "seed"),
    build=build,
    colour="#8e63ce",
    mark="diamond",
    space="rotated",
)
