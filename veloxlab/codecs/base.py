"""The codec contract, and the shape that most algorithms share: rotate, quantize, scale.

A codec compresses vectors of one head dimension. It is an immutable dataclass. One that needs no calibration holds
plain numbers, so it can be compared, hashed, copied for nothing and written as JSON; its constant tables are built once
per process and shared by all layers. One that does also holds the arrays that it learned, and is compared by identity.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar, Self

import mlx.core as mx

from veloxlab.codecs.parts.packing import Layout, Row
from veloxlab.codecs.parts.rope import Rope
from veloxlab.codecs.parts.transforms import Rotation, RotationName, SignedHadamard, make_rotation
from veloxlab.errors import InputError
from veloxlab.kernels.checked import computed
from veloxlab.kernels.readers import Reader
from veloxlab.kernels.rotated import decode_kernel
from veloxlab.kernels.vectors import VectorKernel

TOKENS = 2  # the axis of every array of a code that counts tokens: [B, H, S, ...]
TILE = 1024  # tokens that attention expands at once, so that no decoded history exists


@dataclass(frozen=True)
class Code:
    """The compressed form of ``[B, H, S, D]``: named arrays ``[B, H, S, ...]``, so that any code can grow and be cut.

    Attributes
    ----------
    arrays : what is stored, by name, every array with the tokens on axis 2.
    start : position in the text of the first token; only a codec that undoes RoPE needs it.
    """

    arrays: dict[str, mx.array]
    start: int = 0

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return int(next(iter(self.arrays.values())).shape[TOKENS])

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(a.nbytes for a in self.arrays.values())

    def __getitem__(self, span: slice) -> Code:
        """Tokens ``start:stop`` (not negative), as views."""
        return Code({name: a[:, :, span] for name, a in self.arrays.items()}, self.start + (span.start or 0))


SCALE = Row(mx.float16, 1)  # what `store_scale` keeps of a vector


def empty_code(codec: Codec, batch: int = 1, kv_heads: int = 1, dtype: mx.Dtype = mx.float16) -> Code:
    """The code of no tokens that ``codec`` makes of vectors of type ``dtype``, by its layout."""
    return Code(
        {
            name: mx.zeros((batch, 1 if row.joint else kv_heads, 0, row.count), row.dtype or dtype)
            for name, row in codec.layout.items()
        }
    )


def token_bytes(codec: Codec, kv_heads: int, exact_bytes: int = 2) -> tuple[int, int]:
    """Bytes of codes, and of scales and norms, that ``codec`` stores of one token's ``kv_heads`` vectors.

    ``exact_bytes`` are those of a number that is not compressed; they count as codes.
    """
    codes = scales = 0
    for row in codec.layout.values():
        size = row.nbytes(exact_bytes) * (1 if row.joint else kv_heads)
        if row.dtype is not None and mx.issubdtype(row.dtype, mx.floating):
            scales += size
        else:
            codes += size
    return codes, scales


@dataclass(frozen=True)
class Sample:
    """What calibration saw of one layer, for `Codec.fit`.

    Attributes
    ----------
    x : keys (after RoPE) or values ``[B, H, S, D]``, float32.
    queries : ``[B, Hq, S, D]`` float32, after RoPE, or None where the model does not show them.
    rope : the layer's rotary embedding, with which the keys' position can be undone, or None.
    seed : of everything random.
    """

    x: mx.array
    queries: mx.array | None = None
    rope: Rope | None = None
    seed: int = 0


class Codec(ABC):
    """What the cache and attention need to know of an algorithm. Shapes: x ``[B, H, S, D]``, q ``[B, Hq, L, D]``.

    A codec is a frozen dataclass. One that has to be fitted holds what it learned in fields that are arrays, with one
    entry per KV head where the algorithm says so; all other fields are plain numbers and words, so that
    `veloxlab.codecs.saving` can write them.

    Attributes
    ----------
    head_dim : D, the length of the vectors.
    heads_alike : whether it codes every KV head alike, so that some can be read without others.
    plan : code bits of each coordinate ``[D]``, where they differ; else empty.
    """

    head_dim: int
    heads_alike: ClassVar[bool] = False
    plan: tuple[int, ...] = ()

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """The arrays of a code by name: type, and numbers or words a vector."""

    @property
    def bits_per_value(self) -> float:
        """True stored bits per coordinate: codes, scales, norms and padding."""
        return 8 * sum(row.nbytes() for row in self.layout.values()) / self.head_dim

    @property
    @abstractmethod
    def shared_bytes(self) -> int:
        """Bytes of constant tables, held once per process for all layers that use an equal codec."""

    @property
    def online(self) -> bool:
        """Whether a cache is to `fit` this codec to the first tokens that it packs."""
        return False

    def blank(self, kv_heads: int) -> Self:
        """A codec as large as this one fitted to ``kv_heads`` heads, zeros in place of what is learned."""
        return self

    def fit(self, sample: Sample) -> Self:
        """Learn from what calibration saw; an algorithm that needs no calibration returns itself."""
        check_vectors(sample.x, self.head_dim)
        return self

    @abstractmethod
    def encode(self, x: mx.array, start: int = 0) -> Code:
        """Compress ``x`` ``[B, H, S, D]`` of any float dtype, whose first token is at position ``start``."""

    @abstractmethod
    def decode(self, code: Code, dtype: mx.Dtype | None = None) -> mx.array:
        """Reconstruct ``[B, H, S, D]`` in ``dtype``: float32 if None is given, but by `none` what came."""

    @abstractmethod
    def scores(self, q: mx.array, code: Code) -> mx.array:
        """``q · decode(code)ᵀ`` ``[B, Hq, L, S]``, float32, from the codes; query heads share KV heads in order."""

    @abstractmethod
    def mix(self, p: mx.array, code: Code) -> mx.array:
        """``p · decode(code)`` ``[B, Hq, L, D]``, float32, for weights ``p`` ``[B, Hq, L, S]``, read from the codes."""


def check_vectors(x: mx.array, head_dim: int) -> None:
    """Raise `InputError` unless ``x`` is ``[B, H, S, head_dim]``."""
    if x.ndim != 4 or x.shape[-1] != head_dim:
        raise InputError(
            f"This codec compresses heads of dimension {head_dim}, in arrays [batch, heads, tokens, {head_dim}], "
            f"and was given {list(x.shape)}: make a codec for that head dimension."
        )


LEAST_TOKENS = 16  # of a statistic of a layer: that of fewer says little, its own error a quarter of the spread


def check_sample(x: mx.array, what: str) -> None:
    """Raise `InputError`, of ``what`` is to be learned, if ``x`` ``[B, H, S, D]`` has too few tokens, or only one."""
    batch, _, tokens, _ = x.shape
    same = tokens > 0 and (x == x[:, :, :1]).all().item()
    if batch * tokens < LEAST_TOKENS or same:
        raise InputError(
            f"{what} {LEAST_TOKENS} different tokens or more to find, and the sample has {batch * tokens}"
            f"{', all the same' if same else ''}: calibrate on a longer text."
        )


def check_heads(fitted: int, given: int) -> None:
    """Raise `InputError` unless a codec fitted to ``fitted`` KV heads was given as many."""
    if fitted != given:
        raise InputError(
            f"This codec was fitted to {fitted} KV heads and was given {given}: calibrate it on the model, and use it "
            "in the layer, that it was fitted to."
        )


def not_fitted(method: str, options: str = "") -> InputError:
    """The error of a codec of ``method``, by its name, that saw nothing; ``options`` are of `veloxlab.calibrate`."""
    return InputError(
        f"{method} has to see activations before it can encode: make calibration = "
        f"vl.calibrate(model, tokenizer, {method.lower()!r}{options}), or call codec.fit(sample)."
    )


def unbiased_keys(role: str, options: Mapping[str, object]) -> dict[str, Any]:
    """``options``, with the unbiased scale for keys and the MSE scale for values, unless they say otherwise."""
    return {"scale": "unbiased" if role == "keys" else "mse", **options}


def per_kv_head(x: mx.array, kv_heads: int) -> mx.array:
    """``[B, Hq, L, D]`` to ``[B, H, Hq/H · L, D]``: the queries that read one KV head, together."""
    batch, heads, length, dim = x.shape
    return x.reshape(batch, kv_heads, heads // kv_heads * length, dim)


class TiledCodec(Codec):
    """Attention over codes, a tile of tokens at a time, for every codec that says how a tile expands.

    Vectors are coded in a space of the codec's own. There ``decode = from_codes(scale · expand)``, and the query is
    brought into that space once (`query_to_codes`), the mix of values out of it once.
    """

    @property
    def code_dim(self) -> int:
        """Dimension of the space of the codes: ``head_dim``, unless a subclass codes in another."""
        return self.head_dim

    @abstractmethod
    def expand(self, code: Code) -> mx.array:
        """Vectors in the space of the codes ``[B, H, S, D]``, before scaling, float32."""

    def scales(self, code: Code) -> mx.array | None:
        """What each expanded vector is to be multiplied with ``[B, H, S, 1]``, or None for 1."""
        return None

    def from_codes(self, y: mx.array) -> mx.array:
        """Bring vectors ``[B, H, S, D]`` out of the space of the codes; linear."""
        return y

    def query_to_codes(self, q: mx.array) -> mx.array:
        """Bring queries ``[B, H, L, D]`` into that space, so that ``q · from_codes(y) = query_to_codes(q) · y``."""
        return q

    def inner_products(self, q: mx.array) -> Callable[[Code], mx.array]:
        """How queries ``[B, H, L, D]`` in the space of the codes read a tile: from its code to ``[B, H, L, S]``.

        A codec that can do without expanding prepares its tables here, once for all tiles.
        """
        return lambda tile: q @ self.expand(tile).swapaxes(-1, -2)

    def reader(self, code: Code) -> Reader | None:
        """How a GPU kernel reads the code, in its own space: None, which is not at all, unless a subclass says how."""
        return None

    def decode(self, code: Code, dtype: mx.Dtype | None = None) -> mx.array:
        """Reconstruct ``[B, H, S, D]``; see `Codec.decode`."""
        y, scale = self.expand(code), self.scales(code)
        return self.from_codes(y if scale is None else y * scale).astype(dtype or mx.float32)

    def scores(self, q: mx.array, code: Code) -> mx.array:
        """``q · decode(code)ᵀ`` from the codes, a tile at a time; see `Codec.scores`."""
        batch, heads, length, _ = q.shape
        ours = self.query_to_codes(per_kv_head(q.astype(mx.float32), kv_heads_of(code)))
        read = self.inner_products(ours)
        parts: list[mx.array] = []
        for start in range(0, code.tokens, TILE):
            tile = _tile(code, start, after=parts[-1] if parts else None)
            scores, scale = read(tile), self.scales(tile)
            parts.append(scores if scale is None else scores * scale.swapaxes(-1, -2))
        joined = mx.concatenate(parts, axis=-1) if parts else mx.zeros((*ours.shape[:-1], 0))
        return joined.reshape(batch, heads, length, code.tokens)

    def mix(self, p: mx.array, code: Code) -> mx.array:
        """``p · decode(code)`` from the codes, a tile at a time; see `Codec.mix`."""
        batch, heads, length, _ = p.shape
        weights = per_kv_head(p.astype(mx.float32), kv_heads_of(code))
        total = mx.zeros((*weights.shape[:-1], self.code_dim))
        for start in range(0, code.tokens, TILE):
            tile = _tile(code, start, after=total if start else None)
            part, scale = weights[..., start : start + TILE], self.scales(tile)
            total = total + (part if scale is None else part * scale.swapaxes(-1, -2)) @ self.expand(tile)
        return self.from_codes(total).reshape(batch, heads, length, self.head_dim)


class RotatedSpace(TiledCodec):
    """A codec whose space of codes is a random rotation of the vectors: the same for all KV heads."""

    rotation: RotationName
    seed: int
    heads_alike: ClassVar[bool] = True

    @property
    def _rotation(self) -> Rotation:
        return make_rotation(self.rotation, self.head_dim, self.seed)

    @property
    def _signs(self) -> mx.array | None:
        """Signs of the rotation, if it is one that kernels know."""
        return self._rotation.signs if isinstance(self._rotation, SignedHadamard) else None

    def from_codes(self, y: mx.array) -> mx.array:
        """Rotate back."""
        return self._rotation.inverse(y)

    def query_to_codes(self, q: mx.array) -> mx.array:
        """Rotate."""
        return self._rotation.forward(q)


class RotatedCodec(RotatedSpace):
    """Rotate, quantize, scale: ``decode = rotate⁻¹(scale · levels)``.

    A subclass says how a rotated vector of root-mean-square 1 is quantized and what levels its codes stand for.
    """

    @abstractmethod
    def quantize(self, y: mx.array) -> tuple[dict[str, mx.array], mx.array]:
        """Packed arrays for rotated vectors ``y`` ``[B, H, S, D]`` of length √D, and the factor ``[B, H, S, 1]`` that
        their expansion is to be multiplied with, beside the vector's own root-mean-square.
        """

    @abstractmethod
    def levels(self, arrays: dict[str, mx.array]) -> mx.array:
        """Rotated vectors ``[B, H, S, D]`` before scaling, float32."""

    def _encoder(self) -> VectorKernel | None:
        """The kernel that does what `quantize` says, or None where there is none."""
        return None

    @property
    def _table(self) -> mx.array | None:
        """What each of the ``codes`` stands for ``[2**bits]``, or None where they are of no such kind."""
        return None

    def encode(self, x: mx.array, start: int = 0) -> Code:
        """Compress ``x`` ``[B, H, S, D]``, in one launch where there is a GPU and a kernel; see `Codec.encode`."""
        check_vectors(x, self.head_dim)
        return Code(computed(lambda _: self._encoder(), self._encode_by_graph, x), start)

    def decode(self, code: Code, dtype: mx.Dtype | None = None) -> mx.array:
        """Reconstruct ``[B, H, S, D]``, in one launch where there is a GPU and a table; see `Codec.decode`."""
        wanted = dtype or mx.float32
        if self._table is None:
            return super().decode(code, wanted)
        given = code.arrays["codes"], code.arrays["root_scale"]
        by_graph = partial(self._decode_by_graph, dtype=wanted)
        return computed(lambda _: _decoder(self, wanted), by_graph, *given)["out"]

    def _encode_by_graph(self, x: mx.array) -> dict[str, mx.array]:
        x = x.astype(mx.float32)
        rms = mx.linalg.norm(x, axis=-1, keepdims=True) / math.sqrt(self.head_dim)
        arrays, factor = self.quantize(self._rotation.forward(x / mx.where(rms == 0, 1.0, rms)))
        return arrays | {"root_scale": store_scale(rms * factor)}

    def _decode_by_graph(self, codes: mx.array, root_scale: mx.array, dtype: mx.Dtype) -> dict[str, mx.array]:
        return {"out": super().decode(Code({"codes": codes, "root_scale": root_scale}), dtype)}

    def expand(self, code: Code) -> mx.array:
        """Levels of the codes; see `TiledCodec.expand`."""
        return self.levels(code.arrays)

    def scales(self, code: Code) -> mx.array:
        """The stored scale; see `TiledCodec.scales`."""
        return load_scale(code.arrays["root_scale"])


@lru_cache
def _decoder(codec: RotatedCodec, dtype: mx.Dtype) -> VectorKernel | None:
    signs, table = codec._signs, codec._table
    return None if signs is None or table is None else decode_kernel(signs, table, dtype)


def fitted_online(codec: Codec, x: mx.array) -> Codec:
    """The codec, or, if it is `Codec.online`, one fitted to ``x`` ``[B, H, S, D]``, the first that it is to pack."""
    return codec.fit(Sample(x.astype(mx.float32))) if codec.online else codec


def kv_heads_of(code: Code) -> int:
    """KV heads of a code; an array may have something of all of them together."""
    return max(int(array.shape[1]) for array in code.arrays.values())


def _tile(code: Code, start: int, after: mx.array | None) -> Code:
    """The tile that begins at ``start``, to be read only once ``after`` is computed.

    Without that order MLX evaluates twenty branches of a graph abreast, and so expands twenty tiles at once.
    """
    tile = code[start : start + TILE]
    if after is None:
        return tile
    arrays = tile.arrays
    return Code(dict(zip(arrays, mx.depends(list(arrays.values()), [after]), strict=True)), tile.start)


def store_scale(scale: mx.array) -> mx.array:
    """Keep a positive scale as the float16 of its square root: 10 bits of precision from 4e-9 to 4e9.

    A float16 scale itself overflows past 65504, which float32 and bfloat16 models reach, and loses bits below 6e-5.
    """
    return mx.sqrt(scale).astype(mx.float16)


def load_scale(root: mx.array) -> mx.array:
    """Undo `store_scale`, in float32."""
    return mx.square(root.astype(mx.float32))
