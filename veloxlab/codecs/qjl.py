"""QJL: keys as the signs of a random projection, values as groups of equal steps.

Paper: *QJL: 1-Bit Quantized JL Transform for KV Cache Quantization with Zero Overhead*, A. Zandieh, M. Daliri, I. Han,
AAAI 2025, arXiv 2406.03482.

A key k is stored as sign(S k), for a random matrix S of m rows, and its norm. For an unrounded query
⟨q, k⟩ ≈ c·‖k‖·⟨S q, sign(S k)⟩ is unbiased: c = √(π/2)/m for rows of independent Gaussians.

Stored per vector of D coordinates
    Keys: m = b·D signs and one 16-bit norm: b + 16/D bits per value. With ``outliers`` about D signs and 16 bits more.
    Values: b·D bits of codes, and two 16-bit numbers for each group of 32: b + 1 bits per value. (The paper's
    "2-bit" values take 3.) Signs reconstruct the key itself poorly: the error falls as 1/b, not as 4^−b.

Where we differ
    * S has blocks of D orthogonal rows by default, as in the authors' code but not in their paper: 2.75 times less
      variance for the same bits at m = D, and c is exact for every D. ``gaussian`` is the paper's.
    * Outlier channels (``outliers=k``) are found once for each KV head, by calibration, as the channels of largest
      energy, not for every 32 tokens. As in the paper, they get their own sketch and norm, of about D rows.
    * Values: ``levels="ends"`` is the authors'. The default puts a level in the middle of each step, not on the least
      and the largest value. Without more bits this removes a third of the squared error at 2 bits, and leaves a
      quarter of it at 1 bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar, Literal

import mlx.core as mx
import numpy as np

from veloxlab.checks import whole
from veloxlab.codecs.base import Code, Codec, check_vectors
from veloxlab.codecs.method import Method, Tensor
from veloxlab.codecs.parts import packing, scales
from veloxlab.codecs.parts.outliers import SplitCodec
from veloxlab.codecs.parts.rope import Start
from veloxlab.codecs.parts.scalar import joint_levels
from veloxlab.codecs.parts.transforms import SignSketch, SketchName, make_sketch, pack_signs
from veloxlab.kernels.checked import computed
from veloxlab.kernels.encode import group_kernel, sign_kernel
from veloxlab.kernels.readers import GroupsReader, TableReader
from veloxlab.kernels.vectors import VectorKernel

GroupLevels = Literal["centres", "ends"]

_SIGNS = 4  # that kernels read together
_OUTLIER_SEED = 1_000_003  # keeps the sketch of the outliers independent of the other


@dataclass(frozen=True)
class QJL(Codec):
    """QJL's keys: signs of a ``sketch`` of ``bits`` times ``head_dim`` rows, and a norm (Algorithm 1)."""

    head_dim: int
    bits: int
    sketch: SketchName = "orthogonal"
    seed: int = 0

    def __post_init__(self) -> None:
        self._check()
        _ = self._sketch

    @cached_property
    def _sketch(self) -> SignSketch:
        return make_sketch(self.head_dim, self.bits * self.head_dim, self.sketch, self.seed)

    @property
    def code_dim(self) -> int:
        return self._sketch.rows

    @property
    def layout(self) -> packing.Layout:
        """b·D signs, and the root of the root-mean-square, which float16 holds for larger vectors than the norm."""
        return {"signs": packing.packed(self.code_dim, 1), "root_rms": scales.SCALE}

    def encode(self, x: mx.array, start: Start = 0) -> Code:
        check_vectors(x, self.head_dim)
        y = self.query_to_codes(x.astype(mx.float32))
        return Code(computed(lambda _: sign_kernel(x.shape[-1], y.shape[-1]), _signs_and_size, x, y), start)

    def expand(self, code: Code) -> mx.array:
        return self._sketch.expand(code.arrays["signs"])

    def reader(self, code: Code) -> TableReader | None:
        table = _sign_table(self._sketch.unbiased_scale * math.sqrt(self.head_dim))
        return TableReader(self.code_dim, code.arrays["signs"], code.arrays["root_rms"], None, _SIGNS, table)

    def scales(self, code: Code) -> mx.array:
        """Norms times the constant of the unbiased estimate."""
        return scales.load_scale(code.arrays["root_rms"]) * math.sqrt(self.head_dim) * self._sketch.unbiased_scale

    def from_codes(self, y: mx.array) -> mx.array:
        return y @ self._sketch.matrix

    def query_to_codes(self, q: mx.array) -> mx.array:
        return q @ self._sketch.matrix.T


