"""VecInfer: smooth the keys' outliers away, then one codebook of whole sub-vectors.

Paper: *VecInfer: Efficient LLM Inference with Low-Bit KV Cache via Outlier-Suppressed Vector Quantization*, D. Yao,
C. Yang, Z. Tong, Z. Lin, W. Liu, J. Luan, W. Wang, 2025 (ACL 2026), arXiv 2510.06175.

Stored per vector of D coordinates
    D/d indices of b bits into a codebook of 2ᵇ sub-vectors of d coordinates, and nothing else: b/d bits per value, no
    norm and no scale. Points are written ``d4b8``. The defaults are ``d8b8`` (1 bit), ``d4b8`` (2), ``d4b12`` (3) and
    ``d2b8`` (4). The paper's 1.25 bits are ``point={"keys": "d8b12", "values": "d8b8"}``, its 1.5 ``point="d8b12"``.

Keys (after RoPE) are divided by λᵢ = √(max over tokens |Kᵢ|), per KV head and channel, and spread by a Hadamard
transform; queries are multiplied with λ and spread alike, so that inner products are exact but for the coding. Values
are coded as they are.

Where we differ
    * The Hadamard transform has random signs in front, which the paper does without, and fits any head dimension.
    * One codebook (float16) for all KV heads of a layer's keys, one for its values, so that its bytes stay small: 2 KB
      at ``d4b8``, 64 KB at ``d8b12``. Our notes of the paper do not say what it shares.
    * One of the centroids is zero. A common factor brings the fitted vectors to root-mean-square 1, so that float16
      holds their centroids, whatever their size.
    * It is trained on at most 65,536 sub-vectors (32,768 at 12 bits), from the best of three k-means++ seedings; from
      1,024 entries on from one, since the restarts differ too little there to pay for themselves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Self

import mlx.core as mx
import numpy as np

from veloxlab.codecs.base import Code, Sample, TiledCodec, check_heads, check_vectors, not_fitted
from veloxlab.codecs.method import Method, Role
from veloxlab.codecs.parts.packing import Layout, packed
from veloxlab.codecs.parts.transforms import SignedHadamard
from veloxlab.codecs.parts.vector import (
    can_pack,
    packed_nearest,
    train_codebook,
    unpack_indices,
)
from veloxlab.errors import InputError
from veloxlab.kernels.readers import TableReader

Point = str | Mapping[str, str]
POINTS = {1: "d8b8", 2: "d4b8", 3: "d4b12", 4: "d2b8"}
_LEAST_PER_CENTROID = 2  # different sub-vectors, below which a codebook would only repeat its sample
_FEW_QUERIES = 8  # per KV head, up to which tables are faster than expanding, on a CPU: 5 times for one query


@dataclass(frozen=True, eq=False)
class VecInfer(TiledCodec):
    """VecInfer's product vector quantizer (arXiv 2510.06175); `fit` learns the last two fields.

    Parameters
    ----------
    head_dim : D, a multiple of ``sub_dim``.
    sub_dim : d, coordinates that one index stands for.
    index_bits : b, 1 to 8, 10 or 12; the codebook has 2ᵇ entries.
    smooth : divide each channel of each KV head by λ.
    hadamard : spread the channels by signs and a Hadamard transform.
    seed : of the signs.
    factors : what a channel is divided with: ``[H, D]``, or ``[1, 1]`` without ``smooth``; float32.
    centroids : the codebook ``[2**b, d]``, float16.
    """

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
        if not can_pack(self.index_bits) or self.index_bits > 12:
            raise InputError(f"An index of {self.index_bits} bits cannot be used: choose 1 to 8, 10 or 12 bits.")

    @property
    def parts(self) -> int:
        """D/d, the indices of one vector."""
        return self.head_dim // self.sub_dim

    @property
    def layout(self) -> Layout:
        """D/d indices of b bits."""
        return {"indices": packed(self.parts, self.index_bits)}

    @property
    def shared_bytes(self) -> int:
        """Codebook and channel factors of this layer, and the signs of the transform."""
        fitted = sum(array.nbytes for array in (self.factors, self.centroids) if array is not None)
        return fitted + (self._spread.nbytes if self.hadamard else 0)

    @property
    def _spread(self) -> SignedHadamard:
        return SignedHadamard(self.head_dim, self.seed)

    @property
    def _fitted(self) -> tuple[mx.array, mx.array]:
        """Factors ``[H, 1, D]`` and centroids, both float32."""
        if self.factors is None or self.centroids is None:
            raise not_fitted("VecInfer")
        return self.factors[:, None], self.centroids.astype(mx.float32)

    def fit(self, sample: Sample) -> Self:
        """Learn λ and the codebook.

        Raises
        ------
        InputError : if the sample has not twice as many different sub-vectors as the codebook has entries, or is
            not finite.
        """
        check_vectors(sample.x, self.head_dim)
        x = sample.x.astype(mx.float32)
        if x.size and not mx.isfinite(x).all().item():
            raise InputError("The sample holds values that are NaN or infinite: calibrate in bfloat16 or float32.")
        factors = smoothing_factors(x) if self.smooth and x.size else mx.ones((1, 1))
        y = self._spread.forward(x / factors[:, None]) if self.hadamard else x / factors[:, None]
        points = np.array(y).reshape(-1, self.sub_dim)
        self._check_enough(points, tokens=x.shape[0] * x.shape[2], heads=x.shape[1])
        size = float(np.sqrt(np.square(points, dtype=np.float64).mean()))
        codebook = train_codebook((points / size).astype(np.float32), 1 << self.index_bits, sample.seed)
        factors, centroids = factors * size, mx.array(codebook.astype(np.float16))
        mx.eval(factors, centroids)
        return replace(self, factors=factors, centroids=centroids)

    def blank(self, kv_heads: int) -> Self:
        """Zeros in the place of what is learned; see `Codec.blank`."""
        shape = (kv_heads, self.head_dim) if self.smooth else (1, 1)
        centroids = mx.zeros((1 << self.index_bits, self.sub_dim), mx.float16)
        return replace(self, factors=mx.zeros(shape), centroids=centroids)

    def _check_enough(self, points: np.ndarray, tokens: int, heads: int) -> None:
        least = _LEAST_PER_CENTROID << self.index_bits
        different = len(np.unique(points, axis=0))
        if different < least:
            needed = max(-(-least // max(1, heads * self.parts)), tokens + 1)  # of those given some are alike
            raise InputError(
                f"A codebook of {1 << self.index_bits} entries takes {least:,} different sub-vectors, and the sample's "
                f"{tokens:,} tokens have {different:,}: calibrate on ordinary text of at least {needed:,} tokens, "
                "better ten times as many."
            )

    def encode(self, x: mx.array, start: int = 0) -> Code:
        """Index of the nearest centroid of each sub-vector of ``x`` ``[B, H, S, D]``; see `Codec.encode`."""
        check_vectors(x, self.head_dim)
        factors, centroids = self._fitted
        if self.smooth:
            check_heads(len(factors), x.shape[1])
        y = x.astype(mx.float32) / factors
        y = self._spread.forward(y) if self.hadamard else y
        return Code({"indices": packed_nearest(y, centroids, self.index_bits)}, start)

    def expand(self, code: Code) -> mx.array:
        """Centroids of the indices; see `TiledCodec.expand`."""
        _, centroids = self._fitted
        indices = self._indices(code)
        return mx.take(centroids, indices, axis=0).reshape(*indices.shape[:-1], self.head_dim)

    def from_codes(self, y: mx.array) -> mx.array:
        """Undo the spreading, and multiply with the factors."""
        factors, _ = self._fitted
        return (self._spread.inverse(y) if self.hadamard else y) * factors

    def query_to_codes(self, q: mx.array) -> mx.array:
        """Multiply with the factors, and spread."""
        factors, _ = self._fitted
        return self._spread.forward(q * factors) if self.hadamard else q * factors

    def inner_products(self, q: mx.array) -> Callable[[Code], mx.array]:
        """By look-up: a query's inner product with every centroid is computed once, and each token sums D/d of them.

        Many queries at once, as in a prefill, are multiplied with expanded tiles instead.
        """
        if q.shape[2] > _FEW_QUERIES:
            return super().inner_products(q)
        _, centroids = self._fitted
        table = q.reshape(*q.shape[:-1], self.parts, self.sub_dim) @ centroids.T  # [B, H, L, D/d, 2**b]

        def look_up(tile: Code) -> mx.array:
            indices = self._indices(tile).swapaxes(-1, -2)[:, :, None]  # [B, H, 1, D/d, S]
            return mx.take_along_axis(table, indices, axis=-1).sum(axis=-2)

        return look_up

    def reader(self, code: Code) -> TableReader | None:
        """The codebook as a table; see `TiledCodec.reader`."""
        if self.sub_dim % 2:
            return None
        _, centroids = self._fitted
        return TableReader(self.head_dim, code.arrays["indices"], None, None, self.index_bits, centroids)

    def _indices(self, code: Code) -> mx.array:
        return unpack_indices(code.arrays["indices"], self.index_bits, self.parts)


def smoothing_factors(x: mx.array) -> mx.array:
    """What VecInfer divides each channel of ``x`` ``[B, H, S, D]`` with: λ = √(max over tokens |x|) ``[H, D]``."""
    factors = mx.sqrt(mx.abs(x).max(axis=(0, 2)))
    return mx.where(factors == 0, 1.0, factors)  # a channel that is always 0 says nothing of its size


def build(
    head_dim: int,
    bits: int,
    role: Role,
    *,
    point: Point | None = None,
    smooth: bool | None = None,
    hadamard: bool | None = None,
    seed: int = 0,
) -> VecInfer:
    """Make an unfitted VecInfer for keys (smoothed and spread) or values (as they are), unless the options say more.

    ``point`` is one for both roles, or ``{"keys": "d8b12", "values": "d8b8"}``; a role that is left out has that of
    ``bits``.
    """
    if isinstance(point, Mapping):
        unknown = sorted(set(point) - {"keys", "values"}, key=str)
        if unknown:
            raise InputError(f"point has no side {unknown[0]!r}: give points for 'keys' and 'values'.")
        point = point.get(role)
    point = POINTS[bits] if point is None else point
    found = re.fullmatch(r"d(\d+)b(\d+)", point) if isinstance(point, str) else None
    if found is None:
        raise InputError(
            f"point={point!r} is no point of VecInfer: write 'd4b8' for sub-vectors of 4 coordinates and indices of "
            "8 bits, or {'keys': 'd8b12', 'values': 'd8b8'}."
        )
    transformed = role == "keys"
    return VecInfer(
        head_dim,
        sub_dim=int(found[1]),
        index_bits=int(found[2]),
        smooth=transformed if smooth is None else smooth,
        hadamard=transformed if hadamard is None else hadamard,
        seed=seed,
    )


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
