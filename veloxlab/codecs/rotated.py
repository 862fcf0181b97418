"""The shape that most algorithms share: rotate, quantize, scale."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property, lru_cache, partial
from typing import ClassVar

import mlx.core as mx

from veloxlab.codecs.base import Code, Codec, check_vectors
from veloxlab.codecs.parts.scales import over, root_mean_square, store_scale
from veloxlab.codecs.parts.transforms import Rotation, RotationName, SignedHadamard, make_rotation
from veloxlab.kernels.checked import computed
from veloxlab.kernels.rotated import decode_kernel
from veloxlab.kernels.vectors import VectorKernel


class RotatedSpace(Codec):
    """A codec whose space of codes is a random rotation of the vectors: the same for all KV heads.

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

    @property
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
        return Code(computed(lambda _: self._encoder, self._encode_by_graph, x), start)

    def decode(self, code: Code, dtype: mx.Dtype | None = None) -> mx.array:
        """Reconstruct ``[B, H, S, D]``, in one launch where there is a GPU and a table; see `Codec.decode`."""
        wanted = dtype or mx.float32
        if self._table is None:
            return super().decode(code, wanted)
        by_graph = partial(self._decode_by_graph, dtype=wanted)
        given = code.arrays["codes"], code.arrays["root_scale"]
        return computed(lambda _: _decoder(self, wanted), by_graph, *given)["out"]

    def _encode_by_graph(self, x: mx.array) -> dict[str, mx.array]:
        rms = root_mean_square(x)
        arrays, factor = self.quantize(self._rotation.forward(over(x, rms)))
        return arrays | {"root_scale": store_scale(rms * factor)}

    def _decode_by_graph(self, codes: mx.array, root_scale: mx.array, dtype: mx.Dtype) -> dict[str, mx.array]:
        return {"out": super().decode(Code({"codes": codes, "root_scale": root_scale}), dtype)}

    def expand(self, code: Code) -> mx.array:
        """Levels of the codes; see `Codec.expand`."""
        return self.levels(code.arrays)


@lru_cache
def _decoder(codec: RotatedCodec, dtype: mx.Dtype) -> VectorKernel | None:
    signs, table = codec._signs, codec._table
    return None if signs is None or table is None else decode_kernel(signs, table, dtype)
