"""The base classes of most algorithms: rotate, quantize, scale; and, more special, the nearest level of one table."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property, lru_cache, partial
from typing import ClassVar

import mlx.core as mx

from veloxlab.codecs.base import Code, Codec, check_vectors
from veloxlab.codecs.parts import scales
from veloxlab.codecs.parts.packing import Layout
from veloxlab.codecs.parts.rope import Start
from veloxlab.codecs.parts.scalar import ScalarQuantizer
from veloxlab.codecs.parts.transforms import Rotation, RotationName, SignedHadamard, make_rotation
from veloxlab.kernels import rotated
from veloxlab.kernels.checked import computed
from veloxlab.kernels.readers import TableReader
from veloxlab.kernels.vectors import VectorKernel


class RotatedSpace(Codec):
    """A codec in the space of a random rotation, the same for all KV heads.

    ``rotation`` is ``"hadamard"`` (signs, then Hadamard) or ``"haar"`` (uniform, dense), and ``seed`` is its seed.
    """

    rotation: RotationName
    seed: int
    heads_alike: ClassVar[bool] = True

    @cached_property
    def _rotation(self) -> Rotation:
        return make_rotation(self.rotation, self.head_dim, self.seed)

    @property
    def _signs(self) -> mx.array | None:
        return self._rotation.signs if isinstance(self._rotation, SignedHadamard) else None

    def _for_encoder(self, x: mx.array) -> mx.array:
        """The input of an encoder in one pass: rotated by a matrix product, unless the encoder rotates."""
        return self._rotation.forward(x.astype(mx.float32)) if self._signs is None else x

    def from_codes(self, y: mx.array) -> mx.array:
        return self._rotation.inverse(y)

    def query_to_codes(self, q: mx.array) -> mx.array:
        return self._rotation.forward(q)


class RotatedCodec(RotatedSpace):
    """Rotate, quantize, scale: ``decode = rotate⁻¹(scale · levels)``.

    A subclass defines `quantize` for a rotated vector of root-mean-square 1, and `expand` for the levels of its codes.
    For kernels ``_encoder`` is the kernel of `quantize`, and ``_table`` has the level of each code ``[2**bits]``.
    """

    @abstractmethod
    def quantize(self, y: mx.array) -> tuple[dict[str, mx.array], mx.array]:
        """Packed arrays of rotated ``[B, H, S, D]`` of length √D, and the factor ``[B, H, S, 1]`` of their levels."""

    @property
    def _encoder(self) -> VectorKernel | None:
        return None

    @property
    def _table(self) -> mx.array | None:
        return None

    def encode(self, x: mx.array, start: Start = 0) -> Code:
        check_vectors(x, self.head_dim)
        return Code(computed(lambda _: self._encoder, self._encode_by_graph, self._for_encoder(x)), start)

    def decode(self, code: Code, dtype: mx.Dtype | None = None) -> mx.array:
        wanted = dtype or mx.float32
        if self._table is None:
            return super().decode(code, wanted)
        by_graph = partial(self._decode_by_graph, dtype=wanted)
        given = code.arrays["codes"], code.arrays["root_scale"]
        # on a CPU `veloxlab.cache.expand` decodes codes of any layout
        return computed(lambda backend: backend.build and _decoder(self, wanted), by_graph, *given)["out"]

    def _encode_by_graph(self, x: mx.array) -> dict[str, mx.array]:
        rms = scales.root_mean_square(x)
        y = scales.over(x, rms)
        arrays, factor = self.quantize(y if self._signs is None else self._rotation.forward(y))
        return arrays | {"root_scale": scales.store_scale(rms * factor)}

    def _decode_by_graph(self, codes: mx.array, root_scale: mx.array, dtype: mx.Dtype) -> dict[str, mx.array]:
        return {"out": super().decode(Code({"codes": codes, "root_scale": root_scale}), dtype)}


@lru_cache
def _decoder(codec: RotatedCodec, dtype: mx.Dtype) -> VectorKernel | None:
    signs, table = codec._signs, codec._table
    return None if signs is None or table is None else rotated.decode_kernel(signs, table, dtype)


class TableCodec(RotatedCodec):
    """Each rotated coordinate becomes the nearest level in the table of ``_quantizer``; ``scale`` is a name."""

    bits: int
    scale: scales.ScaleName

    @property
    @abstractmethod
    def _quantizer(self) -> ScalarQuantizer: ...

    @property
    def layout(self) -> Layout:
        return self._quantizer.layout | {"root_scale": scales.SCALE}

    @cached_property
    def _encoder(self) -> VectorKernel | None:
        table = self._quantizer
        nearest = rotated.nearest_level(table.boundaries, table.levels, self.bits)
        return rotated.encode_kernel(self.head_dim, self._signs, nearest, self.scale, table.fields)

    def quantize(self, y: mx.array) -> tuple[dict[str, mx.array], mx.array]:
        codes = self._quantizer.assign(y)
        return self._quantizer.pack(codes), scales.scale_factor(self.scale, y, self._quantizer.levels_of(codes))

    def expand(self, code: Code) -> mx.array:
        return self._quantizer.expand(code.arrays)

    def reader(self, code: Code) -> TableReader:
        rows, *fine = (code.arrays[name] for name in self._quantizer.fields)
        return TableReader(self.head_dim, rows, code.arrays["root_scale"], self._signs, *self._quantizer.paired, *fine)
