"""The codec contract, and the shape that most algorithms share: rotate, quantize, scale.

A codec compresses vectors of one head dimension. It is an immutable dataclass of plain numbers, so it can be compared,
hashed, copied for nothing and written as JSON. Its constant tables are built once per process and shared by all layers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol, Self

import mlx.core as mx

from veloxlab.codecs.transforms import Rotation, RotationName, make_rotation
from veloxlab.errors import InputError

TOKENS = 2  # the axis of every array of a code that counts tokens: [B, H, S, ...]
TILE = 1024  # tokens that attention expands at once, so that no decoded history exists


@dataclass(frozen=True)
class Code:
    """The compressed form of ``[B, H, S, D]``: named arrays ``[B, H, S, ...]``, so that any code can grow and be cut.

    Attributes
    ----------
    arrays : what is stored, by name, every array with the tokens on axis 2.
    """

    arrays: dict[str, mx.array]

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return int(next(iter(self.arrays.values())).shape[TOKENS])

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(a.nbytes for a in self.arrays.values())

    def __getitem__(self, span: slice) -> Code:
        """Tokens ``start:stop``, as views."""
        return Code({name: a[:, :, span] for name, a in self.arrays.items()})


class Codec(Protocol):
    """What the cache and attention need to know of an algorithm. Shapes: x ``[B, H, S, D]``, q ``[B, Hq, L, D]``."""

    @property
    def head_dim(self) -> int:
        """D, the length of the vectors."""

    @property
    def bits_per_value(self) -> float:
        """True stored bits per coordinate: codes, scales, norms and padding."""

    @property
    def shared_bytes(self) -> int:
        """Bytes of constant tables, held once per process for all layers that use an equal codec."""

    def fit(self, sample: mx.array) -> Self:
        """Learn from ``sample`` ``[B, H, S, D]``; an algorithm that needs no calibration returns itself."""

    def encode(self, x: mx.array) -> Code:
        """Compress ``x`` ``[B, H, S, D]`` of any float dtype."""

    def decode(self, code: Code) -> mx.array:
        """Reconstruct ``[B, H, S, D]`` in float32 (`none` keeps the dtype it was given)."""

    def scores(self, q: mx.array, code: Code) -> mx.array:
        """``q · decode(code)ᵀ`` ``[B, Hq, L, S]``, float32, from the codes; query heads share KV heads in order."""

    def mix(self, p: mx.array, code: Code) -> mx.array:
        """``p · decode(code)`` ``[B, Hq, L, D]``, float32, for weights ``p`` ``[B, Hq, L, S]``, read from the codes."""


def check_vectors(x: mx.array, head_dim: int) -> None:
    """Raise `InputError` unless ``x`` is ``[B, H, S, head_dim]``."""
    if x.ndim != 4 or x.shape[-1] != head_dim:
        raise InputError(
            f"This codec compresses heads of dimension {head_dim}, in arrays [batch, heads, tokens, {head_dim}], "
            f"and was given {list(x.shape)}: make a codec for that head dimension."
        )


def per_kv_head(x: mx.array, kv_heads: int) -> mx.array:
    """``[B, Hq, L, D]`` to ``[B, H, Hq/H · L, D]``: the queries that read one KV head, together."""
    batch, heads, length, dim = x.shape
    return x.reshape(batch, kv_heads, heads // kv_heads * length, dim)


class RotatedCodec(ABC):
    """Rotate, quantize, scale: ``decode = scale · rotate⁻¹(expand)``.

    A subclass says how a rotated vector of root-mean-square 1 is quantized and expanded; encoding, the exact query
    side and the tiles of attention are here. Attention never leaves the rotated space: the query is rotated once, and
    the mix of values is rotated back once.
    """

    head_dim: int
    rotation: RotationName
    seed: int

    @abstractmethod
    def quantize(self, y: mx.array) -> tuple[dict[str, mx.array], mx.array]:
        """Packed arrays for rotated vectors ``y`` ``[B, H, S, D]`` of length √D, and the factor ``[B, H, S, 1]`` that
        their expansion is to be multiplied with, beside the vector's own root-mean-square.
        """

    @abstractmethod
    def expand(self, arrays: dict[str, mx.array]) -> mx.array:
        """Rotated vectors ``[B, H, S, D]`` before scaling, float32."""

    @property
    def _rotation(self) -> Rotation:
        return make_rotation(self.rotation, self.head_dim, self.seed)

    def fit(self, sample: mx.array) -> Self:
        """Nothing to learn: the rotation makes every vector's coordinates alike."""
        check_vectors(sample, self.head_dim)
        return self

    def encode(self, x: mx.array) -> Code:
        """Compress ``x`` ``[B, H, S, D]``; see `Codec.encode`."""
        check_vectors(x, self.head_dim)
        x = x.astype(mx.float32)
        rms = mx.linalg.norm(x, axis=-1, keepdims=True) / math.sqrt(self.head_dim)
        arrays, factor = self.quantize(self._rotation.forward(x / mx.where(rms == 0, 1.0, rms)))
        return Code(arrays | {"root_scale": store_scale(rms * factor)})

    def decode(self, code: Code) -> mx.array:
        """Reconstruct ``[B, H, S, D]``; see `Codec.decode`."""
        return self._rotation.inverse(self.expand(code.arrays) * load_scale(code.arrays["root_scale"]))

    def scores(self, q: mx.array, code: Code) -> mx.array:
        """``q · decode(code)ᵀ`` from the codes, a tile at a time; see `Codec.scores`."""
        batch, heads, length, _ = q.shape
        kv_heads = code.arrays["root_scale"].shape[1]
        rotated = self._rotation.forward(per_kv_head(q.astype(mx.float32), kv_heads))
        parts: list[mx.array] = []
        for start in range(0, code.tokens, TILE):
            tile = _tile(code, start, after=parts[-1] if parts else None)
            scale = load_scale(tile["root_scale"]).swapaxes(-1, -2)
            parts.append(rotated @ self.expand(tile).swapaxes(-1, -2) * scale)
        joined = mx.concatenate(parts, axis=-1) if parts else mx.zeros((*rotated.shape[:-1], 0))
        return joined.reshape(batch, heads, length, code.tokens)

    def mix(self, p: mx.array, code: Code) -> mx.array:
        """``p · decode(code)`` from the codes, a tile at a time; see `Codec.mix`."""
        batch, heads, length, _ = p.shape
        kv_heads = code.arrays["root_scale"].shape[1]
        weights = per_kv_head(p.astype(mx.float32), kv_heads)
        total = mx.zeros((*weights.shape[:-1], self.head_dim))
        for start in range(0, code.tokens, TILE):
            tile = _tile(code, start, after=total if start else None)
            scale = load_scale(tile["root_scale"]).swapaxes(-1, -2)
            total = total + (weights[..., start : start + TILE] * scale) @ self.expand(tile)
        return self._rotation.inverse(total).reshape(batch, heads, length, self.head_dim)


def _tile(code: Code, start: int, after: mx.array | None) -> dict[str, mx.array]:
    """Arrays of the tile that begins at ``start``, to be read only once ``after`` is computed.

    Without that order MLX evaluates twenty branches of a graph abreast, and so expands twenty tiles at once.
    """
    arrays = code[start : start + TILE].arrays
    if after is None:
        return arrays
    return dict(zip(arrays, mx.depends(list(arrays.values()), [after]), strict=True))


def store_scale(scale: mx.array) -> mx.array:
    """Keep a positive scale as the float16 of its square root: 10 bits of precision from 4e-9 to 4e9.

    A float16 scale itself overflows past 65504, which float32 and bfloat16 models reach, and loses bits below 6e-5.
    """
    return mx.sqrt(scale).astype(mx.float16)


def load_scale(root: mx.array) -> mx.array:
    """Undo `store_scale`, in float32."""
    return mx.square(root.astype(mx.float32))
