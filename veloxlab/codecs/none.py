"""`none`: the exact control. Keys and values are stored unchanged, so any error that it shows is a defect of ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from veloxlab.codecs.base import Code, Codec, check_vectors
from veloxlab.codecs.method import Method
from veloxlab.codecs.parts.packing import Layout, Row
from veloxlab.codecs.parts.rope import Start


@dataclass(frozen=True)
class Exact(Codec):
    """Uncompressed vectors of ``head_dim`` coordinates. ``bits``, 16 or 32, is only the size of a value."""

    heads_alike: ClassVar[bool] = True
    head_dim: int
    bits: int = 16

    @property
    def layout(self) -> Layout:
        return {"values": Row(None, self.head_dim)}

    @property
    def bits_per_value(self) -> float:
        return float(self.bits)

    def encode(self, x: mx.array, start: Start = 0) -> Code:
        check_vectors(x, self.head_dim)
        return Code({"values": x}, start)

    def expand(self, code: Code) -> mx.array:
        return code.arrays["values"].astype(mx.float32)

    def decode(self, code: Code, dtype: mx.Dtype | None = None) -> mx.array:
        return code.arrays["values"].astype(dtype or code.arrays["values"].dtype)


METHOD = Method(
    id="none",
    name="none (exact)",
    paper="the control",
    bits=range(16, 33, 16),
    stored="the model's own keys and values",
    build=lambda head_dim, bits, tensor: Exact(head_dim, bits),
    colour="#808890",
    mark="circle",
)
