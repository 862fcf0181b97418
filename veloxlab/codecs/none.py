"""`none`: the exact control. Keys and values are kept as they came, so every error it shows is a defect of ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from veloxlab.codecs.base import Code, Codec, check_vectors, per_kv_head
from veloxlab.codecs.method import Method, Role
from veloxlab.codecs.parts.packing import Layout, Row


@dataclass(frozen=True)
class Exact(Codec):
    """Vectors of ``head_dim`` coordinates, not compressed. ``bits`` is 16 or 32 and only says what a value weighs."""

    heads_alike: ClassVar[bool] = True
    head_dim: int
    bits: int = 16

    @property
    def layout(self) -> Layout:
        """The vectors as they came."""
        return {"values": Row(None, self.head_dim)}

    @property
    def bits_per_value(self) -> float:
        """The width of the model's own dtype."""
        return float(self.bits)

    @property
    def shared_bytes(self) -> int:
        """No tables."""
        return 0

    def encode(self, x: mx.array, start: int = 0) -> Code:
        """Keep ``x`` ``[B, H, S, D]``."""
        check_vectors(x, self.head_dim)
        return Code({"values": x}, start)

    def decode(self, code: Code, dtype: mx.Dtype | None = None) -> mx.array:
        """Give it back."""
        values = code.arrays["values"]
        return values if dtype is None else values.astype(dtype)

    def scores(self, q: mx.array, code: Code) -> mx.array:
        """``q · xᵀ`` ``[B, Hq, L, S]``."""
        x = code.arrays["values"].astype(mx.float32)
        grouped = per_kv_head(q.astype(mx.float32), x.shape[1]) @ x.swapaxes(-1, -2)
        return grouped.reshape(*q.shape[:-1], code.tokens)

    def mix(self, p: mx.array, code: Code) -> mx.array:
        """``p · x`` ``[B, Hq, L, D]``."""
        x = code.arrays["values"].astype(mx.float32)
        grouped = per_kv_head(p.astype(mx.float32), x.shape[1]) @ x
        return grouped.reshape(*p.shape[:-1], self.head_dim)


def build(head_dim: int, bits: int, role: Role, **options: object) -> Exact:
    """The exact codec; keys and values alike."""
    return Exact(head_dim, bits)


METHOD = Method(
    id="none",
    name="none (exact)",
    paper="the control",
    calibrated=False,
    bits=range(16, 33, 16),
    stored="the model's own keys and values",
    options=(),
    build=build,
    colour="#808890",
    mark="circle",
)
