"""VecInfer: smoothing of the keys' outliers, then one codebook of sub-vectors.

Paper: *VecInfer: Efficient LLM Inference with Low-Bit KV Cache via Outlier-Suppressed Vector Quantization*, D. Yao,
C. Yang, Z. Tong, Z. Lin, W. Liu, J. Luan, W. Wang, 2025 (ACL 2026), arXiv 2510.06175.

Stored per vector of D coordinates
    D/d indices of b bits into a codebook of 2ᵇ sub-vectors of d coordinates: b/d bits per value, no norm and no scale.
    Points are written ``d4b8``. The paper's 1.25 bits are ``point={"keys": "d8b12", "values": "d8b8"}``.

Keys (after RoPE) are divided by λᵢ = √(max over tokens |Kᵢ|), for each KV head and channel, and rotated by a Hadamard
transform. Queries are multiplied with λ and rotated in the same way. Values are coded unchanged. λ and the codebook of
keys fit the positions of the calibration text, and later keys lose more: calibrate with as many ``tokens`` as your
longest text has.

Where we differ
    * The Hadamard transform has random signs in front, and fits any head dimension.
    * One codebook (float16) for all KV heads of a layer's keys, one for its values: 2 KB at ``d4b8``, 64 KB at
      ``d8b12``. A common factor brings the fitted vectors to root-mean-square 1, so that float16 holds them.
    * One of the centroids is zero. Training sees at most 65,536 sub-vectors (32,768 at 12 bits).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Self

import mlx.core as mx
import numpy as np

from veloxlab.codecs.base import Code, Codec, Sample, check_heads, check_vectors, not_fitted
from veloxlab.codecs.method import Method, Tensor, own_part
from veloxlab.codecs.parts import constant
from veloxlab.codecs.parts.packing import Layout, packed
from veloxlab.codecs.parts.rope import Start
from veloxlab.codecs.parts.transforms import Rotation, make_rotation
from veloxlab.codecs.parts.vector import packed_nearest, train_codebook, unpack_indices
from veloxlab.errors import InputError
from veloxlab.kernels.readers import TableReader

POINTS = {1: "d8b8", 2: "d4b8", 3: "d4b12", 4: "d2b8"}
_INDEX_BITS = (*range(1, 9), 10, 12)
_LEAST_PER_CENTROID = 2  # different sub-vectors; with fewer a codebook would only repeat its sample
_FEW_QUERIES = 8  # for each KV head, up to which tables are faster than expansion by MLX operations (5 times for one)


@dataclass(frozen=True, eq=False)
class VecInfer(Codec):
    """VecInfer's product vector quantizer (arXiv 2510.06175): ``sub_dim`` is d, ``index_bits`` b: 1 to 8, 10 or 12.

    ``smooth`` divides each channel of each KV head by λ, ``hadamard`` rotates. Learned: ``factors``, the divisors of
    the channels ``[H, D]``, or ``[1, 1]`` without ``smooth``, float32; the codebook ``[2**b, d]``, float16.
    """

    reaches_by: ClassVar[str] = "tokens={N}"
    head_dim: int
    sub_dim: int
    index_bits: int
    smooth: bool = True
    hadamard: bool = True
    seed: int = 0
    factors: mx.array | None = None
    centroids: mx.array | None = None

    def __post_init__(self) -> None:
        if self.sub_dim < 1 or self.head_dim % self.sub_dim:
            fits = next(d for d in (4, 2, 1) if self.head_dim % d == 0)
            raise InputError(
                f"Sub-vectors of {self.sub_dim} do not divide a head dimension of {self.head_dim}: "
                f"choose a point whose d does, such as point='d{fits}b8'."
            )
        if self.index_bits not in _INDEX_BITS:
            raise InputError(f"An index of {self.index_bits} bits cannot be used: choose 1 to 8, 10 or 12 bits.")
        if self.hadamard:
            _ = self._rotation

    @property
    def parts(self) -> int:
        """D/d, the number of indices of one vector."""
        return self.head_dim // self.sub_dim

    @property
    def layout(self) -> Layout:
        return {"indices": packed(self.parts, self.index_bits)}

    @cached_property
    def _rotation(self) -> Rotation:
        return make_rotation("hadamard", self.head_dim, self.seed)

    @property
    def _fitted(self) -> tuple[mx.array, mx.array]:
        if self.factors is None or self.centroids is None:
            raise not_fitted("VecInfer")
        return self.factors[:, None], self.centroids.astype(mx.float32)

    def fit(self, sample: Sample) -> Self:
        """Learn λ and the codebook; raises `InputError` for a sample that is not finite, or too small."""
        check_vectors(sample.x, self.head_dim)
        x = sample.x.astype(mx.float32)
        if x.size and not mx.isfinite(x).all().item():
            raise InputError("The sample holds values that are NaN or infinite: calibrate in bfloat16 or float32.")
        factors = smoothing_factors(x) if self.smooth and x.size else mx.ones((1, 1))
        points = np.array(self._rotated(x / factors[:, None])).reshape(-1, self.sub_dim)
        batch, heads, tokens, _ = x.shape
        least, different = _LEAST_PER_CENTROID << self.index_bits, _different(points)
        if different < least:
            given = batch * tokens
            needed = max(-(-least // max(1, heads * self.parts)), given + 1)
            if different > given:  # an estimate for a longer text; a text of a few words gives none
                needed = max(needed, -(-least * given // different))
            raise InputError(
                f"A codebook of {1 << self.index_bits} entries takes {least:,} different sub-vectors, and the sample's "
                f"{given:,} tokens have {different:,}: calibrate on ordinary text of at least {needed:,} "
                "tokens, better ten times as many."
            )
        size = float(np.sqrt(np.square(points, dtype=np.float64).mean()))
        codebook = train_codebook((points / size).astype(np.float32), 1 << self.index_bits, sample.seed)
        return replace(self, factors=constant(factors * size), centroids=constant(codebook, mx.float16))

    def blank(self, kv_heads: int) -> Self:
        shape = (kv_heads, self.head_dim) if self.smooth else (1, 1)
        centroids = mx.zeros((1 << self.index_bits, self.sub_dim), mx.float16)
        return replace(self, factors=mx.zeros(shape), centroids=centroids)

    def encode(self, x: mx.array, start: Start = 0) -> Code:
        check_vectors(x, self.head_dim)
        factors, centroids = self._fitted
        if self.smooth:
            check_heads(len(factors), x.shape[1])
        y = self._rotated(x.astype(mx.float32) / factors)
        return Code({"indices": packed_nearest(y, centroids, self.index_bits)}, start)

    def expand(self, code: Code) -> mx.array:
        return mx.flatten(mx.take(self._fitted[1], self._indices(code), axis=0), -2)

    def from_codes(self, y: mx.array) -> mx.array:
        return (self._rotation.inverse(y) if self.hadamard else y) * self._fitted[0]

    def query_to_codes(self, q: mx.array) -> mx.array:
        return self._rotated(q * self._fitted[0])

    def inner_products(self, q: mx.array) -> Callable[[Code], mx.array]:
        """For few queries: look up their products with all centroids; each token sums D/d of them."""
        if q.shape[2] > _FEW_QUERIES:
            return super().inner_products(q)
        table = mx.unflatten(q, -1, (self.parts, self.sub_dim)) @ self._fitted[1].T  # [B, H, L, D/d, 2**b]

        def look_up(tile: Code) -> mx.array:
            indices = self._indices(tile).swapaxes(-1, -2)[:, :, None]  # [B, H, 1, D/d, S]
            return mx.take_along_axis(table, indices, axis=-1).sum(axis=-2)

        return look_up

    def reader(self, code: Code) -> TableReader | None:
        """The codebook as a table; None for sub-vectors of odd length."""
        if self.sub_dim % 2:
            return None
        return TableReader(self.head_dim, code.arrays["indices"], None, None, self.index_bits, self._fitted[1])

    def _rotated(self, x: mx.array) -> mx.array:
        return self._rotation.forward(x) if self.hadamard else x

    def _indices(self, code: Code) -> mx.array:
        return unpack_indices(code.arrays["indices"], self.index_bits, self.parts)


def _different(points: np.ndarray) -> int:
    """The number of different ``points`` ``[N, d]``, float32, by 64-bit checksums: a sort takes ten times as long."""
    factors = np.random.default_rng(0).integers(1 << 63, size=points.shape[1], dtype=np.uint64) | np.uint64(1)
    checksums = ((points + np.float32(0)).view(np.uint32) * factors).sum(axis=1, dtype=np.uint64)  # −0 + 0 is 0
    return len(np.unique(checksums))


def smoothing_factors(x: mx.array) -> mx.array:
    """VecInfer's divisor of each channel of ``x`` ``[B, H, S, D]``: λ = √(max over tokens |x|) ``[H, D]``."""
    factors = mx.sqrt(mx.abs(x).max(axis=(0, 2)))
    return mx.where(factors == 0, 1.0, factors)  # a channel of zeros has no size