@dataclass(frozen=True, eq=False)
class OutlierQJL(SplitCodec):
    """QJL's keys with a second sketch for ``outliers`` channels of each KV head, whose norm would dominate the rest."""

    method: ClassVar[str] = "QJL"
    head_dim: int
    bits: int
    sketch: SketchName = "orthogonal"
    seed: int = 0
    outliers: int = 4
    channels: tuple[int, ...] = ()

    @property
    def counts(self) -> range:
        return range(1, self.head_dim // 2 + 1)

    @cached_property
    def parts(self) -> tuple[QJL, QJL]:
        rows = self.head_dim // self.outliers
        apart = QJL(self.outliers, rows, self.sketch, self.seed + _OUTLIER_SEED)
        return apart, QJL(self.head_dim, self.bits, self.sketch, self.seed)


@dataclass(frozen=True)
class GroupedValues(Codec):
    """QJL's values: ``group`` neighbours at a time, cut into ``2**bits`` equal steps from the least to the largest.

    ``levels="centres"`` decodes a step to its middle; ``"ends"`` puts the outer levels on the least and the largest
    number, as KIVI and QJL do. The last group may be shorter.
    """

    head_dim: int
    bits: int
    levels: GroupLevels = "centres"
    group: int = 32
    expand_scales: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._check(group=whole(1))

    @property
    def layout(self) -> packing.Layout:
        number = packing.Row(mx.float16, -(-self.head_dim // self.group))
        return {"codes": packing.packed(self.head_dim, self.bits), "half_step": number, "least": number}

    def encode(self, x: mx.array, start: Start = 0) -> Code:
        check_vectors(x, self.head_dim)
        return Code(computed(lambda _: self._encoder, self._encode_by_graph, x), start)

    @property
    def _encoder(self) -> VectorKernel | None:
        return group_kernel(self.head_dim, self.bits, self.group, self._steps, self._shift)

    def _encode_by_graph(self, x: mx.array) -> dict[str, mx.array]:
        x = self._grouped(x.astype(mx.float32))
        least, largest = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
        # roots, as for scales: float16 holds them for any |x| up to 4e9. Codes are relative to the rounded numbers
        root_least = (mx.sign(least) * mx.sqrt(mx.abs(least))).astype(mx.float16)
        least = _signed_square(root_least)
        root_half = mx.sqrt(mx.maximum(largest - least, 0.0) / (2 * self._steps)).astype(mx.float16)
        codes = scales.over(x - least, 2 * _signed_square(root_half)) - self._shift
        codes = self._flat(mx.clip(mx.round(codes), 0, 2**self.bits - 1))
        return {"codes": packing.pack(codes, self.bits), "half_step": root_half[..., 0], "least": root_least[..., 0]}

    def expand(self, code: Code) -> mx.array:
        codes = self._grouped(
            packing.unpack_to_bytes(code.arrays["codes"], self.bits, self.head_dim).astype(mx.float32)
        )
        half_step, least = (_signed_square(code.arrays[name])[..., None] for name in ("half_step", "least"))
        return self._flat(least + (codes + self._shift) * (2 * half_step))

    def reader(self, code: Code) -> GroupsReader:
        codes, half_step, least = (code.arrays[name] for name in ("codes", "half_step", "least"))
        layout = self.bits, self.group, self.levels == "centres"
        return GroupsReader(self.head_dim, codes, None, None, half_step, least, *layout)

    @property
    def _steps(self) -> int:
        return (1 << self.bits) - int(self.levels == "ends")

    @property
    def _shift(self) -> float:
        return 0.5 if self.levels == "centres" else 0.0

    def _flat(self, x: mx.array) -> mx.array:
        return mx.flatten(x, -2)[..., : self.head_dim]

    def _grouped(self, x: mx.array) -> mx.array:
        """``[..., D]`` to ``[..., groups, group]``; the last group is filled up with its last coordinate."""
        missing = -self.head_dim % self.group
        filled = mx.concatenate([x, mx.repeat(x[..., -1:], missing, axis=-1)], axis=-1) if missing else x
        return mx.unflatten(filled, -1, (-1, self.group))


def _signed_square(root: mx.array) -> mx.array:
    root = root.astype(mx.float32)
    return root * mx.abs(root)


@lru_cache
def _sign_table(size: float) -> mx.array:
    """The values of all combinations of neighbouring signs ``[2**4, 4]``: ±size."""
    return joint_levels(np.array([-size, size]), 1, _SIGNS)


def _signs_and_size(x: mx.array, y: mx.array) -> dict[str, mx.array]:
    return {"signs": pack_signs(y), "root_rms": scales.store_scale(scales.root_mean_square(x))}


def build(head_dim: int, bits: int, tensor: Tensor, **options: object) -> QJL | OutlierQJL | GroupedValues:
    """Sketched keys, optionally with ``outliers``, or grouped values. Each has its own options."""
    own = ("levels", "group") if tensor == "values" else ("sketch", "seed", "outliers")
    given = {name: value for name, value in options.items() if name in own}
    if given.get("outliers") in (None, 0):
        given.pop("outliers", None)
    kind = GroupedValues if tensor == "values" else OutlierQJL if "outliers" in given else QJL
    return kind(head_dim, bits, **given)  # type: ignore[arg-type]


METHOD = Method(
    id="qjl",
    name="QJL",
    paper="Zandieh, Daliri, Han 2024, arXiv 2406.03482",
    bits=range(1, 9),
    stored="keys: b signs a coordinate, one 16-bit norm; values: b bits a coordinate, 32 bits a group of 32",
    options=("sketch", "outliers", "levels", "group", "seed"),
    build=build,
    colour="#a0693a",
    mark="triangle-right",
    timed=True,
)
