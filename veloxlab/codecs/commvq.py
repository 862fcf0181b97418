"""CommVQ: sums of table entries that commute with RoPE.

Paper: *CommVQ: Commutative Vector Quantization for KV Cache Compression*, J. Li, Y. Zhang, M. Y. Hassan, T. Chafekar,
T. Cai, Z. Ren, P. Guo, F. Karimzadeh, C. Reed, C. Wang, C. Gan, 2025 (ICML), arXiv 2506.18879.

Keys are coded before RoPE, in the pairs of coordinates that RoPE rotates. Each of R residual stages has 64 matrices
``M(x, y) = [[x, y], [−y, x]]`` for each pair. The code (a, b) of a stage is shared by all pairs of the head, and adds
``[1, 0]·M[a] + [0, 1]·M[b] = (x_a − y_b, y_a + x_b)``. Every M commutes with every rotation, so rotating the sum gives
the same as rotating the tables.

Stored per vector of D coordinates
    12·R bits of codes, to whole bytes, and one 16-bit scale, with R = bits·D/12 rounded: at D = 64, R = 5, 11, 16, 21
    and 1.25, 2.38, 3.25, 4.25 bits a value. Tables per layer and KV head, in float16: R·64·D numbers.

Where we differ
    * mlx-lm passes keys after RoPE: the layer's rotation is undone first, and applied again at decoding.
    * Attention rotates the sums of a tile, not the tables at every position: 2·R·D additions a key, against 64·R·D
      multiplications for a table that is rotated for it.
    * Each vector has its own scale (the paper has one norm for all heads of a token). It minimises the squared error,
      for keys too: on SmolLM2 an unbiased scale is not better.
    * Values are coded by the same stages, without RoPE; the paper learns an encoder network for them.
    * A smaller trainer, which takes seconds for a layer: see `commvq_training`. Calibrate on 1,024 tokens or more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import mlx.core as mx
import numpy as np

from veloxlab.checks import whole
from veloxlab.codecs.base import Code, Codec, Sample, check_heads, check_vectors, empty_code, not_fitted
from veloxlab.codecs.commvq_training import ENTRIES, ROUNDS, STARTS, train_tables
from veloxlab.codecs.method import Method, Tensor
from veloxlab.codecs.parts import constant, packing, scales
from veloxlab.codecs.parts.learning import learnable
from veloxlab.codecs.parts.rope import Rope, Start, angles_from
from veloxlab.errors import InputError
from veloxlab.kernels.checked import computed
from veloxlab.kernels.encode import sums_kernel
from veloxlab.kernels.readers import SumsReader
from veloxlab.kernels.vectors import VectorKernel

_INDEX = 6  # bits of a or b
_CHUNK = 8192  # vectors that are encoded together
_MOST_FACTOR = 4.0  # of a scale over the norm: a vector that its code misses would get a meaningless factor


@dataclass(frozen=True, eq=False)
class CommVQ(Codec):
    """CommVQ's residual stages (arXiv 2506.18879, section 3). Keys are coded before RoPE, values unchanged.

    ``bits`` are nominal; ``12·stages / head_dim`` are used. ``stages`` is R, or 0 to derive it from ``bits``. Learned:
    ``tables``, entries of every stage ``[H, R, 64, D]``, float16, and ``rope`` of the layer, None for values.
    """

    head_dim: int
    bits: int
    tensor: Tensor
    stages: int = 0
    scale: scales.ScaleName = "mse"
    tables: mx.array | None = None
    rope: Rope | None = None

    def __post_init__(self) -> None:
        self._check(stages=whole(0))
        if self.head_dim < 2 or self.head_dim % 2:
            raise InputError(f"CommVQ codes coordinates in pairs: a head dimension of {self.head_dim} has to be even.")
        usual = max(1, round(self.bits * self.head_dim / (2 * _INDEX)))
        object.__setattr__(self, "stages", self.stages or usual)

    @property
    def pairs(self) -> np.ndarray:
        """Both coordinates of each pair ``[D/2, 2]``; without RoPE, coordinate i of each half."""
        return (self.rope or Rope(self.head_dim)).pairs(self.head_dim)

    @property
    def layout(self) -> packing.Layout:
        return {"codes": packing.packed_bytes(2 * self.stages, _INDEX), "root_scale": scales.SCALE}

    def fit(self, sample: Sample) -> Self:
        """Learn each KV head's tables; raises `InputError` below 64 tokens that vary, or for keys without RoPE."""
        check_vectors(sample.x, self.head_dim)
        rope = sample.rope if self.tensor == "keys" else None
        if self.tensor == "keys" and rope is None:
            raise InputError(
                "CommVQ undoes the rotary embedding of keys, and this layer has none that is known: "
                "use it in a rotary layer, or another method for these keys."
            )
        x = _before_rope(sample.x, rope, 0)
        heads = learnable(scales.over(x, scales.root_mean_square(x)), "CommVQ", ENTRIES)
        order = replace(self, rope=rope).pairs.T.ravel()  # all first coordinates, then all second ones
        tables = [
            train_tables(head[head.any(axis=1)].astype(np.float32), self.stages, order, sample.seed + i)
            for i, head in enumerate(heads)
        ]
        # contiguous, as kernels step through it by its shape
        return replace(self, tables=constant(np.ascontiguousarray(np.stack(tables)), mx.float16), rope=rope)

    def blank(self, kv_heads: int) -> Self:
        return replace(self, tables=mx.zeros((kv_heads, self.stages, ENTRIES, self.head_dim), mx.float16))

    def encode(self, x: mx.array, start: Start = 0) -> Code:
        check_vectors(x, self.head_dim)
        self._checked_tables(x.shape[1])
        return Code(computed(lambda _: self._encoder, self._encode_by_graph, _before_rope(x, self.rope, start)), start)

    def _encode_by_graph(self, x: mx.array) -> dict[str, mx.array]:
        both = self.both_tables(x.shape[1])
        chunk = max(1, _CHUNK // max(1, x.shape[0] * x.shape[1]))
        parts = [empty_code(self, x.shape[0], x.shape[1]).arrays]
        for at in range(0, x.shape[2], chunk):
            # one chunk after another: MLX would evaluate all in parallel
            (piece,) = mx.depends([x[:, :, at : at + chunk]], [parts[-1]["codes"]])
            rms = scales.root_mean_square(piece)
            y, indices = scales.over(piece, rms), []
            coded = mx.zeros(y.shape)
            for first, second in ((both[:, stage, 0], both[:, stage, 1]) for stage in range(self.stages)):
                a, b = _search(y - coded, first, second)
                coded = coded + _rows(first, a) + _rows(second, b)
                indices += [a, b]
            factor = mx.clip(scales.scale_factor(self.scale, y, coded), 0.0, _MOST_FACTOR)
            codes = packing.pack_bytes(mx.stack(indices, axis=-1), _INDEX)
            parts.append({"codes": codes, "root_scale": scales.store_scale(rms * factor)})
        return {name: mx.concatenate([part[name] for part in parts], axis=2) for name in parts[0]}

    @cached_property
    def _encoder(self) -> VectorKernel:
        """The kernel that runs the same search for each stage."""
        assert self.tables is not None
        order = constant(self.pairs.T.ravel(), mx.int32)  # the real parts of pairs, then the others
        return sums_kernel(self.tables, order, self.scale, STARTS, ROUNDS, _MOST_FACTOR, self._lost)

    def _lost(self, arrays: Mapping[str, mx.array], x: mx.array) -> mx.array:
        """Squared errors of vectors before RoPE, relative to their squares."""
        decoded = self.from_codes(self._sums(arrays["codes"])) * scales.load_scale(arrays["root_scale"])
        return mx.square(x - decoded).sum(axis=-1) / mx.square(x).sum(axis=-1)

    def expand(self, code: Code) -> mx.array:
        """Sums of the entries, rotated to their positions, with the coordinates of a pair next to each other."""
        total = self._sums(code.arrays["codes"])
        return total if self.rope is None else replace(self.rope, traditional=True).forward(total, code.start)

    def _sums(self, codes: mx.array) -> mx.array:
        heads, count = codes.shape[1], 2 * self.stages
        flat = self.both_tables(heads)[..., self._orders[0]].reshape(-1, self.head_dim)
        first = ENTRIES * mx.arange(heads * count, dtype=mx.uint32).reshape(heads, 1, count)  # row of each table
        rows = packing.unpack(codes, _INDEX, count) + first
        total = mx.zeros((*codes.shape[:-1], self.head_dim))
        for i in range(count):
            (row,) = mx.depends([rows[..., i]], [total])  # otherwise MLX holds the entries of all stages together
            total = total + flat[row]
        return total

    def from_codes(self, y: mx.array) -> mx.array:
        return mx.take(y, self._orders[1], axis=-1)

    def query_to_codes(self, q: mx.array) -> mx.array:
        return mx.take(q, self._orders[0], axis=-1)

    def reader(self, code: Code) -> SumsReader:
        codes, root_scale = code.arrays["codes"], code.arrays["root_scale"]
        tables, turned = self._checked_tables(codes.shape[1]), self.rope or Rope(self.head_dim)
        angles = None if self.rope is None else angles_from(self.rope, self.head_dim, code.start)
        return SumsReader(self.head_dim, codes, root_scale, None, tables, turned.dims, turned.traditional, angles)

    @cached_property
    def _orders(self) -> tuple[mx.array, mx.array]:
        """Coordinates in the order of the codes, where those of a pair are neighbours, and its inverse, ``[D]``."""
        there = self.pairs.ravel()
        return constant(there, mx.uint32), constant(np.argsort(there), mx.uint32)

    def both_tables(self, kv_heads: int) -> mx.array:
        """Entries of index a, and of index b (a quarter turn on), for every stage ``[H, R, 2, 64, D]``, before RoPE."""
        tables, (there, back) = self._checked_tables(kv_heads).astype(mx.float32), self._orders
        x, y = mx.split(mx.unflatten(tables[..., there], -1, (-1, 2)), 2, -1)
        turned = mx.flatten(mx.concatenate([-y, x], axis=-1), -2)
        return mx.stack([tables, turned[..., back]], axis=2)

    def _checked_tables(self, kv_heads: int) -> mx.array:
        if self.tables is None:
            raise not_fitted("CommVQ", f", bits={self.bits}")
        check_heads(self.tables.shape[0], kv_heads)
        return self.tables


def _before_rope(x: mx.array, rope: Rope | None, start: Start) -> mx.array:
    return x.astype(mx.float32) if rope is None else rope.inverse(x.astype(mx.float32), start)


def _search(r: mx.array, first: mx.array, second: mx.array) -> tuple[mx.array, mx.array]:
    """Indices ``[B, H, S]`` of the pair of entries ``[H, 64, D]`` whose sum is nearest to ``r`` ``[B, H, S, D]``.

    ‖r − f_a − s_b‖² is a term in a, a term in b and 2·f_a·s_b. With one index fixed, 64 sums give the best other one.
    The search alternates, from several starts.
    """
    of_a = mx.square(first).sum(axis=-1)[:, None] - 2 * (r @ first.swapaxes(-1, -2))
    of_b = mx.square(second).sum(axis=-1)[:, None] - 2 * (r @ second.swapaxes(-1, -2))
    of_both = 2 * (first @ second.swapaxes(-1, -2))
    a = mx.argpartition(of_a + of_both.mean(axis=-1)[:, None], STARTS, axis=-1)[..., :STARTS]
    b, distance = a, of_a
    for _ in range(ROUNDS):
        given_a = of_b[..., None, :] + _rows(of_both, a)
        b = mx.argmin(given_a, axis=-1)
        given_b = of_a[..., None, :] + _rows(of_both.swapaxes(-1, -2), b)
        a, distance = mx.argmin(given_b, axis=-1), given_b.min(axis=-1) + mx.take_along_axis(of_b, b, axis=-1)
    best = mx.argmin(distance, axis=-1, keepdims=True)
    return tuple(mx.take_along_axis(index, best, axis=-1).squeeze(-1) for index in (a, b))  # type: ignore[return-value]


def _rows(table: mx.array, index: mx.array) -> mx.array:
    """Rows of each head's table ``[H, 64, N]`` at ``index`` ``[B, H, ...]``."""
    heads, entries, _ = table.shape
    offset = (entries * mx.arange(heads, dtype=mx.uint32)).reshape(heads, *(1,) * (index.ndim - 2))
    return table.reshape(heads * entries, -1)[index + offset]


METHOD = Method(
    id="commvq",
    name="CommVQ",
    paper="Li et al. 2025, arXiv 2506.18879",
    calibrated=True,
    bits=range(1, 5),
    stored="12 bits for each of bits·D/12 stages, one 16-bit scale a vector",
    options=("stages", "scale"),
    build=CommVQ,
    colour="#cc5aa0",
    mark="cross",
    space="before_rope",
    long_texts="commvq",
    timed=True,
)