def build(
    head_dim: int, bits: int, tensor: Tensor, *, point: str | Mapping[str, str] | None = None, **options: object
) -> VecInfer:
    """VecInfer to be fitted, for keys (smoothed and rotated) or values (unchanged); ``point`` follows from ``bits``."""
    own = own_part("point", point, tensor)
    own = POINTS[bits] if own is None else own
    found = re.fullmatch(r"d(\d+)b(\d+)", own) if isinstance(own, str) else None
    if found is None:
        raise InputError(
            f"point={own!r} is not a point of VecInfer: write 'd4b8' for sub-vectors of 4 coordinates and indices of "
            "8 bits, or {'keys': 'd8b12', 'values': 'd8b8'}."
        )
    usual = {name: tensor == "keys" for name in ("smooth", "hadamard") if options.get(name) is None}
    return VecInfer(head_dim, int(found[1]), int(found[2]), **(options | usual))  # type: ignore[arg-type]


METHOD = Method(
    id="vecinfer",
    name="VecInfer",
    paper="Yao et al. 2025, arXiv 2510.06175",
    calibrated=True,
    bits=range(1, 5),
    stored="D/d indices of b bits a vector; per layer a codebook and a factor a channel",
    options=("point", "smooth", "hadamard", "seed"),
    build=build,
    colour="#2b93b8",
    mark="square",
    space="smoothed",
)
