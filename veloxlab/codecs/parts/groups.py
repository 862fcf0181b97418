"""Uniform steps from the least to the largest number of a group of coordinates, as QJL and KIVI store values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import mlx.core as mx

from veloxlab.checks import check_fields, choice, whole
from veloxlab.codecs.parts.packing import Layout, Row, pack, packed, unpack_to_bytes
from veloxlab.kernels.encode import group_kernel
from veloxlab.kernels.vectors import VectorKernel

GroupLevels = Literal["centres", "ends"]


@dataclass(frozen=True)
class GroupQuantizer:
    """Groups of neighbouring coordinates, each cut into ``2**bits`` equal steps from its least to its largest number.

    ``"centres"`` decodes a step to its middle; ``"ends"`` puts the outer levels on the least and the largest number, as
    KIVI and QJL do. A group keeps two 16-bit numbers. The last one is shorter where ``group`` does not divide ``dim``.
    """

    dim: int
    bits: int
    group: int = 32
    levels: GroupLevels = "centres"

    def __post_init__(self) -> None:
        check_fields(self, levels=choice(*get_args(GroupLevels)), group=whole(1))

    @property
    def groups(self) -> int:
        """Groups of one vector."""
        return -(-self.dim // self.group)

    @property
    def layout(self) -> Layout:
        """What one vector takes: whole words of codes, and two 16-bit numbers a group."""
        number = Row(mx.float16, self.groups)
        return {"codes": packed(self.dim, self.bits), "half_step": number, "least": number}

    def encode(self, x: mx.array) -> dict[str, mx.array]:
        """Give ``codes`` ``[..., words]`` and roots ``half_step``, ``least`` ``[..., groups]`` of ``[..., dim]``."""
        x = self._grouped(x.astype(mx.float32))
        least, largest = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
        # roots, as for scales: float16 holds them for any |x| up to 4e9. The codes are of what is kept of them
        root_least = (mx.sign(least) * mx.sqrt(mx.abs(least))).astype(mx.float16)
        least = _signed_square(root_least)
        root_half = mx.sqrt(mx.maximum(largest - least, 0.0) / (2 * self._steps)).astype(mx.float16)
        step = 2 * _signed_square(root_half)
        codes = (x - least) / mx.where(step == 0, 1.0, step) - self._shift
        codes = self._flat(mx.clip(mx.round(codes), 0, 2**self.bits - 1))
        return {"codes": pack(codes, self.bits), "half_step": root_half[..., 0], "least": root_least[..., 0]}

    @property
    def kernel(self) -> VectorKernel | None:
        """The kernel that does what `encode` does."""
        return group_kernel(self.dim, self.bits, self.group, self._steps, self._shift)

    def expand(self, arrays: dict[str, mx.array]) -> mx.array:
        """Decode to ``[..., dim]``, float32."""
        codes = self._grouped(unpack_to_bytes(arrays["codes"], self.bits, self.dim).astype(mx.float32))
        half_step, least = (_signed_square(arrays[name])[..., None] for name in ("half_step", "least"))
        return self._flat(least + (codes + self._shift) * (2 * half_step))

    @property
    def _steps(self) -> int:
        return (1 << self.bits) - int(self.levels == "ends")

    @property
    def _shift(self) -> float:
        return 0.5 if self.levels == "centres" else 0.0

    def _flat(self, x: mx.array) -> mx.array:
        """``[..., groups, group]`` to ``[..., dim]``."""
        return mx.flatten(x, -2)[..., : self.dim]

    def _grouped(self, x: mx.array) -> mx.array:
        """``[..., dim]`` to ``[..., groups, group]``; the last group is filled up with its last coordinate."""
        missing = self.groups * self.group - self.dim
        if missing:
            x = mx.concatenate([x, mx.repeat(x[..., -1:], missing, axis=-1)], axis=-1)
        return mx.unflatten(x, -1, (self.groups, self.group))


def _signed_square(root: mx.array) -> mx.array:
    root = root.astype(mx.float32)
    return root * mx.abs(root)
